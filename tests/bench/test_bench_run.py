"""`bench` on tiny random models: offline, behind a server, and everything that it refuses."""

from __future__ import annotations

import json
import math
import mmap
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as Xml

import numpy
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_checkpoint

from llmkit.bench import bench_planner
from llmkit.bench.backends import ServedBackend, UrlBackend, is_url, short_name
from llmkit.bench.bench_metrics import (
    CONDITIONAL_SPEED_METRICS,
    QUALITY_METRICS,
    SPEED_METRICS,
    RequestTimeline,
    RunResult,
    calculate_metrics,
)
from llmkit.bench.bench_options import BenchOptions, LoadOptions
from llmkit.bench.bench_planner import make_plan
from llmkit.bench.bench_report import BenchReport
from llmkit.bench.gpu_monitor import GpuMonitor
from llmkit.bench.host_memory import ProcessMemoryTracker, memory_bytes
from llmkit.bench.load_client import Server
from llmkit.bench.measure_speed import _measure_run
from llmkit.bench.model_quality import make_evaluation
from llmkit.bench.offline_backend import OfflineBackend, run_engine
from llmkit.bench.peak_performance import measure_peaks, peaks_file
from llmkit.bench.run_bench import bench
from llmkit.bench.workload import Workload, WorkloadRequest
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.cli import main
from llmkit.common.errors import GateError, InputError, ShortageError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

CLIENT = {"client_us", "client_busy", "client_late_ms"}
OFFLINE = BenchOptions(offline=True, limit=3, rounds=2, windows=3, window_tokens=48, device="cpu")
QUALITY_ONLY = replace(OFFLINE, speed=False, limit=None, rounds=1)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache directory, so that nothing measured on this machine before is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(bench_planner, "measure_peaks", lambda device: [])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one tokenizer: `a`, and `b` with other weights."""
    path = tmp_path_factory.mktemp("bench")
    tiny_checkpoint(path / "a", seed=0)
    tiny_checkpoint(path / "b", seed=1)
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> BenchReport:
    gates = (
        "mean_kl<=100",
        "checkpoint_bytes<=1*baseline",
        "top1>=0",
        "quick.output_tps>0",
        "mean_kl<=1e-9",
    )
    return run(folder / "a", folder / "b", options=replace(OFFLINE, gates=gates))


def run(*targets: object, options: BenchOptions) -> BenchReport:
    return bench([str(target) for target in targets], options, SilentProgress())


class TestOffline:
    def test_report_has_targets_and_baseline(self, pair: BenchReport) -> None:
        assert [(target.name, target.kind) for target in pair.targets] == [
            ("a", "offline"),
            ("b", "offline"),
        ]
        assert pair.baseline == "a"

    def test_speed_is_measured(self, pair: BenchReport) -> None:
        for target in pair.targets:
            figures = target.scenarios["quick"]
            assert figures.keys() == SPEED_METRICS.keys() - CONDITIONAL_SPEED_METRICS
            assert len(target.rounds["quick"]) == 2
            assert (figures["requests"], figures["output_tokens"]) == (3, 96)
            assert figures["output_tps"] > 0
            assert 0 < figures["ttft_p50_ms"] <= figures["ttft_p99_ms"] < figures["e2e_p99_ms"]
            low, high = sorted(entry["output_tps"] for entry in target.rounds["quick"])
            assert figures["output_tps"] == pytest.approx((low + high) / 2)

    def test_quality_is_measured(self, pair: BenchReport) -> None:
        a, b = (target.metrics for target in pair.targets)
        assert a.keys() == {"perplexity", "checkpoint_bytes", "load_s", "peak_memory_bytes"}
        assert b.keys() == {*a.keys(), *QUALITY_METRICS}
        assert 0 < b["median_kl"] <= b["p99_kl"] <= b["p999_kl"] <= b["max_kl"]
        assert 0 < b["mean_kl"] <= b["max_kl"]
        assert 0 <= b["top1"] < 0.5, "two random models do not agree"
        assert a["perplexity"] > 1 and math.isfinite(a["perplexity"])

    def test_missing_metrics_have_reasons(self, pair: BenchReport) -> None:
        a, b = (target.absent for target in pair.targets)
        assert a["ready_s"] == "--offline starts no server"
        assert a["goodput"] == "no --slo"
        assert a["gpu_power_w, energy_per_token_j, peak_gpu_bytes"] == "no GPU"
        assert a[", ".join(QUALITY_METRICS)] == "the baseline"
        assert b.keys() == a.keys() - {", ".join(QUALITY_METRICS)}
        for target in pair.targets:
            names = {name for names in target.absent for name in names.split(", ")}
            assert not names & {key.rpartition(".")[2] for key in target.all_metrics()}, (
                "what is there is not absent"
            )

    def test_gates_are_checked(self, pair: BenchReport) -> None:
        assert [(result.metric, result.target, result.passed) for result in pair.gates] == [
            ("mean_kl", "b", True),
            ("checkpoint_bytes", "b", True),
            ("top1", "b", True),
            ("quick.output_tps", "b", True),
            ("mean_kl", "b", False),
        ]
        with pytest.raises(GateError, match="1 of 5 gate checks failed: b: mean_kl is"):
            pair.require_gates()

    def test_report_describes_environment_and_workload(self, pair: BenchReport) -> None:
        assert pair.environment["torch"] == torch.__version__
        assert pair.environment["cores"] >= 1
        assert pair.environment["dtype"] == "float32"
        assert len(pair.workload["sha256"]) == 64
        assert pair.workload["scenarios"][0]["requests"] == 3
        assert (pair.evaluation["text"], pair.evaluation["windows"]) == ("builtin", 3)
        assert pair.evaluation["window_tokens"] == 48

    def test_report_survives_json(self, pair: BenchReport) -> None:
        document = json.loads(json.dumps(pair.to_json(), allow_nan=False))
        assert BenchReport.from_json(document).to_json() == pair.to_json()

    def test_saved_report_is_a_baseline(self, folder: Path, tmp_path: Path) -> None:
        options = replace(OFFLINE, rounds=1)
        (tmp_path / "a.json").write_text(json.dumps(run(folder / "a", options=options).to_json()))
        gates = ("perplexity<=1*baseline", "perplexity>=1*baseline", "output_tps>=0.0001*baseline")
        options = replace(options, baseline=str(tmp_path / "a.json"), gates=gates)
        report = run(folder / "a", options=options)
        assert [target.name for target in report.targets] == ["baseline", "a"]
        assert all(result.passed for result in report.gates), "the same model scores the same"
        assert any("different times" in note for note in report.notes)
        with pytest.raises(InputError, match=r"a\.json was measured with another workload"):
            run(folder / "a", options=replace(options, seed=1))
        with pytest.raises(InputError, match="was measured with another evaluation"):
            run(folder / "a", options=replace(QUALITY_ONLY, windows=2, baseline=options.baseline))
        with pytest.raises(UsageError, match="on mean_kl, which is not measured for a"):
            run(folder / "a", options=replace(options, gates=("mean_kl<=1",)))


def test_quality_of_the_baseline_against_itself_is_exact(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(folder / "a")
    options = replace(QUALITY_ONLY, baseline=str(folder / "a"))
    report = run(tmp_path / "copy", options=options)
    assert [(target.name, target.kind) for target in report.targets] == [
        ("a", "checkpoint"),
        ("copy", "checkpoint"),
    ]
    metrics = report.targets[1].metrics
    assert (metrics["mean_kl"], metrics["top1"]) == (pytest.approx(0, abs=1e-9), 1.0)
    assert metrics["perplexity"] == report.targets[0].metrics["perplexity"]
    assert report.workload == {}


def test_quality_matches_the_engines_logprobs(folder: Path, tmp_path: Path) -> None:
    """The perplexity of a quantized checkpoint follows from the engine's log probabilities."""
    for name, flags in (
        ("int4", ["--method", "rtn"]),
        ("w8a8", ["--method", "int8", "--activations"]),
    ):
        out = tmp_path / name
        assert (
            main.run(["quantize", str(folder / "a"), *flags, "-o", str(out), "--no-eval", "-q"])
            == 0
        )
        report = run(out, options=QUALITY_ONLY)
        chosen = make_evaluation(load_tokenizer(open_checkpoint(out)), "builtin", 3, 48, 0).windows
        engine = load_engine(out, EngineOptions(device="cpu", kv_cache_memory=2**22))
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        logprobs: list[float] = []
        for index, window in enumerate(chosen.tolist()):
            engine.add(EngineRequest(str(index), window, sampling))
        while engine.has_work:
            logprobs += [
                one.logprob for output in engine.step() for one in output.prompt_logprobs or ()
            ]
        assert len(logprobs) == 3 * 47
        assert report.targets[0].metrics["perplexity"] == pytest.approx(
            math.exp(-fmean(logprobs)), rel=1e-5
        )


def damaged(source: Path, out: Path, seed: int) -> Path:
    """A copy in which one matrix has noise of a tenth of its size."""
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(seed))
    weights[name] += (0.1 * weights[name].float().std() * noise).to(weights[name].dtype)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("seed", range(2))
def test_gates_fail_a_damaged_checkpoint_and_pass_an_unchanged_one(
    tmp_path: Path, seed: int
) -> None:
    good = tiny_checkpoint(tmp_path / "good", seed=seed)
    shutil.copytree(good, tmp_path / "same")
    bad = damaged(good, tmp_path / "bad", seed)
    gates = [
        "--gate",
        "mean_kl<=1e-6",
        "--gate",
        "perplexity<=1.000001*baseline",
        "--gate",
        "top1>=1",
    ]
    options = [
        "--no-speed",
        "--windows",
        "2",
        "--window-tokens",
        "64",
        "--seed",
        str(seed),
        "-q",
        "--baseline",
        str(good),
    ]
    assert main.run(["bench", str(tmp_path / "same"), *options, *gates]) == 0
    assert (
        main.run(["bench", str(bad), *options, *gates, "--junit", str(tmp_path / "gates.xml")]) == 1
    )
    suite = Xml.parse(tmp_path / "gates.xml").getroot()[0]
    assert int(suite.get("failures", 0)) >= 1, "the file is there although the gates failed"


class TestLoads:
    """`--mode` as a whole, in this process."""

    LOAD = LoadOptions(requests=4, input_tokens=(8, 16), output_tokens=(4, 6))

    def test_latency_mode_measures_goodput_cost_and_utilization(self, folder: Path) -> None:
        load = replace(self.LOAD, mode="latency", concurrency=(1, 3), requests=None)
        measure_peaks("cpu", copy_bytes=1 << 20, matrix_size=64)
        gates = ("goodput>0", "mbu>0", "mfu>0", "cost_per_million>0", "batch3.request_rate>0")
        options = replace(
            OFFLINE,
            limit=None,
            load=load,
            slo="e2e:60s",
            price_per_hour=2.0,
            quality=False,
            gates=gates,
        )
        report = run(folder / "a", options=options)
        peaks_file().unlink()
        (target,) = report.targets
        assert {name: figures["requests"] for name, figures in target.scenarios.items()} == {
            "batch1": 1,
            "batch3": 3,
        }
        for figures in target.scenarios.values():
            assert figures["goodput"] == pytest.approx(figures["request_rate"], rel=0.5)
            assert len(figures.keys() & CONDITIONAL_SPEED_METRICS) == 8  # five of the cost
        one = target.rounds["batch3"][0]
        assert one["cost_per_million"] == pytest.approx(2.0 / 3600 * 1e6 / one["output_tps"])
        assert len(report.gates) == 9 and all(result.passed for result in report.gates)
        assert [len(requests) for requests in target.requests.values()] == [1, 3]
        report.to_json()["targets"][0]["intervals"]["batch1.output_tps"]

    def test_sweep_ends_at_saturation(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "llmkit.bench.measure_speed.is_saturated", lambda levels: len(levels) == 2
        )
        load = replace(self.LOAD, mode="sweep")
        options = replace(
            OFFLINE, limit=None, rounds=1, load=load, quality=False, gates=("saturation_tps>0",)
        )
        (target,) = run(folder / "a", options=options).targets
        assert list(target.scenarios) == ["c1", "c2"]
        best = max(target.scenarios.values(), key=lambda figures: figures["output_tps"])
        assert target.metrics["saturation_tps"] == best["output_tps"]
        assert target.metrics["saturation_load"] in (1, 2)
        gates = ("output_tps>0",)  # not on c4 and later ones, which a saturated target does not run
        report = run(folder / "a", options=replace(options, gates=gates))
        assert [result.metric for result in report.gates] == ["c1.output_tps", "c2.output_tps"]
        report.require_gates()
        report = run(folder / "a", options=replace(options, gates=("c4.output_tps>0",)))
        with pytest.raises(GateError, match=r"c4\.output_tps was not measured"):
            report.require_gates()

    def test_gate_fails_where_one_load_lacks_its_metric(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def without_itl(*arguments: Any) -> dict[str, float]:
            metrics = calculate_metrics(*arguments)
            if metrics["requests"] == 1:
                del metrics["itl_p99_ms"]
            return metrics

        monkeypatch.setattr("llmkit.bench.measure_speed.calculate_metrics", without_itl)
        load = replace(self.LOAD, mode="latency", concurrency=(1, 3), requests=None)
        gates = ("itl_p99_ms>=0", "batch3.itl_p99_ms>=0")
        options = replace(
            OFFLINE, limit=None, rounds=1, load=load, quality=False, warmup=False, gates=gates
        )
        report = run(folder / "a", options=options)
        assert [(result.metric, result.passed) for result in report.gates] == [
            ("batch1.itl_p99_ms", False),
            ("batch3.itl_p99_ms", True),
            ("batch3.itl_p99_ms", True),
        ]

    def test_conversations_are_sent_at_their_times(self, folder: Path, tmp_path: Path) -> None:
        words = [
            {"from": who, "value": "the quick brown fox"}
            for who in ("human", "gpt", "human", "gpt")
        ]
        long = [{"from": who, "value": "the quick brown fox " * 80} for who in ("human", "gpt")]
        path = tmp_path / "talks.jsonl"
        path.write_text(
            "\n".join(json.dumps({"conversations": one}) for one in (words, long, words))
        )
        load = replace(self.LOAD, rates=(50.0,), requests=2, turns=2)
        options = replace(OFFLINE, limit=None, rounds=1, load=load, data=str(path), quality=False)
        report = run(folder / "a", options=options)
        (target,) = report.targets
        assert target.scenarios["rate50"]["requests"] == 4
        assert "1 conversations longer than 256 tokens were left out" in report.notes
        assert target.scenarios["rate50"]["cached_tokens"] >= 0
        first, second = sorted(target.requests["rate50"])[:2]
        assert first.sent_s == 0 <= second.sent_s

    def test_max_model_len_is_checked_before_anything_runs(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(OfflineBackend, "start")
            with pytest.raises(
                InputError, match=r"scenario quick needs a context of \d+ tokens and a has 90"
            ):
                run(folder / "a", options=replace(OFFLINE, max_model_len=90))
        path = tmp_path / "talks.jsonl"
        pairs = [
            {"prompt": "the quick brown fox " * count, "completion": "jumps"} for count in (1, 40)
        ]
        path.write_text("\n".join(map(json.dumps, pairs)))
        options = replace(
            OFFLINE, data=str(path), max_model_len=90, rounds=1, limit=2, quality=False
        )
        report = run(folder / "a", options=options)
        assert report.notes[-2:] == [
            "1 conversations longer than 90 tokens were left out",
            "1 of 2 conversations repeat earlier ones of this run: a prefix cache has them",
        ]

    @pytest.mark.skipif(cpu_kernels.library is None, reason="no compiled kernels")
    def test_bench_measures_a_cpu_that_was_not_measured(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured: list[str] = []

        def measure(device: str) -> None:
            measured.append(device)
            measure_peaks(device, copy_bytes=1 << 20)

        monkeypatch.setattr(bench_planner, "measure_peaks", measure)
        options = replace(OFFLINE, rounds=1, quality=False, gates=("mbu>0", "mfu>0"))
        for _ in range(2):
            (target,) = run(folder / "a", options=options).targets
            assert target.scenarios["quick"]["mbu"] > 0
            assert target.scenarios["quick"]["mfu"] > 0
        peaks_file().unlink()
        assert measured == ["cpu"], "the second time they are stored"

    def test_costs_are_counted_before_targets_start(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure_peaks("cpu", copy_bytes=1 << 20, matrix_size=64)
        start = OfflineBackend.start

        def greedy(target: OfflineBackend) -> dict[str, float]:
            figures = start(target)
            monkeypatch.setattr("llmkit.runtime.engine_plan.free_bytes", lambda device, share: 0)
            return figures

        monkeypatch.setattr(OfflineBackend, "start", greedy)
        (target,) = run(folder / "a", options=replace(OFFLINE, rounds=1, quality=False)).targets
        peaks_file().unlink()
        assert target.scenarios["quick"]["mbu"] > 0

    def test_power_covers_the_time_between_two_readings(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = SimpleNamespace(now_s=0.0)
        clock.perf_counter = lambda: clock.now_s

        class Slow(UrlBackend):
            """Ends long after its load has."""

            def run(self, requests: Sequence[WorkloadRequest], max_concurrency: int) -> RunResult:
                clock.now_s += 0.2
                return RunResult(0.01, [RequestTimeline("r", 0.0, (0.01,), 1, 0, 1)])

        class HundredWatts(GpuMonitor):
            def energy_j(self) -> float:
                return 100 * float(clock.now_s)

        plan = make_plan([str(folder / "a")], OFFLINE)
        monkeypatch.setattr("llmkit.bench.measure_speed.time", clock)
        plan.gpus = HundredWatts(())
        scenario = plan.scenarios[0]
        workload = Workload(0, (scenario,), (), ({scenario.name: ()},))
        backend = Slow("a", Server("http://h", "m"))
        _measure_run(plan, plan.targets[0], backend, scenario, workload, 0)
        assert plan.targets[0].report.rounds["quick"][0]["gpu_power_w"] == pytest.approx(100)

    def test_gate_needs_the_option_of_its_metric(self, folder: Path) -> None:
        for gate in (
            "goodput>1",
            "mbu>0",
            "cost_per_million<1",
            "energy_per_token_j<1",
            "client_us<9",
        ):
            with pytest.raises(UsageError, match="which is not measured for a"):
                run(folder / "a", options=replace(OFFLINE, gates=(gate,)))


def test_run_engine_keeps_the_engines_outputs(folder: Path) -> None:
    engine = load_engine(folder / "a", EngineOptions(device="cpu", kv_cache_memory=2**22))
    requests = [WorkloadRequest(f"r{i}", tuple(range(10 + i, 40 + 3 * i)), 5 + i) for i in range(6)]
    timelines = run_engine(engine, requests, max_concurrency=2).timelines
    assert [timeline.id for timeline in timelines] == [request.id for request in requests]
    assert [timeline.output_tokens for timeline in timelines] == [5, 6, 7, 8, 9, 10]
    assert all(
        timeline.error is None and len(timeline.arrivals_s) == timeline.output_tokens
        for timeline in timelines
    )
    sent = [timeline.sent_s for timeline in timelines]
    ended = [timeline.arrivals_s[-1] for timeline in timelines]
    assert sent[2] >= min(ended[:2]), "a third request waits for one of two clients"
    assert not engine.has_work
    assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))


def test_run_engine_counts_scheduled_times_within_a_step(folder: Path) -> None:
    engine = load_engine(folder / "a", EngineOptions(device="cpu", kv_cache_memory=2**22))
    timed = [
        WorkloadRequest(f"r{i}", tuple(range(10 + i, 40)), 4, send_at_s=1e-6 * i) for i in range(4)
    ]
    timelines = run_engine(engine, timed, max_concurrency=4).timelines
    sent = [timeline.sent_s - timelines[0].sent_s for timeline in timelines]
    assert sent == pytest.approx([0, 1e-6, 2e-6, 3e-6], abs=1e-9), (
        "waiting for the step is part of the latency"
    )
    assert all(timeline.ttft_s > 0 for timeline in timelines)


def test_run_engine_reports_refused_requests(folder: Path) -> None:
    engine = load_engine(folder / "a", EngineOptions(device="cpu", kv_cache_memory=2**22))
    requests = [
        WorkloadRequest("long", tuple(range(300)), 5),
        WorkloadRequest("short", (1, 2, 3), 5),
    ]
    long, short = run_engine(engine, requests, max_concurrency=1).timelines
    assert long.error is not None and "256" in long.error
    assert short.error is None


def test_evaluation_of_a_text_file(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(folder / "a"))
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    chosen = make_evaluation(tokenizer, str(path), 2, 32, seed=0)
    assert chosen.windows.shape == (2, 32)
    assert chosen.describe()["text"] == str(path)
    with pytest.raises(InputError, match="is too short"):
        make_evaluation(tokenizer, str(path), 2, 100_000, seed=0)
    with pytest.raises(InputError, match="windows of 8 tokens are too short"):
        make_evaluation(tokenizer, str(path), 2, 8, seed=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scenarios": ("fast",)}, UsageError, "no such scenario: fast"),
        (
            {"scenarios": ("single", "prefix")},
            InputError,
            "scenario prefix needs a context of 576 tokens and a has 256",
        ),
        (
            {"gates": ("mean_kl<=0.1",)},
            UsageError,
            "on mean_kl, which is not measured for a. Measured are checkpoint_",
        ),
        ({"gates": ("output_tps>=baseline",)}, UsageError, "compares with a baseline. Name one"),
        ({"gates": ("quality>1",)}, UsageError, "names no metric"),
        (
            {"gates": ("perplexity<99",), "quality": False},
            UsageError,
            "on perplexity, which is not measured",
        ),
        (
            {"gates": ("output_tps>1",), "speed": False, "limit": None, "rounds": 1},
            UsageError,
            "on output_tps, which is not measured",
        ),
        ({"gates": ("ready_s<9",)}, UsageError, "on ready_s, which is not measured"),
        ({"speed": False, "quality": False}, UsageError, "neither speed nor quality"),
        ({"baseline": "no/such.json"}, InputError, "report no/such.json cannot be read"),
        ({"dtype": "int3"}, UsageError, "dtype int3 is not known"),
        ({"windows": 0}, UsageError, "0 evaluation windows"),
        ({"price_per_hour": math.nan}, UsageError, "a price of nan per hour"),
    ],
)
def test_bench_refuses_conflicting_options(
    folder: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(folder / "a", options=replace(OFFLINE, **changes))  # type: ignore[arg-type]


def test_bench_refuses_bad_targets(folder: Path) -> None:
    with pytest.raises(UsageError, match="nothing to bench"):
        run(options=OFFLINE)
    with pytest.raises(InputError, match="does not exist"):
        run(folder / "c", options=OFFLINE)
    with pytest.raises(UsageError, match="a server cannot be measured offline"):
        run("http://127.0.0.1:1", options=OFFLINE)
    with pytest.raises(UsageError, match="begins with ftp:// is not the address of a checkpoint"):
        run("ftp://127.0.0.1", options=OFFLINE)
    with pytest.raises(UsageError, match="LLMKIT_API_KEY") as raised:
        run("http://user:secret@127.0.0.1", options=replace(OFFLINE, offline=False))
    assert "secret" not in str(raised.value)
    with pytest.raises(ShortageError, match=r"http://127\.0\.0\.1:1 cannot be reached.*errno 111"):
        run("http://127.0.0.1:1", options=replace(OFFLINE, offline=False))


def test_bench_refuses_models_of_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "small", vocab_size=384)
    with pytest.raises(
        InputError, match="small has a vocabulary of 384 tokens and the baseline a one of 512"
    ):
        run(folder / "a", small, options=QUALITY_ONLY)


def test_target_may_be_named_baseline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "baseline").symlink_to(folder / "a")
    monkeypatch.chdir(folder)
    assert [target.name for target in make_plan(["baseline", "a"], OFFLINE).targets] == [
        "./baseline",
        "a",
    ]


def test_short_names_of_targets() -> None:
    assert [is_url(text) for text in ("http://h:1", "https://h", "org/name", "a/b.gguf")] == [
        True,
        True,
        False,
        False,
    ]
    assert short_name("http://127.0.0.1:8000/v1") == "127.0.0.1:8000"
    assert short_name("models/SmolLM2/") == "SmolLM2"
    assert short_name("org/name") == "name"


def test_memory_of_a_process_tree() -> None:
    own = memory_bytes(psutil.Process().pid)
    assert 2**20 < own <= 2 * psutil.Process().memory_info().rss
    assert memory_bytes(2**22 + 1) == 0, "no such process"


def test_memory_of_an_ended_process_is_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = psutil.Process(child.pid)
    child.communicate()
    monkeypatch.setattr("llmkit.bench.host_memory.process_tree", lambda pid: [seen])
    assert memory_bytes(child.pid) == 0
    with ProcessMemoryTracker().track():
        pass


def mapped_array(size: int) -> numpy.ndarray:
    """An array of its own pages: malloc could take it from what earlier tests have freed."""
    array = numpy.frombuffer(mmap.mmap(-1, size), numpy.uint8)
    array.fill(1)
    return array


def test_memory_tracker_counts_freed_memory_in_the_peak() -> None:
    memory = ProcessMemoryTracker()
    size = 64 * 2**20
    with memory.track():
        for _ in range(2):
            mapped_array(size)
    assert 0.9 * size < memory.peak_bytes < 2 * size
    assert memory.kept_bytes < 0.5 * size
    with memory.track():
        kept = mapped_array(2 * size)
    del kept
    assert 1.9 * size < memory.peak_bytes < 4 * size


class TestServed:
    @pytest.fixture(scope="class")
    def served(self, folder: Path) -> BenchReport:
        gates = ("ready_s<600", "queue_mean_ms<600000")
        options = replace(OFFLINE, offline=False, quality=False, rounds=1, gates=gates)
        return run(folder / "a", options=options)

    def test_speed_is_measured(self, served: BenchReport) -> None:
        (target,) = served.targets
        assert target.kind == "served"
        assert target.scenarios["quick"]["output_tokens"] == 96
        assert target.scenarios[
            "quick"
        ].keys() == SPEED_METRICS.keys() - CONDITIONAL_SPEED_METRICS | CLIENT | {"queue_mean_ms"}
        assert 0 < target.scenarios["quick"]["client_busy"] < 1
        assert (
            target.scenarios["quick"]["prompt_tokens"]
            == served.workload["scenarios"][0]["prompt_tokens"]
        )

    def test_starting_metrics(self, served: BenchReport) -> None:
        (target,) = served.targets
        assert target.metrics["ready_s"] > 0
        assert 50 * 2**20 < target.metrics["peak_memory_bytes"] < 8 * 2**30
        served.require_gates()

    def test_server_is_stopped(self, served: BenchReport, folder: Path) -> None:
        commands = [
            " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)
        ]
        assert not [
            command for command in commands if str(folder) in command or "engine_process" in command
        ]


def test_served_backend_removes_keys_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {
        "LLMKIT_API_KEY",
        "LLMKIT_API_KEY_FILE",
        "LLMKIT_SSL_CERTFILE",
        "LLMKIT_GRPC_PORT",
        "LLMKIT_CONFIG",
    }
    for name in (*names, "LLMKIT_MAX_NUM_SEQS"):
        monkeypatch.setenv(name, "x")
    environment = ServedBackend("x", "x", 256).environment()
    assert "LLMKIT_MAX_NUM_SEQS" in environment and not names & environment.keys()


def test_served_backend_reports_why_the_server_ended(tmp_path: Path) -> None:
    target = ServedBackend("x", str(tmp_path / "missing"), 256)
    try:
        with pytest.raises(
            InputError, match=r"the server of x ended with code 3: .*missing does not exist"
        ):
            target.start()
    finally:
        assert target.stop().keys() <= {"peak_memory_bytes"}
