"""The GPU benchmarks' own logic, on a CPU and with small shapes: what is counted, and that every case runs."""

from __future__ import annotations

import pytest
import torch

from llmkit.bench import kernels, steps
from llmkit.model.families import model_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", steps.WEIGHTS)
def test_a_step_of_every_kind_of_weight(weights: str) -> None:
    config = steps.SHAPES["SmolLM2-135M"] | {"num_hidden_layers": 1, "vocab_size": 512}
    model = steps.random_model(model_spec(config), torch.float32, CPU, steps.WEIGHTS[weights])
    decode = steps.measure("tiny", weights, model, 3, 1, 40, 1e9, repeats=1)
    prefill = steps.measure("tiny", weights, model, 1, 40, 40, 1e9, repeats=1)
    assert (decode.kind, decode.tokens, prefill.kind, prefill.tokens) == ("decode", 3, "prefill", 40)
    kv = 2 * 3 * 64 * 4  # bytes of a token
    assert (decode.floor_ms - prefill.floor_ms) * 1e6 == pytest.approx(2 * 40 * kv)
    linears = 960 * 576 + 576 * 576 + 3 * 1536 * 576
    scheme = steps.WEIGHTS[weights]
    least = linears * (4 if scheme is None else scheme.bits / 8) + 512 * 576 * 4
    assert least * 0.999 <= prefill.floor_ms * 1e6 - 40 * kv <= 8 * least
    assert steps.saturated(model, 3, 8, 5) > 0


def test_every_kernel_is_measured_beside_its_floor() -> None:
    rows = kernels.measure(CPU, scale=128, repeats=1)
    names = [row.kernel for row in rows]
    assert len(names) == len(set(names)) == 5 + 3 * 4 * 5
    assert all(row.ms > 0 and row.floor_ms > 0 and row.bytes > 0 and row.flops > 0 for row in rows)
    one = next(row for row in rows if row.kernel == "down [32, 112], bf16, 16 rows")
    assert (one.bytes, one.flops) == ((32 * 112 + 16 * (32 + 112)) * 4, 2 * 16 * 32 * 112)
