"""The load client: streams `/v1/completions` of any OpenAI-compatible server and writes down when bytes arrive.

While the clock runs, a read costs one list append; requests are encoded before and answers parsed after, so that the
client takes as little as it can of the cores it may share with the server.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from llmkit.bench.metrics import RequestTimeline, Run
from llmkit.bench.sse import EventParser
from llmkit.bench.workload import WorkloadRequest, chains
from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.runtime.channel import API_KEY_VARIABLE

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 600.0  # a request that brings nothing for so long has failed
_ERROR_TEXT = 300  # characters kept of what a server says went wrong


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server: its address without `/v1`, and what it says of its model."""

    url: str
    model: str
    root: str | None = None  # where the model comes from, where the server says so
    context_tokens: int | None = None


@dataclass
class Trace:
    """What the network saw of one request. Times are `time.perf_counter()` seconds."""

    sent_s: float = 0.0
    status: int = 0
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None
    late_s: float = 0.0  # after its time, where it has one


def base_url(url: str) -> str:
    """The address without a trailing `/v1` or slash."""
    return url.rstrip("/").removesuffix("/v1")


def find_server(url: str, model: str | None = None) -> Server:
    """Ask `GET /v1/models` what is served; `model` picks one by name, else the first is taken.

    Raises ShortageError when nobody answers (with the errno), InputError for an answer that is no model list.
    """
    return asyncio.run(_find_server(base_url(url), model))


def run_load(server: Server, requests: Sequence[WorkloadRequest], clients: int) -> Run:
    """Send the requests, `clients` at a time, each client its next when its last is answered and its time has come."""
    bodies = [_body(server, request) for request in requests]
    wall_s, client_s, traces = asyncio.run(_run(server, requests, bodies, clients))
    timelines = [read_trace(trace, request) for trace, request in zip(traces, requests, strict=True)]
    return Run(wall_s, timelines, client_s)


def read_trace(trace: Trace, request: WorkloadRequest) -> RequestTimeline:
    """What a request's network trace says: arrival times of its tokens, its usage, or why it failed."""
    error, token_ids, done = trace.error, 0, False
    arrivals: list[float] = []
    ended: list[float] = []
    usage: dict[str, Any] = {}
    if not error and trace.status != 200:
        error = f"HTTP {trace.status}: {error_text(b''.join(data for _, data in trace.reads))}"
    for arrived, data in _events(trace.reads) if not error else ():
        if data.strip() == "[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
            if event.get("error"):
                error = f"the stream broke off: {error_text(data.encode())}"
                break
            usage = event["usage"] if isinstance(event.get("usage"), dict) else usage
            for choice in event.get("choices") or ():
                token_ids += len(choice.get("token_ids") or ())
                # The last message may only say why the answer ended; any other stands for tokens, text or not.
                if choice.get("text") or choice.get("token_ids") or not choice.get("finish_reason"):
                    arrivals.append(arrived)
                else:
                    ended = [arrived]
        except (ValueError, AttributeError, TypeError, RecursionError):
            error = f"an event is not a completion: {_clean(data)}"
            break
    output_tokens = _count(usage, "completion_tokens") or token_ids or len(arrivals)
    if len(arrivals) < output_tokens:
        arrivals += ended  # it did bring a token, one without text
    if not error and not done:
        error = "the stream ended without [DONE]"
    if not error and (output_tokens != request.max_tokens or not arrivals):
        error = f"{output_tokens} tokens came, {request.max_tokens} were asked for with ignore_eos"
    return RequestTimeline(
        request.id,
        trace.sent_s,
        tuple(arrivals),
        _count(usage, "prompt_tokens") or len(request.prompt),
        _count(usage.get("prompt_tokens_details"), "cached_tokens"),
        output_tokens,
        error,
        trace.late_s,
    )


def _events(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """Each event's data with the time of the read that completed it."""
    parser = EventParser()
    for arrived, read in reads:
        for data in parser.feed(read):
            yield arrived, data
    for data in parser.close():
        yield reads[-1][0], data


def _count(usage: Any, name: str) -> int:
    """A server's count, 0 where it gives none."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else 0


def _body(server: Server, request: WorkloadRequest) -> bytes:
    fields = {
        "model": server.model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


def open_session(silence_s: float) -> aiohttp.ClientSession:
    """Connections to servers, with the key of the environment; a request that is silent for so long has failed."""
    key = os.environ.get(API_KEY_VARIABLE)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    # A connection for each request: a server may close an idle one just as the next request goes out.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
    return aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout)


async def _run(
    server: Server, requests: Sequence[WorkloadRequest], bodies: Sequence[bytes], clients: int
) -> tuple[float, float, list[Trace]]:
    """Wall time, this thread's processor time, both in seconds, and what became of each request."""
    traces = [Trace() for _ in requests]
    unsent = iter(zip(traces, bodies, strict=True))
    conversations = [[(request, *next(unsent)) for request in chain] for chain in chains(requests)]
    waiting = iter(conversations)

    async def client(session: aiohttp.ClientSession, started: float) -> None:
        for conversation in waiting:
            for request, trace, body in conversation:
                if request.at_s is not None:
                    due = started + request.at_s
                    await asyncio.sleep(due - time.perf_counter())
                    trace.late_s = time.perf_counter() - due
                await _send(session, f"{server.url}/v1/completions", body, trace)

    async with open_session(SILENCE_TIMEOUT_S) as session:
        started, worked = time.perf_counter(), time.thread_time()
        await asyncio.gather(*(client(session, started) for _ in range(min(clients, len(conversations)))))
        return time.perf_counter() - started, time.thread_time() - worked, traces


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, trace: Trace) -> None:
    reads = trace.reads
    trace.sent_s = time.perf_counter()
    try:
        # A redirect would carry the key and the load elsewhere: it counts as a failure.
        async with session.post(url, data=body, allow_redirects=False) as response:
            trace.status = response.status
            async for read in response.content.iter_any():
                reads.append((time.perf_counter(), read))
    except (aiohttp.ClientError, OSError) as error:
        trace.error = _clean(f"{type(error).__name__}: {error}")


async def _find_server(url: str, model: str | None) -> Server:
    address = f"{url}/v1/models"
    try:
        async with open_session(CONNECT_TIMEOUT_S) as session, session.get(address, allow_redirects=False) as response:
            status, content = response.status, await response.read()
    except aiohttp.InvalidURL as error:
        raise InputError(f"{url} is no address", "Something like http://127.0.0.1:8000 was expected") from error
    except TimeoutError as error:
        raise _unreachable(url, errno.ETIMEDOUT, str(error)) from error
    except (aiohttp.ClientError, OSError) as error:
        cause = getattr(error, "os_error", error)
        reason = getattr(cause, "strerror", None) or str(error)
        raise _unreachable(url, getattr(cause, "errno", None), reason) from error
    if status == 401:
        raise InputError(f"{url} wants an API key", todo=f"Set {API_KEY_VARIABLE}")
    try:
        entries = {str(entry["id"]): entry for entry in json.loads(content)["data"]} if status == 200 else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        entries = {}
    if not entries:
        raise InputError(
            f"{address} answered HTTP {status} and no list of models", "An OpenAI-compatible server was expected"
        )
    name = model or next(iter(entries))
    if name not in entries:
        raise InputError(f"{url} does not serve {name}", f"It serves {', '.join(map(_clean, entries))}")
    context, root = entries[name].get("max_model_len"), entries[name].get("root")
    return Server(url, name, root if isinstance(root, str) else None, context if isinstance(context, int) else None)


def _unreachable(url: str, number: int | None, reason: str) -> ShortageError:
    told = f" (errno {number})" if number else ""
    if number is not None and number in errno.errorcode:  # else it is one of the name resolver's, with words of its own
        reason, told = os.strerror(number), f" (errno {number}, {errno.errorcode[number]})"
    return ShortageError(
        f"{url} cannot be reached: {_clean(reason)}{told}", todo="Start the server, or check the address"
    )


def error_text(content: bytes) -> str:
    """The message in an answer that reports an error, or its beginning when it is in no form known."""
    text = content.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return _clean(text)


def _clean(text: str) -> str:
    """A server's words, fit for a terminal: one line, no control characters, not endless."""
    return "".join(c if c.isprintable() else " " for c in text[:_ERROR_TEXT]).strip()
