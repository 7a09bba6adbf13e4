"""The load client: streams `/v1/completions` of any OpenAI-compatible server, records arrivals.

The client may share its processor cores with the server, so it does little work during a run: a
read costs one list append. Request bodies are encoded before the run, and responses are parsed
after it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from llmkit.bench.bench_metrics import RequestTimeline, RunResult
from llmkit.bench.draft_counts import DraftCounts, parse_draft_counts
from llmkit.bench.workload import WorkloadRequest, group_conversations
from llmkit.common.errors import InputError, ShortageError
from llmkit.common.sse import EventParser
from llmkit.runtime.process_channel import API_KEY_VARIABLE

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # without any data, after which a request has failed
_MAX_ERROR_CHARS = 300  # of a server's error message


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server: its address without `/v1`, and an entry of its model list."""

    url: str
    model: str
    root: str | None = None  # where the model was loaded from; None: not in the entry
    context_tokens: int | None = None  # None: not in the entry


@dataclass
class RequestRecord:
    """The response to one request as it was read. Times are `time.perf_counter()` seconds."""

    sent_s: float = 0.0
    status: int = 0
    reads: list[tuple[float, bytes]] = field(default_factory=list)  # (time, data)
    error: str | None = None
    schedule_lag_s: float = 0.0  # from its scheduled time to its sending; 0 without a schedule


def base_url(url: str) -> str:
    """The address without a trailing `/v1` or slash."""
    return url.rstrip("/").removesuffix("/v1")


def query_server(url: str, model: str | None = None, key: str | None = None) -> Server:
    """Read the model list of a server and pick `model`, or else its first entry.

    key: the API key; None: that of the environment, if there is one.
    Raises ShortageError, with the errno, when the server cannot be reached, and InputError when the
    answer is no model list.
    """
    return asyncio.run(_query_server(base_url(url), model, key))


def run_load(
    server: Server, requests: Sequence[WorkloadRequest], max_concurrency: int
) -> RunResult:
    """Send the requests with at most `max_concurrency` conversations in flight.

    A client sends its next request when the last one is answered and the scheduled time has come.
    """
    bodies = [_request_body(server, request) for request in requests]
    counts_before = read_draft_counts(server)
    wall_s, client_cpu_s, records = asyncio.run(
        _run_clients(server, requests, bodies, max_concurrency)
    )
    counts = read_draft_counts(server) if counts_before is not None else None
    timelines = [
        parse_record(record, request) for record, request in zip(records, requests, strict=True)
    ]
    if counts is not None and counts_before is not None:
        counts = counts.since(counts_before)
    return RunResult(wall_s, timelines, client_cpu_s, counts)


def read_draft_counts(server: Server) -> DraftCounts | None:
    """A server's counters of speculative decoding; None when it has no /metrics."""
    with suppress(aiohttp.ClientError, OSError, TimeoutError):
        return asyncio.run(_read_draft_counts(server.url))
    return None


async def _read_draft_counts(url: str) -> DraftCounts | None:
    async with (
        open_session(CONNECT_TIMEOUT_S) as session,
        session.get(f"{url}/metrics", allow_redirects=False) as response,
    ):
        text = await response.text(errors="replace")
    return parse_draft_counts(text) if response.status == 200 else None


def parse_record(record: RequestRecord, request: WorkloadRequest) -> RequestTimeline:
    """Parse a recorded response: token arrivals, usage, or the reason of a failure."""
    error = record.error
    token_ids = 0
    done = False
    arrivals: list[float] = []
    final_event_s: list[float] = []  # of an event that has a finish reason and no text
    usage: dict[str, Any] = {}
    if not error and record.status != 200:
        content = b"".join(data for _, data in record.reads)
        error = f"HTTP {record.status}: {server_error_message(content)}"
    for arrival_s, data in _events(record.reads) if not error else ():
        if data.strip() == "[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
            if event.get("error"):
                error = f"the stream broke off: {server_error_message(data.encode())}"
                break
            if isinstance(event.get("usage"), dict):
                usage = event["usage"]
            for choice in event.get("choices") or ():
                token_ids += len(choice.get("token_ids") or ())
                # Any event carries tokens, with text or without. Only the last one may carry
                # nothing but the finish reason.
                if choice.get("text") or choice.get("token_ids") or not choice.get("finish_reason"):
                    arrivals.append(arrival_s)
                else:
                    final_event_s = [arrival_s]
        except (ValueError, AttributeError, TypeError, RecursionError):
            error = f"an event is not a completion: {_printable(data)}"
            break
    output_tokens = _usage_count(usage, "completion_tokens") or token_ids or len(arrivals)
    if len(arrivals) < output_tokens:
        arrivals += final_event_s  # it carried a token without text
    if not error and not done:
        error = "the stream ended without [DONE]"
    if not error and (output_tokens != request.max_tokens or not arrivals):
        error = f"{output_tokens} tokens came, {request.max_tokens} were asked for with ignore_eos"
    return RequestTimeline(
        request.id,
        record.sent_s,
        tuple(arrivals),
        _usage_count(usage, "prompt_tokens") or len(request.prompt),
        _usage_count(usage.get("prompt_tokens_details"), "cached_tokens"),
        output_tokens,
        error,
        record.schedule_lag_s,
    )


def _events(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """Each event's data, with the time of the read that completed it."""
    parser = EventParser()
    for arrival_s, read in reads:
        for data in parser.feed(read):
            yield arrival_s, data
    for data in parser.close():
        yield reads[-1][0], data


def _usage_count(usage: Any, name: str) -> int:
    """A count of the server's usage; 0 when it is missing."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else 0


def _request_body(server: Server, request: WorkloadRequest) -> bytes:
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


def open_session(read_timeout_s: float, key: str | None = None) -> aiohttp.ClientSession:
    """An HTTP session that sends the key, or else that of the environment, if there is one."""
    headers = {"Content-Type": "application/json"}
    key = key or os.environ.get(API_KEY_VARIABLE)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    # Every request gets its own connection: a server may close an idle one just as the next
    # request is sent.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s
    )
    return aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout)


async def _run_clients(
    server: Server,
    requests: Sequence[WorkloadRequest],
    bodies: Sequence[bytes],
    max_concurrency: int,
) -> tuple[float, float, list[RequestRecord]]:
    """Send all requests. Returns seconds of wall time and of thread CPU time, and the records."""
    records = [RequestRecord() for _ in requests]
    unsent = iter(zip(records, bodies, strict=True))
    conversations = [
        [(request, *next(unsent)) for request in conversation]
        for conversation in group_conversations(requests)
    ]
    waiting = iter(conversations)  # shared by all clients

    async def run_client(session: aiohttp.ClientSession, start_s: float) -> None:
        for conversation in waiting:
            for request, record, body in conversation:
                if request.send_at_s is not None:
                    due_s = start_s + request.send_at_s
                    await asyncio.sleep(due_s - time.perf_counter())
                    record.schedule_lag_s = time.perf_counter() - due_s
                await _send(session, f"{server.url}/v1/completions", body, record)

    async with open_session(READ_TIMEOUT_S) as session:
        start_s = time.perf_counter()
        start_cpu_s = time.thread_time()
        clients = [
            run_client(session, start_s) for _ in range(min(max_concurrency, len(conversations)))
        ]
        await asyncio.gather(*clients)
        return time.perf_counter() - start_s, time.thread_time() - start_cpu_s, records


async def _send(
    session: aiohttp.ClientSession, url: str, body: bytes, record: RequestRecord
) -> None:
    reads = record.reads
    record.sent_s = time.perf_counter()
    try:
        # A redirect would send the key and the load to another address: it counts as a failure.
        async with session.post(url, data=body, allow_redirects=False) as response:
            record.status = response.status
            async for read in response.content.iter_any():
                reads.append((time.perf_counter(), read))
    except (aiohttp.ClientError, OSError) as error:
        record.error = _printable(f"{type(error).__name__}: {error}")


async def _query_server(url: str, model: str | None, key: str | None) -> Server:
    address = f"{url}/v1/models"
    try:
        async with (
            open_session(CONNECT_TIMEOUT_S, key) as session,
            session.get(address, allow_redirects=False) as response,
        ):
            status = response.status
            content = await response.read()
    except aiohttp.InvalidURL as error:
        raise InputError(
            f"{url} is not a URL", "Something like http://127.0.0.1:8000 was expected"
        ) from error
    except TimeoutError as error:
        raise _unreachable(url, errno.ETIMEDOUT, str(error)) from error
    except (aiohttp.ClientError, OSError) as error:
        cause = getattr(error, "os_error", error)
        reason = getattr(cause, "strerror", None) or str(error)
        raise _unreachable(url, getattr(cause, "errno", None), reason) from error
    if status == 401:
        raise InputError(f"{url} wants an API key", todo=f"Set {API_KEY_VARIABLE}")
    entries: dict[str, Any] = {}
    if status == 200:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            entries = {str(entry["id"]): entry for entry in json.loads(content)["data"]}
    if not entries:
        raise InputError(
            f"{address} answered HTTP {status} and no list of models",
            "An OpenAI-compatible server was expected",
        )
    name = model or next(iter(entries))
    if name not in entries:
        raise InputError(
            f"{url} does not serve {name}", f"It serves {', '.join(map(_printable, entries))}"
        )
    context_tokens = entries[name].get("max_model_len")
    root = entries[name].get("root")
    return Server(
        url,
        name,
        root if isinstance(root, str) else None,
        context_tokens if isinstance(context_tokens, int) else None,
    )


def _unreachable(url: str, number: int | None, reason: str) -> ShortageError:
    """The error for a server that cannot be reached. number: the errno, where it is known."""
    suffix = f" (errno {number})" if number else ""
    # Other numbers are those of the name resolver, which has its own messages.
    if number is not None and number in errno.errorcode:
        reason = os.strerror(number)
        suffix = f" (errno {number}, {errno.errorcode[number]})"
    return ShortageError(
        f"{url} cannot be reached: {_printable(reason)}{suffix}",
        todo="Start the server, or check the address",
    )


def server_error_message(content: bytes) -> str:
    """The message of a server's error response, or the beginning of an unknown response."""
    text = content.decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    return _printable(text)


def _printable(text: str) -> str:
    """A server's text, made fit for a terminal: one short line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_ERROR_CHARS]).strip()
