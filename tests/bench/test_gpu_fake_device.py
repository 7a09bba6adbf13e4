"""The GPU benchmarks on a CPU that acts as a CUDA device: graphs are captured, kernels bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import GPU
from support.fake_cuda_api import FakeGpu, fake_gpu

from llmkit.bench.gpu import decode_steps, graph_steps, saturation, serving_times, timing
from llmkit.bench.gpu.decode_steps import StepModel
from llmkit.bench.gpu.figure_log import FigureLog, PartOptions, Record, latest
from llmkit.bench.gpu.kernel_times import (
    KernelCase,
    Setting,
    attention_cases,
    elementwise_cases,
    sampling_cases,
    time_case,
)
from llmkit.kernels import sampling_triton


@contextmanager
def timed_gpu() -> Iterator[FakeGpu]:
    """A CPU in the place of a CUDA device, on which everything takes 1 ms."""
    pytest.importorskip("triton")
    with fake_gpu() as gpu:
        gpu.patch.setattr(torch.cuda.Event, "elapsed_time", lambda *_: 1.0, raising=False)
        gpu.patch.setattr(timing, "MAX_LAUNCHES", 2)
        gpu.patch.setattr(timing, "MAX_COPIES", 2)
        yield gpu


def run(module: Any, folder: Path) -> list[Record]:
    """Measure a part. Returns its figures."""
    options = PartOptions(GPU, folder, is_tiny=True)
    module.measure(FigureLog(options.figures_path, "part", 100), options)
    return list(latest(options.figures_path, "part").values())


def test_steps_run_as_graphs_with_the_engines_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = (StepModel("Qwen3-0.6B", "bf16"), StepModel("Llama-3.1-8B", "int4", "fp8"))
    monkeypatch.setattr(decode_steps, "STEP_MODELS", models)
    with timed_gpu() as gpu:
        records = run(decode_steps, tmp_path)
    assert {record["status"] for record in records} == {"measured"}, records
    assert len(records) == 2 * (2 * 2 + 2)
    decode = [record for record in records if record["figure"] == "decode"]
    assert all(record["step_ms"] == 1.0 for record in decode)
    assert gpu.device.log.count("graph") >= len(decode) * 5
    assert vars(sampling_triton).keys() & gpu.launches.keys()
    names = " ".join(gpu.launches)
    assert all(word in names for word in ("weight_only", "attention")), names


def test_steps_with_drafts_prompts_and_adapters_are_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_steps, "GRAPH_MODELS", (StepModel("Qwen3-0.6B", "bf16"),))
    with timed_gpu() as gpu:
        records = run(graph_steps, tmp_path)
    assert {record["status"] for record in records} == {"measured"}, records
    assert {record["kind"] for record in records} == {"verify", "mixed", "adapters"}
    assert all(record["step_ms"] == 1.0 and record["eager_ms"] > 0 for record in records)
    assert gpu.device.log.count("capture") == len(records) == 3, "and the same without a capture"


def test_engines_of_loads_run_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StepModel("Qwen3-0.6B", "bf16")
    monkeypatch.setattr(saturation, "SATURATED", ((model, "top-k top-p"),))
    monkeypatch.setattr(serving_times, "SERVED", (model,))
    with timed_gpu():
        for module in (saturation, serving_times):
            records = run(module, tmp_path / module.__name__)
            assert {record["status"] for record in records} == {"measured"}, records


def test_kernels_are_captured_in_graphs() -> None:
    with timed_gpu() as gpu:
        setting = Setting(GPU, 16)
        cases: list[KernelCase] = [
            *sampling_cases(setting, "Llama-3.1-8B", (2,)),
            *list(elementwise_cases(setting))[:3],
            *list(attention_cases(setting))[:2],
        ]
        measured = [
            time_case(case, setting, 1)["ms"]
            for case in cases
            if case.implementation.startswith("llmkit")
        ]
    assert len(measured) == 2 + 3 + 2 and min(measured) > 0
    assert vars(sampling_triton).keys() & gpu.launches.keys()
    names = " ".join(gpu.launches)
    assert all(word in names for word in ("norm", "rope", "attention")), names
