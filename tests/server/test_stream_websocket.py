"""Streams of tokens over a WebSocket, with the websockets library, and attacks on sockets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket as sockets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.server_process import LlmkitServer, held, serving, wait_for
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

MODEL = {"max_position_embeddings": 32_768}
SERVER: dict[str, Any] = {
    "served_model_name": "tiny",
    "max_body_bytes": 100_000,
    "write_timeout": 1.0,
    "kv_cache_memory": 2**25,
}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
    "temperature": 0,
}


@contextmanager
def stream(server: LlmkitServer, **options: Any) -> Iterator[Any]:
    url = server.url.replace("http", "ws") + "/v1/stream"
    with connect(url, **options) as connection:
        yield connection


def answer(connection: Any, **body: Any) -> list[dict[str, Any]]:
    connection.send(json.dumps(body))
    return messages_until_end(connection)


def messages_until_end(connection: Any) -> list[dict[str, Any]]:
    messages = []
    while True:
        messages.append(json.loads(connection.recv()))
        if messages[-1].get("type") in ("done", "error", "cancelled"):
            return messages


def closed_with(connection: Any) -> int:
    with contextlib.suppress(ConnectionClosed):
        connection.recv()
    assert connection.close_code is not None
    return int(connection.close_code)


def test_stream_socket_sends_the_chunks_of_http(server: LlmkitServer) -> None:
    with server.client() as http:
        whole = http.post("/v1/chat/completions", json=CHAT).json()
    with stream(server) as connection:
        *chunks, end = answer(connection, **CHAT)
        text = "".join(
            choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]
        )
        assert text == whole["choices"][0]["message"]["content"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert end == {"type": "done"}
        # Another request in the same connection.
        *chunks, end = answer(connection, prompt="hello", max_tokens=2)
        assert chunks[0]["object"] == "text_completion"
        assert end == {"type": "done"}


def test_stream_socket_answers_requests_in_their_order(server: LlmkitServer) -> None:
    with stream(server) as connection:
        for _ in range(5):
            connection.send(json.dumps(CHAT))
        ids = []
        for _ in range(5):
            *chunks, _ = messages_until_end(connection)
            (answer_id,) = {chunk["id"] for chunk in chunks}
            ids.append(answer_id)
        assert len(set(ids)) == 5


def test_stream_socket_cancels(server: LlmkitServer) -> None:
    with stream(server) as connection:
        # It would take a minute.
        connection.send(json.dumps({**CHAT, "max_tokens": 32_000, "ignore_eos": True}))
        connection.recv()
        connection.send('{"type": "cancel"}')
        assert messages_until_end(connection)[-1]["type"] == "cancelled"
        assert answer(connection, **CHAT)[-1] == {"type": "done"}
    wait_for(lambda: server.metric("num_requests_running") == 0)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_value"),
        ({"messages": [], "prompt": "both"}, "invalid_value"),
        ({"messages": []}, "invalid_value"),
        ({**CHAT, "model": "unheard"}, "model_not_found"),
        ({"type": "sing"}, "unsupported"),
        ({"type": 7}, "invalid_value"),
    ],
)
def test_stream_socket_reports_errors_and_goes_on(
    server: LlmkitServer, body: dict[str, Any], code: str
) -> None:
    with stream(server) as connection:
        (error,) = answer(connection, **body)
        assert error["error"]["code"] == code
        assert error["status"] in (400, 404)
        assert answer(connection, **CHAT)[-1] == {"type": "done"}


def test_stream_socket_limits_requests_that_wait(server: LlmkitServer) -> None:
    with stream(server) as connection:
        for _ in range(60):
            connection.send(json.dumps({**CHAT, "max_tokens": 100, "ignore_eos": True}))
        codes = set()
        for _ in range(60):
            end = messages_until_end(connection)[-1]
            codes.add(end.get("error", end).get("code"))
        assert "too_many_requests" in codes


def test_stream_socket_reads_fragments(server: LlmkitServer) -> None:
    text = json.dumps(CHAT)
    with stream(server) as connection:
        connection.send(text[index : index + 5] for index in range(0, len(text), 5))
        assert messages_until_end(connection)[-1] == {"type": "done"}


def test_stream_socket_refuses_a_binary_message(server: LlmkitServer) -> None:
    with stream(server) as connection:
        connection.send(b"{}")
        assert closed_with(connection) == 1003


# Attacks, with frames by hand


@contextmanager
def raw_socket(server: LlmkitServer) -> Iterator[sockets.socket]:
    with sockets.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        raw.sendall(
            b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += raw.recv(1)
        assert b" 101 " in head
        yield raw


def frame(opcode: int, payload: bytes, fin: bool = True) -> bytes:
    head = bytes([(0x80 if fin else 0) | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    else:
        head += bytes([0x80 | 126]) + struct.pack("!H", len(payload))
    return head + bytes(4) + payload  # a mask of zeros


def close_code(raw: sockets.socket) -> int | None:
    """The code of the close frame that ends what the server sends."""
    data = b""
    while part := raw.recv(65536):
        data += part
    place = data.rfind(b"\x88")
    return None if place < 0 else struct.unpack("!H", data[place + 2 : place + 4])[0]


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (frame(1, b"\xff\xfe"), 1007),  # no UTF-8
        (frame(1, b"{", fin=False) + frame(0, b"", fin=False) * 2000, 1009),
        (frame(1, b"x" * 60_000, fin=False) + frame(0, b"x" * 60_000, fin=False), 1009),
        (bytes([0x81, 0x80 | 127]) + struct.pack("!Q", 1 << 40) + bytes(4), 1009),
        (frame(3, b""), 1002),  # a reserved opcode
        (b"\x81\x01x", 1002),  # not masked
        (frame(0, b"x"), 1002),  # continues nothing
    ],
)
def test_socket_closes_at_wrong_frames(server: LlmkitServer, attack: bytes, code: int) -> None:
    with raw_socket(server) as raw:
        raw.sendall(attack)
        assert close_code(raw) == code
    with stream(server) as connection:
        assert answer(connection, **CHAT)[-1] == {"type": "done"}


def test_socket_aborts_a_client_that_does_not_read(server: LlmkitServer) -> None:
    process = psutil.Process(server.process.pid)
    with raw_socket(server) as raw:
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        before = process.memory_info().rss
        pings = frame(9, os.urandom(125)) * 500
        bad = frame(1, b"no json") * 2000
        with contextlib.suppress(ConnectionError):  # the server aborts the connection
            for _ in range(100_000):
                raw.sendall(pings + bad)
        assert process.memory_info().rss - before < 64 << 20
    with stream(server) as connection:
        assert answer(connection, **CHAT)[-1] == {"type": "done"}


def test_socket_of_a_client_that_vanishes_frees_its_request(server: LlmkitServer) -> None:
    for _ in range(20):
        with raw_socket(server) as raw:
            text = json.dumps({**CHAT, "max_tokens": 230, "ignore_eos": True}).encode()
            raw.sendall(frame(1, text))
            raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: server.metric("num_requests_running") == 0)


def test_socket_at_another_path_is_answered_as_http(server: LlmkitServer) -> None:
    with sockets.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        raw.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 200 " in raw.recv(4096).partition(b"\r\n")[0]


def test_sockets_are_counted(server: LlmkitServer) -> None:
    wait_for(lambda: server.metric("open_websockets") == 0)
    with stream(server), stream(server):
        wait_for(lambda: server.metric("open_websockets") == 2)
    wait_for(lambda: server.metric("open_websockets") == 0)


def test_socket_at_shutdown_finishes_its_request_and_is_closed(model: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", model, **SERVER) as server:
        with stream(server) as busy, stream(server) as idle:
            busy.send(json.dumps({**CHAT, "max_tokens": 100, "ignore_eos": True}))
            busy.recv()
            with held(server.engine()):
                server.process.send_signal(signal.SIGTERM)
                wait_for(lambda: "stopping: " in server.log.read_text())
                (refused,) = answer(idle, **CHAT)
            assert (refused["status"], refused["error"]["code"]) == (503, "draining")
            assert messages_until_end(busy)[-1] == {"type": "done"}
            assert (closed_with(busy), closed_with(idle)) == (1012, 1012)
        assert server.process.wait(60) == 0
