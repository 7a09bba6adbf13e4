"""The mixture of experts in Triton: interpreted against float64, and compiled for two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.expert_cases import MOE_CASES, MoeCase, expected, moe_arguments
from support.triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import fused_experts as experts
from llmkit.kernels.fused_experts import TILES, copy_to_expert_stack, stack_experts

LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    calls = [moe_arguments(case, dtype) for dtype in LIMITS for case in MOE_CASES]
    return interpreted(
        "support.expert_cases",
        "run_fused_experts_interpreted",
        calls,
        tmp_path_factory.mktemp("interpreted"),
    )


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", MOE_CASES, ids=lambda case: case.label)
def test_fused_experts_match_float64(
    case: MoeCase, dtype: torch.dtype, answers: list[torch.Tensor]
) -> None:
    got = answers[list(LIMITS).index(dtype) * len(MOE_CASES) + MOE_CASES.index(case)]
    wanted = expected(*moe_arguments(case, dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, atol=LIMITS[dtype], rtol=LIMITS[dtype])


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


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize(
    ("capability", "tile"), [(90, tile) for tile in TILES] + [(80, tile) for tile in TILES[:-1]]
)
def test_fused_moe_kernel_compiles(
    capability: int, tile: tuple[int, ...], gate: int, tmp_path: Path
) -> None:
    _, BM, BN, BK, warps, stages = tile
    kinds = dict.fromkeys(("x", "w", "y"), "*bf16") | {
        "order": "*i32",
        "counts": "*i32",
        "topk_weights": "*fp32",
    }
    kinds |= dict.fromkeys(("expert_stride", "num_experts", "N", "K"), "i32")
    constants: dict[str, Any] = {
        "TOP_K": 8,
        "ACTIVATION": gate,
        "PADDED_EXPERTS": 128,
        "BM": BM,
        "BN": BN // (1 + gate),
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
    assert compiled.stack_bytes == 0
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
