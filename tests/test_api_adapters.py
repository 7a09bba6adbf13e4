"""LoRA adapters that clients load and unload while the server runs, and several names of one model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from adapters import WEIGHTS, merged, write_adapter
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint

from llmkit.checkpoint.source import open_checkpoint
from llmkit.runtime.engine.types import SamplingParams
from llmkit.runtime.load import EngineOptions, load_engine
from llmkit.runtime.server.router.app import BY_BODY

PROMPT = [5, 9, 11, 300] * 5
ASKED: dict[str, Any] = {
    "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True},
}  # fmt: skip


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
def server(folder: Path) -> Iterator[ServerProcess]:
    options: dict[str, Any] = {"served_model_name": "tiny", "aliases": ["gpt-4o", "default"], "dp": 2}
    (folder / "keys").write_text("key\n")
    options["api_key_file"] = str(folder / "keys")
    given = {"lora_dir": str(folder / "loras"), "kv_cache_memory": 2**25, "adapters": {"fixed": f"{folder}/secret"}}
    with serving(folder / "log", folder / "model", "key", **options, **given) as running:
        yield running


def load(client: openai.OpenAI, name: str, path: str) -> Any:
    return client.post("/load_lora_adapter", cast_to=object, body={"lora_name": name, "lora_path": path})


def unload(client: openai.OpenAI, name: str) -> Any:
    return client.post("/unload_lora_adapter", cast_to=object, body={"lora_name": name})


def answer(client: openai.OpenAI, name: str) -> list[int]:
    ids: list[int] = client.completions.create(model=name, **ASKED).choices[0].token_ids  # type: ignore[attr-defined]
    return ids


def expected(path: Path) -> list[int]:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return load_engine(open_checkpoint(path), EngineOptions(device="cpu")).generate([PROMPT], greedy)[0]


def listed(client: openai.OpenAI) -> dict[str, tuple[Any, Any]]:
    return {one.id: (one.parent, one.root) for one in client.models.list()}  # type: ignore[attr-defined]


def test_every_name_is_the_same_model(client: openai.OpenAI, folder: Path) -> None:
    assert list(listed(client)) == ["tiny", "gpt-4o", "default", "fixed"]
    assert listed(client)["gpt-4o"] == (None, str(folder / "model"))
    assert client.models.retrieve("default").id == "default"
    given = client.completions.create(model="gpt-4o", **ASKED)
    assert given.model == "gpt-4o"
    assert answer(client, "tiny") == answer(client, "default") == expected(folder / "model")


def test_an_adapter_is_a_model_from_its_loading_to_its_unloading(client: openai.OpenAI, folder: Path) -> None:
    base, loras = folder / "model", folder / "loras"
    with pytest.raises(openai.NotFoundError):
        answer(client, "one")
    assert load(client, "one", "first") == {"lora_name": "one", "status": "loaded"}
    load(client, "two", str(loras / "team" / "second"))
    assert listed(client)["one"] == ("tiny", str(loras / "first"))
    answers = {name: answer(client, name) for name in ("one", "two")}
    for name, path in {"one": "first", "two": "team/second"}.items():
        whole = expected(merged(base, loras / path, folder / f"merged-{name}"))
        assert [answer(client, name) for _ in range(3)] == [whole] * 3, "in both replicas"
        assert answers[name] == whole
    assert answers["one"] != answers["two"] != answer(client, "tiny")
    with pytest.raises(openai.BadRequestError, match="already"):
        load(client, "one", "team/second")
    assert unload(client, "one") == {"lora_name": "one", "status": "unloaded"}
    with pytest.raises(openai.NotFoundError):
        answer(client, "one")
    load(client, "one", "team/second")
    assert answer(client, "one") == answers["two"], "nothing cached of the adapter that had the name"
    unload(client, "one")
    unload(client, "two")
    assert list(listed(client)) == ["tiny", "gpt-4o", "default", "fixed"]


def test_requests_under_way_are_finished_before_their_adapter_goes(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    load(client, "busy", "first")
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with client.completions.create(model="busy", stream=True, **asked) as stream:
        chunks = iter(stream)
        next(chunks)
        going = threading.Thread(target=unload, args=(client, "busy"))
        going.start()
        wait_for(lambda: "busy" not in listed(client))
        with pytest.raises(openai.NotFoundError):
            answer(client, "busy")
        last = [chunk.choices[0].finish_reason for chunk in chunks][-1]
    assert last == "length"
    going.join(60)
    assert not going.is_alive()
    assert server.metric("num_requests_running") == 0


@pytest.mark.parametrize(
    "path",
    ["../secret", "link", "loop", "absent", "file", ".", "first/../..", "a\0b", "x" * 4000, "https://a/b", "/etc"],
)
def test_only_what_is_in_the_folder_is_loaded(client: openai.OpenAI, folder: Path, path: str) -> None:
    for given in (path, str(folder / "secret")):
        with pytest.raises(openai.BadRequestError) as caught:
            load(client, "wanted", given)
        assert caught.value.code == "adapter_not_found"
        assert str(folder) not in str(caught.value), "nothing is told of what is elsewhere"


def test_what_cannot_be_loaded_or_unloaded(client: openai.OpenAI, http: httpx.Client, server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        load(client, "wanted", "broken")
    assert caught.value.code == "invalid_adapter"
    assert WEIGHTS in str(caught.value)
    assert "wanted" not in listed(client)
    for name in ("tiny", "gpt-4o", "fixed"):
        with pytest.raises(openai.BadRequestError, match="already"):
            load(client, name, "first")
    for name in ("tiny", "fixed", "unheard"):
        with pytest.raises(openai.NotFoundError):
            unload(client, name)
    for body in ({"lora_name": "x"}, {"lora_path": "first"}, {"lora_name": "a b", "lora_path": "first"}, {"x": 1}):
        got = http.post("/v1/load_lora_adapter", json=body)
        assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.post(f"{server.url}/v1/load_lora_adapter", json={}).status_code == 401


def test_ranks_have_the_adapters_of_the_start_only(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora_dir": str(folder / "loras"), "tp": 2, "kv_cache_memory": 2**24}
    with serving(tmp_path / "log", folder / "model", **options) as running, running.client() as client:
        got = client.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": "first"})
    assert (got.status_code, got.json()["error"]["code"]) == (400, "not_supported")
    assert "--lora" in json.dumps(got.json())


def test_the_router_of_several_models_knows_every_route_of_one(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    posts = {path for path, methods in paths.items() if "post" in methods and not path.startswith("/v2")}
    assert posts - {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} == set(BY_BODY)
