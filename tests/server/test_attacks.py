"""Attacks with bytes and values: short runs. The long runs are in server/test_soak.py."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from support import attacks, schemathesis_cases
from support.attacks import BODY, SMUGGLED, Answers, chunked, request
from support.server_process import LlmkitServer, wait_for

from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.schemas.base_request import parse_request
from llmkit.runtime.server.schemas.completion_request import MAX_PROMPTS, CompletionRequest
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.schemas.tokenize_request import DetokenizeRequest

KEY = "secret-key"
API_KEYS = (KEY,)
# A server on every address of the machine does not check Host, so attacks reach what is behind that
# check.
SERVER: dict[str, Any] = {
    "host": "0.0.0.0",
    "served_model_name": "tiny",
    "kv_cache_memory": 2**24,
    "max_num_seqs": 16,
}
NONE = b"0\r\n\r\n"  # an empty body in chunks
H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")


@pytest.fixture(scope="module", autouse=True)
def server_logs_nothing(server: LlmkitServer) -> Iterator[None]:
    """No attack makes the server log anything but the names of unknown fields."""
    yield
    lines = server.log.read_text().splitlines()
    expected = re.compile(r" is ready at |: the field \S+ in a request to \S+ is ignored$")
    assert [line for line in lines if not expected.search(line)] == []


def sent(server: LlmkitServer, *parts: bytes) -> Answers:
    return asyncio.run(attacks.exchange(server.port, parts, quiet_s=attacks.HANG_S))


def test_server_answers_damaged_requests_briefly_or_closes(
    server: LlmkitServer, http: httpx.Client
) -> None:
    statuses = set()
    for number, answers in attacks.fuzz(server.port, KEY, range(400)):
        assert attacks.faults(answers) == [], f"damaged({number}): {attacks.damaged(number, KEY)}"
        statuses |= set(answers.statuses) if isinstance(answers, Answers) else set()
    assert {200, 400, 404, 431} <= statuses
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        request(
            BODY + SMUGGLED,
            b"/v1/completions",
            b"POST",
            KEY,
            b"Content-Length: 44",
            b"Content-Length: 99",
        ),
        request(
            NONE + SMUGGLED,
            b"/v1/completions",
            b"POST",
            KEY,
            b"Content-Length: 4",
            b"Transfer-Encoding: chunked",
        ),
        request(
            NONE + SMUGGLED,
            b"/v1/completions",
            b"POST",
            KEY,
            b"Transfer-Encoding: chunked",
            b"Content-Length: 4",
        ),
        chunked(b"2c\r\n", BODY, b"\r\n", key=KEY, coding=b"gzip, chunked") + SMUGGLED,
        chunked(b"2c\r\n", BODY, b"\r\n", key=KEY, coding=b"identity") + SMUGGLED,
        chunked(b"2c\r\n", BODY, b"\r\n", key=KEY).replace(b"HTTP/1.1", b"HTTP/1.0") + SMUGGLED,
        chunked(b"0x2c\r\n", BODY, b"\r\n", key=KEY) + SMUGGLED,
        chunked(b"2c\n", BODY, b"\n", key=KEY, end=b"0\n\n") + SMUGGLED,
        request(BODY, b"/v1/completions", b"POST", KEY, b"X: a\r\n folded"),
        request(BODY, b"/v1/completions", b"POST", KEY, b"Content-Length : 44"),
        request(BODY, b"/v1/completions", b"POST", KEY, b"Host: evil"),
        request(BODY, b"/v1/completions", b"POST", KEY, b"Authorization: Bearer other"),
        request(BODY, b"/v1/completions", b"POST", KEY, b"Content-Type: text/plain"),
        request(BODY, b"http://evil/v1/completions", b"POST", KEY),
        request(BODY, b"/v1/completions", b"POST", KEY).replace(b"Host: localhost\r\n", b""),
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_server_refuses_ambiguous_requests_with_400_and_closes(
    server: LlmkitServer, data: bytes
) -> None:
    answers = sent(server, data)
    assert (answers.statuses, answers.closed) == ([400], True)
    assert json.loads(answers.bodies[0])["error"]["code"] == "invalid_http"


def test_trailers_are_not_used_as_headers(server: LlmkitServer) -> None:
    end = b"0\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n"
    assert sent(
        server, chunked(b"2c\r\n", BODY, b"\r\n", end=end, coding=b"chunked\r\nConnection: close")
    ).statuses == [401]


def test_endless_trailers_and_chunk_extensions_close_the_connection(server: LlmkitServer) -> None:
    for begin in (
        chunked(b"2c\r\n", BODY, b"\r\n", key=KEY, end=b"0\r\nx: "),
        chunked(key=KEY, end=b"2c;"),
    ):
        with socket.create_connection(
            ("127.0.0.1", server.port), timeout=attacks.HANG_S
        ) as connection:
            connection.sendall(begin)
            with pytest.raises(ConnectionError):
                _pour(connection)


def test_upgrade_header_is_ignored_and_the_request_answered(server: LlmkitServer) -> None:
    """Java's client asks for HTTP/2 in its first request, which has a body."""
    complete_request = request(BODY, b"/v1/completions", b"POST", KEY, *H2C)
    pieces = b"%x\r\n" % len(BODY) + BODY, b"\r\n0\r\n\r\n"
    for parts in (
        (complete_request,),
        (complete_request[:-30], complete_request[-30:]),
        (chunked(key=KEY, coding=b"\r\n".join([b"chunked", *H2C]), end=b""), *pieces),
    ):
        answers = sent(server, *parts, SMUGGLED)
        assert (answers.statuses, answers.closed) == ([200], True)
        assert json.loads(answers.bodies[0])["usage"]["completion_tokens"] == 2
    assert sent(server, request(b"", b"/version", b"GET", KEY, *H2C), SMUGGLED).statuses == [200]


def test_content_length_of_five_thousand_digits_is_refused(server: LlmkitServer) -> None:
    length = b"Content-Length: " + b"0" * 5000 + b"%d" % len(BODY)
    assert sent(
        server, request(BODY, b"/v1/completions", b"POST", KEY, length, b"Connection: close")
    ).statuses == [200]


def test_host_header_that_is_no_name_is_refused(server: LlmkitServer) -> None:
    data = request(b"", b"/nowhere", b"GET", KEY, b"Connection: close").replace(b"localhost", b"[")
    assert sent(server, data).statuses == [404]


def test_pipelined_requests_are_cancelled_when_their_client_disconnects(
    server: LlmkitServer,
) -> None:
    """The second one is not read, and does not hide from the first one that the client is gone."""
    long = json.dumps(
        {"model": "tiny", "prompt": "x", "n": 16, "max_tokens": 240, "ignore_eos": True}
    ).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=attacks.HANG_S) as connection:
        connection.sendall(request(long, b"/v1/completions", b"POST", KEY) * 2)
        wait_for(lambda: server.metric("num_requests_running") > 0)
    wait_for(lambda: server.metric("num_requests_running") == 0)
    assert server.metric("num_requests_waiting") == 0
    two = request(BODY, b"/v1/completions", b"POST", KEY)
    answers = sent(server, two + SMUGGLED)
    assert (answers.statuses, answers.closed) == ([200], True)


def test_openapi_document_matches_the_server_under_schemathesis(http: httpx.Client) -> None:
    for path, body in schemathesis_cases.BASES.items():
        model = {} if "/v2/" in path else {"model": schemathesis_cases.MODEL}
        http.post(
            path.format(name=schemathesis_cases.MODEL), json={**model, **body}
        ).raise_for_status()
    schemathesis_cases.attack(http, examples=1)
    assert http.get("/health").status_code == 200


def test_openapi_document_describes_every_route_and_body(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert len(document["paths"]) > 15
    bodiless = {
        path
        for path, methods in document["paths"].items()
        if "requestBody" not in methods.get("post", "requestBody")
    }
    cancel = "/v1/responses/{response_id}/cancel"
    known = {"/v2/repository/index", cancel}
    assert bodiless == known, "add others to REQUEST_SCHEMAS of openapi.py"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = http.request(method, path, headers={"authorization": ""})
            assert ("security" in operation) == (answer.status_code == 401), (method, path)
    chat = document["components"]["schemas"]["ChatBody"]
    assert chat["additionalProperties"] is True
    assert document["components"]["schemas"]["InferBody"]["additionalProperties"] is False
    answer = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    assert "x-llmkit-ignored" in answer["headers"]
    assert chat["properties"]["tool_choice"]["anyOf"][0]["enum"] == ["auto", "none", "required"]
    assert chat["properties"]["modalities"] == {"enum": [None, ["text"]]}


def test_body_of_a_million_wrong_values_is_refused_quickly() -> None:
    keys = ",".join(f'"{index}":1' for index in range(100_000))
    for kind, data, code in (
        (ResponsesRequest, f'{{"model":"m","input":"x","metadata":{{{keys}}}}}', "too_many_errors"),
        (
            CompletionRequest,
            f'{{"model":"m","prompt":"x","stream_options":{{{keys}}}}}',
            "unknown_parameter",
        ),
        (DetokenizeRequest, '{"model":"m","tokens":[' + '"",' * 1_000_000 + "5]}", "invalid_type"),
        (
            CompletionRequest,
            '{"model":"m","prompt":[' + "[]," * MAX_PROMPTS + "[5]]}",
            "invalid_value",
        ),
    ):
        with pytest.raises(ApiError) as caught:
            parse_request(kind, data.encode())
        assert (caught.value.status, caught.value.code) == (400, code)


def test_body_of_64_mb_is_a_413_for_urllib(server: LlmkitServer) -> None:
    """urllib reads nothing before it has sent everything."""
    url = f"{server.url}/v1/completions"
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, b"x" * 64_000_000, headers), timeout=60)
    assert caught.value.code == 413
    assert json.loads(caught.value.read())["error"]["code"] == "body_too_large"


def test_two_hundred_concurrent_clients_get_an_answer_or_429(server: LlmkitServer) -> None:
    async def all_of_them() -> list[Answers]:
        data = request(BODY, b"/v1/completions", b"POST", KEY, b"Connection: close")
        return await asyncio.gather(
            *(attacks.exchange(server.port, [data], attacks.HANG_S) for _ in range(200))
        )

    answers = asyncio.run(all_of_them())
    assert {tuple(answer.statuses) for answer in answers} <= {(200,), (429,)}
    assert all(
        "usage" in json.loads(answer.bodies[0]) for answer in answers if answer.statuses == [200]
    )


def test_open_files_limit_is_raised(server: LlmkitServer) -> None:
    soft, hard = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == min(hard, 65_536)


def _pour(connection: socket.socket) -> None:
    for _ in range(1000):
        connection.sendall(b"e" * 65_536)
