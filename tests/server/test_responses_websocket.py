"""OpenAI's WebSocket mode of the Responses API, with the real openai client."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from support.server_process import LlmkitServer
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from llmkit.runtime.server.http.socket_paths import HTTP_APP, SOCKET_HEADERS, SUBPROTOCOL
from llmkit.runtime.server.websockets.responses_socket import ResponsesSocket

API_KEYS = ("key-of-one", "key-of-two")
ENDS = ("response.completed", "response.incomplete")
SERVER = {"served_model_name": "tiny", "max_body_bytes": 100_000}


@pytest.fixture
def connection(client: openai.OpenAI) -> Iterator[Any]:
    with client.responses.connect() as connection:
        yield connection


def ask(connection: Any, text: Any, **fields: Any) -> Any:
    """Send a request and return its last event; checks the numbers of the events before."""
    fields = {"model": "tiny", "max_output_tokens": 4, "temperature": 0} | fields
    connection.response.create(input=text, **fields)
    return last_event(connection)


def last_event(connection: Any) -> Any:
    number = 0
    while True:
        event = connection.recv()
        if event.type == "error":
            return event
        assert event.sequence_number == number
        number += 1
        if event.type in ENDS:
            return event


def test_responses_socket_answers_as_http_does(client: openai.OpenAI, connection: Any) -> None:
    event = ask(connection, "hello")
    whole = client.responses.create(model="tiny", input="hello", max_output_tokens=4, temperature=0)
    assert event.response.output_text == whole.output_text
    assert event.response.usage.output_tokens == whole.usage.output_tokens


def test_responses_socket_continues_from_its_own_memory(
    client: openai.OpenAI, connection: Any
) -> None:
    first = ask(connection, "hello", store=False).response
    second = ask(connection, "and then?", store=False, previous_response_id=first.id).response
    assert second.previous_response_id == first.id
    whole = client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "and then?"},
        ],
        max_output_tokens=4,
        temperature=0,
    )
    assert second.output_text == whole.output_text
    assert second.usage.input_tokens == whole.usage.input_tokens


def test_responses_socket_knows_no_response_of_another_connection(
    client: openai.OpenAI, connection: Any
) -> None:
    first = ask(connection, "hello").response
    with client.responses.connect() as other:
        event = ask(other, "more", previous_response_id=first.id)
        assert event.type == "error"
        assert event.status == 400
        assert event.error.code == "previous_response_not_found"
        assert ask(other, "hello").type == "response.incomplete"  # the connection goes on


def test_responses_socket_warms_up(connection: Any) -> None:
    warm = ask(connection, "hello", generate=False)
    assert warm.type == "response.completed"
    assert warm.response.output == []
    event = ask(connection, "and then?", previous_response_id=warm.response.id)
    both = ask(
        connection,
        [{"role": "user", "content": "hello"}, {"role": "user", "content": "and then?"}],
    )
    assert event.response.usage.input_tokens == both.response.usage.input_tokens
    assert event.response.output_text == both.response.output_text


def test_responses_socket_marks_events_of_lanes(connection: Any) -> None:
    for lane in ("a", "b", "a"):
        connection.response.create(
            model="tiny",
            input=f"lane {lane}",
            max_output_tokens=4,
            temperature=0,
            stream_id=lane,
        )
    ended: list[str] = []
    while len(ended) < 3:
        event = connection.recv()
        assert event.stream_id in ("a", "b")
        assert event.type != "error"
        if event.type in ENDS:
            ended.append(event.stream_id)
    assert sorted(ended) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"background": True}, "unsupported"),
        ({"model": "unheard"}, "model_not_found"),
        ({"temperature": 9}, "invalid_value"),
        ({"stream_id": ""}, "invalid_value"),
        ({"generate": 1}, "invalid_type"),
    ],
)
def test_responses_socket_reports_errors_as_events(
    connection: Any, fields: dict[str, Any], code: str
) -> None:
    event = ask(connection, "hello", **fields)
    assert event.type == "error"
    assert event.error.code == code
    assert ask(connection, "hello").type == "response.incomplete"


@contextlib.contextmanager
def plain(server: LlmkitServer, key: str | None = API_KEYS[0], **options: Any) -> Iterator[Any]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    url = server.url.replace("http", "ws") + "/v1/responses"
    with connect(url, additional_headers=headers, **options) as socket:
        yield socket


def test_responses_socket_refuses_messages_that_are_no_events(server: LlmkitServer) -> None:
    with plain(server) as socket:
        for text, code in (
            ("nonsense", "invalid_json"),
            ("[1]", "invalid_json"),
            ("[" * 50_000, "invalid_json"),
            ('{"type": "response.steer"}', "unsupported"),
            ("{}", "unsupported"),
        ):
            socket.send(text)
            assert msgspec.json.decode(socket.recv())["error"]["code"] == code


def test_socket_without_a_key_is_refused_at_the_handshake(server: LlmkitServer) -> None:
    for key in (None, "wrong"):
        with pytest.raises(InvalidStatus) as caught, plain(server, key):
            pass
        assert caught.value.response.status_code == 401
        assert b"invalid_api_key" in caught.value.response.body


def test_socket_accepts_a_key_in_a_subprotocol(server: LlmkitServer) -> None:
    protocols = ["realtime", "openai-insecure-api-key.key-of-two"]
    with plain(server, None, subprotocols=protocols) as socket:
        assert socket.subprotocol == "realtime"
        socket.send('{"type": "response.create", "input": "hello", "max_output_tokens": 1}')
        assert msgspec.json.decode(socket.recv())["type"] == "response.created"
    with (
        pytest.raises(InvalidStatus),
        plain(server, None, subprotocols=["openai-insecure-api-key.wrong"]),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "origin"), [("evil.example", None), ("127.0.0.1", "https://evil.example")]
)
def test_socket_of_a_foreign_page_or_host_is_refused(
    server: LlmkitServer, host: str, origin: str | None
) -> None:
    headers = {"authorization": f"Bearer {API_KEYS[0]}"}
    url = f"ws://{host}:{server.port}/v1/responses"
    with (
        pytest.raises(InvalidStatus) as caught,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
        connect(url, additional_headers=headers, origin=origin, sock=sock),
    ):
        pass
    assert caught.value.response.status_code == 403


def test_socket_closes_at_a_message_that_is_too_large(server: LlmkitServer) -> None:
    with plain(server) as socket:
        socket.send("x" * 100_001)
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1009


# The session alone


def test_responses_socket_ends_after_its_lifetime() -> None:
    sent: list[dict[str, Any]] = []
    messages = [{"type": "websocket.connect"}]

    class ShortSocket(ResponsesSocket):
        lifetime_s = 0.01

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {HTTP_APP: None, SOCKET_HEADERS: [], SUBPROTOCOL: None}
    asyncio.run(ShortSocket(scope, receive, send).run())
    assert [message["type"] for message in sent] == [
        "websocket.accept",
        "websocket.send",
        "websocket.close",
    ]
    error = msgspec.json.decode(sent[1]["text"])["error"]
    assert error["code"] == "websocket_connection_limit_reached"


def test_client_of_api_responses_needs_no_store(client: openai.OpenAI, tmp_path: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="--store-responses"):
        client.responses.create(model="tiny", input="more", previous_response_id="resp_1")
