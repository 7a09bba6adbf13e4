"""Bytes and operations against counts by hand, and stored peaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.bench.bench_metrics import RequestTimeline
from llmkit.bench.gpu_monitor import GpuMonitor, energy_metrics
from llmkit.bench.model_costs import ModelCosts, count_model_costs, utilization
from llmkit.bench.peak_performance import PeakPerformance, load_peaks, measure_peaks, peaks_file
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.options import CpuActivations
from llmkit.common.progress import SilentProgress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import model_spec
from llmkit.model.weight_loader import load_model
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

LINEARS = (4 + 2 * 2) * 16 * 64 + 64 * 64 + 2 * 128 * 64 + 64 * 128  # weights of a layer's linears
HEAD = 512 * 64


def costs_of(path: Path) -> ModelCosts:
    checkpoint = open_checkpoint(path)
    return count_model_costs(checkpoint, model_spec(checkpoint.config), "auto", "cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_costs_of_a_dense_model(tmp_path: Path, tied: bool) -> None:
    costs = costs_of(tiny_checkpoint(tmp_path / "tiny", tie_word_embeddings=tied, dtype="float32"))
    assert (costs.token_flops, costs.head_flops) == (2 * 2 * LINEARS, 2 * HEAD)
    assert costs.dense_bytes == 4 * (2 * LINEARS + HEAD)
    assert costs.context_flops == 4 * 2 * 4 * 16
    assert costs.kv_bytes == 2 * 2 * 2 * 16 * 4
    assert costs.step_bytes(3, 10) == costs.dense_bytes + 30 * costs.kv_bytes
    assert costs.flops(0, 3) == 3 * costs.token_flops + (1 + 2 + 3) * costs.context_flops
    assert costs.flops(0, 5) == costs.flops(0, 2) + costs.flops(2, 5)


def test_costs_of_experts_grow_with_the_batch(tmp_path: Path) -> None:
    costs = costs_of(tiny_checkpoint(tmp_path / "moe", "mixtral", dtype="float32"))
    expert = 3 * 64 * 128
    assert costs.expert_bytes == 4 * 2 * 4 * expert
    alone = costs.step_bytes(1, 0) - costs.dense_bytes
    assert alone == pytest.approx(costs.expert_bytes / 2)
    assert alone < costs.step_bytes(4, 0) - costs.dense_bytes < costs.expert_bytes


def test_costs_of_recurrent_layers_do_not_depend_on_the_context(tmp_path: Path) -> None:
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
    }
    costs = costs_of(tiny_checkpoint(tmp_path / "tiny", "qwen3_5_text", dtype="float32", **sizes))
    state = 4 * 8 * 16  # heads, keys, values
    conv = 3 * (2 * 2 * 8 + 4 * 16)  # inputs, channels
    assert costs.state_bytes == 4 * (state + conv)
    assert costs.context_flops == 4 * 4 * 16, "of one layer"
    assert costs.step_bytes(3, 10) == (
        costs.dense_bytes + 30 * costs.kv_bytes + 2 * 3 * costs.state_bytes
    )
    mixer = (2 * 2 * 8 + 2 * 4 * 16) * 64 + 64 * 4 * 16
    attention = (2 * 4 + 2 * 2) * 16 * 64 + 64 * 64  # queries and gates, keys, values
    linears = mixer + attention + 2 * 3 * 64 * 128
    assert costs.token_flops == 2 * (linears + 3 * state)


@pytest.mark.skipif(cpu_kernels.library is None, reason="no compiled kernels")
@pytest.mark.parametrize(
    ("method", "row_bytes", "activations", "inputs"),
    [
        # Bytes of a row of 64 inputs: values, and float32 scales and zero points of its groups.
        ("rtn", 32 + 2 * 4, "auto", "bfloat16"),
        ("rtn", 32 + 2 * 4, "float32", "float32"),
        ("rtn", 32 + 2 * 4, "int8", "int8"),
        ("int8", 64 + 4, "auto", "bfloat16"),
        ("int8 with activations", 64 + 4, "float32", "int8"),
    ],
)
def test_costs_of_packed_weights_are_what_kernels_read(
    tmp_path: Path, method: str, row_bytes: int, activations: CpuActivations, inputs: str
) -> None:
    source = tiny_checkpoint(tmp_path / "tiny", dtype="float32", intermediate_size=64)
    group_size = 32 if method == "rtn" else None
    options = QuantizeOptions(
        method.partition(" ")[0],
        group_size=group_size,
        activations=method.endswith("activations"),
        samples=2,
        seq_len=32,
        evaluate=False,
        device="cpu",
    )
    quantize(source, tmp_path / "packed", options, SilentProgress())
    checkpoint = open_checkpoint(tmp_path / "packed")
    spec = model_spec(checkpoint.config)
    costs = count_model_costs(checkpoint, spec, "auto", "cpu", activations)
    rows = (4 + 2 * 2) * 16 + 64 + 2 * 64 + 64  # of a layer; all have 64 inputs
    assert checkpoint.tensors["lm_head.weight"].torch_dtype == torch.bfloat16
    is_compressed = activations == "auto" and cpu_kernels.has_compression()
    head = HEAD * 3 // 2 if is_compressed else HEAD * 2
    assert costs.dense_bytes == 2 * rows * row_bytes + head
    multiplied = inputs if inputs != "bfloat16" or cpu_kernels.has_bfloat16() else "float32"
    assert costs.inputs == multiplied
    model = load_model(checkpoint, torch.float32, packed=True)
    kernels = [one.kernel for layer in model.layers for one in layer.linears.values()]
    assert sum(kernel.nbytes for kernel in kernels) == costs.dense_bytes - head


def test_utilization_is_a_share_of_the_peaks() -> None:
    costs = ModelCosts(1000, 0, 0.0, 50.0, 20.0, 2.0, 4)
    timelines = [
        RequestTimeline("a", 0.0, (1.0, 2.0, 3.0), 10, 4, 3),
        RequestTimeline("b", 0.0, (1.0,), 2, 0, 1),
    ]
    found = utilization(costs, PeakPerformance("x", "float32", 10_000.0, 1e4), timelines, 5.0)
    flops = costs.flops(4, 12) + costs.flops(0, 2) + 4 * costs.head_flops
    assert found["mfu"] == pytest.approx(flops / 5.0 / 1e4)
    assert found["mbu"] == pytest.approx((1000 + 11.5 * 4) / 1.0 / 10_000)
    assert "mbu" not in utilization(
        costs, PeakPerformance("x", "float32", 1.0, 1.0), timelines[1:], 5.0
    )


def test_peaks_are_stored_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_peaks("cpu", torch.float32) is None
    found = measure_peaks("cpu", copy_bytes=1 << 20, matrix_size=64)
    dtypes = {"float32", "bfloat16", "float16"} | ({"int8"} if cpu_kernels.library else set())
    assert {one.dtype for one in found} == dtypes
    assert all(one.bytes_per_s > 0 and one.flops_per_s > 0 for one in found)
    assert load_peaks("cpu", torch.float32) in found
    again = measure_peaks("cpu", copy_bytes=1 << 20, matrix_size=64)
    assert len(again) == len(dtypes)
    assert load_peaks("cpu", torch.bfloat16) in again, "the newest, once"
    peaks_file().write_text("{")
    assert load_peaks("cpu", torch.float32) is None


def test_energy_metrics() -> None:
    assert energy_metrics(100.0, 250.0, 3.0, 30) == {"gpu_power_w": 50.0, "energy_per_token_j": 5.0}
    assert energy_metrics(None, 1.0, 1.0, 1) == {}
    nothing = GpuMonitor(())
    assert (nothing.energy_j(), nothing.memory_bytes()) == (None, None)
