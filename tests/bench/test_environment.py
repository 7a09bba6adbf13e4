"""What reports say of the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmkit.bench import environment
from llmkit.bench.bench_report import BenchReport, comparability_notes
from llmkit.bench.environment import cpu_flags, describe_environment

X86 = """processor	: 0
model name	: A processor
flags		: fpu sse2 avx2 fma avx512_bf16 avx512f avx512bw amx_tile amx_int8

processor	: 1
model name	: Another processor
flags		: fpu sse2
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm sve asimddp bf16 i8mm\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(X86, "avx2 avx512f avx512bw avx512_bf16 amx_tile amx_int8", id="x86"),
        pytest.param(ARM, "asimd asimddp i8mm bf16 sve", id="arm"),
        pytest.param("flags : fpu sse2\n", "", id="none of them"),
        pytest.param("processor : 0\n", None, id="no list"),
    ],
)
def test_cpu_flags_are_those_that_decide_the_kernels(
    tmp_path: Path, text: str, expected: str | None
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_flags(tmp_path / "cpuinfo") == expected


def test_environment_names_the_processor_and_its_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_flags(tmp_path / "absent") is None
    (tmp_path / "cpuinfo").write_text(X86)
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    found = describe_environment("cpu", torch.bfloat16)
    assert found["cpu"] == "A processor"
    assert found["cpu_flags"] == "avx2 avx512f avx512bw avx512_bf16 amx_tile amx_int8"
    assert (found["device"], found["gpu"], found["dtype"]) == ("cpu", None, "bfloat16")


def test_reports_of_processors_with_other_flags_do_not_compare() -> None:
    """Reports of earlier versions have no flags, and compare with all."""
    a = BenchReport([], environment={"cpu": "A processor", "cpu_flags": "avx2"})
    b = replace(a, environment={"cpu": "A processor", "cpu_flags": "avx2 avx512f"})
    assert comparability_notes(a, b) == [
        "cpu_flags differs (avx2 and avx2 avx512f): speed does not compare"
    ]
    earlier = replace(a, environment={"cpu": "A processor"})
    assert comparability_notes(a, earlier) == []
