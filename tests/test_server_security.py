"""Attacks on a server: on its keys and their limits, on the path, and with templates, schemas and certificates."""

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
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint, write_tokenizer

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import open_files
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.matcher import compile_grammar, grammar_tokenizer
from llmkit.runtime.server.engines.held import Held
from llmkit.runtime.server.engines.messages import Add
from llmkit.runtime.server.generation import Choice
from llmkit.runtime.server.http import keys
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.http.keys import Client, Visit, api_keys, known_client
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.sandbox import Sandbox, SandboxError
from llmkit.runtime.server.sandbox_process import Compile, Render

KEY, ALICE, BOB, SECRET = "plain-key", "alices-key", "bobs-key", "key-of-the-environment"
FILE = f"{KEY}\n\n{ALICE} name=alice max_requests=2\n{BOB}\tmax_tokens_per_minute=20 name=bob\n"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{% set said = messages[-1]['content'] %}{% if said == 'loop' %}" + ENDLESS + "{% endif %}"
    "{% if said == 'fill' %}{{ 'x' * (2 ** 30) }}{% endif %}{{ said }}"
)
# Three numbers whose automata are multiplied: a hundred bytes that llguidance compiles for minutes.
BOMB = {"anyOf": [{"type": "integer", "multipleOf": 90001 + i} for i in range(3)]}
LONG: dict[str, Any] = {"prompt": "one two", "max_tokens": 4000, "ignore_eos": True, "temperature": 0, "stream": True}
SHORT: dict[str, Any] = {"prompt": "one two", "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    model = tiny_checkpoint(folder / "model", max_position_embeddings=4096)
    write_tokenizer(model, chat_template=TEMPLATE)
    (folder / "keys").write_text(FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_API_KEY", SECRET)
        options = {"api_key_file": str(folder / "keys"), "log_requests": True, "kv_cache_memory": 2**26}
        with serving(folder / "log", model, KEY, **options) as running:
            yield running


def post(server: ServerProcess, key: str, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}{path}", json={"model": "model"} | body, headers=headers, timeout=120)


def said(server: ServerProcess, content: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2} | fields
    return post(server, KEY, body, "/v1/chat/completions")


def raw(server: ServerProcess, sent: bytes) -> bytes:
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
        "//health", "/health/", "/health/../v1/models", "/v1/models?/health", "/v1/models#/health", "/HEALTH",
        "/v1/models;/health", "/health%2f..%2fv1%2fmodels", "/%76%31/models", "/v1%2fmodels", "/health%00/../v1/models",
        "/./health", "/health%0d%0aHost:%20x", "http://localhost/v1/models", "http://localhost//health", "/\\health",
        "/v1/models/../..", "/%2e%2e/metrics", "/page/../v1/models", "*", "/info", "/nothing",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_needs_no_key(server: ServerProcess, target: str) -> None:
    answer = raw(server, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ", 2)[1] in (b"401", b"400"), answer
    assert b"max_model_len" not in answer


@pytest.mark.parametrize("target", ["/health", "/%68ealth", "/health?key=1", "http://localhost/health"])
def test_what_is_routed_to_health_is_health(server: ServerProcess, target: str) -> None:
    answer = raw(server, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"status":"ok"}')


def test_nothing_rides_behind_a_request_that_needs_no_key(server: ServerProcess) -> None:
    models = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for first in (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    ):
        answer = raw(server, first + models)
        assert answer.startswith(b"HTTP/1.1 ")
        assert b"max_model_len" not in answer
        assert b"HTTP/1.1 200" not in answer or answer.count(b"HTTP/1.1 200") == first.startswith(b"GET"), answer


@pytest.mark.parametrize("order", [(KEY, "wrong"), ("wrong", KEY), (KEY, KEY)])
def test_of_two_keys_none_counts(server: ServerProcess, order: tuple[str, str]) -> None:
    lines = "".join(f"Authorization: Bearer {key}\r\n" for key in order)
    answer = raw(server, f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "given",
    [
        "", "Bearer", "Bearer ", "Bearer  ", f"Basic {KEY}", KEY, f"Bearer {KEY[:-1]}", f"Bearer {KEY}x",
        f"Token {KEY}", f"Bearer {KEY},{ALICE}", f"Bearer {ALICE} name=alice", "Bearer name=alice", "Bearer \xff",
        f"Bearer {SECRET}",
    ],
)  # fmt: skip
def test_only_a_key_is_a_key(server: ServerProcess, given: str) -> None:
    answer = raw(
        server,
        f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: {given}\r\nConnection: close\r\n\r\n".encode(),
    )
    assert answer.startswith(b"HTTP/1.1 401 "), answer


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost.evil.com"}, {"host": "127.0.0.1.evil.com:8000"}, {"host": "evil.com@127.0.0.1"},
        {"host": ""}, {"origin": "null"}, {"origin": "http://localhost.evil.com"}, {"origin": "https://127.0.0.1:1"},
    ],
    ids=str,
)  # fmt: skip
def test_web_pages_of_others_are_refused_and_are_not_told_otherwise(
    server: ServerProcess, headers: dict[str, str]
) -> None:
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with server.client() as client:
        for method, path in (("GET", "/health"), ("POST", "/v1/completions"), ("OPTIONS", "/v1/completions")):
            answer = client.request(method, path, headers=headers | preflight)
            assert answer.status_code == 403
            assert not any(name.startswith("access-control") for name in answer.headers)
        assert client.options("/v1/completions", headers=preflight).status_code == 405


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def watched(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return compare(given, known)

    monkeypatch.setattr(keys.hmac, "compare_digest", watched)
    clients = tuple(map(Client.of, ("one", "two", "three")))
    for given, expected in ((b"one", 0), (b"three", 2), (b"none", None), (b"", None)):
        compared.clear()
        assert known_client(clients, given) is (None if expected is None else clients[expected])
        assert compared == [client.digest for client in clients]
    assert len({len(known) for known in compared}) == 1  # comparing takes no longer for a longer key


def test_no_process_inherits_the_key_and_none_has_it_among_its_arguments(server: ServerProcess) -> None:
    assert said(server, "hi", response_format={"type": "json_object"}).status_code == 200  # starts all there are
    assert SECRET in Path(f"/proc/{server.process.pid}/environ").read_text()
    others = psutil.Process(server.process.pid).children(recursive=True)
    assert len(others) == 3  # the engine, and the sandboxes of templates and of grammars
    for process in others:
        told = Path(f"/proc/{process.pid}/environ").read_text() + " ".join(process.cmdline())
        assert not any(key in told for key in (SECRET, KEY, ALICE, BOB, "LLMKIT_API_KEY"))


# What a key may use


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("KEY one", r"file:1: word 2 is no field\. A line is KEY \[name=NAME\] \[max_requests=N\]"),
        ("KEY\nKEY2 nam=x", r"file:2: word 2 is no field"),
        ("KEY name=a b", r"file:1: word 3 is no field"),
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
def test_a_wrong_key_file_is_told_with_its_line_and_without_a_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "file"
    path.write_text(text.replace("KEY", "sk-secret"))
    with pytest.raises(InputError, match=problem) as caught:
        api_keys(ServeOptions("m", api_key_file=path))
    assert "secret" not in str(caught.value)


def test_one_client_cannot_fill_the_queue_for_all_others(server: ServerProcess) -> None:
    with ExitStack() as stack:
        headers = {"authorization": f"Bearer {ALICE}"}
        client = stack.enter_context(httpx.Client(base_url=server.url, headers=headers, timeout=120))
        streams = [client.stream("POST", "/v1/completions", json={"model": "model"} | LONG) for _ in range(2)]
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
    log = server.log.read_text()
    assert '"client":"alice"' in log
    assert not any(key in log for key in (KEY, ALICE, BOB, SECRET))


def test_a_key_has_used_up_its_minute(server: ServerProcess) -> None:
    assert post(server, BOB, SHORT | {"max_tokens": 60}).status_code == 200  # the first is let in, whatever it takes
    refused = post(server, BOB, SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tokens_per_minute_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 180
    assert post(server, KEY, SHORT).status_code == 200


def test_a_minutes_tokens_come_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    client = Client(max_tokens_per_minute=120)
    visit = client.enter()
    running = Choice(Add("1", [1, 2], max_tokens=200), 0, None)  # type: ignore[arg-type]
    running.completion_tokens = 98
    visit.take([running])
    client.leave(client.enter())  # 100 of 120 are used
    running.completion_tokens += 60  # 160, while it still runs
    with pytest.raises(ApiError) as caught:
        client.enter()
    assert caught.value.headers["retry-after"] == "20"  # (160 - 120) / 2 a second
    client.leave(visit)
    now[0] += 19
    with pytest.raises(ApiError):
        client.enter()
    now[0] += 2
    assert isinstance(client.enter(), Visit)


# Templates and grammars


def test_a_template_or_a_schema_that_takes_for_ever_is_a_400_and_others_go_on(server: ServerProcess) -> None:
    bomb = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOMB}}
    for attack, code in (
        (lambda: said(server, "loop"), "chat_template"),
        (lambda: said(server, "hi", response_format=bomb), "invalid_grammar"),
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
        assert said(server, "hi", response_format={"type": "json_object"}).status_code == 200


def test_a_template_that_takes_all_memory_is_a_400(server: ServerProcess) -> None:
    answer = said(server, "fill")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "chat_template")
    assert "too much memory" in answer.json()["error"]["message"]
    assert said(server, "hi").status_code == 200


def test_what_cannot_be_sent_to_the_template_is_a_400(server: ServerProcess) -> None:
    answer = said(server, "hi", chat_template_kwargs={"x": 2**70})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_a_sandbox_does_one_job_after_another_and_can_open_no_file() -> None:
    async def run() -> None:
        sandbox = Sandbox()
        try:
            jobs = [Render("{{ x|tojson }}", {"messages": [], "x": "\u20ac" * i}) for i in range(50)]
            assert await asyncio.gather(*map(sandbox.ask, jobs)) == ['"' + "\u20ac" * i + '"' for i in range(50)]
            for template in ("{{ raise_exception('no') }}", "{% if %}", "{{ ().__class__.__base__.__subclasses__() }}"):
                with pytest.raises(SandboxError):
                    await sandbox.ask(Render(template, {"messages": []}))
            assert sandbox.process is not None
            limits = Path(f"/proc/{sandbox.process.pid}/limits").read_text()
            assert [line.split()[-3] for line in limits.splitlines() if line.startswith("Max open files")] == ["3"]
            first = sandbox.process.pid
            task = asyncio.create_task(sandbox.ask(Render(ENDLESS, {"messages": []})))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await sandbox.ask(Render("again", {"messages": []})) == "again"
            assert sandbox.process.pid != first
        finally:
            sandbox.close()
        assert sandbox.process is None

    asyncio.run(run())


def test_the_api_process_renders_nothing_itself(server: ServerProcess) -> None:
    assert said(server, "hi").status_code == 200
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "llguidance" not in maps


@pytest.mark.soak
def test_whatever_schema_is_sent_the_sandbox_answers_and_what_passes_can_be_followed(tmp_path: Path) -> None:
    model, rng = tiny_checkpoint(tmp_path / "model"), random.Random(7)
    tokenizer = grammar_tokenizer(load_tokenizer(open_files(str(model))).to_json(), 512, (2,))
    patterns = ["a*b", "(a|b)*a[ab]{15}", "[0-9]{1,3}(,[0-9]{3}){0,400}", ".*x.*y.*"]

    def schema(depth: int) -> dict[str, Any]:
        kind = rng.choice(["integer", "string", *(["number", "array", "object", "anyOf"] if depth else [])])
        if kind == "anyOf":
            return {"anyOf": [schema(depth - 1) for _ in range(rng.randint(1, 4))]}
        more: dict[str, dict[str, Any]] = {
            "array": {"items": schema(depth - 1) if depth else {}, "maxItems": rng.choice([2, 500, 10_000])},
            "object": {"properties": {f"p{i}": schema(depth - 1) for i in range(rng.randint(0, 5) if depth else 0)}},
            "string": {"pattern": rng.choice(patterns)},
        }
        return {"type": kind, **more.get(kind, {"multipleOf": rng.choice([1, 3, 97, 9973, 90001])})}

    async def run() -> list[bool]:
        sandbox, passed = Sandbox(str(model), 512), []
        try:
            for grammar in (json.dumps({"grammars": [{"json_schema": schema(3)}]}) for _ in range(60)):
                try:
                    await sandbox.ask(Compile(grammar))
                except SandboxError:
                    passed.append(False)
                else:
                    compile_grammar(tokenizer, grammar).compute_bitmask()
                    passed.append(True)
        finally:
            sandbox.close()
        return passed

    assert set(asyncio.run(run())) == {False, True}


def test_a_grammar_that_compiles_holds_up_its_own_request_only() -> None:
    go_on, asked = threading.Event(), list[str]()

    def slow(grammar: str) -> None:
        asked.append(grammar)
        assert go_on.wait(60)

    held, requests = Held(slow), [Add(str(i), [1], 1, grammar=f"g{i}") for i in range(3)]
    assert not held
    for request in requests:
        held.hold(request)
    assert held
    assert held.ready(block=False) == []
    held.forget("1")
    go_on.set()
    ready: list[Add] = []
    while held:
        ready += held.ready(block=True)
    assert sorted(request.id for request in ready) == ["0", "2"]
    assert held.ready(block=True) == []
    assert asked[0] == "g0"
