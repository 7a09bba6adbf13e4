"""The acceptance of draft tokens in bench: from counters of servers, and of the engine itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_draft_heads import glm_with_mtp
from support.tiny_models import write_tokenizer

from llmkit.bench.bench_metrics import find_metric
from llmkit.bench.bench_options import BenchOptions, EvalTaskOptions, LoadOptions
from llmkit.bench.bench_page import report_page
from llmkit.bench.draft_counts import DraftCounts, acceptance_metrics, parse_draft_counts
from llmkit.bench.report_tables import drafting_rows
from llmkit.bench.run_bench import bench
from llmkit.common.errors import UsageError
from llmkit.common.progress import SilentProgress

VLLM = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 20.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 300.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 1.5e+02
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 80.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 10.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 60.0
vllm:spec_decode_num_accepted_tokens_created{engine="0",model_name="m"} 1.7e+09
"""


def test_draft_counts_are_read_from_vllm_and_llmkit() -> None:
    assert parse_draft_counts(VLLM) == DraftCounts(120, 300, 150, (90, 60))
    plain = VLLM.replace("vllm:", "llmkit:").replace('{engine="0",model_name="m"}', "")
    assert parse_draft_counts(plain) == DraftCounts(120, 300, 150, (90, 60))
    assert parse_draft_counts("") == DraftCounts()


def test_acceptance_is_that_of_a_run() -> None:
    counts = DraftCounts(120, 300, 150, (90, 60)).since(DraftCounts(20, 100, 50, (30,)))
    assert acceptance_metrics(counts) == {
        "acceptance": 0.5,
        "acceptance_length": 2.0,
        "drafts": 100,
        "acceptance_pos0": 0.6,
        "acceptance_pos1": 0.6,
    }
    metric = find_metric("c8.acceptance_pos1")
    assert metric is not None and metric.better == "higher" and not metric.headline
    assert find_metric("acceptance_posx") is None
    assert acceptance_metrics(DraftCounts()) == {}
    assert acceptance_metrics(None) == {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = glm_with_mtp(tmp_path_factory.mktemp("glm"), steps=20)
    write_tokenizer(path)
    return path


def test_bench_reports_the_acceptance_of_an_mtp_head(model: Path) -> None:
    options = BenchOptions(
        offline=True, limit=3, rounds=1, device="cpu", quality=False, speculate="mtp:2"
    )
    report = bench([str(model)], options, SilentProgress())
    scenarios = report.targets[0].scenarios.values()
    assert scenarios
    for metrics in scenarios:
        assert 0 <= metrics["acceptance"] <= 1
        assert 1 <= metrics["acceptance_length"] <= 3
        places = [metrics[f"acceptance_pos{place}"] for place in range(2)]
        assert metrics["acceptance_length"] == pytest.approx(1 + sum(places))
    gated = bench(
        [str(model)],
        BenchOptions(**(vars(options) | {"gates": ("acceptance_length>=1", "acceptance_pos1>=0")})),
        SilentProgress(),
    )
    assert gated.gates
    assert all(result.passed for result in gated.gates)


def test_bench_at_a_synthetic_acceptance_measures_it_and_says_so(model: Path) -> None:
    options = BenchOptions(
        offline=True,
        load=LoadOptions(requests=8, input_tokens=(8, 8), output_tokens=(40, 40)),
        device="cpu",
        quality=False,
        speculate="mtp:2",
        synthetic_acceptance_rates=(0.8, 0.5),
    )
    report = bench([str(model)], options, SilentProgress())
    metrics = report.targets[0].scenarios["c8"]
    assert metrics["acceptance_pos0"] == pytest.approx(0.8, abs=0.12)
    assert metrics["acceptance_pos1"] == pytest.approx(0.5, abs=0.15)
    (note,) = [note for note in report.notes if "by a draw" in note]
    assert "(0.8,0.5 at their places)" in note and "not the model's" in note
    head, row = drafting_rows(report)
    assert head[-2:] == ["place 0", "place 1"]
    assert row[0] == "c8" and row[3] == f"{metrics['acceptance_length']:.2f}"
    assert b"<h2" in (page := report_page(report)) and b"Speculation" in page


def test_tasks_refuse_a_synthetic_acceptance(model: Path) -> None:
    options = BenchOptions(
        device="cpu",
        quality=False,
        speculate="mtp:2",
        synthetic_acceptance_length=2.0,
        tasks=EvalTaskOptions(("arc_easy",)),
    )
    with pytest.raises(UsageError, match="by a draw, and --tasks would score its answers"):
        bench([str(model)], options, SilentProgress())
