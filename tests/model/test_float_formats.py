"""Checkpoints in FP8 and FP4, from quantizing to serving: packed weights give the dense logits."""

from __future__ import annotations

import pytest
import torch
from support.cpu_levels import computing_at
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.progress import SilentProgress
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.linear import PackedLinear
from llmkit.model.weight_loader import load_model
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.memory_plan import loaded_bytes, weight_bytes

QUICK_SCHEMES = ("mxfp8", "nvfp4", "w4afp8")
SLOW_SCHEMES = ("fp8", "fp8-static", "fp8-block", "mxfp4", "nvfp4a16")
SCHEMES = [
    *QUICK_SCHEMES,
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SCHEMES),
]


@pytest.fixture(scope="module", params=SCHEMES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    source = tiny_checkpoint(folder / "source")
    options = QuantizeOptions(
        "rtn", scheme=request.param, samples=2, seq_len=64, evaluate=False, device="cpu"
    )
    quantize(str(source), str(folder / "out"), options, SilentProgress())
    return open_checkpoint(folder / "out")


@pytest.mark.skipif(cpu_kernels.library is None, reason="without the compiled kernels")
def test_packed_float_formats_give_the_dense_logits(checkpoint: Checkpoint) -> None:
    windows = torch.randint(3, 500, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        dense = torch.cat(list(window_logits(load_model(checkpoint, torch.float32), windows)))
        packed = load_model(checkpoint, torch.float32, packed=True)
        for layer in packed.layers:
            for linear in layer.linears.values():
                # The compiled kernels quantize inputs, so that steps are recorded.
                assert isinstance(linear, PackedLinear) and linear.activation_quant is None
        for level in cpu_kernels.levels():
            with computing_at(level):
                logits = torch.cat(list(window_logits(packed, windows)))
            # An input at the border of two values of FP8 or FP4 may be rounded to the other one.
            assert (logits - dense).norm() <= 0.02 * dense.norm()


@pytest.mark.skipif(cpu_kernels.library is None, reason="without the compiled kernels")
def test_memory_plan_is_what_float_formats_hold(checkpoint: Checkpoint) -> None:
    spec = checkpoint_spec(checkpoint)
    planned = weight_bytes(checkpoint, spec, torch.float32, torch.device("cpu"))
    held = loaded_bytes(load_model(checkpoint, torch.float32, packed=True))
    assert held == pytest.approx(planned, rel=0.01)
