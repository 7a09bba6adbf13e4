"""The API against a real engine process over a tiny random model."""

from __future__ import annotations

import gzip
import json
import re
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest
from support.server_process import LlmkitServer, wait_for
from support.tiny_models import VOCAB

KEY = "secret-key"
CONTEXT = 4096
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
CHAT = [{"role": "user", "content": "hello, how are you today?"}]
MAX_BODY_BYTES = 65536
QUEUE = 8  # requests that run or wait
MODEL: dict[str, Any] = {"max_position_embeddings": CONTEXT}
API_KEYS = (KEY, "another-key")
SERVER: dict[str, Any] = {
    "served_model_name": "tiny",
    "max_body_bytes": MAX_BODY_BYTES,
    "body_timeout": 1.0,
    "stream_keep_alive": 0.2,
    "max_num_seqs": 4,
    "max_waiting": QUEUE - 4,
    "kv_cache_memory": 64 * 2**20,
}


def idle(server: LlmkitServer) -> bool:
    return server.metric("num_requests_running") + server.metric("num_requests_waiting") == 0


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert len(answer.content) <= 16 * 1024
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def events(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_completion_has_text_and_usage(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        **GREEDY,
        prompt="hello world",
        max_tokens=7,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].token_ids) == 7  # type: ignore[attr-defined]
    assert answer.usage is not None
    assert (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    ) == (2, 7, 9)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_completion_stream_equals_the_full_response(client: openai.OpenAI) -> None:
    params: dict[str, Any] = {
        "prompt": "one two",
        "max_tokens": 60,
        "extra_body": {"return_token_ids": True},
    }
    full = client.completions.create(**GREEDY, **params)
    chunks = list(
        client.completions.create(
            **GREEDY, **params, stream=True, stream_options={"include_usage": True}
        )
    )
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == full.choices[0].text
    ids = [token for chunk in parts for token in chunk.choices[0].token_ids]
    assert ids == full.choices[0].token_ids  # type: ignore[attr-defined]
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == full.choices[0].finish_reason
    assert last.choices == []
    assert last.usage == full.usage
    assert all(chunk.usage is None for chunk in parts)


def test_chat_stream_equals_the_full_response(client: openai.OpenAI) -> None:
    params: dict[str, Any] = {**GREEDY, "messages": CHAT, "max_completion_tokens": 30}
    full = client.chat.completions.create(**params)
    assert full.object == "chat.completion"
    assert full.choices[0].message.role == "assistant"
    assert full.usage is not None
    assert full.usage.completion_tokens <= 30
    chunks = list(client.chat.completions.create(**params, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == full.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_template_is_rendered_with_special_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, messages=CHAT, max_tokens=1)
    same = client.completions.create(
        **GREEDY,
        prompt=f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|>\n<|im_start|>assistant\n",
        max_tokens=1,
    )
    assert answer.usage is not None
    assert same.usage is not None
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens
    assert answer.choices[0].message.content == same.choices[0].text


def test_several_prompts_give_the_same_text_as_each_alone(client: openai.OpenAI) -> None:
    prompts = ["hello", "the quick brown fox", "one two three"]
    alone = [
        client.completions.create(**GREEDY, prompt=prompt, max_tokens=20).choices[0].text
        for prompt in prompts
    ]
    together = client.completions.create(**GREEDY, prompt=prompts, max_tokens=20)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**GREEDY, prompt=prompts, max_tokens=20, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_prompts_can_be_token_ids(client: openai.OpenAI) -> None:
    one = client.completions.create(**GREEDY, prompt=[5, 6, 7], max_tokens=5)
    two = client.completions.create(**GREEDY, prompt=[[5, 6, 7], [8, 9]], max_tokens=5)
    assert two.choices[0].text == one.choices[0].text
    assert two.usage is not None
    assert two.usage.prompt_tokens == 5


def test_stop_string_across_tokens_ends_the_text_before_it(
    server: LlmkitServer, client: openai.OpenAI
) -> None:
    params: dict[str, Any] = {
        "prompt": "a small model",
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    full = client.completions.create(**GREEDY, **params, max_tokens=60).choices[0].text
    stop = full[20:27]
    expected = full[: full.index(stop)]
    answer = client.completions.create(
        **GREEDY, **params, max_tokens=4000, stop=["never there", stop]
    )
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(answer.choices[0].token_ids)
    chunks = list(
        client.completions.create(**GREEDY, **params, max_tokens=4000, stop=stop, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    made = server.metric("generation_tokens_total")
    wait_for(lambda: idle(server))
    assert server.metric("generation_tokens_total") < made + 3000


def test_stop_token_ends_the_text_and_is_not_in_it(client: openai.OpenAI) -> None:
    params: dict[str, Any] = {**GREEDY, "prompt": "lazy dog"}
    extra = {"return_token_ids": True, "ignore_eos": True}
    ids = client.completions.create(**params, max_tokens=30, extra_body=extra).choices[0].token_ids
    stop = ids[10]
    expected = ids[: ids.index(stop) + 1]
    answer = client.completions.create(
        **params, max_tokens=30, extra_body={**extra, "stop_token_ids": [stop]}
    )
    assert answer.choices[0].token_ids == expected  # type: ignore[attr-defined]
    assert answer.choices[0].finish_reason == "stop"
    before = client.completions.create(
        **params, max_tokens=max(1, len(expected) - 1), extra_body=extra
    )
    assert len(expected) == 1 or answer.choices[0].text == before.choices[0].text


@pytest.mark.parametrize("seed", [0, -(2**63), 2**63 - 1])
def test_seed_repeats_the_same_text(client: openai.OpenAI, seed: int) -> None:
    params: dict[str, Any] = {
        "model": "tiny",
        "prompt": "hello",
        "max_tokens": 20,
        "temperature": 1.0,
        "seed": seed,
    }
    first, second = (client.completions.create(**params).choices[0].text for _ in range(2))
    assert first == second


def test_models_health_and_version_routes(
    server: LlmkitServer, client: openai.OpenAI, http: httpx.Client
) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "llmkit", CONTEXT)
    assert client.models.retrieve("tiny") == model
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200
    assert http.get("/version").json().keys() == {"version"}
    assert "server" not in http.get("/health").headers


def test_routes_but_health_need_a_key(server: LlmkitServer) -> None:
    with httpx.Client(base_url=server.url) as stranger:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/version", "/nowhere"):
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": KEY},
                {"authorization": ""},
            ):
                answer = stranger.get(path, headers=headers)
                assert answer.status_code == 401
                assert error_of(answer)["type"] == "authentication_error"
        assert stranger.post("/v1/completions", json={}).status_code == 401
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/ready").status_code == 200
        assert (
            stranger.get("/version", headers={"authorization": "Bearer another-key"}).status_code
            == 200
        )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "localhost:80@evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:1234"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:9", "origin": "http://localhost:8"}, 403),
        ({"host": "localhost:8000", "origin": "http://evil.localhost:8000"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000.evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:80000"}, 403),
        ({"host": "localhost:8000", "origin": "http://xlocalhost:8000"}, 403),
        ({"host": "localhost:8000", "origin": "ws://localhost:8000"}, 403),
        ({"host": "localhost:8000", "origin": "localhost:8000"}, 403),
        ({"host": "evil.localhost:8000", "origin": "http://evil.localhost:8000"}, 403),
        ({"host": "localhost:9", "origin": "http://localhost:9"}, 200),
    ],
)
def test_foreign_hosts_and_origins_are_refused(
    http: httpx.Client, headers: dict[str, str], status: int
) -> None:
    answer = http.get("/version", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert error_of(answer)["type"] == "permission_error"
        option = (
            "--allowed-origins"
            if error_of(answer)["code"] == "foreign_origin"
            else "--allowed-hosts"
        )
        assert option in error_of(answer)["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v2/health/live", "/v2/health/ready"])
def test_health_is_told_to_any_host_but_no_foreign_page(http: httpx.Client, path: str) -> None:
    assert http.get(path, headers={"host": "10.1.2.3:8000"}).status_code == 200
    foreign = {"host": "10.1.2.3:8000", "origin": "https://evil.example"}
    assert http.get(path, headers=foreign).status_code == 403
    assert http.get(f"{path}/", headers={"host": "10.1.2.3:8000"}).status_code == 403


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"temperature": 3}, 400, "temperature", "invalid_value"),
    ({"suffix": "x"}, 400, "suffix", "unsupported"),
    ({"logit_bias": {str(VOCAB): 1}}, 400, "logit_bias", "invalid_token_id"),
    ({"min_tokens": 6, "max_tokens": 5}, 400, "min_tokens", "invalid_value"),
    ({"n": QUEUE + 1}, 400, "prompt", "too_many_prompts"),
    ({"prompt": ""}, 400, "prompt", "invalid_value"),
    ({"prompt": [VOCAB]}, 400, "prompt", "invalid_token_id"),
    ({"prompt": [-1]}, 400, "prompt", "invalid_token_id"),
    ({"prompt": [2**70]}, 400, "prompt", "invalid_token_id"),
    ({"stop_token_ids": [VOCAB]}, 400, "stop_token_ids", "invalid_token_id"),
    ({"prompt": [5] * (CONTEXT + 1)}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": [5] * CONTEXT}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": [5], "max_tokens": CONTEXT}, 400, "max_tokens", "context_length_exceeded"),
    ({"prompt": ["x"] * (QUEUE + 1)}, 400, "prompt", "too_many_prompts"),
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"stop": [""]}, 400, "stop", "invalid_value"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "status", "param", "code"), WRONG)
def test_wrong_requests_are_refused_with_their_field(
    http: httpx.Client,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    code: str,
    stream: bool,
) -> None:
    body = {"model": "tiny", "prompt": "x", "stream": stream, **fields}
    answer = http.post("/v1/completions", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)


def test_context_error_has_both_token_counts(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/completions", json={"model": "tiny", "prompt": [5] * 4000, "max_tokens": 200}
    )
    assert "4096" in error_of(answer)["message"]
    assert "4200" in error_of(answer)["message"]


def test_context_error_of_a_chat_has_its_length(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x" * 60_000}]
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert error_of(answer)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/redoc", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_unknown_paths_and_wrong_methods_are_refused(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    error_of(answer)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""]
)
def test_wrong_content_type_is_a_415(http: httpx.Client, kind: str) -> None:
    answer = http.post(
        "/v1/completions", content=b"{}", headers={"content-type": kind} if kind else {}
    )
    assert answer.status_code == 415
    error_of(answer)


def test_body_that_is_no_json_or_not_utf8_is_a_400(http: httpx.Client) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    for content in (b"{", b"\xff\xfe", b"[" * 50_000, b""):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "invalid_json"
    answer = http.post(
        "/v1/completions", content=b'{"model":"tiny","prompt":"x","top_p":NaN}', headers=headers
    )
    assert (answer.status_code, error_of(answer)["param"]) == (400, "top_p")


def test_large_body_is_a_413_declared_or_not(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    pieces = (b"x" * 1000 for _ in range(MAX_BODY_BYTES // 1000 + 2))
    for content in (b"x" * (MAX_BODY_BYTES + 1), pieces):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 413
        error_of(answer)


def test_large_body_is_answered_although_the_client_still_sends(server: LlmkitServer) -> None:
    """The answer is not lost in a reset of the connection, whatever it says."""
    length = 8 * MAX_BODY_BYTES
    with_key = head(server, length=length)
    for data, status in (
        (with_key, 413),
        (with_key.replace(b"application/json", b"text/plain"), 415),
        (with_key.replace(KEY.encode(), b"wrong"), 401),
        (with_key.replace(b"/v1/completions", b"/nowhere"), 404),
        (with_key.replace(b"HTTP/1.1", b"HTTP/1.0"), 413),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(data + b"x" * (2 * MAX_BODY_BYTES))
            select.select([connection], [], [], 60)  # the answer is there, and not read yet
            for _ in range(6):
                connection.sendall(b"x" * MAX_BODY_BYTES)
                time.sleep(0.001)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
        assert received.startswith(f"HTTP/1.1 {status} ".encode())
        assert received.count(b"connection: close\r\n") == 1
        assert received.endswith(b"}}")


def test_large_body_is_dropped_up_to_a_number_of_bytes(server: LlmkitServer) -> None:
    """Beyond 16 times the limit the connection is cut, however much the client would send."""
    sent = 0

    def pour(connection: socket.socket) -> None:
        nonlocal sent
        while sent < (64 << 20):  # the bound, and what lies between two sockets, is far less
            connection.sendall(b"x" * MAX_BODY_BYTES)
            sent += MAX_BODY_BYTES

    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head(server, length=1 << 40))
        with pytest.raises(ConnectionError):
            pour(connection)
    assert sent > 8 * MAX_BODY_BYTES


def test_large_body_is_dropped_for_a_limited_time(server: LlmkitServer) -> None:
    def drip(connection: socket.socket) -> None:
        while time.monotonic() < start_time + 60:  # `body_timeout` is 1 s
            connection.sendall(b"x")
            time.sleep(0.02)

    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        start_time = time.monotonic()
        connection.sendall(head(server, length=1 << 40))
        assert connection.recv(12) == b"HTTP/1.1 413"
        with pytest.raises(ConnectionError):
            drip(connection)
    assert time.monotonic() > start_time + 0.5


def test_large_body_that_stops_is_not_waited_for(server: LlmkitServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head(server, length=1 << 40))
        while connection.recv(65536):  # the answer, and the end of what the server sends
            pass
        port = connection.getsockname()[1]
        process = psutil.Process(server.process.pid)

        def is_open() -> bool:
            return any(one.raddr and one.raddr.port == port for one in process.net_connections())

        wait_for(lambda: not is_open())


def test_body_in_gzip_is_decoded_within_the_limit(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    body = json.dumps({**GREEDY, "prompt": "hello " * 500, "max_tokens": 2}).encode()
    headers = {"content-type": "application/json", "content-encoding": "gzip"}

    def post(content: bytes, **more: str) -> httpx.Response:
        more = {name.replace("_", "-"): value for name, value in more.items()}
        return http.post("/v1/completions", content=content, headers=headers | more)

    plain = http.post("/v1/completions", content=body, headers=headers | {"content-encoding": ""})
    for answer in (post(gzip.compress(body)), post(gzip.compress(body), content_encoding="X-GZIP")):
        assert answer.status_code == 200
        assert answer.json()["choices"] == plain.json()["choices"]
    for content, status, code in (
        (gzip.compress(b" " * MAX_BODY_BYTES), 400, "invalid_json"),
        (gzip.compress(b" " * (MAX_BODY_BYTES + 1)), 413, "body_too_large"),
        (gzip.compress(b" " * (1 << 24)), 413, "body_too_large"),  # a bomb: 16 MiB in 16 KB
        (body, 400, "invalid_gzip"),
        (gzip.compress(body)[:-1], 400, "invalid_gzip"),
        (gzip.compress(body) + b"x", 400, "invalid_gzip"),
    ):
        answer = post(content)
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    for coding in ("br", "deflate", "zstd", "gzip, gzip"):
        answer = post(body, content_encoding=coding)
        assert (answer.status_code, error_of(answer)["code"]) == (415, "content_encoding")
        assert coding in error_of(answer)["message"]
        assert answer.headers["accept-encoding"] == "gzip"


def test_head_is_answered_as_get_without_a_body(server: LlmkitServer, http: httpx.Client) -> None:
    for path in (
        "/health",
        "/v1/models",
        "/v1/models/tiny",
        "/metrics",
        "/openapi.json",
        "/",
        "/v2",
    ):
        head_answer = http.head(path)
        get_answer = http.get(path)
        assert (head_answer.status_code, head_answer.content) == (200, b"")
        assert head_answer.headers["content-type"] == get_answer.headers["content-type"]
        if path != "/metrics":
            assert head_answer.headers["content-length"] == str(len(get_answer.content))
    assert http.head("/nowhere").status_code == 404
    assert http.head("/v1/completions").status_code == 405
    assert http.delete("/health").headers["allow"] == "GET, HEAD"
    assert httpx.head(f"{server.url}/v1/models").status_code == 401
    # The connection goes on: no body stands between two answers.
    two = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for _ in range(2):
            connection.sendall(two)
            received = b""
            while not received.endswith(b"\r\n\r\n"):
                received += connection.recv(65536)
            assert received.count(b"HTTP/1.1 200") == 1


def test_http_1_0_gets_no_chunks(server: LlmkitServer) -> None:
    for stream in (True, False):
        body = json.dumps({**GREEDY, "prompt": "x", "max_tokens": 9, "stream": stream}).encode()
        request = head(server, length=len(body)).replace(b"HTTP/1.1", b"HTTP/1.0") + body
        headers, _, content = raw(server, request).partition(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200 ")
        assert b"transfer-encoding" not in headers.lower()
        assert b"connection: close" in headers.lower()
        assert (b"content-length" in headers) is not stream
        if stream:
            assert content.startswith(b"data: {")
            assert content.endswith(b"data: [DONE]\n\n")
            assert len(list(events(content.decode().splitlines().__iter__()))) >= 2
        else:
            assert json.loads(content)["object"] == "text_completion"
    health = raw(server, b"HEAD /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert health.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("req_1-a.b~c:d/e+f=g@h", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ('a"b', False),
        ("a;b", False),
        ("\xe9", False),
        (None, False),
    ],
)
def test_request_id_is_returned_if_sane_else_replaced(
    http: httpx.Client, given: str | None, kept: bool
) -> None:
    headers = {} if given is None else {"x-request-id": given.encode("latin-1")}
    for method, path, status in (
        ("GET", "/health", 200),
        ("GET", "/nowhere", 404),
        ("POST", "/v1/completions", 415),
        ("OPTIONS", "/v1/completions", 405),
    ):
        answer = http.request(method, path, headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == status
        assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
        if kept:
            assert answer.headers["x-request-id"] == given
        else:
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_request_id_reaches_the_real_clients(server: LlmkitServer, client: openai.OpenAI) -> None:
    headers = {"x-request-id": "mine-1"}
    answer = client.completions.create(**GREEDY, prompt="x", max_tokens=1, extra_headers=headers)
    assert answer._request_id == "mine-1"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x", extra_headers=headers)
    assert caught.value.request_id == "mine-1"
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, default_headers=headers) as claude:
        message = claude.messages.create(
            model="tiny", max_tokens=1, messages=[{"role": "user", "content": "x"}]
        )
    assert message._request_id == "mine-1"
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nx-request-id: a\r\nx-request-id: b\r\n"
    for data in (two + b"Connection: close\r\n\r\n", b"not http\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", raw(server, data))
    refused = raw(server, b"GET / HTTP/1.1\r\nx-request-id: mine-2\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nx-request-id: mine-2\r\n" in refused


def raw(server: LlmkitServer, data: bytes) -> bytes:
    """Send bytes, wait for the server to close or answer in full, return what came."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def head(server: LlmkitServer, more: str = "\r\n", length: int = 100) -> bytes:
    """The headers of a completion's request, complete unless there is `more`."""
    lines = [
        "POST /v1/completions HTTP/1.1",
        f"host: 127.0.0.1:{server.port}",
        f"authorization: Bearer {KEY}",
    ]
    return "\r\n".join(
        [*lines, "content-type: application/json", f"content-length: {length}", more]
    ).encode()


def test_slow_body_is_a_408(server: LlmkitServer) -> None:
    answer = raw(server, head(server) + b"{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


def test_large_headers_are_a_431_complete_or_not(server: LlmkitServer) -> None:
    complete = raw(
        server, head(server, f"x: {'y' * 70_000}\r\nconnection: close\r\n\r\n") + b"{" * 100
    )
    endless = raw(server, head(server, f"x: {'y' * 70_000}"))
    for answer in (complete, endless):
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b'"code":"headers_too_large"' in answer


def test_invalid_http_is_a_400_in_json(server: LlmkitServer) -> None:
    answer = raw(server, b"\x16\x03\x01 not http\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'{"error":{' in answer


LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "hello",
    "max_tokens": 4000,
    "ignore_eos": True,
    "temperature": 0,
}


def test_client_that_disconnects_frees_the_engine(server: LlmkitServer, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        stream = events(answer.iter_lines())  # httpx closes the connection with its iterator
        assert next(stream)["object"] == "text_completion"
        assert server.metric("num_requests_running") == 1
        made = server.metric("generation_tokens_total")
    wait_for(lambda: idle(server))
    assert server.metric("generation_tokens_total") < made + 3000
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=0.3)
    wait_for(lambda: idle(server))
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0)


def test_stream_that_waits_gets_comments_and_clients_ignore_them(
    server: LlmkitServer, client: openai.OpenAI, http: httpx.Client
) -> None:
    chat: dict[str, Any] = {**GREEDY, "messages": CHAT, "max_tokens": 8}
    plain = client.chat.completions.create(**chat)
    with ExitStack() as stack:
        # All places are taken. Each of these streams has begun.
        busy = stack.enter_context(
            http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 4})
        )
        busy_events = events(busy.iter_lines())  # httpx closes the connection with its iterator
        next(busy_events)
        waiting = stack.enter_context(
            http.stream("POST", "/v1/chat/completions", json=chat | {"stream": True})
        )
        assert waiting.headers["content-type"].startswith("text/event-stream")
        parts = waiting.iter_raw()  # as the server sent them
        silence = [next(parts) for _ in range(2)]
        assert silence == [b": keep-alive\n\n"] * 2
        stream = client.chat.completions.create(**chat, stream=True)
        claude = stack.enter_context(
            anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
        )
        message: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "messages": CHAT}
        with claude.messages.stream(**message, extra_body={"temperature": 0}) as messages:
            busy.close()
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == plain.choices[0].message.content
            assert "".join(messages.text_stream) == text
        rest = list(parts)
    assert rest[-1].endswith(b"data: [DONE]\n\n")
    first = next(index for index, part in enumerate(rest) if b"data:" in part)
    assert set(rest[:first]) <= {b": keep-alive\n\n"}
    # vLLM's bench client strips each part, so the comment must end in the event's part, too.
    assert rest[first].startswith(b":\n\ndata: {")
    assert b":\n\n" not in b"".join(rest[first + 1 :])


def test_full_queue_is_a_429_and_running_requests_continue(
    server: LlmkitServer, http: httpx.Client
) -> None:
    body = LONG | {"prompt": ["hello"] * QUEUE, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as running:
        stream = events(running.iter_lines())
        next(stream)
        answer = http.post("/v1/completions", json=LONG | {"max_tokens": 1})
        assert answer.status_code == 429
        assert error_of(answer)["code"] == "queue_full"
        assert answer.headers["retry-after"] == "1"
        assert server.metric("num_requests_waiting") == QUEUE - 4
        next(stream)
    wait_for(lambda: idle(server))
    assert http.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200


def test_metrics_count_requests_and_tokens(server: LlmkitServer, http: httpx.Client) -> None:
    def figures() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        return {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if not line.startswith("#")
        }

    wait_for(lambda: idle(server))
    before = figures()
    http.post(
        "/v1/completions", json=LONG | {"prompt": [5, 6, 7], "max_tokens": 4}
    ).raise_for_status()
    after = figures()
    gained = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert gained["llmkit:prompt_tokens_total"] == 3
    assert gained["llmkit:generation_tokens_total"] == 4
    assert gained['llmkit:request_success_total{finished_reason="length"}'] == 1
    assert gained["llmkit:time_to_first_token_seconds_count"] == 1
    assert gained["llmkit:inter_token_latency_seconds_count"] == 3
    assert gained["llmkit:e2e_request_latency_seconds_count"] == 1
    assert after["llmkit:kv_cache_usage_perc"] == 0
    assert "llmkit:num_preemptions_total" in after


def test_openai_client_raises_its_own_error_types(
    server: LlmkitServer, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=CHAT, n=0)
    assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize("what", ["load", "unload"])
def test_adapter_routes_need_lora_dir(http: httpx.Client, what: str) -> None:
    got = http.post(f"/v1/{what}_lora_adapter", json={"lora_name": "one", "lora_path": "first"})
    assert (got.status_code, got.json()["error"]["code"]) == (404, "not_found")


def test_server_logs_only_the_ready_line(server: LlmkitServer) -> None:
    (line,) = server.log.read_text().splitlines()
    assert line.startswith("llmkit serve: tiny is ready at http://127.0.0.1:")
