"""`--sweep-options` and the options of `--mode slo`: what is refused, and a sweep over servers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_models import tiny_checkpoint

from llmkit.bench.bench_options import BenchOptions, LoadOptions
from llmkit.bench.bench_plan import BenchPlan, Target
from llmkit.bench.bench_planner import make_plan
from llmkit.bench.bench_report import BenchReport, TargetReport
from llmkit.bench.engine_settings import bench_engine_options
from llmkit.bench.offline_backend import OfflineBackend
from llmkit.bench.slo.option_points import (
    load_points,
    pareto_points,
    ranked_targets,
    serve_command,
)
from llmkit.bench.slo.slo_plan import count_gpus
from llmkit.bench.slo.slo_tables import best_command, options_rows
from llmkit.bench.slo.sweep_options import parse_sweep, serve_options
from llmkit.cli import main
from llmkit.common.errors import UsageError

SWEEP = ("max_num_seqs=1,4",)
SLO_LOAD = LoadOptions("slo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "tiny"
    tiny_checkpoint(path)
    return path


def test_sweep_words_make_every_combination() -> None:
    assert parse_sweep(["max_num_seqs=8,16 kv-cache-dtype=auto,int8"]) == [
        {"max_num_seqs": "8", "kv_cache_dtype": "auto"},
        {"max_num_seqs": "8", "kv_cache_dtype": "int8"},
        {"max_num_seqs": "16", "kv_cache_dtype": "auto"},
        {"max_num_seqs": "16", "kv_cache_dtype": "int8"},
    ]
    # As a list of a YAML file or a variable splits it.
    assert parse_sweep(["max_num_seqs=8", "16"]) == parse_sweep(["--max-num-seqs=8,16"])
    assert serve_options({"no_prefix_cache": "true", "max_num_seqs": "8"}) == {
        "--no-prefix-cache": "",
        "--max-num-seqs": "8",
    }
    assert serve_options({"no_prefix_cache": "false"}) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_num_sequences=8"], "llmkit serve has no option max_num_sequences"),
        (["max_num_seqs=0"], "--max-num-seqs: 0 is out of range"),
        (["max_num_seqs=many"], "--max-num-seqs 'many' is not allowed"),
        (["kv_cache_dtype=int5"], "int5"),
        (["port=1,2"], "port is set by bench itself"),
        (["max_num_seqs=8 max_num_seqs=9"], "max_num_seqs is given twice"),
        (["max_num_seqs"], "'max_num_seqs' is not NAME=VALUE,VALUE"),
        (["max_num_seqs="], "is not NAME=VALUE,VALUE"),
        (["max_num_seqs=" + ",".join(map(str, range(1, 66)))], "makes 65 combinations"),
    ],
)
def test_sweep_refuses_what_serve_would(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_sweep(words)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(load=SLO_LOAD), "--mode slo has no bounds"),
        (BenchOptions(load=SLO_LOAD, slo="ttft:1s", limit=5), "--limit does not go with"),
        (
            BenchOptions(load=replace(SLO_LOAD, requests=100), slo="ttft:1s"),
            "100 requests of a load cannot show that 0.99 of them keep the bounds",
        ),
        (
            BenchOptions(load=replace(SLO_LOAD, rates=(1.0,)), slo="ttft:1s"),
            "--mode slo chooses the loads itself",
        ),
        (BenchOptions(sweep_options=SWEEP, offline=True), "--offline has none"),
        (
            BenchOptions(sweep_options=SWEEP, load=LoadOptions("startup")),
            "--sweep-options does not go with --mode startup",
        ),
        (BenchOptions(sweep_options=SWEEP, speed=False), "does not go with --no-speed"),
    ],
)
def test_slo_and_sweep_options_that_exclude_each_other(
    model: Path, options: BenchOptions, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan([str(model)], options)
    assert message in str(caught.value)


def test_sweep_of_a_running_server_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--url", "http://127.0.0.1:9", "--sweep-options", *SWEEP]
    assert main.run(words) == 2
    assert "an address is one that runs already" in capsys.readouterr().err


def test_sweep_beside_a_server_as_the_baseline_is_refused(model: Path) -> None:
    options = BenchOptions(sweep_options=SWEEP, baseline="http://127.0.0.1:9")
    with pytest.raises(UsageError, match="an address is one that runs already"):
        make_plan([str(model)], options)


def test_slo_options_belong_to_the_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", "model", "--attained", "0.9"]) == 2
    assert "--attained belongs to --mode slo" in capsys.readouterr().err


def swept_target(name: str, points: list[tuple[float, float]], **options: str) -> TargetReport:
    """A target with scenarios of these (TPOT P90 in ms, output tokens/s)."""
    scenarios = {
        f"c{i}": {"tpot_p90_ms": tpot, "output_tps": tps, "ttft_p50_ms": 1.0}
        for i, (tpot, tps) in enumerate(points)
    }
    return TargetReport(name, "org/model", "served", {}, scenarios, serve_options=options)


def test_pareto_front_and_the_best_command() -> None:
    report = BenchReport(
        [
            swept_target("a", [(10.0, 100.0), (20.0, 150.0)], **{"--max-num-seqs": "8"}),
            swept_target("b", [(12.0, 90.0), (40.0, 300.0)], **{"--max-num-seqs": "16"}),
            swept_target("c", [(50.0, 80.0)], **{"--max-num-seqs": "1"}),
        ]
    )
    front = pareto_points(load_points(report))
    assert [(point.target, point.throughput) for point in front] == [(0, 100), (0, 150), (1, 300)]
    assert front[0].interactivity == pytest.approx(100)
    assert [(row.target.name, row.on_front) for row in ranked_targets(report)] == [
        ("b", True),
        ("a", True),
        ("c", False),
    ]
    assert [row[-1] for row in options_rows(report)[1:]] == ["best", "on the front", "loses"]
    assert best_command(report) == "llmkit serve org/model --max-num-seqs 16"
    assert serve_command(report.targets[0]) == "llmkit serve org/model --max-num-seqs 8"


def test_throughput_is_that_of_a_gpu() -> None:
    assert count_gpus("cuda", {"--tp": "2", "--pp": "2"}) == 4
    assert count_gpus("cpu", {"--tp": "2"}) == 0
    target = swept_target("a", [(10.0, 100.0)], **{"--tp": "4"})
    target.gpus = 4
    (point,) = load_points(BenchReport([target]))
    assert point.throughput == 25


SMALL_LOAD = ("--mode", "serve", "--concurrency", "1", "--requests", "2", "--input-tokens", "4")


def test_interrupted_sweep_is_continued(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second of three combinations is interrupted. They run in this process."""
    started: list[str] = []
    interrupted = "max_num_seqs=2"

    def make_backend(plan: BenchPlan, target: Target) -> OfflineBackend:
        started.append(target.name)
        if target.name == interrupted:
            raise KeyboardInterrupt
        assert target.spec
        seqs = int(target.report.serve_options["--max-num-seqs"])
        options = replace(bench_engine_options(plan.options, plan.device), max_num_seqs=seqs)
        limit = target.spec.max_position_embeddings
        return OfflineBackend(target.name, target.report.reference, limit, options)

    monkeypatch.setattr("llmkit.bench.measure_speed._make_backend", make_backend)
    out = tmp_path / "sweep.json"
    words = ["bench", str(model), *SMALL_LOAD, "--output-tokens", "4", "--device", "cpu", "-q"]
    words += ["-o", str(out), "--sweep-options", "max_num_seqs=1,2,3"]
    assert main.run(words) == 130
    partial = BenchReport.from_json(json.loads(out.read_text()))
    assert [target.name for target in partial.targets] == ["max_num_seqs=1"]
    assert partial.notes[-1] == "1 of 3 targets were measured"
    assert main.run(["bench", "show", str(out), "-q"]) == 0

    for changes, message in (
        (["--requests", "3"], "--requests 2, here 3"),
        (["--seed", "7"], "--seed 0, here 7"),
        (["--sweep-options", "tp=1"], "targets max_num_seqs=1,max_num_seqs=2,max_num_seqs=3, here"),
    ):
        assert main.run([*words, *changes]) == 5
        error = capsys.readouterr().err
        assert f"{out} has an unfinished run of another kind" in error
        assert message in error
    status = (model / "config.json").stat()
    os.utime(model / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert main.run(words) == 5
    assert "of another kind (files " in capsys.readouterr().err
    os.utime(model / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert BenchReport.from_json(json.loads(out.read_text())).to_json() == partial.to_json()

    started.clear()
    interrupted = ""
    assert main.run([*words, "--gate", "output_tps>0"]) == 0  # gates may be others
    assert started == ["max_num_seqs=2", "max_num_seqs=3"]
    whole = BenchReport.from_json(json.loads(out.read_text()))
    assert [target.name for target in whole.targets] == [f"max_num_seqs={n}" for n in (1, 2, 3)]
    assert whole.targets[0] == partial.targets[0], "it is not measured again"
    assert len(whole.gates) == 2, "the first one is the baseline"
    assert not whole.unfinished
    assert not any("were measured" in note for note in whole.notes)

    def interrupt(report: BenchReport) -> list[str]:
        raise KeyboardInterrupt

    started.clear()
    with monkeypatch.context() as patch:
        patch.setattr("llmkit.bench.run_bench._client_warnings", interrupt)
        assert main.run([*words, "--seed", "7"]) == 130, "a finished report is replaced"
    assert len(started) == 3
    assert main.run([*words, "--seed", "7"]) == 0
    assert len(started) == 3, "the last one was kept, too"


def test_unfinished_run_is_refused_before_anything_starts(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "sweep.json"
    unfinished = BenchReport([TargetReport("a", "a", "served")], unfinished={"key": {}})
    out.write_text(json.dumps(unfinished.to_json()))
    monkeypatch.delattr("llmkit.bench.measure_speed.measure_startup")
    words = ["bench", str(model), "--mode", "startup", "--no-quality", "--device", "cpu", "-q"]
    assert main.run([*words, "-o", str(out)]) == 5
    assert "has an unfinished run of another kind" in capsys.readouterr().err


def test_sweep_serves_every_combination(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that starts and one that does not, with the words as separate arguments."""
    report = tmp_path / "report.json"
    words = ["bench", str(model), *SMALL_LOAD, "--output-tokens", "4", "--device", "cpu", "--json"]
    words += ["--sweep-options", "max_num_seqs=2", "tp=1,7", "-o", str(report)]
    assert main.run([*words, "--gate", "output_tps>0"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document == json.loads(report.read_text())
    names = [target["name"] for target in document["targets"]]
    assert names == ["max_num_seqs=2, tp=1"]
    assert sum("tp=7 was left out" in note for note in document["notes"]) == 1
    assert "tp=7: output_tps was not measured" in captured.err
    assert [gate["passed"] for gate in document["gates"]] == [True, False]
    (target,) = document["targets"]
    assert target["scenarios"].keys() == {"c1"}
    assert target["scenarios"]["c1"]["requests"] == 2
    best = best_command(BenchReport.from_json(document))
    assert best.startswith(f"llmkit serve {model} --max-num-seqs ")
