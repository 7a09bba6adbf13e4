"""Requests of every kind to one server, from a seed; some are cancelled, some malformed."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from support.attacks import HANG_S, MAX_ERROR_BYTES
from support.scripted_model import TOOLS, trigger
from support.server_process import LlmkitServer, wait_for

CANCELLED = 0.3
MALFORMED = 0.1
SOCKETS = 0.1
_WORDS = [
    "hello",
    "the quick brown fox",
    "ünïcödé ✓",
    "a\u0000b",
    "one two three four five six seven eight nine ten",
]
_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue", "red"]}},
    "required": ["colour"],
}


@dataclass
class Tally:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    done: int = 0
    cancelled: int = 0
    wrong: list[str] = field(default_factory=list)  # answers that should not be


@dataclass(frozen=True)
class Resources:
    """What the two processes hold: open files and resident bytes."""

    api_files: int
    engine_files: int
    api_bytes: int
    engine_bytes: int

    @staticmethod
    def of(server: LlmkitServer) -> Resources:
        api = psutil.Process(server.process.pid)
        engine = server.engine()
        return Resources(
            api.num_fds(), engine.num_fds(), api.memory_info().rss, engine.memory_info().rss
        )


def right(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body that must be answered with 200."""
    text = rng.choice(
        [*_WORDS, trigger("call"), trigger("json"), trigger("two"), trigger("plain")]
    ) + rng.choice(["", " x"])
    say = [{"role": "user", "content": text}]
    if rng.random() < 0.3:
        say = [
            *say,
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": rng.choice(_WORDS)},
        ]
    tokens = rng.choice([1, 4, 16, 40])
    stream = rng.random() < 0.5
    common: dict[str, Any] = {"model": "said", "max_tokens": tokens, "stream": stream}
    sampling = rng.choice(
        [
            {},
            {"temperature": 0},
            {"temperature": 1.5, "top_p": 0.9, "seed": rng.randrange(9)},
            {"top_k": 5},
        ]
    )
    match rng.randrange(12):
        case 0:
            more = rng.choice(
                [
                    {"n": 3},
                    {"logprobs": 3},
                    {"echo": True, "logprobs": 1},
                    {"stop": ["e", "x"]},
                    {"min_tokens": 1},
                ]
            )
            return "/v1/completions", common | sampling | more | {"prompt": text}
        case 1:
            prompt = rng.choice([[text, "y"], [5, 6, 7], [[5], [6, 7]]])
            return "/v1/completions", common | sampling | {
                "prompt": prompt,
                "presence_penalty": 0.5,
                "logit_bias": {"9": -5},
            }
        case 2:
            more = rng.choice(
                [
                    {"n": 2},
                    {"logprobs": True, "top_logprobs": 2},
                    {"stop": "a"},
                    {"repetition_penalty": 1.2},
                ]
            )
            return "/v1/chat/completions", common | sampling | more | {"messages": say}
        case 3:
            choice = rng.choice(["auto", "none", "required"])
            return "/v1/chat/completions", common | {
                "messages": say,
                "tools": TOOLS,
                "tool_choice": choice,
            }
        case 4:
            form = rng.choice(
                [
                    {"type": "json_object"},
                    {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
                ]
            )
            return "/v1/chat/completions", common | {"messages": say, "response_format": form}
        case 5:
            tool = {"name": "get_weather", "input_schema": {"type": "object"}}
            return "/v1/messages", common | {
                "messages": say,
                "system": "be brief",
                "tools": [tool][: rng.randrange(2)],
            }
        case 6:
            body = {"model": "said", "input": text, "max_output_tokens": tokens, "stream": stream}
            return "/v1/responses", body
        case 7:
            return _of_ollama(rng, text, say, tokens, stream)
        case 8:
            parameters = {"max_new_tokens": tokens, "details": rng.random() < 0.5}
            path = rng.choice(["/generate", "/generate_stream", "/"])
            return path, {"inputs": text, "parameters": parameters}
        case 9:
            return _of_scores(rng, text)
        case 10:
            input_ = [{"role": "user", "content": text}]
            fields = {"model": "said", "max_output_tokens": tokens, "stream": stream}
            return "/v1/responses", fields | {"input": input_, "store": True}
        case _:
            return rng.choice(
                [
                    ("/tokenize", {"prompt": text}),
                    ("/tokenize", {"messages": say}),
                    ("/detokenize", {"tokens": [5, 6]}),
                    ("/v1/messages/count_tokens", {"model": "said", "messages": say}),
                ]
            )


def _of_scores(rng: random.Random, text: str) -> tuple[str, dict[str, Any]]:
    """A path and a body of the APIs that embed, score and rerank."""
    documents = rng.sample(_WORDS, 3)
    return rng.choice(
        [
            ("/v1/embeddings", {"model": "said", "input": [text, "y"]}),
            ("/v1/rerank", {"model": "said", "query": text, "documents": documents, "top_n": 2}),
            ("/score", {"model": "said", "text_1": text, "text_2": documents}),
        ]
    )


def _of_ollama(
    rng: random.Random, text: str, say: list[dict[str, str]], tokens: int, stream: bool
) -> tuple[str, dict[str, Any]]:
    """A path and a body of Ollama's API."""
    options = {"num_predict": tokens, "num_ctx": rng.choice([1024, 2048])}
    common = {"model": rng.choice(["said", "said:latest"]), "stream": stream, "options": options}
    return rng.choice(
        [
            ("/api/chat", common | {"messages": say}),
            ("/api/chat", common | {"messages": say, "tools": TOOLS[: rng.randrange(3)]}),
            ("/api/chat", common | {"messages": say, "format": _SCHEMA}),
            ("/api/generate", common | {"prompt": text, "raw": rng.random() < 0.5}),
            ("/api/embed", {"model": "said", "input": [text, "y"]}),
            ("/api/show", {"model": "said"}),
        ]
    )


def malformed(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A path, a body and headers that must be answered with 400, 404 or 415."""
    path, body = right(rng)
    data = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    match rng.randrange(6):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            data = json.dumps(body | {"model": "unheard"}).encode()
        case 2:
            data = json.dumps([body]).encode()
        case 3:
            headers = {"content-type": "text/plain"}
        case 4:
            wrong = {"prompt": {}, "messages": 5, "input": [5], "tokens": ["x"]}
            wrong |= {"inputs": 5, "model": 2**64}
            data = json.dumps(
                {name: wrong.get(name, value) for name, value in ({"model": ""} | body).items()}
            ).encode()
        case _:
            data = b"\xff" + data
    return path, data, headers


async def soak(url: str, count: int, seed: int, at_once: int = 32, say: str = "") -> Tally:
    """Send `count` requests, `at_once` at a time. A request that hangs raises TimeoutError."""
    tally = Tally()
    began = time.monotonic()
    todo = iter(range(count))

    async def worker(session: aiohttp.ClientSession) -> None:
        for index in todo:
            rng = random.Random(f"{seed}/{index}")
            async with asyncio.timeout(HANG_S * 5):
                await _one(session, rng, tally)
            tally.done += 1

    async def progress() -> None:
        while True:
            spent = time.monotonic() - began
            sys.stderr.write(
                f"\r{say}{tally.done}/{count} requests, "
                f"{tally.cancelled} cancelled, {spent:.0f} s, "
                f"{tally.done / max(spent, 1):.0f}/s, wrong: {len(tally.wrong)}  "
            )
            sys.stderr.flush()
            await asyncio.sleep(1)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        url, connector=connector, timeout=aiohttp.ClientTimeout()
    ) as session:
        showing = asyncio.create_task(progress())
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker(session))
        showing.cancel()
    sys.stderr.write("\n")
    return tally


async def _one(session: aiohttp.ClientSession, rng: random.Random, tally: Tally) -> None:
    if rng.random() < SOCKETS:
        await _use_socket(session, rng, tally)
        return
    if rng.random() < MALFORMED:
        path, data, headers = malformed(rng)
        async with session.post(path, data=data, headers=headers) as answer:
            _judge(tally, path, data, answer.status, await answer.read(), (400, 404, 415))
        return
    path, body = right(rng)
    if rng.random() >= CANCELLED / (1 - MALFORMED):
        async with session.post(path, json=body) as answer:
            _judge(
                tally, path, json.dumps(body).encode(), answer.status, await answer.read(), (200,)
            )
        return
    body |= (
        {"max_output_tokens" if "input" in body else "max_tokens": 400}
        if "max_tokens" in body or "input" in body
        else {}
    )
    tally.cancelled += 1
    try:  # in the queue, in the prompt or in the middle of the answer
        async with (
            asyncio.timeout(rng.choice([0, 0.001, 0.01, 0.1, 0.5])),
            session.post(path, json=body) as answer,
        ):
            tally.statuses[answer.status] += 1
            for _ in range(rng.randrange(5)):
                await answer.content.readany()
            answer.close()
    except TimeoutError:
        pass


async def _use_socket(session: aiohttp.ClientSession, rng: random.Random, tally: Tally) -> None:
    """Send some requests over a WebSocket, and read all answers or leave before their end."""
    path = rng.choice(["/v1/stream", "/v1/responses"])
    field, last = ("prompt", {"done", "error"})
    if path == "/v1/responses":
        field, last = ("input", {"response.completed", "response.incomplete", "error"})
    leaves = rng.random() < CANCELLED
    async with session.ws_connect(path) as connection:
        tally.statuses[101] += 1
        for _ in range(rng.randint(1, 3)):
            limit = "max_output_tokens" if field == "input" else "max_tokens"
            body: dict[str, Any] = {"model": "said", field: rng.choice(_WORDS), limit: 16}
            if field == "input":
                body["type"] = "response.create"
            is_wrong = rng.random() < MALFORMED
            if is_wrong:
                body |= rng.choice([{"model": "unheard"}, {field: {}}, {limit: -7}])
            await connection.send_str(json.dumps(body))
            if leaves:
                continue
            kind = ""
            while kind not in last:
                message = await connection.receive_json()
                kind = message.get("type", "")
            if (kind == "error") != is_wrong:
                tally.wrong.append(f"{path} {body}: {message}")
        if leaves:
            tally.cancelled += 1
            await asyncio.sleep(rng.choice([0, 0.01, 0.1]))


def _judge(
    tally: Tally, path: str, data: bytes, status: int, got: bytes, expected: tuple[int, ...]
) -> None:
    tally.statuses[status] += 1
    broken = (
        (b'"error":{' in got or b'"error":"' in got)
        if status == 200
        else len(got) > MAX_ERROR_BYTES
    )
    if status not in expected or broken:
        tally.wrong.append(f"{path} {data[:300]!r}: {status} {got[:300]!r}")


def settle(server: LlmkitServer) -> None:
    """Wait until nothing runs or waits, and no connection of a client is left."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    wait_for(lambda: not any(server.metric(name) for name in names), HANG_S)
    api = psutil.Process(server.process.pid)
    wait_for(
        lambda: not [c for c in api.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED],
        HANG_S,
    )
