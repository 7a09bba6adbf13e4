"""Attacks on keys and their limits, and with paths, headers, templates and schemas."""

from __future__ import annotations

import asyncio
import hmac
import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.engine_requests import engine_request
from support.server_process import LlmkitServer, wait_for
from support.tiny_models import tiny_checkpoint, write_tokenizer

from llmkit.checkpoint.open_model_files import open_model_files
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.grammar_compiler import compile_grammar, grammar_tokenizer
from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.engines.pending_grammars import PendingGrammars
from llmkit.runtime.server.http import api_keys, key_usage
from llmkit.runtime.server.http.api_keys import Admission, Client, find_client, load_api_keys
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.sandbox import Sandbox, SandboxError
from llmkit.runtime.server.sandbox_process import CompileGrammar, RenderTemplate
from llmkit.runtime.server.serve_options import ServeOptions

KEY = "plain-key"
ALICE = "alices-key"
BOB = "bobs-key"
SECRET = "key-of-the-environment"
KEY_FILE = f"{KEY}\n\n{ALICE} name=alice max_requests=2\n{BOB}\tmax_tokens_per_minute=20 name=bob\n"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{% set said = messages[-1]['content'] %}{% if said == 'loop' %}" + ENDLESS + "{% endif %}"
    "{% if said == 'fill' %}{{ 'x' * (2 ** 30) }}{% endif %}{{ said }}"
)
# Three numbers whose automata are multiplied: a hundred bytes that llguidance compiles for minutes.
BOMB = {"anyOf": [{"type": "integer", "multipleOf": 90001 + i} for i in range(3)]}
LONG: dict[str, Any] = {
    "prompt": "one two",
    "max_tokens": 32_000,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
SHORT: dict[str, Any] = {"prompt": "one two", "max_tokens": 2, "ignore_eos": True}


MODEL: dict[str, Any] = {"max_position_embeddings": 32_768}
API_KEYS = KEY_FILE.splitlines()
SERVER: dict[str, Any] = {"log_requests": True, "kv_cache_memory": 2**26}


def edit_model(path: Path) -> None:
    """Let the chat template loop or fill the memory when a message says so."""
    write_tokenizer(path, chat_template=TEMPLATE)


@pytest.fixture(scope="module", autouse=True)
def environment_key() -> Iterator[None]:
    """The server starts with a key in its environment, which its key file overrides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_API_KEY", SECRET)
        yield


def post(
    server: LlmkitServer, key: str, body: dict[str, Any], path: str = "/v1/completions"
) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(
        f"{server.url}{path}", json={"model": "model"} | body, headers=headers, timeout=120
    )


def chat(server: LlmkitServer, content: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2} | fields
    return post(server, KEY, body, "/v1/chat/completions")


def raw(server: LlmkitServer, sent: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


# Who gets in


@pytest.mark.parametrize(
    "target",
    [
        "//health",
        "/health/",
        "/health/../v1/models",
        "/v1/models?/health",
        "/v1/models#/health",
        "/HEALTH",
        "/v1/models;/health",
        "/health%2f..%2fv1%2fmodels",
        "/%76%31/models",
        "/v1%2fmodels",
        "/health%00/../v1/models",
        "/./health",
        "/health%0d%0aHost:%20x",
        "http://localhost/v1/models",
        "http://localhost//health",
        "/\\health",
        "/v1/models/../..",
        "/%2e%2e/metrics",
        "/page/../v1/models",
        "*",
        "/info",
        "/nothing",
    ],
)
def test_path_needs_a_key_in_any_spelling(server: LlmkitServer, target: str) -> None:
    answer = raw(
        server, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.split(b" ", 2)[1] in (b"401", b"400"), answer
    assert b"max_model_len" not in answer


@pytest.mark.parametrize(
    "target", ["/health", "/%68ealth", "/health?key=1", "http://localhost/health"]
)
def test_health_needs_no_key_under_its_routed_paths_only(server: LlmkitServer, target: str) -> None:
    answer = raw(
        server, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"status":"ok"}')


def test_request_behind_one_without_a_key_needs_a_key(server: LlmkitServer) -> None:
    models = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for first in (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    ):
        answer = raw(server, first + models)
        assert answer.startswith(b"HTTP/1.1 ")
        assert b"max_model_len" not in answer
        assert b"HTTP/1.1 200" not in answer or answer.count(b"HTTP/1.1 200") == first.startswith(
            b"GET"
        ), answer


@pytest.mark.parametrize("order", [(KEY, "wrong"), ("wrong", KEY), (KEY, KEY)])
def test_two_key_headers_are_refused(server: LlmkitServer, order: tuple[str, str]) -> None:
    lines = "".join(f"Authorization: Bearer {key}\r\n" for key in order)
    answer = raw(server, f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer  ",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Token {KEY}",
        f"Bearer {KEY},{ALICE}",
        f"Bearer {ALICE} name=alice",
        "Bearer name=alice",
        "Bearer \xff",
        f"Bearer {SECRET}",
    ],
)
def test_header_without_a_valid_key_is_refused(server: LlmkitServer, given: str) -> None:
    answer = raw(
        server,
        (
            f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: {given}\r\n"
            "Connection: close\r\n\r\n"
        ).encode(),
    )
    assert answer.startswith(b"HTTP/1.1 401 "), answer


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost.evil.com"},
        {"host": "127.0.0.1.evil.com:8000"},
        {"host": "evil.com@127.0.0.1"},
        {"host": ""},
        {"origin": "null"},
        {"origin": "http://localhost.evil.com"},
        {"origin": "https://127.0.0.1:1"},
    ],
    ids=str,
)
def test_foreign_web_pages_are_refused_and_get_no_cors_headers(
    server: LlmkitServer, headers: dict[str, str]
) -> None:
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    with server.client() as client:
        for method, path in (
            ("GET", "/version"),
            ("POST", "/v1/completions"),
            ("OPTIONS", "/v1/completions"),
        ):
            answer = client.request(method, path, headers=headers | preflight)
            assert answer.status_code == 403
            assert not any(name.startswith("access-control") for name in answer.headers)
        assert client.options("/v1/completions", headers=preflight).status_code == 405


def test_find_client_compares_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def watched(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return compare(given, known)

    monkeypatch.setattr(api_keys.hmac, "compare_digest", watched)
    clients = tuple(map(Client.of, ("one", "two", "three")))
    for given, expected in ((b"one", 0), (b"three", 2), (b"none", None), (b"", None)):
        compared.clear()
        assert find_client(clients, given) is (None if expected is None else clients[expected])
        assert compared == [client.digest for client in clients]
    # All digests have one length, so a longer key takes no longer to compare.
    assert len({len(known) for known in compared}) == 1


def test_processes_have_no_key_in_environment_or_arguments(
    server: LlmkitServer,
) -> None:
    # This starts both kinds of sandbox, so all processes exist.
    assert chat(server, "hi", response_format={"type": "json_object"}).status_code == 200
    assert SECRET in Path(f"/proc/{server.process.pid}/environ").read_text()
    others = psutil.Process(server.process.pid).children(recursive=True)
    assert len(others) == 3  # the engine, and the sandboxes of templates and of grammars
    for process in others:
        visible = Path(f"/proc/{process.pid}/environ").read_text() + " ".join(process.cmdline())
        assert not any(key in visible for key in (SECRET, KEY, ALICE, BOB, "LLMKIT_API_KEY"))


# What a key may use


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "KEY one",
            r"file:1: word 2 is not a field\. A line is KEY \[name=NAME\] \[max_requests=N\]",
        ),
        ("KEY\nKEY2 nam=x", r"file:2: word 2 is not a field"),
        ("KEY name=a b", r"file:1: word 3 is not a field"),
        ("KEY name=", r"file:1: name is wrong \(''\)"),
        ("KEY name=a/b", r"name is wrong \('a/b'\)\. up to 64 of"),
        ("KEY max_requests=0", r"max_requests is wrong \('0'\)\. a whole number above 0"),
        ("KEY max_requests=-1", "max_requests is wrong"),
        ("KEY max_tokens_per_minute=1.5", "max_tokens_per_minute is wrong"),
        ("KEY max_requests=1 max_requests=2", "file:1: max_requests is given twice"),
        ("KEY\nKEY name=x", "file:2: the key or its name is in an earlier line"),
        ("KEY name=x\n\nKEY2 name=x", "file:3: the key or its name is in an earlier line"),
        (" \n\n", "has no keys"),
    ],
)
def test_wrong_key_file_is_reported_with_its_line_and_no_key(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "file"
    path.write_text(text.replace("KEY", "sk-secret"))
    with pytest.raises(InputError, match=problem) as caught:
        load_api_keys(ServeOptions("m", api_key_file=path))
    assert "secret" not in str(caught.value)


def test_client_cannot_fill_the_queue_for_others(server: LlmkitServer) -> None:
    with ExitStack() as stack:
        headers = {"authorization": f"Bearer {ALICE}"}
        client = stack.enter_context(
            httpx.Client(base_url=server.url, headers=headers, timeout=120)
        )
        streams = [
            client.stream("POST", "/v1/completions", json={"model": "model"} | LONG)
            for _ in range(2)
        ]
        lines = [stack.enter_context(stream).iter_lines() for stream in streams]
        assert all(map(next, lines))  # both are under way
        refused = post(server, ALICE, SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert refused.headers["retry-after"] == "1"
        assert post(server, KEY, SHORT | {"n": 3}).status_code == 200
        listed = httpx.get(f"{server.url}/v1/models", headers={"x-api-key": ALICE})
        assert listed.status_code == 200  # asking how the server is costs nothing
    wait_for(lambda: post(server, ALICE, SHORT | {"n": 2}).status_code == 200)
    never = post(server, ALICE, SHORT | {"n": 3})
    assert (never.status_code, never.json()["error"]["code"]) == (400, "too_many_prompts")
    wait_for(lambda: '"client":"alice"' in server.log.read_text())
    log = server.log.read_text()
    assert not any(key in log for key in (KEY, ALICE, BOB, SECRET))


def test_key_over_its_tokens_per_minute_is_a_429(server: LlmkitServer) -> None:
    # The first request is admitted, however many tokens it uses.
    assert post(server, BOB, SHORT | {"max_tokens": 60}).status_code == 200
    refused = post(server, BOB, SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        429,
        "tokens_per_minute_exceeded",
    )
    assert 1 <= int(refused.headers["retry-after"]) <= 180
    assert post(server, KEY, SHORT).status_code == 200


def test_tokens_per_minute_come_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(key_usage.time, "monotonic", lambda: now[0])
    client = Client(max_tokens_per_minute=120)
    admission = client.admit()
    running = Choice(engine_request("1", [1, 2], max_tokens=200), 0, None)  # type: ignore[arg-type]
    running.completion_tokens = 98
    admission.reserve([running])
    client.release(client.admit())  # 100 of 120 are used
    running.completion_tokens += 60  # 160, while it still runs
    with pytest.raises(ApiError) as caught:
        client.admit()
    assert caught.value.headers["retry-after"] == "20"  # (160 - 120) / 2 a second
    client.release(admission)
    now[0] += 19
    with pytest.raises(ApiError):
        client.admit()
    now[0] += 2
    assert isinstance(client.admit(), Admission)


@pytest.mark.parametrize(
    ("used", "retry_after"), [(119, None), (120, "1"), (121, "1"), (122, "1"), (123, "2")]
)
def test_tokens_per_minute_are_refused_from_the_last_one_on(
    monkeypatch: pytest.MonkeyPatch, used: int, retry_after: str | None
) -> None:
    """120 tokens a minute are two a second: a wait is rounded up, and never 0."""
    monkeypatch.setattr(key_usage.time, "monotonic", lambda: 1000.0)
    client = Client(max_tokens_per_minute=120)
    admission = client.admit()
    choice = Choice(engine_request("1", [1, 2], max_tokens=200), 0, None)  # type: ignore[arg-type]
    choice.completion_tokens = used - 2
    admission.reserve([choice])
    for _ in range(2):  # charged once, however often the client asks
        if retry_after is None:
            client.release(client.admit())
            continue
        with pytest.raises(ApiError) as caught:
            client.admit()
        assert caught.value.headers["retry-after"] == retry_after


def test_tokens_per_minute_are_not_saved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(key_usage.time, "monotonic", lambda: now[0])
    client = Client(max_tokens_per_minute=120)
    client.admit()
    now[0] += 3600
    admission = client.admit()
    choice = Choice(engine_request("1", [1] * 120, max_tokens=9), 0, None)  # type: ignore[arg-type]
    admission.reserve([choice])
    with pytest.raises(ApiError):
        client.admit()
    now[0] += 0.5
    client.release(client.admit())  # one token has come back


def test_requests_of_a_key_are_admitted_up_to_its_limit() -> None:
    client = Client(max_requests=2)
    first = client.admit()
    client.admit()
    with pytest.raises(ApiError) as caught:
        client.admit()
    assert caught.value.status == 429
    client.release(first)
    client.admit()


# Templates and grammars


def test_endless_template_or_schema_is_a_400_and_others_continue(
    server: LlmkitServer,
) -> None:
    bomb = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOMB}}
    for attack, code in (
        (lambda: chat(server, "loop"), "chat_template"),
        (lambda: chat(server, "hi", response_format=bomb), "invalid_grammar"),
    ):
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda attack=attack, found=found: found.append(attack()))
        thread.start()
        answered = 0
        while thread.is_alive():
            assert post(server, KEY, SHORT).status_code == 200
            answered += 1
        (answer,) = found
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        assert "takes too long" in answer.json()["error"]["message"]
        assert answered > 1
        assert chat(server, "hi", response_format={"type": "json_object"}).status_code == 200


def test_template_that_takes_all_memory_is_a_400(server: LlmkitServer) -> None:
    answer = chat(server, "fill")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "chat_template")
    assert "too much memory" in answer.json()["error"]["message"]
    assert chat(server, "hi").status_code == 200


def test_values_that_no_template_can_get_are_a_400(server: LlmkitServer) -> None:
    answer = chat(server, "hi", chat_template_kwargs={"x": 2**70})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_sandbox_runs_jobs_in_order_and_opens_no_file() -> None:
    async def run() -> None:
        sandbox = Sandbox()
        try:
            jobs = [
                RenderTemplate("{{ x|tojson }}", {"messages": [], "x": "\u20ac" * i})
                for i in range(50)
            ]
            assert await asyncio.gather(*map(sandbox.run, jobs)) == [
                '"' + "\u20ac" * i + '"' for i in range(50)
            ]
            for template in (
                "{{ raise_exception('no') }}",
                "{% if %}",
                "{{ ().__class__.__base__.__subclasses__() }}",
            ):
                with pytest.raises(SandboxError):
                    await sandbox.run(RenderTemplate(template, {"messages": []}))
            assert sandbox.process is not None
            limits = Path(f"/proc/{sandbox.process.pid}/limits").read_text()
            assert [
                line.split()[-3]
                for line in limits.splitlines()
                if line.startswith("Max open files")
            ] == ["3"]
            first = sandbox.process.pid
            task = asyncio.create_task(sandbox.run(RenderTemplate(ENDLESS, {"messages": []})))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await sandbox.run(RenderTemplate("again", {"messages": []})) == "again"
            assert sandbox.process.pid != first
        finally:
            sandbox.close()
        assert sandbox.process is None

    asyncio.run(run())


def test_api_process_compiles_no_grammar_itself(server: LlmkitServer) -> None:
    assert chat(server, "hi").status_code == 200
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "llguidance" not in maps


@pytest.mark.soak
def test_sandbox_answers_any_schema_and_accepted_ones_compile(
    tmp_path: Path,
) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    rng = random.Random(7)
    tokenizer = grammar_tokenizer(load_tokenizer(open_model_files(str(model))).to_json(), 512, (2,))
    patterns = ["a*b", "(a|b)*a[ab]{15}", "[0-9]{1,3}(,[0-9]{3}){0,400}", ".*x.*y.*"]

    def schema(depth: int) -> dict[str, Any]:
        kind = rng.choice(
            ["integer", "string", *(["number", "array", "object", "anyOf"] if depth else [])]
        )
        if kind == "anyOf":
            return {"anyOf": [schema(depth - 1) for _ in range(rng.randint(1, 4))]}
        more: dict[str, dict[str, Any]] = {
            "array": {
                "items": schema(depth - 1) if depth else {},
                "maxItems": rng.choice([2, 500, 10_000]),
            },
            "object": {
                "properties": {
                    f"p{i}": schema(depth - 1) for i in range(rng.randint(0, 5) if depth else 0)
                }
            },
            "string": {"pattern": rng.choice(patterns)},
        }
        return {"type": kind, **more.get(kind, {"multipleOf": rng.choice([1, 3, 97, 9973, 90001])})}

    async def run() -> list[bool]:
        sandbox = Sandbox(str(model), 512)
        passed = []
        try:
            for grammar in (
                json.dumps({"grammars": [{"json_schema": schema(3)}]}) for _ in range(60)
            ):
                try:
                    await sandbox.run(CompileGrammar(grammar))
                except SandboxError:
                    passed.append(False)
                else:
                    compile_grammar(tokenizer, grammar).compute_bitmask()
                    passed.append(True)
        finally:
            sandbox.close()
        return passed

    assert set(asyncio.run(run())) == {False, True}


def test_grammar_compilation_delays_its_own_request_only() -> None:
    go_on = threading.Event()
    compiled = list[str]()

    def slow(grammar: str) -> None:
        compiled.append(grammar)
        assert go_on.wait(60)

    pending = PendingGrammars(slow)
    requests = [engine_request(str(i), [1], 1, grammar=f"g{i}") for i in range(3)]
    assert not pending
    for request in requests:
        pending.add(request)
    assert pending
    assert pending.pop_ready(block=False) == []
    pending.remove("1")
    go_on.set()
    ready: list[EngineRequest] = []
    while pending:
        ready += pending.pop_ready(block=True)
    assert sorted(request.request_id for request in ready) == ["0", "2"]
    assert pending.pop_ready(block=True) == []
    assert compiled[0] == "g0"
