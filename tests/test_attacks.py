"""The server against bytes and values that are made to hurt it: short runs; the long ones are in test_soak.py."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import attacks
import described
import httpx
import psutil
import pytest
from attacks import BODY, SMUGGLED, Answers, chunked, request
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint

from llmkit.runtime.server.bodies.base import parse
from llmkit.runtime.server.bodies.completions import MAX_PROMPTS, CompletionBody
from llmkit.runtime.server.bodies.responses import ResponsesBody
from llmkit.runtime.server.bodies.tokens import DetokenizeBody
from llmkit.runtime.server.http.errors import ApiError

KEY = "secret-key"
NONE = b"0\r\n\r\n"  # an empty body in chunks
H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """On every address of the machine, so that Host is not checked and reaches what is behind that check."""
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "keys").write_text(KEY)
    model = tiny_checkpoint(folder / "model")
    options = {"host": "0.0.0.0", "api_key_file": str(folder / "keys"), "served_model_name": "tiny"}
    with serving(folder / "log", model, KEY, kv_cache_memory=2**24, max_num_seqs=16, **options) as running:
        yield running
        assert [line for line in running.log.read_text().splitlines() if " is ready at " not in line] == []


def sent(server: ServerProcess, *parts: bytes) -> Answers:
    return asyncio.run(attacks.exchange(server.port, parts, quiet_s=attacks.HANG_S))


def test_damaged_requests_get_a_short_answer_or_a_closed_connection(server: ServerProcess, http: httpx.Client) -> None:
    statuses = set()
    for number, answers in attacks.fuzz(server.port, KEY, range(1000)):
        assert attacks.faults(answers) == [], f"damaged({number}): {attacks.damaged(number, KEY)}"
        statuses |= set(answers.statuses) if isinstance(answers, Answers) else set()
    assert {200, 400, 404, 431} <= statuses
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        request(BODY + SMUGGLED, b"/v1/completions", b"POST", KEY, b"Content-Length: 44", b"Content-Length: 99"),
        request(NONE + SMUGGLED, b"/v1/completions", b"POST", KEY, b"Content-Length: 4", b"Transfer-Encoding: chunked"),
        request(NONE + SMUGGLED, b"/v1/completions", b"POST", KEY, b"Transfer-Encoding: chunked", b"Content-Length: 4"),
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
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_a_400_and_the_end(server: ServerProcess, data: bytes) -> None:
    answers = sent(server, data)
    assert (answers.statuses, answers.closed) == ([400], True)
    assert json.loads(answers.bodies[0])["error"]["code"] == "invalid_http"


def test_trailers_are_no_headers(server: ServerProcess) -> None:
    end = b"0\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n"
    assert sent(
        server, chunked(b"2c\r\n", BODY, b"\r\n", end=end, coding=b"chunked\r\nConnection: close")
    ).statuses == [401]


def test_endless_trailers_and_chunk_extensions_are_hung_up_on(server: ServerProcess) -> None:
    for begin in (chunked(b"2c\r\n", BODY, b"\r\n", key=KEY, end=b"0\r\nx: "), chunked(key=KEY, end=b"2c;")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=attacks.HANG_S) as connection:
            connection.sendall(begin)
            with pytest.raises(ConnectionError):
                _pour(connection)


def test_an_upgrade_is_not_made_and_the_request_is_answered(server: ServerProcess) -> None:
    """Java's client asks for HTTP/2 in its first request, which has a body."""
    whole = request(BODY, b"/v1/completions", b"POST", KEY, *H2C)
    pieces = b"%x\r\n" % len(BODY) + BODY, b"\r\n0\r\n\r\n"
    for parts in (
        (whole,),
        (whole[:-30], whole[-30:]),
        (chunked(key=KEY, coding=b"\r\n".join([b"chunked", *H2C]), end=b""), *pieces),
    ):
        answers = sent(server, *parts, SMUGGLED)
        assert (answers.statuses, answers.closed) == ([200], True)
        assert json.loads(answers.bodies[0])["usage"]["completion_tokens"] == 2
    assert sent(server, request(b"", b"/version", b"GET", KEY, *H2C), SMUGGLED).statuses == [200]


def test_a_length_of_five_thousand_digits(server: ServerProcess) -> None:
    length = b"Content-Length: " + b"0" * 5000 + b"%d" % len(BODY)
    assert sent(server, request(BODY, b"/v1/completions", b"POST", KEY, length, b"Connection: close")).statuses == [200]


def test_a_host_that_is_no_name(server: ServerProcess) -> None:
    data = request(b"", b"/nowhere", b"GET", KEY, b"Connection: close").replace(b"localhost", b"[")
    assert sent(server, data).statuses == [404]


def test_pipelined_requests_leave_the_engine_with_their_client(server: ServerProcess) -> None:
    """The second one is not read, and does not hide from the first one that the client is gone."""
    long = json.dumps({"model": "tiny", "prompt": "x", "n": 16, "max_tokens": 240, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=attacks.HANG_S) as connection:
        connection.sendall(request(long, b"/v1/completions", b"POST", KEY) * 2)
        wait_for(lambda: server.metric("num_requests_running") > 0)
    wait_for(lambda: server.metric("num_requests_running") == 0)
    assert server.metric("num_requests_waiting") == 0
    two = request(BODY, b"/v1/completions", b"POST", KEY)
    answers = sent(server, two + SMUGGLED)
    assert (answers.statuses, answers.closed) == ([200], True)


def test_schemathesis(http: httpx.Client) -> None:
    for path, body in described.BASES.items():
        model = {} if "/v2/" in path else {"model": described.MODEL}
        http.post(path.format(name=described.MODEL), json={**model, **body}).raise_for_status()
    described.attack(http, examples=4)
    assert http.get("/health").status_code == 200


def test_every_route_and_body_is_described(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert len(document["paths"]) > 15
    bodiless = {
        path for path, methods in document["paths"].items() if "requestBody" not in methods.get("post", "requestBody")
    }
    assert bodiless == {"/v2/repository/index"}, "another needs a row in BODIES of openapi.py"
    for path, methods in document["paths"].items():
        assert ("security" in next(iter(methods.values()))) == (
            http.get(path, headers={"authorization": ""}).status_code == 401
        )
    chat = document["components"]["schemas"]["ChatBody"]
    assert chat["additionalProperties"] is False
    assert chat["properties"]["tool_choice"]["anyOf"][0]["enum"] == ["auto", "none", "required"]
    assert chat["properties"]["modalities"] == {"enum": [None, ["text"]]}


def test_a_body_of_a_million_wrong_values_is_refused_in_no_time() -> None:
    keys = ",".join(f'"{index}":1' for index in range(100_000))
    for kind, data, code in (
        (ResponsesBody, f'{{"model":"m","input":"x","metadata":{{{keys}}}}}', "too_many_errors"),
        (CompletionBody, f'{{"model":"m","prompt":"x","stream_options":{{{keys}}}}}', "too_many_errors"),
        (DetokenizeBody, '{"model":"m","tokens":[' + '"",' * 1_000_000 + "5]}", "invalid_type"),
        (CompletionBody, '{"model":"m","prompt":[' + "[]," * MAX_PROMPTS + "[5]]}", "invalid_value"),
    ):
        with pytest.raises(ApiError) as caught:
            parse(kind, data.encode())
        assert (caught.value.status, caught.value.code) == (400, code)


def test_two_hundred_clients_at_once_get_an_answer_or_a_429(server: ServerProcess) -> None:
    async def all_of_them() -> list[Answers]:
        data = request(BODY, b"/v1/completions", b"POST", KEY, b"Connection: close")
        return await asyncio.gather(*(attacks.exchange(server.port, [data], attacks.HANG_S) for _ in range(200)))

    answers = asyncio.run(all_of_them())
    assert {tuple(answer.statuses) for answer in answers} <= {(200,), (429,)}
    assert all("usage" in json.loads(answer.bodies[0]) for answer in answers if answer.statuses == [200])


def test_the_limit_of_open_files_is_raised(server: ServerProcess) -> None:
    soft, hard = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == min(hard, 65_536)


def _pour(connection: socket.socket) -> None:
    for _ in range(1000):
        connection.sendall(b"e" * 65_536)
