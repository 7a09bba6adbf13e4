"""Several models behind one port: which are loaded when, and what clients see of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as Threads
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ServerProcess, wait_for
from tiny import tiny_checkpoint

from llmkit.checkpoint.errors import InputError, LlmkitError
from llmkit.checkpoint.source import open_checkpoint
from llmkit.cli import main
from llmkit.cli.serve import named_models
from llmkit.runtime.engine.types import EngineOptions, SamplingParams
from llmkit.runtime.load import load_engine
from llmkit.runtime.server.router.fleet import Fleet, Model

PROMPT = [5, 9, 11, 300] * 5
ASKED: dict[str, Any] = {
    "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True},
}  # fmt: skip
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 3500, "temperature": 0, "ignore_eos": True, "stream": True}


class FakeServer:
    """A server that is ready, fails or ends when the test says so."""

    def __init__(self) -> None:
        self.ready: Future[Mapping[str, Any]] = Future()
        self.gone: Future[LlmkitError] = Future()

    def stop(self, grace_s: float = 0.0) -> None:
        if not self.gone.done():
            self.gone.set_result(LlmkitError("stopped"))


class Case:
    """A fleet of fakes, which are ready at once unless `hold` is set."""

    def __init__(self, names: str, max_loaded: int, idle_s: float = 0.0, patience_s: float = 60.0) -> None:
        self.started: list[str] = []
        self.hold = False
        self.fail = False
        models = [Model(name, name, lambda name=name: self.start(name)) for name in names]  # type: ignore[misc]
        self.fleet = Fleet(models, max_loaded, idle_s, patience_s=patience_s)

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
        async with self.fleet.use(self.fleet.models[name]) as server:
            yield server

    async def ask(self, *names: str) -> None:
        for name in names:
            async with self.use(name):
                pass

    def states(self) -> str:
        return " ".join(model.state for model in self.fleet.models.values())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_the_model_that_was_idle_for_longest_makes_room() -> None:
    async def run() -> None:
        case = Case("abc", max_loaded=2)
        await case.ask("a", "b", "a", "c")
        assert (case.started, case.states()) == (["a", "b", "c"], "loaded unloaded loaded")
        await case.ask("a", "b")
        assert (case.started[3:], case.states()) == (["b"], "loaded loaded unloaded")

    asyncio.run(run())


def test_first_requests_at_the_same_time_load_a_model_once() -> None:
    async def run() -> None:
        case = Case("a", max_loaded=1)
        case.hold = True
        asks = [asyncio.create_task(case.ask("a")) for _ in range(5)]
        await until(lambda: case.states() == "loading")
        assert case.fleet.waiting == 5
        asks[0].cancel()  # whoever leaves takes nothing from the others
        case.fleet.models["a"].server.ready.set_result({})
        await asyncio.gather(*asks[1:])
        assert case.started == ["a"]

    asyncio.run(run())


def test_a_model_in_use_is_not_unloaded_and_no_model_waits_for_ever() -> None:
    async def run() -> None:
        case = Case("ab", max_loaded=1, patience_s=0.0)
        async with case.use("a"):
            b = asyncio.create_task(case.ask("b"))
            await until(lambda: case.fleet.models["a"].leaving)
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


def test_a_load_that_fails_is_told_and_tried_again_by_the_next_request() -> None:
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


def test_a_server_that_ends_is_started_again_when_asked_for() -> None:
    async def run() -> None:
        case = Case("a", max_loaded=1)
        await case.ask("a")
        case.fleet.models["a"].server.gone.set_result(LlmkitError("killed"))
        await until(lambda: case.states() == "failed")
        await case.ask("a")
        assert (case.started, case.states()) == (["a", "a"], "loaded")

    asyncio.run(run())


def test_idle_models_are_unloaded_and_busy_ones_are_not() -> None:
    async def run() -> None:
        case = Case("ab", max_loaded=2, idle_s=0.05)
        async with case.use("a"):
            await case.ask("b")
            await until(lambda: case.states() == "loaded unloaded")
        await until(lambda: case.states() == "unloaded unloaded")
        await case.ask("a")
        assert case.started == ["a", "b", "a"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a=x", "a=y"], "two models have the name 'a'"),
        (["org/a", "org/a"], "two models have the name 'org/a'"),
        (["a=x", "=y"], "'=y' is no NAME=MODEL"),
        (["a=x", "b=y", "--lora", "l=d"], "--lora is for one model"),
        (["a=x", "--served-model-name", "b"], "--served-model-name is for one model"),
        (["a=x", "b=y", "--max-loaded", "0"], "--max-loaded: 0 is out of range"),
        (["a=x", "b=y", "--host", "0.0.0.0"], "other machines could use the server without a key"),
    ],
)
def test_usage(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_names(tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()
    assert named_models(str(tmp_path / "x=y"), []) == {}, "one model, whose path has an equals sign"
    assert named_models("a=org/x", []) == {"a": "org/x"}
    assert named_models("org/x", ["b=org/y"]) == {"org/x": "org/x", "b": "org/y"}
    assert named_models(f"{tmp_path}/x=y", ["org/z"]) == {"x=y": f"{tmp_path}/x=y", "org/z": "org/z"}


class Router(ServerProcess):
    """`llmkit serve NAME=MODEL ...` in a process of its own."""

    def __init__(self, log: Path, models: Mapping[str, Path], *options: str, key: str | None = None) -> None:
        self.log, self.key = log, key
        command = [sys.executable, "-m", "llmkit.cli.main", "serve", *(f"{n}={path}" for n, path in models.items())]
        given = ["--port", "0", "--device", "cpu", "--kv-cache-memory", "32MiB", *options]
        with log.open("w") as stream:
            self.process = subprocess.Popen([*command, *given], stdout=stream, stderr=stream, env=os.environ)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def of_model(self, name: str, metric: str, **labels: str) -> float:
        with self.client() as client:
            text = client.get("/metrics").raise_for_status().text
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        (value,) = (s.value for s in samples if s.name == f"llmkit:{metric}" and s.labels == labels | {"model": name})
        return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        tiny_checkpoint(folder / name, dtype="float32", seed=seed, max_position_embeddings=4096)
    (folder / "keys").write_text("key-one\nkey-two\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Router]:
    models = {"one": folder / "one", "team/two": folder / "two", "late": folder / "late"}
    options = ("--max-loaded", "2", "--api-key-file", str(folder / "keys"), "--max-num-seqs", "8")
    running = Router(folder / "log", models, *options, key="key-one")
    try:
        running.wait_ready()
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def states(http: httpx.Client) -> dict[str, str]:
    return {one["id"]: one["state"] for one in http.get("/v1/models").json()["data"]}


def expected(path: Path) -> list[int]:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return load_engine(open_checkpoint(path), EngineOptions(device="cpu")).generate([PROMPT], greedy)[0]


def test_each_model_answers_to_its_name(
    server: Router, client: openai.OpenAI, http: httpx.Client, folder: Path
) -> None:
    assert states(http) == {"one": "unloaded", "team/two": "unloaded", "late": "unloaded"}
    assert [http.get(path).status_code for path in ("/health", "/ready", "/v2/models/one/ready")] == [200, 200, 503]
    names = ["one", "team/two"] * 3
    with Threads(6) as threads:
        given = list(threads.map(lambda name: client.completions.create(model=name, **ASKED), names))
    wanted = {"one": expected(folder / "one"), "team/two": expected(folder / "two")}
    assert wanted["one"] != wanted["team/two"]
    for name, one in zip(names, given, strict=True):
        assert (one.model, one.choices[0].token_ids) == (name, wanted[name])  # type: ignore[attr-defined]
    assert server.of_model("one", "model_loads_total") == server.of_model("team/two", "model_loads_total") == 1
    chunks = list(client.completions.create(model="team/two", **ASKED, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == wanted["team/two"]  # type: ignore[attr-defined]
    chat = client.chat.completions.create(model="one", messages=[{"role": "user", "content": "hello"}], max_tokens=3)
    assert chat.usage is not None and chat.usage.completion_tokens == 3
    assert states(http) == {"one": "loaded", "team/two": "loaded", "late": "unloaded"}
    assert client.models.retrieve("team/two").max_model_len == 4096  # type: ignore[attr-defined]
    assert http.get("/v2/models/team/two/ready").status_code == 200
    assert server.of_model("one", "generation_tokens_total") == 3 * 12 + 3
    assert server.of_model("late", "model_loaded") == 0
    assert http.get("/").status_code == 200
    assert http.get("/info").json()["defaults"]["temperature"] == 1.0


def test_prefixes_stay_apart_by_key(server: Router) -> None:
    def cached(key: str) -> int:
        body = {"model": "one", "prompt": [7, 8, 9, 10] * 20, "max_tokens": 1}
        got = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-api-key": key}, timeout=60).json()
        count: int = got["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert [cached("key-one"), cached("key-one"), cached("key-two"), cached("key-two")] == [0, 64, 0, 64]


def test_wrong_requests_get_what_a_single_models_server_answers(server: Router, http: httpx.Client) -> None:
    ask = "/v1/completions"
    body = {"model": "one", "prompt": "a"}
    json = {"content-type": "application/json"}
    for status, code, got in (
        (401, "invalid_api_key", httpx.post(f"{server.url}{ask}", json=body)),
        (401, "invalid_api_key", httpx.get(f"{server.url}/metrics")),
        (403, "foreign_host", http.post(ask, json=body, headers={"host": "evil.example"})),
        (403, "foreign_origin", http.post(ask, json=body, headers={"origin": "http://evil.example"})),
        (404, "model_not_found", http.post(ask, json=body | {"model": "three"})),
        (404, "model_not_found", http.get("/v1/models/three")),
        (404, "not_found", http.post("/v1/unheard", json=body)),
        (405, "method_not_allowed", http.get(ask)),
        (415, "content_type", http.post(ask, content="{}", headers={"content-type": "text/plain"})),
        (413, "body_too_large", http.post(ask, content=b"x" * (9 << 20), headers=json)),
        (400, "invalid_json", http.post(ask, content="{", headers=json)),
        (400, "missing_required_parameter", http.post(ask, json={"prompt": "a"})),
        (400, "invalid_type", http.post(ask, json=body | {"model": 3})),
        (400, "invalid_value", http.post(ask, json=body | {"max_tokens": -3})),
        (400, "unknown_parameter", http.post(ask, json=body | {"unheard": 1})),
    ):
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)
        assert len(got.content) <= 16 * 1024
    assert http.get("/v2/models/three/infer").status_code == 404
    assert http.post("/v1/messages", json={"model": "three"}).json()["type"] == "error", "Anthropic's shape"


def test_a_client_that_goes_away_frees_the_engine(server: Router, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json=LONG | {"model": "one", "n": 8}) as got:
        next(got.iter_lines())
    wait_for(lambda: server.of_model("one", "num_requests_running") == 0)
    assert server.of_model("one", "request_success_total", finished_reason="cancelled") >= 1


def test_a_server_that_dies_fails_its_streams_and_is_loaded_again(
    server: Router, client: openai.OpenAI, http: httpx.Client
) -> None:
    with http.stream("POST", "/v1/completions", json=LONG | {"model": "team/two"}) as got:
        lines = got.iter_lines()
        next(lines)
        for child in psutil.Process(server.process.pid).children():
            child.kill()
        rest = [line for line in lines if line]
    assert '"code":"lost"' in rest[-1]
    assert len(client.completions.create(model="team/two", **ASKED).choices[0].token_ids) == 12  # type: ignore[attr-defined]
    assert server.of_model("team/two", "model_failures_total") == 1


def test_a_model_that_cannot_be_loaded_says_why_and_is_tried_again(
    server: Router, client: openai.OpenAI, http: httpx.Client, folder: Path
) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="late", **ASKED)
    assert (caught.value.status_code, caught.value.code) == (503, "model_failed")
    assert f"{folder / 'late'} does not exist" in str(caught.value)
    assert states(http)["late"] == "failed"
    (folder / "late").symlink_to(folder / "one")
    assert len(client.completions.create(model="late", **ASKED).choices[0].token_ids) == 12  # type: ignore[attr-defined]
    assert states(http)["late"] == "loaded"


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Iterator[Router]:
    """A server of one model, which is loaded when asked for."""
    running = Router(tmp_path / "log", {"one": folder / "one"})
    try:
        yield running.wait_ready()  # type: ignore[misc]
    finally:
        running.process.kill()
        running.process.wait()


def test_sigterm_lets_streams_end_and_leaves_nothing_behind(own: Router) -> None:
    ended: list[str] = []

    def read() -> None:
        with (
            own.client() as http,
            http.stream("POST", "/v1/completions", json=LONG | {"model": "one", "max_tokens": 3000}) as got,
        ):
            ended.extend(line for line in got.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: ended)  # it has begun
    family = own.family()
    own.process.send_signal(signal.SIGTERM)
    with own.client() as http:
        wait_for(lambda: http.get("/ready").status_code == 503)
        assert http.post("/v1/completions", json=LONG | {"model": "one"}).json()["error"]["code"] == "draining"
    reader.join(60)
    assert ended[-1] == "data: [DONE]"
    assert own.process.wait(60) == 0
    assert len(family) >= 2
    assert not any(process.is_running() for process in family)


def test_a_child_does_not_outlive_its_parent(folder: Path) -> None:
    """Killed as early as can be: the child loads its model still."""
    code = (
        "import sys, time\n"
        "from llmkit.runtime.child import Child\n"
        "from llmkit.runtime.server.options import ServeOptions\n"
        "print(Child(ServeOptions(sys.argv[1])).pid, flush=True)\n"
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
