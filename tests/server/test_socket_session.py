"""The requests of a socket and their ends, with an application that is scripted for each test."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.runtime.server.http.internal_request import InternalRequest
from llmkit.runtime.server.http.socket_paths import HTTP_APP, SOCKET_HEADERS, SUBPROTOCOL
from llmkit.runtime.server.websockets import socket_session
from llmkit.runtime.server.websockets.responses_socket import ResponsesSocket
from llmkit.runtime.server.websockets.socket_session import SocketSession
from llmkit.runtime.server.websockets.stream_socket import StreamSocket


class ScriptedApp:
    """Answers each request with `events`, after `begin` is set. Counts what runs at a time."""

    def __init__(self, *events: bytes, status: int = 200) -> None:
        self.begin = asyncio.Event()
        self.bodies: list[dict[str, Any]] = []
        self.num_running = 0
        self.max_running = 0
        self._events = events
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append(json.loads((await receive())["body"]))
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await self.begin.wait()
            start = {"type": "http.response.start", "status": self._status, "headers": []}
            await send(start)
            for event in self._events:
                body = {"type": "http.response.body", "body": event, "more_body": True}
                await send(body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await asyncio.sleep(0)  # an end takes a while, as that of a request does
            self.num_running -= 1


class Connection:
    """A client's side of a session."""

    def __init__(self, session: type[SocketSession], app: ASGIApp) -> None:
        self.sent: asyncio.Queue[Message] = asyncio.Queue()  # by the server
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._received.put_nowait({"type": "websocket.connect"})
        scope = {HTTP_APP: app, SOCKET_HEADERS: [], SUBPROTOCOL: None}
        run = session(scope, self._received.get, self.sent.put).run()
        self._task = asyncio.create_task(run)

    def send(self, *messages: dict[str, Any]) -> None:
        """Send messages, which the server finds together."""
        for message in messages:
            text = json.dumps(message)
            self._received.put_nowait({"type": "websocket.receive", "text": text})

    async def receive(self) -> dict[str, Any]:
        """The next message of the server. Fails when the server closes."""
        message = await asyncio.wait_for(self.sent.get(), 60)
        if message["type"] == "websocket.accept":
            return await self.receive()
        document: dict[str, Any] = json.loads(message["text"])
        return document

    async def close(self) -> None:
        """Go away, and wait until the session has ended."""
        self._received.put_nowait({"type": "websocket.disconnect"})
        await asyncio.wait_for(self._task, 60)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def test_socket_cancels_a_request_as_soon_as_it_is_there() -> None:
    async def run() -> None:
        app = ScriptedApp(b"data: {}\n\n")
        connection = Connection(StreamSocket, app)
        connection.send({"messages": [1]}, {"type": "cancel"}, {"messages": [2]})
        assert await connection.receive() == {"type": "cancelled"}
        app.begin.set()
        # The answer to the second one only.
        assert await connection.receive() == {}
        assert await connection.receive() == {"type": "done"}
        assert app.bodies[-1]["messages"] == [2]
        assert connection.sent.empty()
        await connection.close()

    asyncio.run(run())


def test_socket_begins_the_next_request_when_a_cancelled_one_has_ended() -> None:
    async def run() -> None:
        app = ScriptedApp(b"data: {}\n\n")
        connection = Connection(StreamSocket, app)
        connection.send({"messages": [1]}, {"messages": [2]})
        await until(lambda: app.num_running)
        connection.send({"type": "cancel"})
        await until(lambda: len(app.bodies) == 2)
        app.begin.set()
        assert await connection.receive() == {"type": "cancelled"}
        assert await connection.receive() == {}
        # Together they would have exceeded the limit of a key for one request.
        assert app.max_running == 1
        await connection.close()

    asyncio.run(run())


def test_socket_with_many_messages_lets_others_run() -> None:
    async def run() -> None:
        connection = Connection(StreamSocket, ScriptedApp())
        connection.send(*({} for _ in range(100)))
        turns = 0
        while connection.sent.qsize() <= 100:
            await asyncio.sleep(0)
            turns += 1
            assert turns < 1000
        assert turns >= 100
        await connection.close()

    asyncio.run(run())


def test_socket_that_closes_before_the_first_byte_ends_its_request() -> None:
    async def run() -> None:
        app = ScriptedApp()
        connection = Connection(StreamSocket, app)
        connection.send({"messages": []})
        await until(lambda: app.num_running)
        await connection.close()
        assert app.num_running == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_internal_request_ends_when_it_is_cancelled_before_its_response() -> None:
    async def run() -> None:
        app = ScriptedApp()

        async def ask() -> None:
            async with InternalRequest(app, "POST", "/", [], b"{}"):
                pytest.fail("there was no response")

        task = asyncio.create_task(ask())
        await until(lambda: app.num_running)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert app.num_running == 0

    asyncio.run(run())


def test_internal_request_ends_although_the_application_goes_on_after_its_cancellation() -> None:
    """As where a wait ends at the moment of the cancellation, which is lost then."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def run() -> None:
        async with asyncio.timeout(60), InternalRequest(app, "POST", "/", [], b"{}") as request:
            assert request.status == 200
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("events", "error"),
    [
        # A router's error after keep-alive comments.
        ([b': waiting\n\ndata: {"error": {"code": "model_failed"}}\n\n'], {"code": "model_failed"}),
        # Another server's.
        (
            [b'data: {"type": "error", "error": {"code": "theirs"}}\n\ndata: [DONE]\n\n'],
            {"code": "theirs"},
        ),
    ],
)
def test_responses_socket_passes_errors_of_other_servers_on(
    events: list[bytes], error: dict[str, Any]
) -> None:
    async def run() -> None:
        app = ScriptedApp(*events)
        app.begin.set()
        connection = Connection(ResponsesSocket, app)
        for _ in range(2):  # the connection goes on
            connection.send({"type": "response.create", "input": "hello"})
            message = await connection.receive()
            assert (message["type"], message["error"]) == ("error", error)
        await connection.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", [[], {}, 7, None])
def test_responses_socket_leaves_wrong_items_to_the_checks_of_http(kind: Any) -> None:
    async def run() -> None:
        app = ScriptedApp(b'{"error": {"code": "unsupported"}}', status=400)
        app.begin.set()
        connection = Connection(ResponsesSocket, app)
        connection.send({"type": "response.create", "input": [{"type": kind}]})
        assert (await connection.receive())["error"]["code"] == "unsupported"
        await connection.close()

    asyncio.run(run())


def test_socket_holds_a_limited_number_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_session, "MAX_HELD_CHARS", 400)

    async def run() -> None:
        app = ScriptedApp(b"data: {}\n\n")
        connection = Connection(StreamSocket, app)
        connection.send({"prompt": "x" * 500})
        await until(lambda: app.num_running)
        connection.send({"prompt": "x" * 100})
        refused = await connection.receive()
        assert (refused["status"], refused["error"]["code"]) == (429, "too_many_requests")
        assert "400 characters" in refused["error"]["message"]
        app.begin.set()
        assert await connection.receive() == {}
        assert await connection.receive() == {"type": "done"}
        for _ in range(10):  # the session takes note of the end
            await asyncio.sleep(0)
        connection.send({"prompt": "x" * 100}, {"prompt": "x" * 100})
        await until(lambda: len(app.bodies) == 3)
        await connection.close()

    asyncio.run(run())
