"""The API key file is read again while the server runs, and limits count in all its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.router_process import LlmkitRouter
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import tiny_checkpoint

from llmkit.runtime.server.http.api_keys import Client, find_client
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http.key_ring import KeyRing
from llmkit.runtime.server.http.key_usage import UsageFile
from llmkit.runtime.server.serve_options import ServeOptions

LIMITED = "limited-key name=limited max_requests=2"
BODY: dict[str, Any] = {"prompt": "one two", "max_tokens": 2, "ignore_eos": True}


def write(path: Path, *lines: str) -> None:
    """Replace the file, as editors do."""
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n")
    new.replace(path)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    write(path, "one", LIMITED)
    return path


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def ring(key_file: Path, log: list[str]) -> KeyRing:
    return KeyRing(ServeOptions("m", api_key_file=key_file), log.append)


def find(ring: KeyRing, key: bytes) -> Client:
    client = find_client(ring, key)
    assert client is not None
    return client


def test_key_ring_keeps_counters_of_keys_whose_limits_change(ring: KeyRing, key_file: Path) -> None:
    client = find(ring, b"limited-key")
    running = client.admit()
    write(key_file, "two", "limited-key name=other max_requests=1 admin")
    assert ring.refresh()
    assert find(ring, b"limited-key") is client
    assert (client.name, client.is_admin) == ("other", True)
    with pytest.raises(ApiError):
        client.admit()
    client.release(running)
    client.admit()
    assert find_client(ring, b"one") is None
    assert find(ring, b"two").max_requests is None


def test_key_that_comes_back_has_used_what_it_had_used(ring: KeyRing, key_file: Path) -> None:
    client = find(ring, b"limited-key")
    running = client.admit()
    write(key_file, "one")
    ring.refresh()
    assert find_client(ring, b"limited-key") is None
    write(key_file, "one", LIMITED)
    ring.refresh()
    assert find(ring, b"limited-key") is client
    client.release(running)
    write(key_file, "one")
    ring.refresh()
    write(key_file, "one", LIMITED)
    ring.refresh()
    assert find(ring, b"limited-key") is not client, "an idle key is forgotten"


@pytest.mark.parametrize("content", ["", "one what=1 secret", "one\none", None])
def test_wrong_key_file_changes_nothing_and_is_logged(
    content: str | None, ring: KeyRing, key_file: Path, log: list[str]
) -> None:
    before = list(ring)
    if content is None:
        key_file.unlink()
    else:
        write(key_file, content)
    assert not ring.refresh()
    assert list(ring) == before
    (line,) = log
    assert line.startswith("the API keys stay as they were: ")
    assert "secret" not in line
    assert not ring.refresh()
    assert len(log) == 1, "it is read once"
    write(key_file, "one", "three")
    assert ring.refresh()
    assert log[1] == "the API key file was read again: 1 keys added, 1 removed, 2 now"


def test_limits_are_counted_in_all_processes_of_a_server(
    key_file: Path, tmp_path: Path, log: list[str]
) -> None:
    """Two rings in one process stand for two processes: each has a slot of its own."""
    write(key_file, "limited-key max_requests=3 max_tokens_per_minute=1000")
    options = ServeOptions("m", api_key_file=key_file, usage_file=str(tmp_path / "usage"))
    router = find(KeyRing(options, log.append), b"limited-key")
    one, two = (
        find(KeyRing(replace(options, behind_router=True), log.append), b"limited-key")
        for _ in range(2)
    )
    first, second = router.admit(), router.admit()
    at_one, at_two = one.admit(), two.admit()  # the same two requests
    third = router.admit()
    with pytest.raises(ApiError):
        router.admit()
    at_one.reserve([])  # one answer, which the router has counted
    with pytest.raises(ApiError):
        at_two.reserve([object(), object()])  # type: ignore[list-item]
    router.release(third)
    one.release(at_one)
    router.release(first)
    two.release(at_two)
    router.release(second)
    assert router.usage.charge(600, 1000) == pytest.approx(600, abs=1)
    assert one.usage.charge(500, 1000) == pytest.approx(1100, abs=5)
    with pytest.raises(ApiError) as caught:
        router.admit()
    assert caught.value.code == "tokens_per_minute_exceeded"


def test_answers_of_a_process_that_ended_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "usage"
    child = os.fork()
    if not child:
        UsageFile(path).usage(b"d" * 32).set_running(5)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    file = UsageFile(path)
    assert file.usage(b"d" * 32).running_elsewhere() == 0
    other = UsageFile(path)
    other.usage(b"d" * 32).set_running(2)
    assert file.usage(b"d" * 32).running_elsewhere() == 2
    other.close()
    assert file.usage(b"d" * 32).running_elsewhere() == 0
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("keys") / "model", max_position_embeddings=32_768
    )


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("server")
    write(folder / "keys", "one", LIMITED)
    options = {"api_key_file": str(folder / "keys"), "kv_cache_memory": 2**25}
    with serving(folder / "log", model, "one", **options) as server:
        yield server


def status(url: str, key: str, **changes: Any) -> int:
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "model"} | BODY | changes
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code


def test_server_rereads_keys_while_requests_run(server: LlmkitServer) -> None:
    path = server.log.parent / "keys"
    assert (status(server.url, "one"), status(server.url, "two")) == (200, 401)
    headers = {"authorization": "Bearer one"}
    body = {"model": "model", **BODY, "max_tokens": 500, "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        write(path, "two", LIMITED)
        assert status(server.url, "two") == 200, "a new key counts at once"
        wait_for(lambda: status(server.url, "one") == 401)
        assert list(lines)[-2] == "data: [DONE]", "a running request goes on"
    write(path, "no=field of=keys")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "the API keys stay as they were" in server.log.read_text())
    assert status(server.url, "two") == 200
    write(path, "one", LIMITED)
    wait_for(lambda: status(server.url, "one") == 200)


def test_limits_of_a_key_hold_for_all_models_together(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write(keys, "plain", LIMITED, "few max_tokens_per_minute=10")
    models = {"a": model, "b": model}
    options = ("--max-loaded", "2", "--api-key-file", str(keys))
    router = LlmkitRouter(tmp_path / "log", models, *options, key="plain")
    try:
        router.wait_ready()
        url = router.url
        for name in models:
            assert status(url, "plain", model=name) == 200  # both are loaded
        headers = {"authorization": "Bearer limited-key"}
        with ExitStack() as stack:
            running = []  # an iterator that is dropped closes its stream
            for name in models:
                body = {"model": name, **BODY, "max_tokens": 32_000, "stream": True}
                stream = stack.enter_context(
                    httpx.stream(
                        "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60
                    )
                )
                assert stream.status_code == 200, stream.read()
                running.append(stream.iter_lines())
                next(running[-1])
            assert status(url, "limited-key", model="a") == 429
            assert status(url, "plain", model="a") == 200
        wait_for(lambda: status(url, "limited-key", model="a", n=2) == 200)
        assert status(url, "few", model="a", max_tokens=20) == 200
        assert status(url, "few", model="b") == 429
        write(keys, "plain", "new-key")
        assert status(url, "new-key", model="a") == 200
        wait_for(lambda: status(url, "few", model="b") == 401)
    finally:
        router.process.kill()
        router.process.wait()
