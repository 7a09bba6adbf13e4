"""The contract of SageMaker's multi-model endpoints, by HTTP."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.sagemaker_container import SagemakerContainer
from support.server_process import held, wait_for
from support.tiny_models import never_ends, tiny_checkpoint

from llmkit.cli.main import run

ASK: dict[str, Any] = {"prompt": [5, 9, 11], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models as SageMaker fills it: HASH/model."""
    folder = tmp_path_factory.mktemp("sagemaker") / "models"
    first = tiny_checkpoint(folder / "1f" / "model", dtype="float32", max_position_embeddings=4096)
    never_ends(first)
    shutil.copytree(first, folder / "2f" / "model")
    (folder / "empty" / "model").mkdir(parents=True)
    (folder / "link").symlink_to("/etc")
    return folder


@pytest.fixture(scope="module")
def container(folder: Path) -> Iterator[SagemakerContainer]:
    variables = {
        "SAGEMAKER_MULTI_MODEL": "true",
        "SAGEMAKER_MODELS_PATH": str(folder),
        "LLMKIT_SERVE_DEVICE": "cpu",
        "LLMKIT_SERVE_KV_CACHE_MEMORY": "32MiB",
        "LLMKIT_SERVE_MAX_LOADED": "1",
    }
    with SagemakerContainer(folder.parent / "log", variables) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def http(container: SagemakerContainer) -> Iterator[httpx.Client]:
    with container.client() as client:
        yield client
        for entry in client.get("/models").json()["models"]:
            client.delete(f"/models/{entry['modelName']}")


def load(http: httpx.Client, name: str, url: str) -> httpx.Response:
    return http.post("/models", json={"model_name": name, "url": url})


def test_models_are_loaded_listed_invoked_and_unloaded(folder: Path, http: httpx.Client) -> None:
    assert http.get("/ping").status_code == 200
    assert http.get("/models").json() == {"models": []}
    url = str(folder / "1f" / "model")
    entry = {"modelName": "one", "modelUrl": url}
    assert load(http, "one", url).raise_for_status().json() == entry
    assert http.get("/models").json() == {"models": [entry]}
    assert http.get("/models/one").json() == entry
    # A client does not know the name that SageMaker gives to its model.
    answer = http.post("/models/one/invoke", json=ASK | {"model": "llama"}).raise_for_status()
    assert answer.json()["model"] == "one"
    assert answer.json()["usage"]["completion_tokens"] == 4
    again = load(http, "one", url)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_exists")
    assert http.delete("/models/one").status_code == 200
    for refused in (
        http.delete("/models/one"),
        http.get("/models/one"),
        http.post("/models/one/invoke", json=ASK),
    ):
        assert refused.status_code == 404
        assert refused.json()["error"]["message"] == "The model 'one' is not loaded."
    missing = http.post("/invocations", json=ASK)
    assert missing.json()["error"]["message"] == "model is missing. No model is loaded."


def test_load_without_room_is_a_507_and_unloading_makes_room(
    folder: Path, http: httpx.Client
) -> None:
    load(http, "1f", str(folder / "1f" / "model")).raise_for_status()
    refused = load(http, "2f", str(folder / "2f" / "model"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "insufficient_memory")
    assert (
        "all 1 places for models are taken (--max-loaded 1)" in refused.json()["error"]["message"]
    )
    assert http.get("/models/2f").status_code == 404
    http.delete("/models/1f").raise_for_status()
    load(http, "2f", str(folder / "2f" / "model")).raise_for_status()
    assert [entry["modelName"] for entry in http.get("/models").json()["models"]] == ["2f"]


def test_model_that_does_not_fit_into_memory_is_a_507(folder: Path, tmp_path: Path) -> None:
    variables = {
        "SAGEMAKER_MULTI_MODEL": "true",
        "SAGEMAKER_MODELS_PATH": str(folder),
        "LLMKIT_SERVE_DEVICE": "cpu",
        "LLMKIT_SERVE_KV_CACHE_MEMORY": "900TiB",
    }
    with (
        SagemakerContainer(tmp_path / "log", variables) as running,
        running.wait_ready().client() as http,
    ):
        refused = load(http, "one", str(folder / "1f" / "model"))
        assert refused.status_code == 507
        assert "The model 'one' could not be loaded:" in refused.json()["error"]["message"]
        assert http.get("/models").json() == {"models": []}
        assert http.get("/ping").status_code == 200


def test_models_are_loaded_from_the_folder_only(folder: Path, http: httpx.Client) -> None:
    for url in ("/etc", str(folder), f"{folder}/link", f"{folder}/../..", f"{folder}/no", "a\0b"):
        refused = load(http, "one", url)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "url")
        assert "There is no such folder in" in refused.json()["error"]["message"]
    broken = load(http, "one", str(folder / "empty" / "model"))
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_model")
    assert "has no config.json" in broken.json()["error"]["message"]
    for body in ({"url": "x"}, {"model_name": "", "url": "x"}, {"model_name": "x"}):
        assert http.post("/models", json=body).status_code == 400
    assert http.get("/models").json() == {"models": []}


def test_unload_waits_for_a_running_stream(
    folder: Path, container: SagemakerContainer, http: httpx.Client
) -> None:
    load(http, "one", str(folder / "1f" / "model")).raise_for_status()
    body = ASK | {"max_tokens": 100, "stream": True}
    with http.stream("POST", "/models/one/invoke", json=body) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line)
        statuses: list[int] = []
        unload = threading.Thread(
            target=lambda: statuses.append(http.delete("/models/one").status_code)
        )
        with held(*container.engines()):
            unload.start()
            wait_for(lambda: http.get("/models/one").status_code == 404)
            # Its memory is not free yet.
            assert load(http, "2f", str(folder / "2f" / "model")).status_code == 507
        texts = [first, *(line for line in lines if line)]
    unload.join(60)
    assert statuses == [200]
    assert texts[-1] == "data: [DONE]"
    assert json.loads(texts[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow  # as test_router_fails_streams_of_a_dead_server_and_reloads_it
def test_ended_server_of_a_model_is_started_again_by_an_invocation(
    folder: Path, container: SagemakerContainer, http: httpx.Client
) -> None:
    load(http, "one", str(folder / "1f" / "model")).raise_for_status()
    served = [one for one in container.family() if "serve_process" in " ".join(one.cmdline())]
    for process in served:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(served, 60)
    answer = http.post("/models/one/invoke", json=ASK)
    assert answer.raise_for_status().json()["model"] == "one"
    assert len(served) == 1


def test_folder_of_models_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    multi = ["--sagemaker", "multi-model"]
    assert run(["serve", str(folder / "no"), *multi]) == 3
    assert "With --sagemaker multi-model, MODEL is the folder" in capsys.readouterr().err
    assert run(["serve", f"a={folder}", f"b={folder}", *multi]) == 2
    assert "is for one folder of models, and several models are given" in capsys.readouterr().err
    assert run(["serve", str(folder), *multi, "--grpc-port", "0"]) == 2
    assert "--grpc-port is for one model" in capsys.readouterr().err
