"""`llmkit plan`: the simulated queue by hand, the fit of step times, and how many
replicas come out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.bench.bench_metrics import RequestTimeline
from llmkit.bench.bench_report import BenchReport, RequestMetrics, TargetReport
from llmkit.bench.model_costs import count_model_costs
from llmkit.bench.peak_performance import load_peaks, measure_peaks
from llmkit.cli.main import run
from llmkit.common.errors import InputError, ShortageError, UsageError
from llmkit.deploy import capacity_planning
from llmkit.deploy.capacity_planning import (
    CapacityPlan,
    Demand,
    Engine,
    cpu_engine,
    engines,
    measured_engine,
    plan_replicas,
    predict,
)
from llmkit.deploy.queue_simulation import Arrival, Limits, SimulatedReplica, simulate
from llmkit.deploy.step_time import (
    ALL_REDUCE_S,
    EFFICIENCY,
    STEP_OVERHEAD_S,
    FittedStepTime,
    RooflineStepTime,
    fit_step_time,
)
from llmkit.kernels.cpu import cpu_kernels
from llmkit.shard.shard_checkpoint import open_source, validated_spec

STEP = FittedStepTime(fixed_s=0.010, request_s=0.001, context_s=1e-6, prompt_s=1e-4, error=0.0)


@dataclass
class Constant:
    """A second a step, whatever is in it; `steps` has what was."""

    steps: list[tuple[int, int, int]]

    def seconds(self, requests: int, context: int, prompt: int) -> float:
        self.steps.append((requests, context, prompt))
        return 1.0


def run_one(
    arrivals: Sequence[Arrival], limits: Limits
) -> tuple[list[tuple[int, int, int]], list[RequestTimeline]]:
    step = Constant([])
    return step.steps, simulate(arrivals, [SimulatedReplica(step, limits)])


def test_simulation_prefills_in_chunks_and_then_decodes() -> None:
    steps, done = run_one([Arrival(5.0, 25, 3, cached=5)], Limits(4, 8))
    assert steps == [(0, 0, 8), (0, 0, 8), (0, 0, 4), (1, 25, 0), (1, 26, 0)]
    (one,) = done
    assert (one.ttft_s, one.e2e_s, one.tpot_s) == (3.0, 5.0, 1.0)


def test_simulation_prefills_beside_decodes() -> None:
    steps, done = run_one([Arrival(0.0, 4, 4), Arrival(0.0, 10, 2)], Limits(4, 8))
    assert steps == [(0, 0, 8), (1, 4, 6), (2, 15, 0), (1, 6, 0)]
    assert [one.ttft_s for one in sorted(done, key=lambda one: one.id)] == [1.0, 2.0]


def test_simulation_limits_requests_and_cache() -> None:
    steps, _ = run_one([Arrival(0.0, 4, 2)] * 3, Limits(max_num_seqs=2, max_num_batched_tokens=64))
    assert [requests for requests, _, _ in steps] == [0, 2, 0, 1]
    steps, _ = run_one([Arrival(0.0, 30, 2)] * 2, Limits(8, 64, kv_tokens=40))
    assert [prompt for _, _, prompt in steps] == [30, 0, 30, 0]


def test_simulation_gives_back_the_cache_of_finished_requests() -> None:
    """Each waits until those before it have given back all their tokens, the last one too."""
    limits = Limits(8, 64, kv_tokens=40)
    for output, decodes in ((1, 0), (2, 1), (4, 3)):
        steps, done = run_one([Arrival(0.0, 20, output)] * 5, limits)
        # The first two have room together; so have the next two, once the first two are done.
        per_pair = [40] + [0] * decodes
        assert [prompt for _, _, prompt in steps] == per_pair * 2 + [20] + [0] * decodes
        assert len(done) == 5
    # The first one holds 10 + 2 tokens when it ends: beside 20 + 2 of the second there is then
    # room for exactly 18 tokens.
    for third, start in ((18, 3), (19, 6)):
        arrivals = [Arrival(0.0, 10, 3), Arrival(0.0, 20, 6), Arrival(0.0, third, 2)]
        steps, _ = run_one(arrivals, limits)
        assert [index for index, step in enumerate(steps) if step[2] == third] == [start]


def test_simulation_reports_the_most_tokens_in_the_cache() -> None:
    replica = SimulatedReplica(Constant([]), Limits(4, 64))
    simulate([Arrival(0.0, 10, 3), Arrival(100.0, 6, 2)], [replica])
    assert replica.peak_kv == 11, "the third token is not written to the cache before the end"


def test_simulation_sends_requests_to_the_idle_replica() -> None:
    replicas = [SimulatedReplica(Constant([]), Limits()) for _ in range(2)]
    simulate([Arrival(0.0, 8, 50), Arrival(1.0, 8, 2), Arrival(10.0, 8, 2)], replicas)
    assert sorted(len(replica.finished) for replica in replicas) == [1, 2]


def figures(step: FittedStepTime, arrivals: Sequence[Arrival]) -> list[RequestMetrics]:
    """What bench would report of a server whose steps take that long."""
    done = simulate(arrivals, [SimulatedReplica(step, Limits(64, 512))])
    return [
        RequestMetrics(
            one.sent_s,
            one.ttft_s,
            one.e2e_s,
            one.prompt_tokens,
            one.cached_tokens,
            one.output_tokens,
        )
        for one in done
    ]


def test_step_time_fit_finds_the_server_times() -> None:
    random = Random(0)
    runs = []
    for gap in (4.0, 0.3, 0.12, 0.06):
        lengths = [(random.randint(50, 900), random.randint(20, 200)) for _ in range(60)]
        runs.append(
            figures(STEP, [Arrival(index * gap, *pair) for index, pair in enumerate(lengths)])
        )
    found = fit_step_time(runs)
    assert found.error < 0.05
    for load in ((1, 500, 0), (8, 4000, 0), (32, 20_000, 100)):
        assert found.seconds(*load) == pytest.approx(STEP.seconds(*load), rel=0.15)


def test_step_time_fit_refuses_too_few_requests() -> None:
    with pytest.raises(InputError, match="bench MODEL --mode sweep"):
        fit_step_time([figures(STEP, [Arrival(0.0, 8, 8)])])


def test_plan_finds_the_fewest_replicas_that_keep_the_bounds() -> None:
    engine = Engine("one", 1, STEP, Limits(8, 512))
    demand = Demand(20.0, (100, 300), (10, 30), {"ttft": 1.0, "tpot": 0.06})
    found = plan_replicas(engine, demand)
    assert found is not None and found.attained >= 0.99
    assert predict(engine, demand, found.replicas - 1).attained < 0.99
    looser = plan_replicas(engine, replace(demand, slo={"ttft": 10.0}))
    assert looser is not None and looser.replicas <= found.replicas
    # A step alone takes longer.
    assert plan_replicas(engine, replace(demand, slo={"tpot": 0.005})) is None


def test_plan_without_bounds_keeps_the_queue_from_growing() -> None:
    engine = Engine("one", 1, STEP, Limits(16, 512))
    found = plan_replicas(engine, Demand(12.0, (200, 200), (100, 100), {}))
    assert found is not None
    assert found.replicas > 1 and 0.3 < found.busy < 1
    assert (
        predict(engine, Demand(12.0, (200, 200), (100, 100), {}), found.replicas - 1).attained
        == 0.0
    )


def test_engines_fit_on_a_gpu_by_tp_size(tmp_path: Path) -> None:
    source = open_source(str(tiny_checkpoint(tmp_path / "model")))
    found = engines(source, "h200", (1, 2, 8), Limits())
    assert [(one.gpus, one.name) for one in found] == [
        (1, "TP 1"),
        (2, "TP 2"),
    ]  # 8 does not divide its heads
    first, second = (one.step for one in found)
    assert isinstance(first, RooflineStepTime) and isinstance(second, RooflineStepTime)
    assert second.weight_bytes < first.weight_bytes and second.token_flops == first.token_flops / 2
    with pytest.raises(UsageError, match="a100-40, a100-80"):
        engines(source, "a100", (1,), Limits())
    with pytest.raises(ShortageError, match="TP that works"):
        engines(source, "t4", (1,), Limits(max_num_batched_tokens=1 << 40))


@pytest.mark.skipif(cpu_kernels.library is None, reason="no compiled kernels")
def test_roofline_of_a_cpu_has_its_measured_peaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_checkpoint(tmp_path / "model", dtype="float32")
    measured: list[str] = []

    def measure(device: str) -> None:
        measured.append(device)
        measure_peaks(device, copy_bytes=1 << 20)

    monkeypatch.setattr(capacity_planning, "measure_peaks", measure)
    source = open_source(str(model))
    engine = [cpu_engine(source, Limits()) for _ in range(2)][1]
    peaks = load_peaks("cpu", torch.float32)
    assert measured == ["cpu"] and peaks is not None
    assert (engine.name, engine.gpus) == ("CPU", 0)
    assert engine.limits.kv_tokens > 0
    step = engine.step
    assert isinstance(step, RooflineStepTime)
    costs = count_model_costs(source.checkpoint, validated_spec(source), "auto", "cpu")
    assert (step.weight_bytes, step.kv_bytes) == (costs.dense_bytes, costs.kv_bytes)
    assert step.flops_per_s == EFFICIENCY * peaks.flops_per_s
    assert step.bytes_per_s == EFFICIENCY * peaks.bytes_per_s


def test_roofline_step_computes_a_token_for_each_decoding_request() -> None:
    step = RooflineStepTime(
        weight_bytes=1000,
        kv_bytes=10.0,
        token_flops=50.0,
        layers=4,
        tp=1,
        flops_per_s=100.0,
        bytes_per_s=1000.0,
    )
    assert step.seconds(6, 0, 0) == pytest.approx(STEP_OVERHEAD_S + 6 * 50 / 100)
    assert step.seconds(6, 0, 8) == pytest.approx(STEP_OVERHEAD_S + 14 * 50 / 100)
    assert step.seconds(1, 300, 0) == pytest.approx(STEP_OVERHEAD_S + (1000 + 300 * 10) / 1000)
    two = replace(step, tp=2).seconds(6, 0, 0) - step.seconds(6, 0, 0)
    assert two == pytest.approx(2 * 4 * ALL_REDUCE_S)


def test_plan_costs_the_price_of_every_gpu() -> None:
    made = CapacityPlan(
        Engine("TP 4", 4, STEP, Limits()),
        replicas=3,
        attained=1.0,
        figures={"output_tps": 500.0},
        busy=0.5,
        kv_share=0.1,
    )
    document = made.to_json(2.0)
    assert (document["gpus"], document["price_per_hour"]) == (12, 24.0)
    assert document["cost_per_million"] == pytest.approx(24.0 / (500 * 3600) * 1e6)
    on_cpus = replace(made, engine=Engine("as measured", 0, STEP, Limits())).to_json(2.0)
    assert (on_cpus["gpus"], on_cpus["price_per_hour"]) == (0, 6.0)
    assert "price_per_hour" not in made.to_json(None)


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrivals = [Arrival(index * 0.3, 200, 40) for index in range(60)]
    target = TargetReport(
        "m",
        "m",
        "served",
        requests={"c4": figures(STEP, arrivals), "c1": figures(STEP, arrivals[::9])},
    )
    report = tmp_path / "report.json"
    report.write_text(json.dumps(BenchReport([target]).to_json()))
    words = [
        "plan",
        "--bench",
        str(report),
        "--rate",
        "10/s",
        "--in",
        "200",
        "--out",
        "40",
        "--price-per-hour",
        "2",
    ]
    assert run([*words, "--slo", "ttft:1s", "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["plans"]
    assert made["replicas"] >= 1 and made["attained"] >= 0.99
    assert made["price_per_hour"] == 2 * made["replicas"]
    assert run([*words, "--replicas", "3"]) == 0
    assert "fitted within" in capsys.readouterr().out
    assert run(["plan", "--rate", "10/s"]) == 2
    assert "MODEL with --gpu, or a report with --bench" in capsys.readouterr().err
    assert run([*words, "--slo", "tpot:1ms"]) == 2
    assert "Loosen them" in capsys.readouterr().err
    assert measured_engine(BenchReport([target]), "report", Limits(), 0).gpus == 0
