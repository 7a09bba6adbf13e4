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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from llmkit.bench.answer_stream import (
    RequestRecord,
    StreamedAnswer,
    printable,
    read_answer,
)
from llmkit.bench.bench_metrics import RequestTimeline, RunResult
from llmkit.bench.draft_counts import DraftCounts, parse_draft_counts
from llmkit.bench.server_samples import QueueCounts, parse_queue_counts
from llmkit.bench.workload import WorkloadRequest, group_conversations
from llmkit.common.errors import InputError, ShortageError
from llmkit.runtime.engine.synthetic_acceptance import HEADER as SYNTHETIC_HEADER
from llmkit.runtime.process_channel import API_KEY_VARIABLE

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # without any data, after which a request has failed


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server: its address without `/v1`, and an entry of its model list."""

    url: str
    model: str
    root: str | None = None  # where the model was loaded from; None: not in the entry
    context_tokens: int | None = None  # None: not in the entry
    synthetic_acceptance: str | None = None  # rates, of a server that accepts drafts by a draw


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
    text_before = read_metrics(server)
    wall_s, client_cpu_s, records = asyncio.run(
        _run_clients(server, requests, bodies, max_concurrency)
    )
    text = read_metrics(server) if text_before is not None else None
    timelines = [
        parse_record(record, request) for record, request in zip(records, requests, strict=True)
    ]
    return RunResult(wall_s, timelines, client_cpu_s, *run_counts(text_before, text))


def run_counts(
    before: str | None, after: str | None
) -> tuple[DraftCounts | None, QueueCounts | None]:
    """What a server counted between two answers of /metrics; None when it has none."""
    if before is None or after is None:
        return None, None
    return (
        parse_draft_counts(after).since(parse_draft_counts(before)),
        parse_queue_counts(after).since(parse_queue_counts(before)),
    )


def read_metrics(server: Server) -> str | None:
    """A server's answer to /metrics; None when it has none."""
    with suppress(aiohttp.ClientError, OSError, TimeoutError):
        return asyncio.run(_read_metrics(server.url))
    return None


async def _read_metrics(url: str) -> str | None:
    async with (
        open_session(CONNECT_TIMEOUT_S) as session,
        session.get(f"{url}/metrics", allow_redirects=False) as response,
    ):
        text = await response.text(errors="replace")
    return text if response.status == 200 else None


def parse_record(record: RequestRecord, request: WorkloadRequest) -> RequestTimeline:
    """Parse a recorded response: token arrivals, usage, or the reason of a failure."""
    answer = read_answer(record)
    return answer_timeline(request.id, record, answer, len(request.prompt), request.max_tokens)


def answer_timeline(
    request_id: str,
    record: RequestRecord,
    answer: StreamedAnswer,
    prompt_tokens: int,
    max_tokens: int | None,
) -> RequestTimeline:
    """The timeline of an answer.

    prompt_tokens: used when the server does not count them. max_tokens: how many tokens the answer
    must have, or it failed; None: any number.
    """
    error = answer.error
    is_complete = max_tokens is None or answer.output_tokens == max_tokens
    if not error and not (is_complete and answer.arrivals_s):
        error = (
            f"{answer.output_tokens} tokens came, {max_tokens or 'some'} were asked for"
            f"{' with ignore_eos' if max_tokens else ''}"
        )
    return RequestTimeline(
        request_id,
        record.sent_s,
        tuple(answer.arrivals_s),
        answer.prompt_tokens or prompt_tokens,
        answer.cached_tokens or 0,
        answer.output_tokens,
        error,
        record.schedule_lag_s,
        answer.first_output_s,
    )


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
                await send_request(session, f"{server.url}/v1/completions", body, record)

    async with open_session(READ_TIMEOUT_S) as session:
        start_s = time.perf_counter()
        start_cpu_s = time.thread_time()
        clients = [
            run_client(session, start_s) for _ in range(min(max_concurrency, len(conversations)))
        ]
        await asyncio.gather(*clients)
        return time.perf_counter() - start_s, time.thread_time() - start_cpu_s, records


async def post_json(
    session: aiohttp.ClientSession, server: Server, path: str, fields: Mapping[str, Any]
) -> tuple[int, bytes]:
    """Send fields, with the model's name, to a server. Returns the status and the answer.

    Raises ShortageError when the server does not answer.
    """
    body = json.dumps({"model": server.model, **fields}).encode()
    try:
        # A redirect would send the key to another address.
        async with session.post(
            f"{server.url}{path}", data=body, allow_redirects=False
        ) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError) as error:
        raise ShortageError(
            f"{server.url} did not answer ({printable(f'{type(error).__name__}: {error}')})"
        ) from error


async def send_request(
    session: aiohttp.ClientSession, url: str, body: bytes, record: RequestRecord
) -> None:
    """Send a request and record its answer, or why there is none."""
    reads = record.reads
    record.sent_s = time.perf_counter()
    try:
        # A redirect would send the key and the load to another address: it counts as a failure.
        async with session.post(url, data=body, allow_redirects=False) as response:
            record.status = response.status
            async for read in response.content.iter_any():
                reads.append((time.perf_counter(), read))
    except (aiohttp.ClientError, OSError) as error:
        record.error = printable(f"{type(error).__name__}: {error}")


async def _query_server(url: str, model: str | None, key: str | None) -> Server:
    address = f"{url}/v1/models"
    try:
        async with (
            open_session(CONNECT_TIMEOUT_S, key) as session,
            session.get(address, allow_redirects=False) as response,
        ):
            status = response.status
            content = await response.read()
            synthetic_acceptance = response.headers.get(SYNTHETIC_HEADER)
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
            f"{url} does not serve {name}", f"It serves {', '.join(map(printable, entries))}"
        )
    context_tokens = entries[name].get("max_model_len")
    root = entries[name].get("root")
    return Server(
        url,
        name,
        root if isinstance(root, str) else None,
        context_tokens if isinstance(context_tokens, int) else None,
        None if synthetic_acceptance is None else printable(synthetic_acceptance),
    )


def _unreachable(url: str, number: int | None, reason: str) -> ShortageError:
    """The error for a server that cannot be reached. number: the errno, where it is known."""
    suffix = f" (errno {number})" if number else ""
    # Other numbers are those of the name resolver, which has its own messages.
    if number is not None and number in errno.errorcode:
        reason = os.strerror(number)
        suffix = f" (errno {number}, {errno.errorcode[number]})"
    return ShortageError(
        f"{url} cannot be reached: {printable(reason)}{suffix}",
        todo="Start the server, or check the address",
    )
