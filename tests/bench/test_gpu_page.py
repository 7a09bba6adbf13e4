"""docs/gpu.md: without figures, and from those of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.bench.gpu.figure_log import FILE_NAME
from llmkit.bench.gpu.gpu_page import (
    CALL_S,
    LOAN_S,
    LOANS,
    NOT_MEASURED,
    Figures,
    main,
    make_page,
)
from llmkit.bench.gpu.run_parts import PARTS
from llmkit.kernels import tuned_configs

ROOT = Path(__file__).resolve().parents[2]


def record(part: str, figure: str, name: str, **values: Any) -> dict[str, Any]:
    return {"part": part, "figure": figure, "name": name, "status": "measured", **values}


RECORDS = [
    record(
        "ceilings",
        "machine",
        "machine",
        device="NVIDIA H100",
        torch="2.11.0",
        triton="3.6.0",
        llmkit="0.1",
    ),
    record("ceilings", "bandwidth", "copy", bytes_per_s=3.0e12),
    record("ceilings", "product", "bf16", flops_per_s=700e12),
    record("ceilings", "part", "ceilings", status="ended", how="complete"),
    record("steps", "decode", "Llama-3.1-8B bf16, batch 1, greedy", step_ms=7.0),
    record(
        "steps", "decode", "Llama-3.1-8B bf16, batch 1, top-k top-p", status="failed", reason="OOM"
    ),
    record("steps", "decode", "Qwen3-0.6B bf16, batch 1, greedy", step_ms=0.5),
    record("steps", "prefill", "Llama-3.1-8B bf16, greedy", step_ms=60.0),
    record("rivals", "throughput", "Qwen3-0.6B, 1 requests; transformers_static", output_tps=700.0),
    record("rivals", "throughput", "Qwen3-0.6B, 1 requests; vllm", status="skipped", reason="no"),
    record("rivals", "throughput", "Qwen3-0.6B, 1 requests; llmkit", output_tps=1900.0),
    record("kernels", "sampling", "Llama-3.1-8B [64, 128256], greedy; llmkit", ms=0.02),
    record("kernels", "sampling", "Llama-3.1-8B [64, 128256], greedy; torch", ms=0.05),
    record(
        "profile",
        "kernels",
        "Qwen3-0.6B bf16, batch 1, top-k top-p",
        step_ms=0.5,
        busy_ms=0.4,
        launches=300,
        table=[{"kernel": "_sample|kernel", "count": 1, "us": 20.5}],
    ),
    record(
        "graphs",
        "graph",
        "Qwen3-0.6B bf16, verify, batch 16 x 4 tokens",
        step_ms=1.5,
        eager_ms=9.0,
    ),
    record("quantized", "throughput", "Llama-3.1-8B int4; llmkit", output_tps_16=2000.0),
    record("quantized", "throughput", "Llama-3.1-8B int4; vllm", status="skipped", reason="no"),
    record("tests", "tests", "pytest", passed=400, skipped=3),
    record("quantize", "gptq", "8B shape", seconds=250.0, bound_s=300.0),
    record(
        "tune",
        "tuned",
        "attention",
        entries=[
            {
                "name": "NVIDIA H100 sm_90; triton 3.6.0; attention; 4 128",
                "config": [64, 4],
                "ms": 0.1,
                "safe_ms": 0.2,
            }
        ],
    ),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(one) + "\n" for one in RECORDS)
    (tmp_path / FILE_NAME).write_text(lines)
    (tmp_path / "tuned.json").write_text(
        json.dumps({"format": 1, "tuned": {"NVIDIA H100 sm_90; x": [64, 4]}})
    )
    return tmp_path


def row(page: str, first: str) -> list[str]:
    """The cells of a table's row by its first one."""
    lines = (line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in next(lines).strip("|").split(" | ")][1:]


def test_gpu_page_is_written_from_figures(results: Path) -> None:
    page = make_page(Figures(results))
    assert "Measured on NVIDIA H100, torch 2.11.0, Triton 3.6.0" in page
    # 15.14 GB at 3 TB/s and at 4.3 TB/s
    assert row(page, "Llama-3.1-8B bf16, batch 1") == [
        "7",
        "failed",
        "5.05",
        "72%",
        "3.52",
        "143",
        NOT_MEASURED,
    ]
    assert row(page, "Qwen3-0.6B bf16, batch 1")[-2:] == ["2,000", "700 (transformers_static)"]
    prefill = row(page, "Llama-3.1-8B bf16, prefill")
    assert prefill[0] == "60" and prefill[5].strip() == "34,133"
    sampling = row(page, "Llama-3.1-8B [64, 128256], greedy")
    assert (sampling[0], sampling[-1]) == ("20", "torch: 50")
    assert row(page, "Qwen3-0.6B, 1 requests")[:4] == ["1,900", "700", "", "not installed"]
    assert row(page, "memory, copy") == ["3.00 TB/s", "4.3 TB/s"]
    assert row(page, "attention; 4 128") == ["64 4", "0.1", "0.2"]
    verified = row(page, "Qwen3-0.6B bf16, verify, batch 16 x 4 tokens")
    assert verified[:2] == ["1.5", "9"] and verified[3].endswith("%")
    assert row(page, "Llama-3.1-8B int4, 16 requests")[:2] == ["2,000", "not installed"]
    assert row(page, "Llama-3.1-8B int4, 64 requests")[0] == NOT_MEASURED
    assert row(page, "Llama-3.1-8B fp8, 16 requests")[:2] == [NOT_MEASURED] * 2
    assert row(page, "GPU tests")[0] == "400 passed, 3 skipped"
    assert "| `_sample\\|kernel` | 1 | 20.5 |" in page
    assert "batch 1, top-k top-p: failed (OOM)" in page
    assert row(page, "ceilings")[-1] == "complete"


def test_gpu_page_plans_calls_that_are_short_enough() -> None:
    calls = [call for loan in LOANS for call in loan]
    assert sorted(part for call in calls for part in call) == sorted(PARTS)
    for loan in LOANS:
        seconds = [sum(PARTS[part].budget_s for part in call) for call in loan]
        assert max(seconds) <= CALL_S - 60, "imports, and a figure that takes longer"
        assert sum(seconds) <= LOAN_S - 240, "the start of the machine"


def test_gpu_page_without_figures_is_the_one_in_the_repository() -> None:
    page = make_page(Figures(None))
    assert "**Nothing on this page has been measured yet.**" in page
    assert row(page, "Llama-3.1-8B fp8, batch 64")[:4] == [NOT_MEASURED] * 4
    written = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    if "Nothing on this page has been measured yet" in written:
        assert page == written, "make gpu-page writes it anew"
    assert len(written.splitlines()) == pytest.approx(len(page.splitlines()), abs=200)


def test_gpu_page_adds_tuned_configurations(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    tuned = tmp_path / "package.json"
    tuned.write_text('{"format": 1, "tuned": {"another": [1]}}')
    words = ["--results", str(results), "--page", str(page), "--tuned", str(tuned)]
    assert main(words) == 0
    assert page.read_text(encoding="utf-8") == make_page(Figures(results))
    assert json.loads(tuned.read_text())["tuned"] == {
        "NVIDIA H100 sm_90; x": [64, 4],
        "another": [1],
    }
    tuned_configs.read_configs.cache_clear()
    main(["--page", str(page)])
    assert "Nothing on this page" in page.read_text(encoding="utf-8")
