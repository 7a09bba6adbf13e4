"""Weights in FP8 and FP4 with random values, by the schemes of checkpoints."""

from __future__ import annotations

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.model.linear import Linear

SCHEMES = {
    "fp8": Scheme(8, kind="float"),
    "fp8 token": Scheme(8, kind="float", inputs="token"),
    "fp8 static": Scheme(8, kind="float", inputs="tensor"),
    "fp8 blocks": Scheme(8, 128, kind="float", inputs="group", block_rows=128),
    "mxfp8": Scheme(8, 32, kind="float", inputs="group", scale_format="e8m0"),
    "mxfp4": Scheme(4, 32, kind="float", inputs="group", scale_format="e8m0"),
    "mxfp4a16": Scheme(4, 32, kind="float", scale_format="e8m0"),
    "nvfp4": Scheme(4, 16, kind="float", inputs="group", scale_format="e4m3"),
    "nvfp4a16": Scheme(4, 16, kind="float", scale_format="e4m3"),
    "w4afp8": Scheme(4, 32, inputs="token", input_type="fp8"),
    "w4afp8 asymmetric": Scheme(4, 32, symmetric=False, inputs="token", input_type="fp8"),
}
INPUT_SCALE = torch.tensor([0.0071])


def random_quantized(scheme: Scheme, out: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """A weight [out, columns] with values of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    scales = torch.randn(out, groups, generator=generator).exp()
    global_scale = None
    if scheme.scale_format == "e8m0":
        scales = scales.log2().round().exp2()
    elif scheme.scale_format == "e4m3":
        global_scale = torch.tensor([0.0123])
        scales = scales.to(torch.float8_e4m3fn).float() * global_scale
    elif scheme.block_rows > 1:
        scales = scales[:1].expand(out, -1)
    zeros = torch.full((out, groups), scheme.half, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(16, (out, groups), generator=generator).byte()
    if scheme.is_fp8:
        q = (40 * torch.randn(out, columns, generator=generator)).to(torch.float8_e4m3fn)
    else:
        q = torch.randint(1 << scheme.bits, (out, columns), generator=generator).byte()
    return QuantizedWeight(q, scales, zeros, scheme, None, global_scale)


def keep_inputs(linear: Linear) -> None:
    """Let a linear layer take its inputs as they are, not in FP8 or FP4."""
    linear.activation_quant = None
    kernel = getattr(linear, "kernel", None)
    if isinstance(kernel, CpuLinear):
        kernel._segments = [
            (weight, bias, first, "float32") for weight, bias, first, _ in kernel._segments
        ]
