"""Asks a tier all prompts over the OpenAI API, and the large tier what it thinks of other answers.

The signals are computed from the same log probabilities as in a route.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from llmkit.bench.answer_stream import server_error_message
from llmkit.bench.load_client import READ_TIMEOUT_S, Server, open_session, post_json
from llmkit.bench.routing.route_prompts import RoutePrompt
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress
from llmkit.runtime.server.tiers.signals import TOP_LOGPROBS, AnswerSignals

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TierReply:
    """A tier's answer to one prompt."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    mean_logprob: float  # of its tokens under the tier itself, in nats
    first: dict[str, float] | None  # signals of its first tokens; None: without log probabilities
    whole: dict[str, float] | None  # signals of all its tokens


class TierClient:
    """One tier, whose server is running."""

    def __init__(self, server: Server, concurrency: int, progress: Progress) -> None:
        self._server = server
        self._concurrency = concurrency
        self._progress = progress

    def replies(
        self, prompts: Sequence[RoutePrompt], max_tokens: int, first_tokens: int
    ) -> list[TierReply]:
        """Greedy answers. Raises InputError for an error of the server."""

        async def ask(session: aiohttp.ClientSession, prompt: RoutePrompt) -> TierReply:
            fields = {
                "messages": list(prompt.messages),
                "max_tokens": max_tokens,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": TOP_LOGPROBS,
            }
            document = await self._post(session, "/v1/chat/completions", fields)
            return _reply(document, first_tokens)

        return self._run(f"answers of {self._server.model}", ask, prompts)

    def mean_logprobs(
        self, prompts: Sequence[RoutePrompt], answers: Sequence[str]
    ) -> list[float] | None:
        """The mean log probability of each answer's tokens under this tier, in nats.

        None for a server without /tokenize or `prompt_logprobs`.
        """

        async def score(
            session: aiohttp.ClientSession, pair: tuple[RoutePrompt, str]
        ) -> float | None:
            prompt, answer = pair
            try:
                head = await self._tokens(session, {"messages": list(prompt.messages)})
                tail = await self._tokens(session, {"prompt": answer, "add_special_tokens": False})
                fields = {
                    "prompt": head + tail,
                    "max_tokens": 1,
                    "temperature": 0,
                    "prompt_logprobs": 0,
                }
                document = await self._post(session, "/v1/completions", fields)
                entries = document["choices"][0]["prompt_logprobs"][len(head) :]
                values = [
                    float(entry[str(token)]["logprob"])
                    for entry, token in zip(entries, tail, strict=True)
                ]
            except (InputError, KeyError, TypeError, ValueError):
                return None
            return sum(values) / len(values) if values else -math.inf

        pairs = list(zip(prompts, answers, strict=True))
        scores = self._run(f"likelihoods under {self._server.model}", score, pairs)
        known = [value for value in scores if value is not None]
        return known if len(known) == len(scores) else None

    def embeddings(self, texts: Sequence[str]) -> list[list[float]] | None:
        """Embeddings of texts; None for a server without them."""

        async def embed(session: aiohttp.ClientSession, text: str) -> list[float] | None:
            try:
                fields = {"input": text or " ", "encoding_format": "float"}
                document = await self._post(session, "/v1/embeddings", fields)
                return [float(value) for value in document["data"][0]["embedding"]]
            except (InputError, KeyError, TypeError, ValueError, IndexError):
                return None

        vectors = self._run(f"embeddings of {self._server.model}", embed, texts)
        known = [vector for vector in vectors if vector is not None]
        return known if len(known) == len(vectors) else None

    async def _tokens(self, session: aiohttp.ClientSession, fields: dict[str, Any]) -> list[int]:
        document = await self._post(session, "/tokenize", fields)
        return [int(token) for token in document["tokens"]]

    async def _post(
        self, session: aiohttp.ClientSession, path: str, fields: dict[str, Any]
    ) -> dict[str, Any]:
        url = f"{self._server.url}{path}"
        status, content = await post_json(session, self._server, path, fields)
        if status != 200:
            raise InputError(f"{url} answered HTTP {status}: {server_error_message(content)}")
        document = json.loads(content)
        if not isinstance(document, dict):
            raise InputError(f"{url} answered no JSON object")
        return document

    def _run(
        self,
        title: str,
        ask: Callable[[aiohttp.ClientSession, Any], Awaitable[_Result]],
        items: Sequence[Any],
    ) -> list[_Result]:
        """The results for all items, some at a time, in their order."""

        async def run() -> list[_Result]:
            limit = asyncio.Semaphore(self._concurrency)
            self._progress.start(title, len(items), "prompts")
            async with open_session(READ_TIMEOUT_S) as session:

                async def one(item: Any) -> _Result:
                    async with limit:
                        result = await ask(session, item)
                    self._progress.advance()
                    return result

                results = await asyncio.gather(*map(one, items))
            self._progress.finish()
            return results

        return asyncio.run(run())


def _reply(document: dict[str, Any], first_tokens: int) -> TierReply:
    """The reply in a chat completion. Raises InputError for another document."""
    try:
        choice = document["choices"][0]
        text = str(choice["message"]["content"] or "")
        usage = document["usage"]
        prompt_tokens, completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        entries = (choice.get("logprobs") or {}).get("content") or []
        first, whole = AnswerSignals(), AnswerSignals()
        total = 0.0
        for index, entry in enumerate(entries):
            logprob = float(entry["logprob"])
            top = [float(other["logprob"]) for other in entry["top_logprobs"]]
            total += logprob
            whole.add(logprob, top)
            if index < first_tokens:
                first.add(logprob, top)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"an answer is no chat completion ({type(error).__name__}: {error})"
        ) from None
    mean = total / len(entries) if entries else -math.inf
    return TierReply(text, prompt_tokens, completion_tokens, mean, first.values(), whole.values())
