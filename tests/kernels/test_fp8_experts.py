"""Experts in FP8 blocks in one launch: interpreted against float64, and compiled for two GPUs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fp8_files import pack_fp8, round_inputs
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.checkpoint.block_scales import expand_block_scales
from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels import fused_experts
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.kernels.fused_experts import TILES
from llmkit.model import decoder
from llmkit.model.linear import PackedLinear

HIDDEN, INTERMEDIATE = 96, 80
FIRST, LOCAL, COUNT = 1, 3, 5
SCHEME = Scheme(8, 64, kind="float", inputs="group", block_rows=48)
CASES = [(torch.float32, 1, True), (torch.float16, 45, True), (torch.float16, 20, False)]


def make_experts() -> list[list[Any]]:
    """For each product, the packed weights of the experts [2I, H] and [H, I]."""
    draw = torch.Generator().manual_seed(0)
    return [
        [
            pack_fp8(torch.randn(out, columns, generator=draw) / columns**0.5, (48, 64))
            for _ in range(LOCAL)
        ]
        for out, columns in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    ]


def row_scales(packed: Any) -> torch.Tensor:
    return expand_block_scales(packed.scales, SCHEME, len(packed.q))


def test_fp8_experts_match_float64(tmp_path: Path) -> None:
    stored = make_experts()
    calls = []
    for dtype, tokens, quantize_inputs in CASES:
        draw = torch.Generator().manual_seed(tokens)
        weights, chosen = torch.rand(tokens, COUNT, generator=draw).topk(2)
        x = torch.randn(tokens, HIDDEN, generator=draw).to(dtype)
        stacks = tuple(torch.stack([packed.q for packed in own]) for own in stored)
        scales = tuple(torch.stack([row_scales(p).T.contiguous() for p in own]) for own in stored)
        calls.append((x, chosen, weights, stacks, scales, FIRST, COUNT, 64, quantize_inputs))
    results = interpreted("support.fp8_block_cases", "run_fp8_experts", calls, tmp_path)
    for (dtype, _, quantize_inputs), (x, chosen, weights, *_), found in zip(
        CASES, calls, results, strict=True
    ):
        expected = torch.zeros(x.shape, dtype=torch.float64)
        for token, place in product(*map(range, chosen.shape)):
            expert = int(chosen[token, place]) - FIRST
            if not 0 <= expert < LOCAL:
                continue
            inputs = x[token].float()
            if quantize_inputs:
                inputs = round_inputs(inputs, 64)
            both = (stored[0][expert].dense.double() @ inputs.double()).to(dtype).float()
            inner = torch.nn.functional.silu(both[:INTERMEDIATE]) * both[INTERMEDIATE:]
            inner = inner.to(dtype).float()
            if quantize_inputs:
                inner = round_inputs(inner, 64)
            out = stored[1][expert].dense.double() @ inner.double()
            expected[token] += weights[token, place].double() * out
        assert found.dtype == dtype
        # A value between two steps of FP8 may be rounded to the other one.
        difference = (found.double() - expected).abs()
        limit = 1e-5 if dtype == torch.float32 else 2e-3
        assert difference.median() <= limit and difference.max() <= (
            0.03 if quantize_inputs else 4 * limit
        )


@pytest.mark.parametrize(
    ("capability", "tile", "quantize_inputs", "gate"),
    [(90, TILES[0], True, 1), (90, TILES[1], True, 1), (80, TILES[1], False, 0)],
)
def test_fp8_experts_kernel_compiles(
    capability: int, tile: tuple[int, ...], quantize_inputs: bool, gate: int, tmp_path: Path
) -> None:
    _, BM, BN, BK, warps, stages = tile
    kinds = {"x": "*fp8e4nv", "w": "*fp8e4nv", "row_scales": "*fp32"}
    constants: dict[str, Any] = {"bias": None, "factors": None, "FP4": False}
    if not quantize_inputs:
        kinds = {"x": "*bf16", "w": "*u8"}
        constants["row_scales"] = None
    kinds |= {"y": "*bf16", "order": "*i32", "counts": "*i32"}
    kinds |= {"topk_weights": "*fp32", "scales": "*fp32"}
    kinds |= dict.fromkeys(("limit", "alpha"), "fp32")
    kinds |= dict.fromkeys(("expert_stride", "num_experts", "N", "K"), "i32")
    constants |= {"TOP_K": 8, "ACTIVATION": gate, "GATED": bool(gate), "BM": BM}
    constants |= {"PADDED_EXPERTS": 256}
    constants |= {"BN": BN // 2 if gate else BN, "BK": BK, "GROUP": 128}
    compiled = compiled_for(
        capability,
        fused_experts._fused_moe_kernel,
        kinds,
        constants,
        tmp_path,
        num_warps=warps,
        num_stages=stages,
    )
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    if quantize_inputs and BM >= 64:
        assert "QGMMA" in compiled.code


def test_fp8_experts_are_stacked_without_a_copy() -> None:
    linears = []
    for packed in make_experts()[0]:
        kernel = Fp8BlockLinear(packed.q, row_scales(packed), 64)
        linears.append(PackedLinear(kernel, (len(packed.q), HIDDEN)))
    stack = decoder._stack_fp8(linears)
    assert stack is not None
    assert stack.group_size == 64 and stack.input_quant is not None
    for index, linear in enumerate(linears):
        kernel = linear.kernel
        assert isinstance(kernel, Fp8BlockLinear)
        assert kernel.q.data_ptr() == stack.q[index].data_ptr()
        weight = QuantizedWeight(stack.q[index], stack.scales[index].T, torch.zeros(160, 2), SCHEME)
        assert torch.equal(kernel.dequantize(), weight.dequantize())
    odd = PackedLinear(Fp8BlockLinear(packed.q, row_scales(packed), 128), (160, HIDDEN))
    assert decoder._stack_fp8([linears[0], odd]) is None
