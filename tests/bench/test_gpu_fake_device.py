"""The GPU benchmarks on a CPU that acts as a CUDA device: graphs are captured, kernels bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import GPU, Device
from support.fake_cuda_api import stand_in_cuda, stand_in_triton

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
from llmkit.model import device as transfer
from llmkit.runtime.engine.cuda_graphs import CudaGraph


@contextmanager
def fake_gpu() -> Iterator[tuple[Device, Counter[str]]]:
    """A CPU in the place of a CUDA device, and how often each Triton kernel was launched."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        device = Device()
        stand_in_cuda(patch, device)
        patch.setattr(torch.cuda.Event, "elapsed_time", lambda *_: 1.0, raising=False)
        patch.setattr(timing, "MAX_LAUNCHES", 2)
        patch.setattr(timing, "MAX_COPIES", 2)
        launches = stand_in_triton(patch, device)
        transfer.uploader.cache_clear()
        CudaGraph._shared = None
        try:
            with device:
                yield device, launches
        finally:
            transfer.uploader.cache_clear()
            CudaGraph._shared = None


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
    with fake_gpu() as (device, launches):
        records = run(decode_steps, tmp_path)
    assert {record["status"] for record in records} == {"measured"}, records
    assert len(records) == 2 * (2 * 2 + 2)
    decode = [record for record in records if record["figure"] == "decode"]
    assert all(record["step_ms"] == 1.0 for record in decode)
    assert device.log.count("graph") >= len(decode) * 5
    assert vars(sampling_triton).keys() & launches.keys()
    names = " ".join(launches)
    assert all(word in names for word in ("weight_only", "attention")), names


def test_steps_with_drafts_prompts_and_adapters_are_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_steps, "GRAPH_MODELS", (StepModel("Qwen3-0.6B", "bf16"),))
    with fake_gpu() as (device, _):
        records = run(graph_steps, tmp_path)
    assert {record["status"] for record in records} == {"measured"}, records
    assert {record["kind"] for record in records} == {"verify", "mixed", "adapters"}
    assert all(record["step_ms"] == 1.0 and record["eager_ms"] > 0 for record in records)
    assert device.log.count("capture") == len(records) == 3, "and the same without a capture"


def test_engines_of_loads_run_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StepModel("Qwen3-0.6B", "bf16")
    monkeypatch.setattr(saturation, "SATURATED", ((model, "top-k top-p"),))
    monkeypatch.setattr(serving_times, "SERVED", (model,))
    with fake_gpu():
        for module in (saturation, serving_times):
            records = run(module, tmp_path / module.__name__)
            assert {record["status"] for record in records} == {"measured"}, records


def test_kernels_are_captured_in_graphs() -> None:
    with fake_gpu() as (_, launches):
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
    assert vars(sampling_triton).keys() & launches.keys()
    names = " ".join(launches)
    assert all(word in names for word in ("norm", "rope", "attention")), names
