"""Sleep mode: memory is free at two levels; requests get 503 until the server wakes up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.completion_requests import LONG_CONTEXT, complete
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import tiny_checkpoint

KEY = "plain-key"
ADMIN = {"authorization": "Bearer admin-key"}
MIB = 1 << 20
KV_BYTES = 200 * MIB
# 32 KiB for each token in bfloat16
BIG_CACHE = {
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
PROMPT_TOKENS = 400
NUM_PROMPTS = KV_BYTES // (PROMPT_TOKENS * 32 * 1024)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("sleep")
    model = tiny_checkpoint(folder / "model", **LONG_CONTEXT, **BIG_CACHE)
    (folder / "keys").write_text(f"{KEY} name=plain\nadmin-key name=admin admin\n")
    options = {
        "api_key_file": str(folder / "keys"),
        "kv_cache_memory": KV_BYTES,
        "kv_cache_dtype": "bfloat16",  # on all processors
        "enable_sleep_mode": True,
    }
    with serving(folder / "log", model, KEY, **options) as server:
        yield server


def post(server: LlmkitServer, path: str, **query: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", params=query, headers=ADMIN, timeout=60)


def is_sleeping(server: LlmkitServer) -> bool:
    with server.client() as client:
        found: bool = client.get("/is_sleeping").json()["is_sleeping"]
    return found


def family_bytes(server: LlmkitServer) -> int:
    """The memory of the server's process and its engines."""
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def fill_cache(server: LlmkitServer) -> None:
    """Compute prompts that together fill the KV cache."""
    prompts = [
        [3 + (7 * i + 11 * p + i * i // 5) % 120 for i in range(PROMPT_TOKENS)]
        for p in range(NUM_PROMPTS)
    ]
    complete(server, prompt=prompts, max_tokens=1).raise_for_status()


def cached_tokens(answer: httpx.Response) -> int:
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_sleep_at_level_1_frees_the_cache_and_keeps_the_process(server: LlmkitServer) -> None:
    prompt = [5 + i % 100 for i in range(64)]
    before = complete(server, prompt=prompt).json()["choices"][0]["text"]
    fill_cache(server)
    assert cached_tokens(complete(server, prompt=prompt)) == 0, "the cache has others now"
    assert cached_tokens(complete(server, prompt=prompt)) == 48
    tokens = server.metric("generation_tokens_total")
    engine = server.engine()
    awake_bytes = engine.memory_info().rss
    slept = post(server, "/sleep", level=1).raise_for_status().json()
    assert (slept["status"], slept["level"]) == ("sleeping", 1)
    assert is_sleeping(server)
    freed = awake_bytes - engine.memory_info().rss
    # Buffers of earlier steps are freed as well, so there is no upper limit.
    assert freed > KV_BYTES * 0.85, f"{freed / MIB} MiB are free"
    refused = complete(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "sleeping")
    assert post(server, "/sleep", level=1).json()["level"] == 1, "it sleeps already"
    assert server.metric("generation_tokens_total") == tokens
    assert post(server, "/wake_up").raise_for_status().json()["status"] == "awake"
    assert server.engine() == engine
    after = complete(server, prompt=prompt)
    assert after.json()["choices"][0]["text"] == before
    assert cached_tokens(after) == 0
    assert cached_tokens(complete(server, prompt=prompt)) == 48
    assert server.metric("generation_tokens_total") == tokens + 16


def test_sleep_becomes_deeper_but_not_lighter(server: LlmkitServer) -> None:
    assert post(server, "/sleep", level=1).json()["level"] == 1
    assert len(server.engines()) == 1
    assert post(server, "/sleep", level=2).json()["level"] == 2
    assert server.engines() == []
    assert post(server, "/sleep", level=1).json()["level"] == 2
    assert post(server, "/wake_up").status_code == 200
    assert complete(server).status_code == 200


def test_sleep_frees_the_memory_and_the_answer_after_it_is_the_same(server: LlmkitServer) -> None:
    before = complete(server).json()["choices"][0]["text"]
    engine_bytes = server.engine().memory_info().rss
    all_bytes = family_bytes(server)
    assert not is_sleeping(server)
    slept = post(server, "/sleep", level=2).raise_for_status().json()
    assert (slept["status"], slept["level"]) == ("sleeping", 2)
    assert is_sleeping(server)
    assert server.engines() == []
    assert family_bytes(server) < all_bytes - engine_bytes + 32 * MIB
    refused = complete(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "sleeping")
    assert refused.headers["retry-after"] == "1"
    with server.client() as client:
        assert client.get("/health").json() == {"status": "sleeping"}
        assert client.get("/ready").status_code == 503
        assert client.get("/metrics").status_code == 200
    woken = post(server, "/wake_up", tags=["weights", "kv_cache"]).raise_for_status().json()
    assert woken["status"] == "awake"
    assert not is_sleeping(server)
    assert complete(server).json()["choices"][0]["text"] == before
    assert post(server, "/wake_up").status_code == 200, "it is awake already"
    log = server.log.read_text()
    assert "the server sleeps" in log and "the server is awake after" in log


def test_sleep_ends_running_requests_or_waits_for_them(server: LlmkitServer) -> None:
    answers: list[httpx.Response] = []

    def run(max_tokens: int) -> threading.Thread:
        thread = threading.Thread(
            target=lambda: answers.append(complete(server, max_tokens=max_tokens))
        )
        thread.start()
        wait_for(lambda: server.metric("num_requests_running") == 1)
        return thread

    thread = run(4000)
    assert post(server, "/sleep").status_code == 200  # vLLM's default is to abort
    thread.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "sleeping")
    assert post(server, "/wake_up").status_code == 200
    thread = run(500)
    assert post(server, "/sleep", mode="wait").status_code == 200
    thread.join()
    assert answers[1].json()["usage"]["completion_tokens"] == 500
    assert post(server, "/wake_up").status_code == 200


@pytest.mark.parametrize(
    ("path", "query", "message"),
    [
        ("/sleep", {"level": "3"}, "1 or 2 was expected"),
        ("/sleep", {"mode": "keep"}, "abort or wait was expected"),
        ("/wake_up", {"tags": "weights"}, "wake up together"),
        ("/wake_up", {"tags": "other"}, "wake up together"),
    ],
)
def test_sleep_refuses_wrong_values(
    path: str, query: dict[str, str], message: str, server: LlmkitServer
) -> None:
    answer = post(server, path, **query)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert not is_sleeping(server)


def test_sleep_needs_a_key_with_the_right_admin(server: LlmkitServer) -> None:
    with server.client() as client:
        for path in ("/sleep", "/wake_up"):
            refused = client.post(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                403,
                "admin_key_needed",
            )
    assert httpx.post(f"{server.url}/sleep").status_code == 401
    assert not is_sleeping(server)


def test_sleeping_server_stops_at_a_signal(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    with serving(tmp_path / "log", model, enable_sleep_mode=True) as server:
        assert post(server, "/sleep").status_code == 200
        assert server.stop() == 0
        assert not Path(f"/proc/{server.process.pid}").exists()
