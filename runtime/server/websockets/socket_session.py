"""One WebSocket: its messages, its requests in lanes, and its end.

A request of a socket runs as an HTTP request within the process. So it has all checks and limits
of HTTP, and a router forwards it to its model. Each part of the answer is sent before the next is
taken: a client that reads slowly slows its own answer only.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.http.internal_request import InternalRequest
from llmkit.runtime.server.http.socket_paths import HTTP_APP, SOCKET_HEADERS, SUBPROTOCOL

LIFETIME_S = 3600.0
MAX_QUEUED = 16  # requests of one connection that run or wait
# Characters of the messages that requests of one connection were made of, while they run or wait. A
# single request may be larger.
MAX_HELD_CHARS = 16 << 20
MAX_LANES = 32
GOING_AWAY = 1001
UNSUPPORTED_DATA = 1003
INTERNAL_ERROR = 1011
DONE = b"[DONE]"  # the data behind the last event of some APIs
_END_OF_EVENT = b"\n\n"

Job = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class _Request:
    """A request of a message, which waits or runs."""

    job: Job
    num_chars: int  # of the message


class RequestFailedError(Exception):
    """The answer to a request is an error. error: the object in the response's `error`."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        self.status = status
        self.error = error
        super().__init__(error.get("message"))


class SocketSession:
    """The base of the sockets' protocols: `handle` gets each message.

    Requests of one lane run one after another, those of different lanes side by side.
    """

    lifetime_s = LIFETIME_S

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._http_app: ASGIApp = scope[HTTP_APP]
        self._send_lock = asyncio.Lock()
        # The requests that wait.
        self._lanes: dict[str | None, collections.deque[_Request]] = {}
        self._workers: dict[str | None, asyncio.Task[None]] = {}  # each has one request
        self._message_chars = 0  # of the message that `handle` has
        self._running_chars: dict[str | None, int] = {}  # of the messages of running requests

    async def handle(self, message: dict[str, Any]) -> None:
        """Answer a message, or `enqueue` its request. Raises ApiError."""
        raise NotImplementedError

    def error_message(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        """Return the message that reports an error."""
        raise NotImplementedError

    async def run(self) -> None:
        """Serve the socket until it closes."""
        if (await self._receive())["type"] != "websocket.connect":
            return
        await self._send({"type": "websocket.accept", "subprotocol": self._scope[SUBPROTOCOL]})
        reader = asyncio.create_task(self._read_messages())
        try:
            await asyncio.wait([reader], timeout=self.lifetime_s)
            if reader.done():
                reader.result()
            else:
                reader.cancel()
                await self._expire()
        except OSError:
            pass  # the client has gone while a message was sent
        finally:
            reader.cancel()
            await self._cancel_all()

    async def _read_messages(self) -> None:
        while (message := await self._receive())["type"] == "websocket.receive":
            text = message.get("text")
            if text is None:
                await self._close(UNSUPPORTED_DATA, "Send text, not binary messages.")
                return
            self._message_chars = len(text)
            try:
                await self.handle(_parse(text))
            except ApiError as error:
                await self.send_error(error)
            # Thousands of short messages may have arrived together, for which nothing waits.
            await asyncio.sleep(0)

    async def _expire(self) -> None:
        """End a connection that has lived long enough, once its requests have ended."""
        await asyncio.gather(*self._workers.values(), return_exceptions=True)
        message = (
            f"Responses websocket connection limit reached ({self.lifetime_s / 60:g} minutes). "
            "Create a new websocket connection to continue."
        )
        await self.send_error(ApiError(400, message, code="websocket_connection_limit_reached"))
        await self._close(GOING_AWAY, "connection limit reached")

    def enqueue(self, lane: str | None, job: Job) -> None:
        """Run `job` after the others of its lane. Raises ApiError 429 when too many wait."""
        if len(self._workers) + sum(map(len, self._lanes.values())) >= MAX_QUEUED:
            message = f"At most {MAX_QUEUED} requests of one connection can run or wait."
            raise ApiError(429, message, code="too_many_requests")
        request = _Request(job, self._message_chars)
        held_chars = self._held_chars
        if held_chars and held_chars + request.num_chars > MAX_HELD_CHARS:
            message = (
                f"The requests of one connection that run or wait can have {MAX_HELD_CHARS} "
                "characters together."
            )
            raise ApiError(429, message, code="too_many_requests")
        if lane not in self._lanes and len(self._lanes) >= MAX_LANES:
            message = f"At most {MAX_LANES} streams are possible in one connection."
            raise ApiError(400, message, code="websocket_stream_limit_reached", param="stream_id")
        waiting = self._lanes.setdefault(lane, collections.deque())
        if lane in self._workers:
            waiting.append(request)
        else:
            self._start(lane, request)

    @property
    def _held_chars(self) -> int:
        """The characters of the messages of requests that run or wait."""
        waiting = (request.num_chars for lane in self._lanes.values() for request in lane)
        return sum(self._running_chars.values()) + sum(waiting)

    def _start(
        self, lane: str | None, request: _Request, after: asyncio.Task[None] | None = None
    ) -> None:
        """Run a request of a lane that has no worker. after: ends before it begins."""
        self._running_chars[lane] = request.num_chars
        self._workers[lane] = asyncio.create_task(self._work(lane, request.job, after))

    def cancel_running(self, lane: str | None) -> bool:
        """Cancel the request that runs in a lane; those that wait go on. Returns if one ran."""
        worker = self._workers.pop(lane, None)
        if worker is None:
            return False
        worker.cancel()
        del self._running_chars[lane]
        if self._lanes[lane]:
            # It waits until the cancelled one no longer counts for the limits of the key.
            self._start(lane, self._lanes[lane].popleft(), after=worker)
        return True

    async def send_json(self, document: Any) -> None:
        """Send a message, when the client has read enough of those before."""
        text = msgspec.json.encode(document).decode()
        async with self._send_lock:
            await self._send({"type": "websocket.send", "text": text})

    async def send_error(self, error: ApiError) -> None:
        """Send the message of an error."""
        await self.send_json(self.error_message(error.status, error.envelope()["error"]))

    async def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a POST. Raises RequestFailedError."""
        async with self._request(path, body) as request:
            document: dict[str, Any] = msgspec.json.decode(await request.read())
            return document

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        """Yield the data of the server-sent events of a POST. Raises RequestFailedError.

        Closing it early cancels the request.
        """
        async with self._request(path, body) as request:
            rest = b""
            async for chunk in request.chunks():
                *events, rest = (rest + chunk).split(_END_OF_EVENT)
                for event in events:
                    for line in event.splitlines():
                        if line.startswith(b"data: "):
                            yield line.removeprefix(b"data: ")

    @contextlib.asynccontextmanager
    async def _request(self, path: str, body: dict[str, Any]) -> AsyncIterator[InternalRequest]:
        data = msgspec.json.encode(body)
        headers = self._scope[SOCKET_HEADERS]
        async with InternalRequest(self._http_app, "POST", path, headers, data) as request:
            if request.status != 200:
                failed = {"error": {"message": "The server failed.", "type": "server_error"}}
                answer = msgspec.json.decode(await request.read() or msgspec.json.encode(failed))
                raise RequestFailedError(request.status, answer["error"])
            yield request

    async def _work(
        self, lane: str | None, job: Job, after: asyncio.Task[None] | None = None
    ) -> None:
        """Run `job`, then the requests that wait in its lane. after: ends before the first one."""
        if after is not None:
            await asyncio.wait([after])
        waiting = self._lanes[lane]
        while True:
            try:
                await job()
            except RequestFailedError as failure:
                await self.send_json(self.error_message(failure.status, failure.error))
            except OSError:
                return  # the client has gone
            except Exception:
                traceback.print_exc(file=sys.stderr)
                await self._close(INTERNAL_ERROR, "The server failed; its log says why.")
                return
            if not waiting:
                break
            request = waiting.popleft()
            self._running_chars[lane] = request.num_chars
            job = request.job
        del self._workers[lane]
        del self._running_chars[lane]

    async def _cancel_all(self) -> None:
        workers = list(self._workers.values())
        for worker in workers:
            worker.cancel()
        # Those that ended with an error could not send: the client has gone.
        await asyncio.gather(*workers, return_exceptions=True)

    async def _close(self, code: int, reason: str) -> None:
        async with self._send_lock:
            await self._send({"type": "websocket.close", "code": code, "reason": reason})


def take_string(message: dict[str, Any], name: str, max_chars: int = 128) -> str | None:
    """Remove an optional field from a message and return it. Raises ApiError 400."""
    value = message.pop(name, None)
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= max_chars):
        raise invalid(name, f"{name} must be a string of 1 to {max_chars} characters.")
    return value


def _parse(text: str) -> dict[str, Any]:
    """Return the object of a message. Raises ApiError 400."""
    try:
        message = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(
            400, f"The message is not valid JSON: {error}.", code="invalid_json"
        ) from None
    if not isinstance(message, dict):
        raise ApiError(400, "A message must be a JSON object.", code="invalid_json")
    return message
