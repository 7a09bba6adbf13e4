"""Other weights for a running server: no request is lost, and a failure changes nothing."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.completion_requests import LONG_CONTEXT, complete
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("model", "better")):
        tiny_checkpoint(folder / name, seed=seed, **LONG_CONTEXT)
    tiny_checkpoint(folder / "other-vocabulary", vocab_size=700, **LONG_CONTEXT)
    tiny_checkpoint(folder / "other-context", max_position_embeddings=2048)
    tiny_checkpoint(
        folder / "other-model",
        "qwen2",
        num_hidden_layers=3,
        num_key_value_heads=4,
        **LONG_CONTEXT,
    )
    tuned = tiny_checkpoint(folder / "tuned", seed=7, **LONG_CONTEXT)
    settings = json.loads((tuned / "tokenizer_config.json").read_text())
    settings["chat_template"] = "ANSWER {{ messages[0]['content'] }}"
    (tuned / "tokenizer_config.json").write_text(json.dumps(settings))
    (tuned / "generation_config.json").write_text('{"top_k": 7}')
    broken = shutil.copytree(folder / "model", folder / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    options = {
        "kv_cache_memory": 2**25,
        "reload_dir": str(folder),
        "response_cache": 2**20,
        "max_model_len": 4096,
    }
    log = tmp_path_factory.mktemp("reload") / "log"
    with serving(log, folder / "model", **options) as server:
        yield server


def reload(server: LlmkitServer, path: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/reload", json={"path": path} | changes, timeout=120)


def answer(server: LlmkitServer, **changes: Any) -> str:
    text: str = complete(server, **changes).raise_for_status().json()["choices"][0]["text"]
    return text


def root(server: LlmkitServer) -> str:
    found: str = httpx.get(f"{server.url}/v1/models").json()["data"][0]["root"]
    return found


def test_reload_serves_other_weights_and_loses_no_request(
    folder: Path, server: LlmkitServer
) -> None:
    before = answer(server)
    assert answer(server) == before  # from the response cache
    long_before: list[str] = []
    ask_long = {"max_tokens": 1500, "prompt": "five six"}
    expected = answer(server, **ask_long, seed=None, top_k=1)
    thread = threading.Thread(
        target=lambda: long_before.append(answer(server, **ask_long, cache_salt="again"))
    )
    thread.start()
    wait_for(lambda: server.metric("num_requests_running") == 1)
    engine = server.engine()
    loaded = reload(server, "better").raise_for_status().json()
    assert (loaded["status"], loaded["path"]) == ("loaded", str(folder / "better"))
    assert loaded["changed"] == []
    assert root(server) == str(folder / "better")
    after = answer(server)
    assert after != before, "neither the prefix cache nor the response cache has old answers"
    thread.join()
    assert long_before == [expected], "the request that ran went on with the old weights"
    wait_for(lambda: not engine.is_running() and len(server.engines()) == 1)
    assert reload(server, f"../weights-elsewhere/../{folder.name}/model").status_code == 200
    assert answer(server) == before


def test_failed_reload_leaves_the_old_weights(folder: Path, server: LlmkitServer) -> None:
    served = root(server)
    before = answer(server)
    wait_for(lambda: len(server.engines()) == 1)
    engine = server.engine()
    for path, reason in (
        ("broken", "could not be loaded"),
        ("other-vocabulary", "another tokenizer"),
        ("other-context", "At most 2048 tokens"),
        ("other-model", "architecture is Qwen2ForCausalLM, not LlamaForCausalLM"),
    ):
        failed = reload(server, path)
        error = failed.json()["error"]
        assert (failed.status_code, error["code"], error["param"]) == (
            400,
            "reload_failed",
            "path",
        ), error
        assert reason in error["message"]
        assert "old weights are served" in error["message"]
    assert "layers is 3, not 2" in error["message"]
    assert "kv_heads is 4, not 2" in error["message"]
    assert (root(server), answer(server)) == (served, before)
    assert server.engines() == [engine]


def test_reload_changes_everything_that_is_told_of_the_model(
    folder: Path, server: LlmkitServer
) -> None:
    def facts() -> tuple[Any, ...]:
        with server.client() as client:
            document = client.get("/info").json()
            info = {name: document[name] for name in ("model_id", "card", "defaults")}
            show = client.post("/api/show", json={"model": "model"}).json()
            tags = client.get("/api/tags").json()["models"]
            tokens = client.post(
                "/tokenize",
                json={"model": "model", "messages": [{"role": "user", "content": "hello"}]},
            ).json()
        return info, show, tags[0]["digest"], tokens["tokens"]

    if root(server) != str(folder / "model"):  # another test's weights
        reload(server, "model").raise_for_status()
    info, show, digest, tokens = facts()
    loaded = reload(server, "tuned").raise_for_status().json()
    assert loaded["changed"] == ["chat_template", "sampling_defaults"]
    new_info, new_show, new_digest, new_tokens = facts()
    assert root(server) == new_info["model_id"] == str(folder / "tuned")
    assert new_info["card"] == info["card"]
    assert (info["defaults"]["top_k"], new_info["defaults"]["top_k"]) == (0, 7)
    assert new_show["modelfile"] == f"FROM {folder / 'tuned'}\n"
    assert "ANSWER" in new_show["template"] and "ANSWER" not in show["template"]
    assert new_digest != digest
    assert new_tokens != tokens
    changed = reload(server, str(folder / "model")).json()["changed"]
    assert changed == ["chat_template", "sampling_defaults"]
    assert facts() == (info, show, digest, tokens)


@pytest.mark.parametrize("path", ["..", ".", "", "nothing", "/etc", "a\0b", "model/config.json"])
def test_reload_takes_directories_of_its_folder_only(path: str, server: LlmkitServer) -> None:
    refused = reload(server, path)
    assert refused.status_code == 400
    if path:
        assert refused.json()["error"]["code"] == "weights_not_found"


@pytest.mark.slow  # restarts alone are in test_server_reliability.py
def test_engine_that_is_restarted_has_the_weights_of_the_last_reload(
    folder: Path, tmp_path: Path
) -> None:
    options = {"kv_cache_memory": 2**25, "reload_dir": str(folder), "restart": 1}
    with serving(tmp_path / "log", folder / "model", **options) as server:
        reload(server, "better").raise_for_status()
        expected = answer(server)
        wait_for(lambda: len(server.engines()) == 1)
        server.engine().kill()
        wait_for(lambda: "is back after" in server.log.read_text())
        assert answer(server) == expected
        assert httpx.post(f"{server.url}/sleep").status_code == 404
