"""Several engine processes behind one port: who gets a request, that answers do not depend on it, and how all end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint

from llmkit.checkpoint.errors import LlmkitError, ShortageError
from llmkit.runtime.engine.types import SamplingParams
from llmkit.runtime.load import EngineOptions, load_engine, plan_engine
from llmkit.runtime.server.engines.messages import Add, Ready, Stats
from llmkit.runtime.server.engines.replicas import AHEAD, BLOCK_TOKENS, Replicas
from llmkit.runtime.server.engines.shares import shares

PROMPTS = [[5 + index, 9, 11, 300] * 20 for index in range(4)]  # no two begin alike
LONG: dict[str, Any] = {"model": "model", "max_tokens": 3000, "ignore_eos": True, "temperature": 0, "stream": True}


class FakeClient:
    """Takes requests and finishes none."""

    serving = True

    def __init__(self, blocks: int) -> None:
        self.ready: asyncio.Future[Ready] = asyncio.Future()
        tokens = blocks * BLOCK_TOKENS
        seconds = {"load": float(blocks)}
        self.ready.set_result(Ready(256, 512, "float32", "cpu", tokens, 1.0, seconds, {}, [], ["fast"], {}))
        self.stats = Stats(running=blocks, prompt_tokens_total=10)
        self.added: list[str] = []

    @property
    def in_flight(self) -> int:
        return len(self.added)

    def add(self, request: Add, _receiver: object) -> None:
        self.added.append(request.id)

    def cancel(self, request_id: str) -> None:
        if request_id in self.added:
            self.added.remove(request_id)


def routed(requests: list[Add], blocks: int = 100, prefixes: bool = True, finish: bool = False) -> list[int]:
    """Which of two replicas each request went to; with `finish` each is done before the next."""

    async def run() -> list[int]:
        clients = [FakeClient(blocks) for _ in range(2)]
        replicas = Replicas(clients, prefixes)  # type: ignore[arg-type]
        places = []
        for request in requests:
            replicas.add(request, None)  # type: ignore[arg-type]
            places.append(next(place for place, client in enumerate(clients) if request.id in client.added))
            if finish:
                replicas.cancel(request.id)
        return places

    return asyncio.run(run())


def request(index: int, prompt: list[int], **more: Any) -> Add:
    return Add(str(index), prompt, 9, **more)


def test_a_request_follows_the_longest_beginning_of_its_prompt() -> None:
    first, second = PROMPTS[0], PROMPTS[1]
    prompts = [first, second, second + [7] * 40, first + [8] * 40, second[:40] + [9] * 40, first[:33]]
    assert routed([request(index, prompt) for index, prompt in enumerate(prompts)]) == [0, 1, 1, 0, 1, 0]


def test_requests_of_other_keys_and_adapters_share_nothing() -> None:
    kinds: list[dict[str, Any]] = [{}, {"salt": "a"}, {"adapter": "b"}, {"salt": "a"}, {}, {"adapter": "b"}]
    places = routed([request(index, PROMPTS[0], **kind) for index, kind in enumerate(kinds)], finish=True)
    assert places == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("finish", [True, False])
def test_prompts_that_begin_differently_are_spread(finish: bool) -> None:
    prompts = [[index, 9, 11, 300] * 20 for index in range(20)]
    assert routed([request(index, prompt) for index, prompt in enumerate(prompts)], finish=finish) == [0, 1] * 10


def test_a_busy_replica_gets_nothing_for_its_prefixes() -> None:
    places = routed([request(index, PROMPTS[0]) for index in range(40)])
    assert places[: AHEAD + 2] == [0] * (AHEAD + 1) + [1]
    assert abs(places.count(0) - places.count(1)) <= AHEAD


def test_without_a_prefix_cache_only_the_load_counts() -> None:
    assert routed([request(index, PROMPTS[0]) for index in range(4)], prefixes=False) == [0, 1, 0, 1]


def test_what_a_replica_cannot_keep_is_forgotten_ends_of_prompts_first() -> None:
    a, b, c = (request(index, PROMPTS[index]) for index in range(3))  # five blocks each: the third takes what a had
    again = [request(9, PROMPTS[0] + [1]), request(8, PROMPTS[1] + [1])]
    assert routed([a, b, c, again[0]], blocks=5, finish=True)[3] == 1
    assert routed([a, b, c, again[0]], blocks=10, finish=True)[3] == 0
    assert routed([a, b, c, again[1]], blocks=5, finish=True)[3] == 1


def test_together_they_are_the_slowest_and_the_sum() -> None:
    async def run() -> tuple[Ready, Stats]:
        replicas = Replicas([FakeClient(blocks) for blocks in (3, 5)])  # type: ignore[list-item]
        return await replicas.ready(), replicas.stats

    ready, stats = asyncio.run(run())
    assert (ready.seconds, ready.kv_cache_tokens, ready.max_model_len) == ({"load": 5.0}, 8 * BLOCK_TOKENS, 256)
    assert ready.paths == ["fast", "replicas: 2; the table is the slowest one's"]
    assert (stats.running, stats.prompt_tokens_total, stats.waiting) == (8, 20, 0)


def test_one_that_is_gone_gets_nothing_and_its_counters_stay() -> None:
    class Receiver:
        dead = 0

        def on_dead(self) -> None:
            self.dead += 1

    async def run() -> None:
        first, second = FakeClient(3), FakeClient(5)
        replicas, receiver = Replicas([first, second]), Receiver()  # type: ignore[list-item]
        first.serving = False
        for index in range(3):
            replicas.add(request(index, PROMPTS[0]), receiver)  # type: ignore[arg-type]
        assert (first.added, second.added, replicas.serving) == ([], ["0", "1", "2"], True)
        first.stats = first.stats.counters()
        fresh = FakeClient(7)
        replicas.replace(0, fresh)  # type: ignore[arg-type]
        assert (replicas.stats.running, replicas.stats.prompt_tokens_total) == (12, 30)
        replicas.add(request(4, PROMPTS[1]), receiver)  # type: ignore[arg-type]
        assert fresh.added == ["4"]
        fresh.serving = second.serving = False
        replicas.add(request(5, PROMPTS[0]), receiver)  # type: ignore[arg-type]
        assert (receiver.dead, replicas.serving) == (1, False)

    asyncio.run(run())


def test_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3, 5,GPU-7")
    assert shares(1, "auto") == [{}]
    assert shares(2, "auto") == [
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "0,3"},
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5,GPU-7"},
    ]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(3, "cuda")] == ["0", "3", "5"]
    assert shares(10, "cpu") == [{"OMP_NUM_THREADS": "1"}] * 10
    with pytest.raises(ShortageError, match="5 replicas need a GPU each, and there are 4"):
        shares(5, "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert shares(5, "auto") == [{"OMP_NUM_THREADS": "1"}] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replicas") / "model"
    return tiny_checkpoint(path, dtype="float32", max_position_embeddings=4096)


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with serving(tmp_path / "log", model, dp=2, max_num_seqs=1, kv_cache_memory=64 * 2**20) as running:
        yield running


def test_replicas_share_what_memory_a_cpu_has(model: Path) -> None:
    from llmkit.checkpoint.source import open_checkpoint

    one, two = (plan_engine(open_checkpoint(model), EngineOptions(device="cpu", dp=dp)).memory for dp in (1, 2))
    assert 0.4 < two.free / one.free < 0.6


def test_answers_are_those_of_one_engine_and_each_prefix_stays_where_it_is(server: ServerProcess, model: Path) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    expected = load_engine(model, EngineOptions(device="cpu", prefix_cache=False)).generate(PROMPTS, greedy)
    with server.client() as client:
        for cached in (0, 64):  # the last token of 80 is always computed
            for prompt, ids in zip(PROMPTS, expected, strict=True):
                body = LONG | {"prompt": prompt, "max_tokens": 12, "stream": False, "return_token_ids": True}
                got = client.post("/v1/completions", json=body).raise_for_status().json()
                assert got["choices"][0]["token_ids"] == ids
                assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert server.metric("prefix_cache_hits_total") == 64 * len(PROMPTS)
    assert server.metric("generation_tokens_total") == 12 * 2 * len(PROMPTS)
    assert "replicas: 2" not in server.log.read_text()  # that is the command's to tell, in its table


class Streams:
    """Requests that are under way, one in each replica: an engine of these runs one at a time."""

    def __init__(self, server: ServerProcess, stack: ExitStack, max_tokens: int) -> None:
        client = stack.enter_context(server.client())
        self._lines = []
        for prompt in PROMPTS[:2]:
            body = LONG | {"prompt": prompt, "max_tokens": max_tokens}
            self._lines.append(stack.enter_context(client.stream("POST", "/v1/completions", json=body)).iter_lines())
        wait_for(lambda: server.metric("num_requests_running") == 2)

    def last(self) -> list[list[str]]:
        """The rest of each stream."""
        return [[line for line in lines if line] for lines in self._lines]


def gone(engines: list[psutil.Process]) -> bool:
    return not any(engine.is_running() for engine in engines)


def test_a_graceful_stop_waits_for_all_of_them(server: ServerProcess) -> None:
    engines = server.engines()
    assert len(engines) == 2
    with ExitStack() as stack:
        streams = Streams(server, stack, 600)
        server.process.send_signal(signal.SIGTERM)
        for lines in streams.last():
            assert lines[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in lines[-2]
    assert server.process.wait(30) == 0
    assert gone(engines)


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_dies_ends_the_server_with_its_reason(server: ServerProcess, number: int) -> None:
    engines = sorted(server.engines(), key=lambda engine: engine.pid)
    with ExitStack() as stack:
        streams = Streams(server, stack, 3000)
        engines[number].kill()
        for lines in streams.last():
            assert '"code":"engine_dead"' in lines[-1]
        with server.client() as client:
            assert client.get("/health").json()["error"]["code"] == "engine_dead"
    assert server.process.wait(30) == LlmkitError.exit_code
    text = f"llmkit serve: error: replica {number}: the engine process ended (signal SIGKILL"
    assert server.log.read_text().splitlines()[-1].startswith(text)
    assert gone(engines)


def test_none_outlives_a_killed_server(server: ServerProcess) -> None:
    engines = server.engines()
    server.process.kill()
    wait_for(lambda: all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in engines), timeout_s=10)


def test_one_that_cannot_start_is_one_line(model: Path, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", model, dp=2, max_model_len=5000)
    assert server.process.wait(60) == 3
    (line,) = server.log.read_text().splitlines()
    assert "5000" in line
