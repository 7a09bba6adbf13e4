"""The acceptance of draft tokens in bench: from counters of servers, and of the engine itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_draft_heads import glm_with_mtp
from support.tiny_models import write_tokenizer

from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.draft_counts import DraftCounts, acceptance_metrics, parse_draft_counts
from llmkit.bench.run_bench import bench
from llmkit.common.progress import SilentProgress

VLLM = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 20.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 300.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 1.5e+02
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 90.0
vllm:spec_decode_num_accepted_tokens_created{engine="0",model_name="m"} 1.7e+09
"""


def test_draft_counts_are_read_from_vllm_and_llmkit() -> None:
    assert parse_draft_counts(VLLM) == DraftCounts(120, 300, 150)
    plain = VLLM.replace("vllm:", "llmkit:").replace('{engine="0",model_name="m"}', "")
    assert parse_draft_counts(plain) == DraftCounts(120, 300, 150)
    assert parse_draft_counts("") == DraftCounts()


def test_acceptance_is_that_of_a_run() -> None:
    counts = DraftCounts(120, 300, 150).since(DraftCounts(20, 100, 50))
    assert acceptance_metrics(counts) == {"acceptance": 0.5, "acceptance_length": 2.0}
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
    gated = bench(
        [str(model)],
        BenchOptions(**(vars(options) | {"gates": ("acceptance_length>=1",)})),
        SilentProgress(),
    )
    assert gated.gates
    assert all(result.passed for result in gated.gates)
