"""Sleep and reload of a model on two ranks, and of two replicas."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.completion_requests import LONG_CONTEXT, complete
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import tiny_checkpoint

PROMPT = [5 + i % 100 for i in range(64)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("model", "better")):
        tiny_checkpoint(folder / name, seed=seed, **LONG_CONTEXT)
    return folder


# A layout of each kind of change is in `make test`.
@pytest.fixture(scope="module", params=["tp", pytest.param("dp", marks=pytest.mark.slow)])
def server(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitServer]:
    options = {
        request.param: 2,
        "kv_cache_memory": 2**25,
        "enable_sleep_mode": True,
        "reload_dir": str(folder),
        "max_model_len": 4096,
    }
    with serving(tmp_path_factory.mktemp("log") / "log", folder / "model", **options) as server:
        yield server


def post(server: LlmkitServer, path: str, **arguments: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", timeout=120, **arguments)


def ask(server: LlmkitServer, **changes: Any) -> tuple[list[int], int]:
    """The answer's tokens, and how many tokens of the prompt were cached."""
    document = complete(server, prompt=PROMPT, **changes).raise_for_status().json()
    details = document["usage"]["prompt_tokens_details"]
    return document["choices"][0]["token_ids"], details["cached_tokens"]


@pytest.mark.parametrize("level", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_layout_sleeps_and_answers_as_before(server: LlmkitServer, level: int) -> None:
    expected, _ = ask(server)
    assert ask(server) == (expected, 48)
    failed: list[httpx.Response] = []
    threads = [
        threading.Thread(
            target=lambda: failed.append(complete(server, prompt=PROMPT, max_tokens=4000))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.metric("num_requests_running") == 3)
    engines = server.engines()
    slept = post(server, "/sleep", params={"level": level}).raise_for_status().json()
    assert slept["level"] == level
    for thread in threads:
        thread.join()
    assert [answer.json()["error"]["code"] for answer in failed] == ["sleeping"] * 3
    assert server.engines() == (engines if level == 1 else [])
    refused = complete(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "sleeping")
    post(server, "/wake_up").raise_for_status()
    assert ask(server) == (expected, 0)
    assert ask(server) == (expected, 48)


def test_layout_reloads_without_losing_a_request(server: LlmkitServer) -> None:
    before, _ = ask(server)
    old: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: old.append(complete(server, prompt=PROMPT, max_tokens=1500))
    )
    thread.start()
    wait_for(lambda: server.metric("num_requests_running") == 1)
    num_engines = len(server.engines())
    (served,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    other = "model" if served["root"].endswith("better") else "better"
    post(server, "/reload", json={"path": other}).raise_for_status()
    after = [ask(server)[0] for _ in range(2)]
    thread.join()
    assert old[0].json()["choices"][0]["token_ids"][:8] == before
    assert after[0] == after[1] != before
    wait_for(lambda: len(server.engines()) == num_engines)
