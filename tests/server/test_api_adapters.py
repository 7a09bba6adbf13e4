"""LoRA adapters loaded and unloaded at run time, and several names of one model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.openai_client import openai_client
from support.server_process import LlmkitServer, held, serving, wait_for
from support.tiny_adapters import WEIGHTS, merged, write_adapter
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.server.http.http_errors import is_inference_protocol
from llmkit.runtime.server.router.router_app import ROUTED_BY_BODY

PROMPT = [5, 9, 11, 300] * 5
COMPLETION: dict[str, Any] = {
    "prompt": PROMPT,
    "max_tokens": 12,
    "temperature": 0,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny_checkpoint(folder / "model", dtype="float32", max_position_embeddings=4096)
    loras = folder / "loras"
    write_adapter(model, loras / "first")
    write_adapter(model, loras / "team" / "second", seed=2)
    write_adapter(model, loras / "broken", seed=3)
    (loras / "broken" / WEIGHTS).write_bytes(b"no header")
    write_adapter(model, folder / "secret", seed=4)
    (loras / "link").symlink_to(folder / "secret")
    (loras / "loop").symlink_to(loras / "loop")
    (loras / "file").write_text("")
    return folder


@pytest.fixture(scope="module")
def adapter_server(folder: Path) -> Iterator[LlmkitServer]:
    options: dict[str, Any] = {
        "served_model_name": "tiny",
        "aliases": ["gpt-4o", "default"],
        "dp": 2,
    }
    (folder / "keys").write_text("key\n")
    options["api_key_file"] = str(folder / "keys")
    more_options = {
        "lora_dir": str(folder / "loras"),
        "kv_cache_memory": 2**25,
        "adapters": {"fixed": f"{folder}/secret"},
    }
    with serving(folder / "log", folder / "model", "key", **options, **more_options) as running:
        yield running


@pytest.fixture(scope="module")
def adapter_client(adapter_server: LlmkitServer) -> Iterator[openai.OpenAI]:
    with openai_client(adapter_server) as client:
        yield client


@pytest.fixture
def adapter_http(adapter_server: LlmkitServer) -> Iterator[httpx.Client]:
    with adapter_server.client() as client:
        yield client


def load(client: openai.OpenAI, name: str, path: str) -> Any:
    return client.post(
        "/load_lora_adapter", cast_to=object, body={"lora_name": name, "lora_path": path}
    )


def unload(client: openai.OpenAI, name: str) -> Any:
    return client.post("/unload_lora_adapter", cast_to=object, body={"lora_name": name})


def answer(client: openai.OpenAI, name: str) -> list[int]:
    ids: list[int] = client.completions.create(model=name, **COMPLETION).choices[0].token_ids
    return ids


def expected(path: Path) -> list[int]:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return load_engine(open_checkpoint(path), EngineOptions(device="cpu")).generate(
        [PROMPT], greedy
    )[0]


def listed(client: openai.OpenAI) -> dict[str, tuple[Any, Any]]:
    return {one.id: (one.parent, one.root) for one in client.models.list()}


def test_adapters_aliases_name_the_same_model(adapter_client: openai.OpenAI, folder: Path) -> None:
    assert list(listed(adapter_client)) == ["tiny", "gpt-4o", "default", "fixed"]
    assert listed(adapter_client)["gpt-4o"] == (None, str(folder / "model"))
    assert adapter_client.models.retrieve("default").id == "default"
    completion = adapter_client.completions.create(model="gpt-4o", **COMPLETION)
    assert completion.model == "gpt-4o"
    assert (
        answer(adapter_client, "tiny")
        == answer(adapter_client, "default")
        == expected(folder / "model")
    )


def test_adapters_are_models_from_loading_to_unloading(
    adapter_client: openai.OpenAI, folder: Path
) -> None:
    base = folder / "model"
    loras = folder / "loras"
    with pytest.raises(openai.NotFoundError):
        answer(adapter_client, "one")
    assert load(adapter_client, "one", "first") == {"lora_name": "one", "status": "loaded"}
    load(adapter_client, "two", str(loras / "team" / "second"))
    assert listed(adapter_client)["one"] == ("tiny", str(loras / "first"))
    answers = {name: answer(adapter_client, name) for name in ("one", "two")}
    for name, path in {"one": "first", "two": "team/second"}.items():
        whole = expected(merged(base, loras / path, folder / f"merged-{name}"))
        assert [answer(adapter_client, name) for _ in range(3)] == [whole] * 3, "in both replicas"
        assert answers[name] == whole
    assert answers["one"] != answers["two"] != answer(adapter_client, "tiny")
    with pytest.raises(openai.BadRequestError, match="already"):
        load(adapter_client, "one", "team/second")
    assert unload(adapter_client, "one") == {"lora_name": "one", "status": "unloaded"}
    with pytest.raises(openai.NotFoundError):
        answer(adapter_client, "one")
    load(adapter_client, "one", "team/second")
    assert answer(adapter_client, "one") == answers["two"], (
        "nothing cached of the adapter that had the name"
    )
    unload(adapter_client, "one")
    unload(adapter_client, "two")
    assert list(listed(adapter_client)) == ["tiny", "gpt-4o", "default", "fixed"]


def test_adapters_unload_after_running_requests_finish(
    adapter_client: openai.OpenAI, adapter_server: LlmkitServer
) -> None:
    load(adapter_client, "busy", "first")
    params: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 300,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    with adapter_client.completions.create(model="busy", stream=True, **params) as stream:
        chunks = iter(stream)
        next(chunks)
        going = threading.Thread(target=unload, args=(adapter_client, "busy"))
        with held(*adapter_server.engines()):
            going.start()
            wait_for(lambda: "busy" not in listed(adapter_client))
            with pytest.raises(openai.NotFoundError):
                answer(adapter_client, "busy")
        last = [chunk.choices[0].finish_reason for chunk in chunks][-1]
    assert last == "length"
    going.join(60)
    assert not going.is_alive()
    wait_for(lambda: adapter_server.metric("num_requests_running") == 0)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "link",
        "loop",
        "absent",
        "file",
        ".",
        "first/../..",
        "a\0b",
        "x" * 4000,
        "https://a/b",
        "/etc",
    ],
)
def test_adapters_load_from_the_folder_only(
    adapter_client: openai.OpenAI, folder: Path, path: str
) -> None:
    for lora_path in (path, str(folder / "secret")):
        with pytest.raises(openai.BadRequestError) as caught:
            load(adapter_client, "wanted", lora_path)
        assert caught.value.code == "adapter_not_found"
        assert str(folder) not in str(caught.value), "the error says nothing about files elsewhere"


def test_adapters_refuse_what_cannot_be_loaded_or_unloaded(
    adapter_client: openai.OpenAI, adapter_http: httpx.Client, adapter_server: LlmkitServer
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        load(adapter_client, "wanted", "broken")
    assert caught.value.code == "invalid_adapter"
    assert WEIGHTS in str(caught.value)
    assert "wanted" not in listed(adapter_client)
    for name in ("tiny", "gpt-4o", "fixed"):
        with pytest.raises(openai.BadRequestError, match="already"):
            load(adapter_client, name, "first")
    for name in ("tiny", "fixed", "unheard"):
        with pytest.raises(openai.NotFoundError):
            unload(adapter_client, name)
    for body in (
        {"lora_name": "x"},
        {"lora_path": "first"},
        {"lora_name": "a b", "lora_path": "first"},
        {"x": 1},
    ):
        got = adapter_http.post("/v1/load_lora_adapter", json=body)
        assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.post(f"{adapter_server.url}/v1/load_lora_adapter", json={}).status_code == 401


@pytest.mark.slow  # two processes for a refusal
def test_adapters_cannot_change_on_several_ranks(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora_dir": str(folder / "loras"), "tp": 2, "kv_cache_memory": 2**24}
    with (
        serving(tmp_path / "log", folder / "model", **options) as running,
        running.client() as client,
    ):
        got = client.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": "first"})
    assert (got.status_code, got.json()["error"]["code"]) == (400, "not_supported")
    assert "--lora" in json.dumps(got.json())


def test_router_knows_every_route_of_a_server(adapter_http: httpx.Client) -> None:
    paths = adapter_http.get("/openapi.json").json()["paths"]
    posts = {
        path
        for path, methods in paths.items()
        if "post" in methods and not is_inference_protocol(path)
    }
    posts -= {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"}
    posts.remove("/invocations")  # answered by another route of the router
    posts.remove("/v1/responses/{response_id}/cancel")  # routed by the id
    assert posts == set(ROUTED_BY_BODY)
