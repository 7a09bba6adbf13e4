"""The mixture of experts in Triton: interpreted against float64, and compiled for two GPUs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.expert_cases import (
    GPT_OSS_ALPHA,
    GPT_OSS_LIMIT,
    MOE_CASES,
    MoeCase,
    expected,
    moe_arguments,
)
from support.float_format_cases import SCHEMES, random_quantized
from support.mxfp4_files import pack_mxfp4
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import fused_experts as experts
from llmkit.kernels.fp4_expert import Fp4Expert
from llmkit.kernels.fused_experts import TILES, copy_to_expert_stack, stack_experts

LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3}
# The types in turn.
PAIRS = [(case, list(LIMITS)[index % 2]) for index, case in enumerate(MOE_CASES)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    calls = [moe_arguments(case, dtype) for case, dtype in PAIRS]
    return interpreted(
        "support.expert_cases",
        "run_fused_experts_interpreted",
        calls,
        tmp_path_factory.mktemp("interpreted"),
    )


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_fused_experts_match_float64(
    case: MoeCase, dtype: torch.dtype, answers: list[torch.Tensor]
) -> None:
    got = answers[PAIRS.index((case, dtype))]
    wanted = expected(*moe_arguments(case, dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, atol=LIMITS[dtype], rtol=LIMITS[dtype])


# Each pair of a kind, a type and a size.
GPT_OSS = [
    (kind, dtype, size)
    for i, kind in enumerate(("dense", "mxfp4", "nvfp4"))
    for j, dtype in enumerate(LIMITS)
    for k, size in enumerate((1, 70))
    if (i + j + k) % 2 == 0
]


def nvfp4_experts(out: int, columns: int) -> tuple[list[Fp4Expert], torch.Tensor]:
    """Three experts, and their dense weights [3, out, columns]."""
    weights = [random_quantized(SCHEMES["nvfp4a16"], out, columns, seed) for seed in range(3)]
    for index, weight in enumerate(weights):  # each has a global scale of its own
        assert weight.global_scale is not None
        weight.scales = weight.scales * (index + 1)
        weight.global_scale = weight.global_scale * (index + 1)
    kernels = [Fp4Expert(weight.q, weight.scales, None, weight.global_scale) for weight in weights]
    dense = torch.stack([weight.dequantize() for weight in weights])
    found = torch.stack([kernel.dequantize() for kernel in kernels])
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=0.0)
    return kernels, dense


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each of GPT_OSS: the output of the kernels, and the formula in float64.

    A rank holds three of five experts, from the second on; a token chooses two.
    """
    calls = []
    wanted = []
    for kind, dtype, tokens in GPT_OSS:
        draw = torch.Generator().manual_seed(tokens)
        weights, chosen = torch.rand(tokens, 5, generator=draw).topk(2)
        scales: list[torch.Tensor | None]
        x = torch.randn(tokens, 64, generator=draw).to(dtype)
        packed = [
            pack_mxfp4(torch.randn(3, out, columns, generator=draw) / columns**0.5)
            for out, columns in ((2 * 96, 64), (64, 96))
        ]
        biases = tuple(torch.randn(3, out, generator=draw).to(dtype) for out in (2 * 96, 64))
        denses = [weight.dense.double() for weight in packed]
        factors: list[torch.Tensor | None] = [None, None]
        if kind == "nvfp4":
            found = [nvfp4_experts(2 * 96, 64), nvfp4_experts(64, 96)]
            kernels = [kernels for kernels, _ in found]
            denses = [dense.double() for _, dense in found]
            stacks = [torch.stack([one.blocks for one in own]) for own in kernels]
            scales = [torch.stack([one.scales for one in own]) for own in kernels]
            rows = [[one.factors for one in own if one.factors is not None] for own in kernels]
            factors = [torch.stack(own) for own in rows]
        elif kind == "dense":
            stacks = [weight.dense.to(dtype) for weight in packed]
            scales = [None, None]
        else:
            stacks = [weight.blocks.flatten(-2) for weight in packed]
            scales = [weight.scales for weight in packed]
        calls.append(
            (x, chosen, weights, tuple(stacks), tuple(scales), biases, 1, 5, tuple(factors))
        )
        gate_up, down = denses
        out = torch.zeros(tokens, 64, dtype=torch.float64)
        for token, place in product(range(tokens), range(2)):
            expert = int(chosen[token, place]) - 1
            if not 0 <= expert < 3:
                continue
            both = gate_up[expert] @ x[token].double() + biases[0][expert].double()
            gate = both[:96].clamp(max=GPT_OSS_LIMIT)
            up = both[96:].clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
            inner = gate / (1 + (-GPT_OSS_ALPHA * gate).exp()) * (up + 1)
            total = down[expert] @ inner + biases[1][expert].double()
            out[token] += weights[token, place].double() * total
        wanted.append(out)
    folder = tmp_path_factory.mktemp("gpt_oss")
    found = interpreted("support.expert_cases", "run_gpt_oss_experts", calls, folder)
    return list(zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", GPT_OSS, ids=str)
def test_fused_experts_of_gpt_oss_match_float64(
    case: tuple[str, torch.dtype, int], gpt_oss: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    got, wanted = gpt_oss[GPT_OSS.index(case)]
    assert got.dtype == case[1]
    limit = 2 * LIMITS[case[1]]
    torch.testing.assert_close(got.double(), wanted, atol=limit, rtol=limit)


def test_fused_experts_cases_cover_every_tile() -> None:
    """By the cases above."""
    tried = {experts._tile(case.tokens * case.per / case.count, (9, 0)) for case in MOE_CASES}
    assert tried == {tile[1:] for tile in TILES}
    assert experts._tile(5000, (8, 0)) == experts._tile(60, (9, 0)) == TILES[1][1:]


def test_stack_experts_views_neighbouring_weights() -> None:
    names = [
        f"layers.{layer}.mlp.experts.{expert}.down.weight"
        for layer in (0, 1)
        for expert in (4, 5, 6)
    ]
    expert_stacks = dict[str, list[torch.Tensor]]()
    weights = torch.rand(6, 3, 8)
    put = [
        copy_to_expert_stack(expert_stacks, name, weight, 3)
        for name, weight in zip(names, weights, strict=True)
    ]
    for start in (0, 3):
        stack = stack_experts(put[start : start + 3])
        assert stack is not None and torch.equal(stack, weights[start : start + 3])
        assert stack.data_ptr() == put[start].data_ptr(), "nothing is held twice"
    assert stack_experts(put) is None, "of two layers"
    assert stack_experts([put[0], put[2], put[1]]) is None
    assert stack_experts(put[2::-1]) is None
    assert stack_experts([weights[0].clone(), weights[1].clone()]) is None
    assert stack_experts([weights[0], weights[1, :2]]) is None
    apart = stack_experts([weights[0], weights[2], weights[4]])
    assert apart is not None and torch.equal(apart, weights[::2]), "other things may lie between"
    assert torch.equal(stack_experts(put[:1]), weights[:1])  # type: ignore[arg-type]


COMPILED = [
    (capability, tile, gate, "")
    for capability, tile in [(90, tile) for tile in TILES] + [(80, tile) for tile in TILES[:-1]]
    for gate in (0, 1)
]
COMPILED += [(90, tile, gate, "mxfp4") for tile in TILES for gate in (0, 3)]
COMPILED += [(90, TILES[1], 1, "nvfp4"), (80, TILES[0], 0, "nvfp4")]
COMPILED += [(90, TILES[-1], 4, "")]


@pytest.mark.parametrize(
    ("capability", "tile", "gate", "fp4"),
    [
        # Two of three, of both gates and all tiles.
        pytest.param(*case, marks=[pytest.mark.slow] if index % 3 == 1 else [])
        for index, case in enumerate(COMPILED)
    ],
)
def test_fused_moe_kernel_compiles(
    capability: int, tile: tuple[int, ...], gate: int, fp4: str, tmp_path: Path
) -> None:
    _, BM, BN, BK, warps, stages = tile
    is_gated = gate in (1, 2, 3)
    kinds = dict.fromkeys(("x", "w", "y"), "*bf16") | {
        "order": "*i32",
        "counts": "*i32",
        "topk_weights": "*fp32",
    }
    kinds |= dict.fromkeys(("limit", "alpha"), "fp32")
    kinds |= dict.fromkeys(("expert_stride", "num_experts", "N", "K"), "i32")
    constants: dict[str, Any] = {} if fp4 else {"scales": None, "bias": None}
    if fp4:
        kinds |= {"w": "*u8", "scales": "*u8", "bias": "*bf16"}
    if fp4 == "nvfp4":
        kinds["factors"] = "*fp32"
    else:
        constants["factors"] = None
    constants |= {
        "row_scales": None,
        "GROUP": {"": 0, "mxfp4": 32, "nvfp4": 16}[fp4],
        "FP4": bool(fp4),
        "TOP_K": 8,
        "ACTIVATION": gate,
        "GATED": is_gated,
        "PADDED_EXPERTS": 128,
        "BM": BM,
        "BN": BN // 2 if is_gated else BN,
        "BK": BK,
    }
    compiled = compiled_for(
        capability,
        experts._fused_moe_kernel,
        kinds,
        constants,
        tmp_path,
        num_warps=warps,
        num_stages=stages,
    )
    # Unpacking FP4 takes registers: some 8 to 72 bytes are spilled.
    assert compiled.stack_bytes <= (128 if fp4 else 0)
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert ("HGMMA" if capability == 90 and BM >= 64 else "HMMA") in compiled.code


@pytest.mark.parametrize("capability", [90, 80])
def test_sort_by_expert_kernel_compiles(capability: int, tmp_path: Path) -> None:
    kinds = {
        "topk_ids": "*i64",
        "order": "*i32",
        "counts": "*i32",
        "num_choices": "i32",
        "first": "i32",
    }
    compiled = compiled_for(
        capability, experts._sort_by_expert_kernel, kinds, {"CHUNK": 1024}, tmp_path
    )
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 8192
