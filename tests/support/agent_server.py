"""A fake server of an agent's model: scripted answers at known times, and a word for a token."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

FIRST_ANSWER_ID = 1000  # token ids of answers to completions count up from here


@dataclass(frozen=True)
class Piece:
    """One event of an answer, sent `after_s` seconds after the one before it."""

    delta: Mapping[str, Any]
    after_s: float = 0.0


@dataclass
class AgentServer:
    """Answers chats with the pieces of `script` and completions with counted token ids.

    Each message's text is split into words, each of which is a token. `cached` are the tokens that
    it says to have found in its cache.
    """

    script: Callable[[Mapping[str, Any]], Sequence[Piece]] = lambda body: [
        Piece({"content": f"word{index} "}) for index in range(body["max_tokens"])
    ]
    cached: Callable[[Mapping[str, Any]], int | None] = lambda body: 0
    refuses: Callable[[Mapping[str, Any]], bool] = lambda body: False
    tokenizes: bool = True
    together: int = 1  # answers wait until so many requests have been in flight at once
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)  # in the order of arrival
    ended: list[dict[str, Any]] = field(default_factory=list)  # in the order of their last event
    in_flight: int = 0
    most_in_flight: int = 0
    words: dict[str, int] = field(default_factory=dict)  # the token of each word

    def tokens(self, body: Mapping[str, Any]) -> list[int]:
        """The prompt's tokens."""
        if "prompt" in body:
            return list(body["prompt"])
        text = json.dumps(body.get("tools") or [])
        for message in body["messages"]:
            calls = json.dumps(message.get("tool_calls") or [])
            text += f" {message['role']} {message['content']} {calls}"
        return [self.words.setdefault(word, len(self.words)) for word in text.split()]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.refuses(body):
                return web.json_response({"error": {"message": "no such turn"}}, status=400)
            for _ in range(1000):
                if self.most_in_flight >= self.together:
                    break
                await asyncio.sleep(0.01)
            return await self._stream(request, body)
        finally:
            self.in_flight -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        pieces = self.script(body)
        for index, piece in enumerate(pieces):
            await asyncio.sleep(piece.after_s)
            choice: dict[str, Any] = {"index": 0, "token_ids": [FIRST_ANSWER_ID + index]}
            if "prompt" in body:
                choice |= {"text": piece.delta["content"]}
            else:
                choice |= {"delta": piece.delta}
            choice["finish_reason"] = "length" if index + 1 == len(pieces) else None
            await self._send(response, {"choices": [choice]})
        usage: dict[str, Any] = {
            "prompt_tokens": len(self.tokens(body)),
            "completion_tokens": len(pieces),
        }
        cached = self.cached(body)
        if cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        self.ended.append(body)
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, document: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(document)}\n\n".encode())

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        if not self.tokenizes:
            return web.Response(status=404)
        return web.json_response({"tokens": self.tokens(await request.json())})

    async def models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "agent", "max_model_len": 4096}]})

    @contextmanager
    def running(self) -> Iterator[AgentServer]:
        """Serve on another thread."""
        loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def start() -> None:
            app = web.Application(client_max_size=1 << 26)
            app.router.add_post("/v1/completions", self.answer)
            app.router.add_post("/v1/chat/completions", self.answer)
            app.router.add_post("/tokenize", self.tokenize)
            app.router.add_get("/v1/models", self.models)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = "http://{}:{}".format(*runner.addresses[0][:2])
            ready.set()

        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        asyncio.run_coroutine_threadsafe(start(), loop)
        assert ready.wait(60)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
