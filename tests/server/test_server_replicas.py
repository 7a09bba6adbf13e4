"""Several engine processes behind one port: routing, equal answers, and how they end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.engine_requests import engine_request
from support.server_process import LlmkitServer, serving, wait_for

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli import main
from llmkit.common import cpu_threads
from llmkit.common.errors import LlmkitError, ShortageError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.engine_plan import plan_engine
from llmkit.runtime.server.engines.engine_messages import EngineReady
from llmkit.runtime.server.engines.replicas import BALANCE_THRESHOLD, BLOCK_SIZE, Replicas
from llmkit.runtime.server.engines.resource_shares import replica_environments

MODEL = {"dtype": "float32", "max_position_embeddings": 4096}
PROMPTS = [[5 + index, 9, 11, 300] * 20 for index in range(4)]  # no two begin alike
LONG: dict[str, Any] = {
    "model": "model",
    "max_tokens": 3000,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


class FakeClient:
    """Takes requests and finishes none."""

    serving = True

    def __init__(self, blocks: int) -> None:
        self.ready: asyncio.Future[EngineReady] = asyncio.Future()
        tokens = blocks * BLOCK_SIZE
        seconds = {"load": float(blocks)}
        self.ready.set_result(
            EngineReady(256, 512, "float32", "cpu", tokens, 1.0, seconds, {}, [], ["fast"], {})
        )
        self.stats = EngineStats(running=blocks, prompt_tokens_total=10)
        self.added: list[str] = []

    @property
    def in_flight(self) -> int:
        return len(self.added)

    def add(self, request: EngineRequest, _receiver: object) -> None:
        self.added.append(request.request_id)

    def abort(self, request_id: str) -> None:
        if request_id in self.added:
            self.added.remove(request_id)


def routed(
    requests: list[EngineRequest],
    blocks: int = 100,
    prefix_caching: bool = True,
    finish: bool = False,
) -> list[int]:
    """Which of two replicas each request went to; with `finish` each is done before the next."""

    async def run() -> list[int]:
        clients = [FakeClient(blocks) for _ in range(2)]
        replicas = Replicas(clients, prefix_caching)  # type: ignore[arg-type]
        places = []
        for request in requests:
            replicas.add(request, None)  # type: ignore[arg-type]
            places.append(
                next(
                    place
                    for place, client in enumerate(clients)
                    if request.request_id in client.added
                )
            )
            if finish:
                replicas.abort(request.request_id)
        return places

    return asyncio.run(run())


def request(index: int, prompt: list[int], **more: Any) -> EngineRequest:
    return engine_request(str(index), prompt, 9, **more)


def test_replicas_route_by_longest_prefix() -> None:
    first = PROMPTS[0]
    second = PROMPTS[1]
    prompts = [
        first,
        second,
        second + [7] * 40,
        first + [8] * 40,
        second[:40] + [9] * 40,
        first[:33],
    ]
    assert routed([request(index, prompt) for index, prompt in enumerate(prompts)]) == [
        0,
        1,
        1,
        0,
        1,
        0,
    ]


def test_replicas_share_no_prefixes_across_keys_and_adapters() -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"adapter": "b"},
        {"cache_salt": "a"},
        {},
        {"adapter": "b"},
    ]
    places = routed(
        [request(index, PROMPTS[0], **kind) for index, kind in enumerate(kinds)], finish=True
    )
    assert places == [0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("finish", [True, False])
def test_replicas_spread_different_prompts(finish: bool) -> None:
    prompts = [[index, 9, 11, 300] * 20 for index in range(20)]
    assert (
        routed([request(index, prompt) for index, prompt in enumerate(prompts)], finish=finish)
        == [0, 1] * 10
    )


def test_replicas_balance_load_before_prefixes() -> None:
    places = routed([request(index, PROMPTS[0]) for index in range(40)])
    assert places[: BALANCE_THRESHOLD + 2] == [0] * (BALANCE_THRESHOLD + 1) + [1]
    assert abs(places.count(0) - places.count(1)) <= BALANCE_THRESHOLD


def test_replicas_route_by_load_without_prefix_cache() -> None:
    assert routed([request(index, PROMPTS[0]) for index in range(4)], prefix_caching=False) == [
        0,
        1,
        0,
        1,
    ]


def test_replicas_forget_the_ends_of_prompts_first() -> None:
    a, b, c = (
        request(index, PROMPTS[index]) for index in range(3)
    )  # five blocks each: the third takes what a had
    again = [request(9, PROMPTS[0] + [1]), request(8, PROMPTS[1] + [1])]
    assert routed([a, b, c, again[0]], blocks=5, finish=True)[3] == 1
    assert routed([a, b, c, again[0]], blocks=10, finish=True)[3] == 0
    assert routed([a, b, c, again[1]], blocks=5, finish=True)[3] == 1


def test_replicas_report_slowest_start_and_summed_stats() -> None:
    async def run() -> tuple[EngineReady, EngineStats]:
        replicas = Replicas([FakeClient(blocks) for blocks in (3, 5)])  # type: ignore[list-item]
        return await replicas.ready(), replicas.stats

    ready, stats = asyncio.run(run())
    assert (ready.seconds, ready.kv_cache_tokens, ready.max_model_len) == (
        {"load": 5.0},
        8 * BLOCK_SIZE,
        256,
    )
    assert ready.fast_paths == ["fast", "replicas: 2; the table is the slowest one's"]
    assert (stats.running, stats.prompt_tokens_total, stats.waiting) == (8, 20, 0)


def test_replicas_skip_a_dead_one_and_keep_its_counters() -> None:
    class Receiver:
        dead = 0

        def on_engine_dead(self) -> None:
            self.dead += 1

    async def run() -> None:
        first = FakeClient(3)
        second = FakeClient(5)
        # type: ignore[list-item]
        replicas = Replicas([first, second])
        receiver = Receiver()
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


def test_replica_environments_divide_threads_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_affinity_cpus", lambda: 16)
    monkeypatch.setattr(cpu_threads, "cgroup_quota", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3, 5,GPU-7")
    assert replica_environments(1, "auto") == [{}]
    assert replica_environments(2, "auto") == [
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "0,3"},
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5,GPU-7"},
    ]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in replica_environments(3, "cuda")] == [
        "0",
        "3",
        "5",
    ]
    assert replica_environments(2, "cpu", threads=7) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert replica_environments(10, "cpu") == [{"OMP_NUM_THREADS": "1"}] * 10
    with pytest.raises(ShortageError, match="5 replicas need a GPU each, and there are 4"):
        replica_environments(5, "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert replica_environments(5, "auto") == [{"OMP_NUM_THREADS": "1"}] * 5


@pytest.fixture
def replica_server(model: Path, tmp_path: Path) -> Iterator[LlmkitServer]:
    with serving(
        tmp_path / "log", model, dp=2, max_num_seqs=1, kv_cache_memory=64 * 2**20
    ) as running:
        yield running


def test_replicas_share_what_memory_a_cpu_has(model: Path) -> None:
    one, two = (
        plan_engine(open_checkpoint(model), EngineOptions(device="cpu", dp=dp)).memory
        for dp in (1, 2)
    )
    assert 0.4 < two.free_bytes / one.free_bytes < 0.6


def test_replicas_answer_like_one_engine_and_keep_prefixes_apart(
    replica_server: LlmkitServer, model: Path
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    expected = load_engine(model, EngineOptions(device="cpu", prefix_cache=False)).generate(
        PROMPTS, greedy
    )
    with replica_server.client() as client:
        for cached in (0, 64):  # the last token of 80 is always computed
            for prompt, ids in zip(PROMPTS, expected, strict=True):
                body = LONG | {
                    "prompt": prompt,
                    "max_tokens": 12,
                    "stream": False,
                    "return_token_ids": True,
                }
                got = client.post("/v1/completions", json=body).raise_for_status().json()
                assert got["choices"][0]["token_ids"] == ids
                assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert replica_server.metric("prefix_cache_hits_total") == 64 * len(PROMPTS)
    assert replica_server.metric("generation_tokens_total") == 12 * 2 * len(PROMPTS)
    assert (
        "replicas: 2" not in replica_server.log.read_text()
    )  # that is the command's to tell, in its table


class Streams:
    """Requests that are under way, one in each replica: an engine of these runs one at a time."""

    def __init__(self, server: LlmkitServer, stack: ExitStack, max_tokens: int) -> None:
        client = stack.enter_context(server.client())
        self._lines = []
        for prompt in PROMPTS[:2]:
            body = LONG | {"prompt": prompt, "max_tokens": max_tokens}
            self._lines.append(
                stack.enter_context(
                    client.stream("POST", "/v1/completions", json=body)
                ).iter_lines()
            )
        wait_for(lambda: server.metric("num_requests_running") == 2)

    def last(self) -> list[list[str]]:
        """The rest of each stream."""
        return [[line for line in lines if line] for lines in self._lines]


def gone(engines: list[psutil.Process]) -> bool:
    return not any(engine.is_running() for engine in engines)


@pytest.mark.slow  # as one engine, in test_server_lifecycle.py
def test_replicas_finish_all_requests_at_a_graceful_stop(replica_server: LlmkitServer) -> None:
    engines = replica_server.engines()
    assert len(engines) == 2
    with ExitStack() as stack:
        streams = Streams(replica_server, stack, 600)
        replica_server.process.send_signal(signal.SIGTERM)
        for lines in streams.last():
            assert lines[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in lines[-2]
    assert replica_server.process.wait(60) == 0
    assert gone(engines)


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_replica_that_dies_ends_the_server_with_its_reason(
    replica_server: LlmkitServer, number: int
) -> None:
    engines = sorted(replica_server.engines(), key=lambda engine: engine.pid)
    with ExitStack() as stack:
        streams = Streams(replica_server, stack, 3000)
        engines[number].kill()
        for lines in streams.last():
            assert '"code":"engine_dead"' in lines[-1]
        with replica_server.client() as client:
            assert client.get("/health").json()["error"]["code"] == "engine_dead"
    assert replica_server.process.wait(60) == LlmkitError.exit_code
    text = f"llmkit serve: error: replica {number}: the engine process ended (signal SIGKILL"
    assert replica_server.log.read_text().splitlines()[-1].startswith(text)
    assert gone(engines)


@pytest.mark.slow  # as one engine, in test_server_lifecycle.py
def test_replicas_do_not_outlive_a_killed_server(replica_server: LlmkitServer) -> None:
    engines = replica_server.engines()
    replica_server.process.kill()
    wait_for(
        lambda: all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in engines)
    )


@pytest.mark.slow  # as one engine, in test_server_lifecycle.py
def test_replica_that_cannot_start_is_reported_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dp", "2", "--max-model-len", "5000", "--port", "0", "--device", "cpu"]
    assert main.run(["serve", str(model), *words]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "5000" in line
