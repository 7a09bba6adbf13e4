"""uvicorn's undocumented classes have everything that llmkit's HTTP protocol uses.

`runtime/server/http/protocol.py` and `runtime/server/lifecycle.py` derive from these classes.
`pyproject.toml` pins uvicorn's minor version. Whoever raises it reads the failures here first.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
ADVICE = (
    f"uvicorn {version('uvicorn')} has changed what runtime/server/http/protocol.py relies on: "
    "{}. Adapt protocol.py, then this test, or pin the earlier uvicorn in pyproject.toml."
)
# The methods that LimitedHttpProtocol overrides or calls, with their parameters.
PROTOCOL_METHODS = {
    "connection_made": ["transport"],
    "connection_lost": ["exc"],
    "pause_writing": [],
    "resume_writing": [],
    "data_received": ["data"],
    "on_message_begin": [],
    "on_url": ["url"],
    "on_header": ["name", "value"],
    "on_headers_complete": [],
    "on_body": ["body"],
    "on_message_complete": [],
    "on_response_complete": [],
    "_start_asgi_task": ["cycle", "app"],
    "_unset_keepalive_if_required": [],
}
PROTOCOL_ATTRIBUTES = ("loop", "parser", "transport", "headers", "cycle")
CYCLE_ATTRIBUTES = {
    "keep_alive": True,
    "more_body": True,
    "response_started": False,
    "response_complete": False,
    "disconnected": False,
    "waiting_for_100_continue": False,
    "chunked_encoding": None,
    "expected_content_length": 0,
}
REQUEST = b"POST /path HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"
# What LimitedWebSocketProtocol overrides or calls.
SOCKET_METHODS = {
    "connection_lost": ["exc"],
    "pause_writing": [],
    "resume_writing": [],
    "data_received": ["data"],
    "handle_cont": ["event"],
    "handle_parser_exception": [],
}
SOCKET_ATTRIBUTES = ("loop", "queue", "conn", "frames", "close_sent", "close_timer", "read_paused")


def check(condition: bool, what: str) -> None:
    """Fail with one sentence that says what changed and what to do."""
    if not condition:
        pytest.fail(ADVICE.format(what), pytrace=False)


class Transport(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the request's body."""
    body = b""
    more_body = True
    while more_body:
        message = await receive()
        body += message.get("body", b"")
        more_body = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def new_protocol() -> HttpToolsProtocol:
    config = uvicorn.Config(app, loop="none", lifespan="off", log_config=None)
    config.load()
    return HttpToolsProtocol(config, ServerState(), {})


def test_uvicorn_minor_version_is_pinned() -> None:
    requirements = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    pin = next(line for line in requirements if re.match(r"uvicorn\b", line))
    low, high = (int(minor) for minor in re.findall(r"0\.(\d+)", pin))
    assert high == low + 1, f"pin one minor version of uvicorn: {pin}"
    assert version("uvicorn").startswith(f"0.{low}."), "the pin is not the tested version"


@pytest.mark.parametrize("name", PROTOCOL_METHODS)
def test_uvicorn_protocol_has_the_methods_that_are_overridden(name: str) -> None:
    method = getattr(HttpToolsProtocol, name, None)
    check(callable(method), f"HttpToolsProtocol.{name} is missing")
    parameters = list(inspect.signature(getattr(HttpToolsProtocol, name)).parameters)[1:]
    check(
        parameters == PROTOCOL_METHODS[name],
        f"HttpToolsProtocol.{name} takes {parameters} and not {PROTOCOL_METHODS[name]}",
    )


@pytest.mark.parametrize("name", SOCKET_METHODS)
def test_uvicorn_socket_has_the_methods_that_are_overridden(name: str) -> None:
    method = getattr(WebSocketsSansIOProtocol, name, None)
    check(callable(method), f"WebSocketsSansIOProtocol.{name} is missing")
    parameters = list(inspect.signature(getattr(WebSocketsSansIOProtocol, name)).parameters)[1:]
    check(parameters == SOCKET_METHODS[name], f"WebSocketsSansIOProtocol.{name} takes {parameters}")


def test_uvicorn_socket_has_the_attributes_that_are_used() -> None:
    config = uvicorn.Config(app, loop="none", lifespan="off", log_config=None)
    config.load()
    loop = asyncio.new_event_loop()
    protocol = WebSocketsSansIOProtocol(config, ServerState(), {}, loop)
    loop.close()
    for name in SOCKET_ATTRIBUTES:
        check(hasattr(protocol, name), f"WebSocketsSansIOProtocol.{name} is missing")
    for name in ("_should_upgrade", "handle_websocket_upgrade"):
        check(hasattr(HttpToolsProtocol, name), f"HttpToolsProtocol.{name} is missing")


def test_uvicorn_protocol_has_the_attributes_and_the_life_that_are_expected() -> None:
    async def exchange() -> None:
        protocol = new_protocol()
        for name in PROTOCOL_ATTRIBUTES:
            check(hasattr(protocol, name), f"HttpToolsProtocol.{name} is missing")
        check(protocol.cycle is None, "a new connection already has a cycle")
        transport = Transport()
        protocol.connection_made(transport)
        check(protocol.transport is transport, "connection_made does not set transport")
        protocol.data_received(REQUEST)
        check(protocol.url == b"/path", "url is not the request's target")
        check(
            protocol.headers == [(b"host", b"a"), (b"content-length", b"4")],
            "headers is not a list of lower-case names and values",
        )
        cycle: Any = protocol.cycle
        check(isinstance(cycle, RequestResponseCycle), "cycle is not a RequestResponseCycle")
        for name, value in CYCLE_ATTRIBUTES.items():
            check(
                getattr(cycle, name, None) is value,
                f"RequestResponseCycle.{name} is not {value} when a request begins",
            )
        check(
            isinstance(getattr(cycle, "message_event", None), asyncio.Event),
            "RequestResponseCycle.message_event is not an asyncio.Event",
        )
        check(
            cycle.flow is protocol.flow and cycle.flow.write_paused is False,
            "RequestResponseCycle.flow.write_paused is not False when a request begins",
        )
        check(cycle.transport is transport, "RequestResponseCycle.transport is another one")
        protocol.data_received(b"body")
        check(cycle.more_body is False, "more_body stays true after the last byte of the body")
        async with asyncio.timeout(60):
            while not cycle.response_complete:
                await asyncio.sleep(0)
        check(cycle.response_started, "response_started stays false after the response")
        check(transport.written.endswith(b"body\r\n0\r\n\r\n"), "the response was not written")
        check(not transport.closed, "a connection with keep_alive was closed")
        protocol.connection_lost(None)

    asyncio.run(exchange())


def test_uvicorn_cycle_writes_nothing_once_disconnected() -> None:
    async def exchange() -> None:
        protocol = new_protocol()
        transport = Transport()
        protocol.connection_made(transport)
        protocol.data_received(REQUEST)
        protocol.cycle.disconnected = True
        protocol.cycle.message_event.set()
        async with asyncio.timeout(60):
            while protocol.tasks:
                await asyncio.sleep(0)
        check(transport.written == b"", "a cycle that is `disconnected` still writes")
        protocol.connection_lost(None)

    asyncio.run(exchange())


def test_uvicorn_cycle_closes_the_connection_without_keep_alive() -> None:
    async def exchange() -> None:
        protocol = new_protocol()
        transport = Transport()
        protocol.connection_made(transport)
        protocol.data_received(REQUEST + b"body")
        protocol.cycle.keep_alive = False
        async with asyncio.timeout(60):
            while protocol.tasks:
                await asyncio.sleep(0)
        check(transport.closed, "a cycle without `keep_alive` leaves the connection open")
        check(b"connection: close" in transport.written, "the response lacks connection: close")
        protocol.connection_lost(None)

    asyncio.run(exchange())


def test_uvicorn_cycle_writes_a_body_without_length_or_chunks() -> None:
    """As for HTTP/1.0, whose responses end with the connection."""

    async def exchange() -> None:
        protocol = new_protocol()
        transport = Transport()
        protocol.connection_made(transport)
        protocol.data_received(REQUEST + b"body")
        cycle = protocol.cycle
        cycle.keep_alive = False
        cycle.chunked_encoding = False
        cycle.expected_content_length = len(b"body")
        async with asyncio.timeout(60):
            while protocol.tasks:
                await asyncio.sleep(0)
        check(transport.written.endswith(b"\r\n\r\nbody"), "a body without length has a frame")
        check(b"transfer-encoding" not in transport.written, "chunked_encoding False is ignored")
        check(transport.closed, "the connection stays open after a body without length")
        protocol.connection_lost(None)

    asyncio.run(exchange())


def test_uvicorn_cycle_leaves_the_connection_open_when_keep_alive_is_set_again() -> None:
    """So that llmkit receives the rest of a request before it closes the connection."""

    async def exchange() -> None:
        protocol = new_protocol()

        async def early_app(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"connection", b"close"), (b"content-length", b"4")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            protocol.cycle.keep_alive = True
            await send({"type": "http.response.body", "body": b"much"})

        protocol.app = early_app
        transport = Transport()
        protocol.connection_made(transport)
        protocol.data_received(REQUEST)
        async with asyncio.timeout(60):
            while protocol.tasks:
                await asyncio.sleep(0)
        check(
            transport.written.endswith(b"connection: close\r\ncontent-length: 4\r\n\r\nmuch"),
            "unexpected response",
        )
        check(not transport.closed, "a cycle whose keep_alive is set again closes the connection")
        check(protocol.cycle.more_body is True, "more_body is False before the body has come")
        protocol.connection_lost(None)

    asyncio.run(exchange())


def test_uvicorn_server_has_what_the_lifecycle_replaces() -> None:
    server = uvicorn.Server(uvicorn.Config(app, loop="none", lifespan="off", log_config=None))
    check(
        list(inspect.signature(server.capture_signals).parameters) == []
        and isinstance(server.capture_signals(), contextlib.AbstractContextManager),
        "Server.capture_signals is not a context manager without parameters",
    )
    check(
        "self.capture_signals()" in inspect.getsource(uvicorn.Server.serve),
        "Server.serve does not call capture_signals",
    )
    check(server.should_exit is False, "Server.should_exit is missing")
    server.config.load()
    check(server.config.loaded, "Config.load does not set loaded: startup would load it again")
    check(hasattr(server.config, "ssl"), "Config.ssl is missing")
