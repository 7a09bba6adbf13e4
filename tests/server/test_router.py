"""Several models behind one port: which are loaded when, and what clients see of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as Threads
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import psutil
import pytest
from huggingface_hub.errors import ValidationError
from support.router_process import LlmkitRouter, UncheckedRouter
from support.server_process import held, wait_for
from support.tgi_client import inference_client
from support.tiny_models import never_ends, tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli import main
from llmkit.cli.serve import named_models
from llmkit.common.errors import InputError, LlmkitError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.server.router import model_pool
from llmkit.runtime.server.router.check_models import check_models
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.run_server import bind
from llmkit.runtime.server.serve_options import ServeOptions

PROMPT = [5, 9, 11, 300] * 5
ASKED: dict[str, Any] = {
    "prompt": PROMPT,
    "max_tokens": 12,
    "temperature": 0,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}
LONG: dict[str, Any] = {
    "prompt": PROMPT,
    "max_tokens": 3500,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


class FakeServer:
    """A server that is ready, fails or ends when the test says so."""

    def __init__(self) -> None:
        self.ready: Future[Mapping[str, Any]] = Future()
        self.ended: Future[LlmkitError] = Future()

    def stop(self, grace_s: float = 0.0) -> None:
        if not self.ended.done():
            self.ended.set_result(LlmkitError("stopped"))


class Case:
    """A pool of fake servers, which are ready at once unless `hold` is set."""

    def __init__(
        self, names: str, max_loaded: int, idle_s: float = 0.0, patience_s: float = 60.0
    ) -> None:
        self.started: list[str] = []
        self.hold = False
        self.fail = False
        models = [PooledModel(name, name, lambda name=name: self.start(name)) for name in names]
        self.pool = ModelPool(models, max_loaded, idle_s, patience_s=patience_s)

    def start(self, name: str) -> FakeServer:
        self.started.append(name)
        server = FakeServer()
        if self.fail:
            server.ready.set_exception(InputError("no such model"))
        elif not self.hold:
            server.ready.set_result({})
        return server

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Any]:
        async with self.pool.acquire(self.pool.models[name]) as server:
            yield server

    async def ask(self, *names: str) -> None:
        for name in names:
            async with self.use(name):
                pass

    def states(self) -> str:
        return " ".join(model.state for model in self.pool.models.values())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)


def test_pool_unloads_the_model_that_is_idle_for_longest() -> None:
    async def run() -> None:
        case = Case("abc", max_loaded=2)
        await case.ask("a", "b", "a", "c")
        assert (case.started, case.states()) == (["a", "b", "c"], "loaded unloaded loaded")
        await case.ask("a", "b")
        assert (case.started[3:], case.states()) == (["b"], "loaded loaded unloaded")

    asyncio.run(run())


def test_pool_loads_a_model_once_for_concurrent_first_requests() -> None:
    async def run() -> None:
        case = Case("a", max_loaded=1)
        case.hold = True
        asks = [asyncio.create_task(case.ask("a")) for _ in range(5)]
        await until(lambda: case.states() == "loading")
        assert case.pool.num_waiting == 5
        asks[0].cancel()  # whoever leaves takes nothing from the others
        case.pool.models["a"].server.ready.set_result({})
        await asyncio.gather(*asks[1:])
        assert case.started == ["a"]

    asyncio.run(run())


def test_pool_keeps_a_busy_model_and_no_model_waits_forever() -> None:
    async def run() -> None:
        case = Case("ab", max_loaded=1, patience_s=0.0)
        async with case.use("a"):
            b = asyncio.create_task(case.ask("b"))
            await until(lambda: case.pool.models["a"].draining)
            late = asyncio.create_task(case.ask("a"))  # comes after b, and does not keep it waiting
            await asyncio.sleep(0.05)
            assert (case.started, case.states()) == (["a"], "loaded unloaded")
        await asyncio.gather(b, late)
        assert case.started == ["a", "b", "a"]
        patient = Case("ab", max_loaded=1)
        async with patient.use("a"):
            b = asyncio.create_task(patient.ask("b"))
            await asyncio.sleep(0.05)
            await patient.ask("a", "a")
            b.cancel()
        assert patient.started == ["a"], "nobody waited for it any more"

    asyncio.run(run())


def test_pool_reports_a_failed_load_and_the_next_request_retries() -> None:
    async def run() -> None:
        case = Case("ab", max_loaded=1)
        case.fail = True
        results = await asyncio.gather(case.ask("a"), case.ask("a"), return_exceptions=True)
        assert [str(error) for error in results] == ["no such model."] * 2
        assert (case.started, case.states()) == (["a"], "failed unloaded")
        case.fail = False
        await case.ask("a", "b", "a")
        assert (case.started, case.states()) == (["a", "a", "b", "a"], "loaded unloaded")

    asyncio.run(run())


def test_pool_restarts_an_ended_server_at_the_next_request() -> None:
    async def run() -> None:
        case = Case("a", max_loaded=1)
        await case.ask("a")
        case.pool.models["a"].server.ended.set_result(LlmkitError("killed"))
        await until(lambda: case.states() == "failed")
        await case.ask("a")
        assert (case.started, case.states()) == (["a", "a"], "loaded")

    asyncio.run(run())


def test_pool_unloads_idle_models_and_keeps_busy_ones() -> None:
    async def run() -> None:
        case = Case("ab", max_loaded=2, idle_s=0.05)
        async with case.use("a"):
            await case.ask("b")
            await until(lambda: case.states() == "loaded unloaded")
        await until(lambda: case.states() == "unloaded unloaded")
        await case.ask("a")
        assert case.started == ["a", "b", "a"]

    asyncio.run(run())


def test_pool_keeps_a_model_that_works_on_without_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_pool, "_BUSY_POLL_S", 0.001)

    async def run() -> None:
        case = Case("ab", max_loaded=1)
        model = case.pool.models["a"]
        works = True
        num_asked = 0

        async def is_busy(server: Any) -> bool:
            nonlocal num_asked
            num_asked += 1
            if num_asked > 20:
                raise OSError("the server does not answer")
            return works

        async with case.use("a"):
            case.pool.keep_loaded(model, is_busy)
            case.pool.keep_loaded(model, is_busy)
        case.pool.unload_when_idle(model)
        other = asyncio.create_task(case.ask("b"))
        await until(lambda: num_asked > 5)
        assert (case.states(), model.num_running) == ("loaded unloaded", 1)
        works = False
        await case.pool.wait_until_done()
        await other
        assert (case.states(), model.num_running) == ("unloaded loaded", 0)
        works = True
        async with case.use("a"):
            case.pool.keep_loaded(model, is_busy)
        await case.pool.wait_until_done()  # an error ends it
        assert num_asked > 20 and model.num_running == 0

    asyncio.run(run())


def test_pool_keeps_a_model_as_long_as_its_last_request_says() -> None:
    async def run() -> None:
        case = Case("ab", max_loaded=2, idle_s=0.05)
        pool = case.pool
        model = pool.models["a"]
        async with pool.acquire(model, idle_s=math.inf):
            assert pool.seconds_to_unload(model) is None
        await case.ask("b")
        await until(lambda: case.states() == "loaded unloaded")
        async with pool.acquire(model, idle_s=60):
            pool.unload_when_idle(model)
            await asyncio.sleep(0.02)
            assert model.state == "loaded", "a running request keeps it"
        await until(lambda: model.state == "unloaded")
        pool.unload_when_idle(model)  # has no effect on a model that is not loaded
        async with pool.acquire(model, idle_s=1e300):
            assert pool.seconds_to_unload(model) > 86_400 * 364
        async with pool.acquire(model):
            assert pool.seconds_to_unload(model) == pytest.approx(0.05)
        await until(lambda: model.state == "unloaded")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=x", "a=y"], "two models have the name 'a'"),
        (["org/a", "org/a"], "two models have the name 'org/a'"),
        (["a=x", "=y"], "'=y' is not NAME=MODEL"),
        (["a=x", "b=y", "--lora", "l=d"], "--lora is for one model"),
        (["a=x", "--served-model-name", "b"], "--served-model-name is for one model"),
        (["a=x", "b=y", "--max-loaded", "0"], "--max-loaded: 0 is out of range"),
        (["a=x", "b=y", "--host", "0.0.0.0"], "other machines could use the server without a key"),
    ],
)
def test_router_refuses_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_router_accepts_names_for_models(tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()
    assert named_models(str(tmp_path / "x=y"), []) == {}, "one model, whose path has an equals sign"
    assert named_models("a=org/x", []) == {"a": "org/x"}
    assert named_models("org/x", ["b=org/y"]) == {"org/x": "org/x", "b": "org/y"}
    assert named_models(f"{tmp_path}/x=y", ["org/z"]) == {
        "x=y": f"{tmp_path}/x=y",
        "org/z": "org/z",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        tiny_checkpoint(folder / name, dtype="float32", seed=seed, max_position_embeddings=4096)
        never_ends(folder / name)
    (folder / "late").symlink_to(folder / "one")
    (folder / "keys").write_text("key-one\nkey-two\n")
    return folder


@pytest.fixture(scope="module")
def router(folder: Path) -> Iterator[LlmkitRouter]:
    models = {"one": folder / "one", "team/two": folder / "two", "late": folder / "late"}
    options = ("--max-loaded", "2", "--api-key-file", str(folder / "keys"), "--max-num-seqs", "8")
    options += ("--store-responses",)
    options += ("--allowed-hosts", "llm.example.com", "--allowed-origins", "app://obsidian.md")
    with LlmkitRouter(folder / "log", models, *options, key="key-one") as running:
        running.wait_ready()
        yield running


@pytest.fixture
def http(router: LlmkitRouter) -> Iterator[httpx.Client]:
    with router.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(router: LlmkitRouter) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{router.url}/v1", api_key=router.key, max_retries=0, timeout=60
    ) as client:
        yield client


def first_event(lines: Iterator[str]) -> str:
    """Read up to the first event: comments come before it while the model is loaded."""
    return next(line for line in lines if line.startswith("data: "))


def states(http: httpx.Client) -> dict[str, str]:
    return {one["id"]: one["state"] for one in http.get("/v1/models").json()["data"]}


def expected(path: Path) -> list[int]:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return load_engine(open_checkpoint(path), EngineOptions(device="cpu")).generate(
        [PROMPT], greedy
    )[0]


def test_router_sends_each_request_to_the_named_model(
    router: LlmkitRouter, client: openai.OpenAI, http: httpx.Client, folder: Path
) -> None:
    assert states(http) == {"one": "unloaded", "team/two": "unloaded", "late": "unloaded"}
    assert [
        http.get(path).status_code for path in ("/health", "/ready", "/v2/models/one/ready")
    ] == [200, 200, 503]
    names = ["one", "team/two"] * 3
    with Threads(6) as threads:
        given = list(
            threads.map(lambda name: client.completions.create(model=name, **ASKED), names)
        )
    expected_ids = {"one": expected(folder / "one"), "team/two": expected(folder / "two")}
    assert expected_ids["one"] != expected_ids["team/two"]
    for name, one in zip(names, given, strict=True):
        assert (one.model, one.choices[0].token_ids) == (name, expected_ids[name])
    assert (
        router.of_model("one", "model_loads_total")
        == router.of_model("team/two", "model_loads_total")
        == 1
    )
    chunks = list(client.completions.create(model="team/two", **ASKED, stream=True))
    token_ids = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    assert token_ids == expected_ids["team/two"]
    chat = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "hello"}], max_tokens=3
    )
    assert chat.usage is not None and chat.usage.completion_tokens == 3
    assert states(http) == {"one": "loaded", "team/two": "loaded", "late": "unloaded"}
    assert client.models.retrieve("team/two").max_model_len == 4096  # type: ignore[attr-defined]
    assert http.get("/v2/models/team/two/ready").status_code == 200
    assert router.of_model("one", "generation_tokens_total") == 3 * 12 + 3
    assert router.of_model("late", "model_loaded") == 0
    assert http.get("/").status_code == 200
    assert http.get("/info").json()["defaults"]["temperature"] == 1.0


def test_router_keeps_prefix_caches_of_keys_apart(router: LlmkitRouter) -> None:
    def cached(key: str) -> int:
        body = {"model": "one", "prompt": [7, 8, 9, 10] * 20, "max_tokens": 1}
        got = httpx.post(
            f"{router.url}/v1/completions", json=body, headers={"x-api-key": key}, timeout=60
        ).json()
        count: int = got["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert [cached("key-one"), cached("key-one"), cached("key-two"), cached("key-two")] == [
        0,
        64,
        0,
        64,
    ]


def test_router_answers_wrong_requests_as_a_single_server_does(
    router: LlmkitRouter, http: httpx.Client
) -> None:
    ask = "/v1/completions"
    body = {"model": "one", "prompt": "a"}
    as_json = {"content-type": "application/json"}
    for status, code, got in (
        (401, "invalid_api_key", httpx.post(f"{router.url}{ask}", json=body)),
        (401, "invalid_api_key", httpx.get(f"{router.url}/metrics")),
        (403, "foreign_host", http.post(ask, json=body, headers={"host": "evil.example"})),
        (
            403,
            "foreign_origin",
            http.post(ask, json=body, headers={"origin": "http://evil.example"}),
        ),
        (404, "model_not_found", http.post(ask, json=body | {"model": "three"})),
        (404, "model_not_found", http.get("/v1/models/three")),
        (404, "not_found", http.post("/v1/unheard", json=body)),
        (405, "method_not_allowed", http.get(ask)),
        (415, "content_type", http.post(ask, content="{}", headers={"content-type": "text/plain"})),
        (413, "body_too_large", http.post(ask, content=b"x" * (9 << 20), headers=as_json)),
        (400, "invalid_json", http.post(ask, content="{", headers=as_json)),
        (400, "missing_required_parameter", http.post(ask, json={"prompt": "a"})),
        (400, "missing_required_parameter", http.get("/tokenizer_info")),
        (404, "model_not_found", http.get("/tokenizer_info?model=three")),
        (400, "invalid_type", http.post(ask, json=body | {"model": 3})),
        (400, "invalid_value", http.post(ask, json=body | {"max_tokens": -3})),
    ):
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)
        assert len(got.content) <= 16 * 1024
    assert http.get("/v2/models/three/infer").status_code == 404
    assert http.post("/v1/messages", json={"model": "three"}).json()["type"] == "error", (
        "Anthropic's shape"
    )


def test_router_tells_of_a_loaded_model_without_loading_others(
    router: LlmkitRouter, client: openai.OpenAI, http: httpx.Client
) -> None:
    client.completions.create(model="one", **ASKED)
    for path in ("/v2/models/one", "/v2/models/one/versions/1"):
        assert http.get(f"{path}/ready").status_code == 200
        (stats,) = http.get(f"{path}/stats").json()["model_stats"]
        assert (stats["name"], stats["inference_stats"]["success"]["count"] > 0) == ("one", True)
    assert http.get("/v2/models/one/versions/2/ready").status_code == 404
    assert http.get("/v2/models/three/versions/1/ready").status_code == 404
    states = {entry["id"]: entry["state"] for entry in http.get("/v1/models").json()["data"]}
    # Two of the three models may be loaded at a time.
    waiting = next(name for name, state in states.items() if state != "loaded")
    for end in ("ready", "stats", "versions/1/ready"):
        assert http.get(f"/v2/models/{waiting}/{end}").status_code == 503
    after = {entry["id"]: entry["state"] for entry in http.get("/v1/models").json()["data"]}
    assert after == states, "nothing was loaded"
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]
    assert http.get("/docs").status_code == 200
    assert http.get("/tokenizer_info?model=one").json()["eos_token"] == "<|im_end|>"


def test_router_forwards_the_header_of_ignored_fields(client: openai.OpenAI) -> None:
    for stream in (False, True):
        raw = client.completions.with_raw_response.create(
            model="one", prompt="a", max_tokens=2, stream=stream, extra_body={"unheard": 1}
        )
        assert raw.headers["x-llmkit-ignored"] == "unheard"


def test_router_serves_ollamas_clients(router: LlmkitRouter, http: httpx.Client) -> None:
    client = ollama.Client(host=router.url, headers={"authorization": "Bearer key-one"})
    before = states(http)
    listed = {entry.model: entry.details for entry in client.list().models}
    assert set(listed) == {"one:latest", "team/two:latest", "late:latest"}
    assert listed["one:latest"].parameter_size == "139.58K"
    for name in ("one", "team/two:latest"):
        assert client.show(name).modelinfo["llama.embedding_length"] == 64
    assert states(http) == before, "lists load nothing"
    options = {"num_predict": 3, "temperature": 0}
    whole = client.generate("one:latest", "a b", options=options, keep_alive="30m")
    assert whole.model == "one:latest"
    parts = list(client.generate("one", "a b", options=options, stream=True, keep_alive=-1))
    assert "".join(part.response for part in parts) == whole.response
    (entry,) = (entry for entry in client.ps().models if entry.model == "one:latest")
    assert entry.expires_at.year == 9999
    assert entry.context_length == 4096
    client.generate("one", "", keep_alive="20s")
    (entry,) = (entry for entry in client.ps().models if entry.model == "one:latest")
    assert entry.expires_at - datetime.now(UTC) < timedelta(seconds=21)
    assert client.generate("one", "", keep_alive=0).done_reason == "unload"
    wait_for(lambda: states(http)["one"] == "unloaded")
    assert client.chat("one", [], keep_alive="0s").done_reason == "unload"
    assert states(http)["one"] == "unloaded", "an unloaded model is not loaded to unload it"
    assert client.chat("one", []).done_reason == "load"
    assert len(client.embed("one", ["a", "b"]).embeddings) == 2
    client.generate("one", "a", options=options, keep_alive=0)
    wait_for(lambda: states(http)["one"] == "unloaded")
    for call in (
        lambda: client.generate("three", "a"),
        lambda: client.show("three"),
        lambda: client.generate("one", "a", keep_alive="soon"),
        lambda: client.pull("one"),
    ):
        with pytest.raises(ollama.ResponseError) as raised:
            call()
        assert raised.value.status_code in (400, 404)


def test_router_serves_tgis_client(router: LlmkitRouter) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 4, "adapter_id": "one"}
    with inference_client(router.url, "key-one") as client:
        whole = client.text_generation("a b", details=True, **asked)
        assert whole.details is not None
        assert 0 < whole.details.generated_tokens <= 4
        streamed = client.text_generation("a b", stream=True, **asked)
        assert "".join(streamed) == whole.generated_text
        with pytest.raises(ValidationError, match="three"):
            client.text_generation("a b", adapter_id="three")
        with pytest.raises(ValidationError, match="Name one of"):
            client.text_generation("a b")
    assert httpx.post(router.url, json={"inputs": "a"}).status_code == 401
    assert httpx.get(router.url).status_code == 200, "the web page needs no key"


def test_router_accepts_hosts_and_origins_by_option(
    router: LlmkitRouter, http: httpx.Client
) -> None:
    headers = {"host": "llm.example.com", "origin": "app://obsidian.md", "x-request-id": "mine-1"}
    body = {"model": "one", "prompt": "a", "max_tokens": 1}
    for stream in (False, True):
        answer = http.post("/v1/completions", json=body | {"stream": stream}, headers=headers)
        assert answer.status_code == 200
        # Each header once, although the model's server has set it too.
        for name, value in (
            ("access-control-allow-origin", "app://obsidian.md"),
            ("x-request-id", "mine-1"),
            ("vary", "Origin"),
        ):
            assert answer.headers.get_list(name) == [value]
    asked = httpx.options(
        f"{router.url}/v1/completions",
        headers=headers | {"access-control-request-method": "POST"},
    )
    assert (asked.status_code, asked.headers["x-request-id"]) == (204, "mine-1")
    other = http.post("/v1/completions", json=body, headers={"origin": "app://evil.obsidian.md"})
    assert (other.status_code, other.json()["error"]["code"]) == (403, "foreign_origin")


def test_router_forwards_gzip_bodies_and_heads(http: httpx.Client) -> None:
    body = gzip.compress(json.dumps({"model": "one", "prompt": "a", "max_tokens": 1}).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = http.post("/v1/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 1)
    refused = http.post(
        "/v1/completions", content=body, headers=headers | {"content-encoding": "br"}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "content_encoding")
    for path in ("/health", "/v1/models", "/v2/models/one"):
        assert (http.head(path).status_code, http.head(path).content) == (200, b"")
        assert int(http.head(path).headers["content-length"]) == len(http.get(path).content)
        assert len(http.get(path).headers.get_list("date")) == 1


def test_router_client_that_disconnects_frees_the_engine(
    router: LlmkitRouter, http: httpx.Client
) -> None:
    with http.stream("POST", "/v1/completions", json=LONG | {"model": "one", "n": 8}) as got:
        first_event(got.iter_lines())
    wait_for(lambda: router.of_model("one", "num_requests_running") == 0)
    assert router.of_model("one", "request_success_total", finished_reason="cancelled") >= 1


def test_router_fails_streams_of_a_dead_server_and_reloads_it(
    router: LlmkitRouter, client: openai.OpenAI, http: httpx.Client
) -> None:
    with http.stream("POST", "/v1/completions", json=LONG | {"model": "team/two"}) as got:
        lines = got.iter_lines()
        first_event(lines)
        for child in psutil.Process(router.process.pid).children():
            child.kill()
        rest = [line for line in lines if line]
    assert '"code":"lost"' in rest[-1]
    assert len(client.completions.create(model="team/two", **ASKED).choices[0].token_ids) == 12
    assert router.of_model("team/two", "model_failures_total") == 1


def test_router_reports_why_a_model_cannot_load_and_retries(
    router: LlmkitRouter, client: openai.OpenAI, http: httpx.Client, folder: Path
) -> None:
    (folder / "late").unlink()  # it was there when the server started
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="late", **ASKED)
    assert (caught.value.status_code, caught.value.code) == (503, "model_failed")
    assert f"{folder / 'late'} does not exist" in str(caught.value)
    assert states(http)["late"] == "failed"
    (folder / "late").symlink_to(folder / "one")
    assert len(client.completions.create(model="late", **ASKED).choices[0].token_ids) == 12
    assert states(http)["late"] == "loaded"


def test_router_keeps_a_model_loaded_for_a_background_response(
    router: LlmkitRouter, http: httpx.Client
) -> None:
    def state() -> str:
        entries = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        return str(entries["one"]["state"])

    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="key-one", max_retries=0)
    response = client.responses.create(
        model="one",
        input="a",
        background=True,
        max_output_tokens=3500,
        temperature=0,
    )
    with held(*router.engines()):
        http.post("/api/generate", json={"model": "one", "keep_alive": 0}).raise_for_status()
        for _ in range(5):
            assert client.responses.retrieve(response.id).status in ("queued", "in_progress")
            http.post("/api/generate", json={"model": "one", "keep_alive": 0}).raise_for_status()
            assert state() == "loaded"
        assert router.of_model("one", "background_responses") == 1
    assert client.responses.cancel(response.id).status == "cancelled"
    http.post("/api/generate", json={"model": "one", "keep_alive": 0}).raise_for_status()
    wait_for(lambda: state() == "unloaded")


@pytest.fixture
def eager_router(folder: Path, tmp_path: Path) -> Iterator[UncheckedRouter]:
    """A server whose streams get comments long before a model is loaded."""
    models = {"one": folder / "one", "absent": tmp_path / "absent"}
    with UncheckedRouter(tmp_path / "log", models, stream_keep_alive=0.2) as running:
        running.wait_ready()
        yield running


@pytest.mark.slow  # test_route_config.py has the comments of a stream that waits
def test_router_stream_gets_comments_while_its_model_loads(eager_router: UncheckedRouter) -> None:
    body = {"model": "one", "prompt": "a", "max_tokens": 3, "stream": True}
    wrong = body | {"max_tokens": "3"}
    turn = {"model": "one", "messages": [{"role": "user", "content": "a"}], "max_tokens": "3"}

    def lines(path: str, json_body: dict[str, Any]) -> tuple[int, str, list[str]]:
        with eager_router.client() as http, http.stream("POST", path, json=json_body) as got:
            kind = got.headers["content-type"]
            return got.status_code, kind, [line for line in got.iter_lines() if line]

    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", body),
        ("/v1/completions", wrong),
        ("/v1/messages", turn | {"stream": True}),
        ("/v2/models/one/generate_stream", {"text_input": "a", "max_tokens": "3"}),
        ("/v1/chat/completions", turn | {"model": "absent", "stream": True}),
        # These are no streams.
        ("/v1/completions", wrong | {"stream": False}),
        ("/v1/embeddings", {"model": "absent", "input": "a", "stream": True}),
    ]
    with Threads(len(asked) + 1) as threads:
        found = [threads.submit(lines, path, given) for path, given in asked]
        with openai.OpenAI(base_url=f"{eager_router.url}/v1", api_key="none") as client:
            chunks = list(client.completions.create(**body))
            assert [chunk.model for chunk in chunks] == ["one"] * len(chunks)
            assert chunks[-1].choices[0].finish_reason == "length"
    *streams, full, unknown = [one.result() for one in found]
    for status, kind, texts in streams:
        assert (status, kind) == (200, "text/event-stream; charset=utf-8")
        assert texts[:2] == [": keep-alive", ": keep-alive"]
    (*_, done), *errors = [texts for _, _, texts in streams]
    assert done == "data: [DONE]"
    last = [texts[-2:] for texts in errors]
    documents = [json.loads(texts[-1].removeprefix("data: ")) for texts in last]
    # The line ":" ends the comments for clients that strip what they receive.
    assert [texts[0] for texts in last] == [":", "event: error", ":", ":"]
    completion, message, inference, absent = documents
    assert completion["error"]["param"] == message["error"]["param"] == "max_tokens"
    assert message["type"] == "error"
    assert "max_tokens" in inference["error"]
    assert absent["error"]["code"] == "model_failed"
    assert (full[0], full[1]) == (400, "application/json")
    assert (unknown[0], unknown[1]) == (503, "application/json")


def test_router_refuses_a_wrong_model_before_it_listens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bind("127.0.0.1", 0) as taken:
        # A port in use is reported only when the server listens, which it does not come to.
        options = ("--port", str(taken.getsockname()[1]))
        models = {"a": folder / "one", "b": tmp_path / "none"}
        words = [f"{name}={path}" for name, path in models.items()]
        assert main.run(["serve", *words, "--device", "cpu", *options]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"llmkit serve: error: the model b: {tmp_path / 'none'} does not exist. "
        "A directory, a hub id or a .gguf file was expected."
    )


def test_router_checks_tokenizers_and_options_of_every_model(folder: Path, tmp_path: Path) -> None:
    models = {"a": str(folder / "one"), "b": str(shutil.copytree(folder / "two", tmp_path / "b"))}
    options = ServeOptions("", engine=EngineOptions(device="cpu"))
    assert check_models(options, models).failed is None
    (tmp_path / "b" / "tokenizer.json").write_text('{"model"')
    failed = check_models(options, models).failed
    assert failed is not None
    assert failed.what.startswith(f"the model b: {tmp_path / 'b' / 'tokenizer.json'} is malformed")
    long = ServeOptions("", engine=EngineOptions(device="cpu", max_model_len=5000))
    failed = check_models(long, models).failed
    assert failed is not None
    assert failed.what == "the model a: --max-model-len 5000 is over the model's limit"
    assert isinstance(failed.error(), InputError)


@pytest.fixture
def fresh_router(folder: Path, tmp_path: Path) -> Iterator[LlmkitRouter]:
    """A server of one model, which is loaded when asked for."""
    with LlmkitRouter(tmp_path / "log", {"one": folder / "one"}) as running:
        yield running.wait_ready()  # type: ignore[misc]


def test_router_finishes_streams_after_sigterm_and_leaves_no_process(
    fresh_router: LlmkitRouter,
) -> None:
    ended: list[str] = []

    def read() -> None:
        with (
            fresh_router.client() as http,
            # The name of the only model may be left out.
            http.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 300}) as got,
        ):
            ended.extend(line for line in got.iter_lines() if line.startswith("data: "))

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: bool(ended))  # it has begun
    family = fresh_router.family()
    with held(fresh_router.engine()), fresh_router.client() as http:
        fresh_router.process.send_signal(signal.SIGTERM)
        wait_for(lambda: http.get("/ready").status_code == 503)
        assert (
            http.post("/v1/completions", json=LONG | {"model": "one"}).json()["error"]["code"]
            == "draining"
        )
    reader.join(60)
    assert ended[-1] == "data: [DONE]"
    assert json.loads(ended[0].removeprefix("data: "))["model"] == "one"
    assert fresh_router.process.wait(60) == 0
    assert (
        "llmkit serve: stopping: 1 request left, Ctrl-C again to cut it"
        in fresh_router.log.read_text().splitlines()
    )
    assert len(family) >= 2
    assert not any(process.is_running() for process in family)


def test_server_process_ends_with_its_parent(folder: Path) -> None:
    """Killed as early as can be: the child loads its model still."""
    code = (
        "import sys, time\n"
        "from llmkit.runtime.server_process import ServerProcess\n"
        "from llmkit.runtime.server.serve_options import ServeOptions\n"
        "print(ServerProcess(ServeOptions(sys.argv[1])).pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    command = [sys.executable, "-c", code, str(folder / "one")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_for(lambda: bool(child.children()))
        family = [child, *child.children()]
        parent.kill()
    wait_for(lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in family))
