"""The mixture of experts in Triton: in the interpreter against its definition, and compiled for two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import MIXTURES, Mixture, expected, mixture_arguments
from triton_checks import SHARED_BYTES, compiled_for, interpreted

from llmkit.kernels import experts
from llmkit.kernels.experts import TILES, shelve, side_by_side

LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    calls = [mixture_arguments(case, dtype) for dtype in LIMITS for case in MIXTURES]
    return interpreted("expert_cases", "interpreted_mixed", calls, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.label)
def test_each_token_gets_what_its_experts_give(case: Mixture, dtype: torch.dtype, answers: list[torch.Tensor]) -> None:
    got = answers[list(LIMITS).index(dtype) * len(MIXTURES) + MIXTURES.index(case)]
    wanted = expected(*mixture_arguments(case, dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, atol=LIMITS[dtype], rtol=LIMITS[dtype])


def test_every_tile_is_tried() -> None:
    """By the cases above."""
    tried = {experts._tile(case.tokens * case.per / case.count, (9, 0)) for case in MIXTURES}
    assert tried == {tile[1:] for tile in TILES}
    assert experts._tile(5000, (8, 0)) == experts._tile(60, (9, 0)) == TILES[1][1:]


def test_weights_side_by_side() -> None:
    names = [f"layers.{layer}.mlp.experts.{expert}.down.weight" for layer in (0, 1) for expert in (4, 5, 6)]
    shelves, weights = dict[str, list[torch.Tensor]](), torch.rand(6, 3, 8)
    put = [shelve(shelves, name, weight, 3) for name, weight in zip(names, weights, strict=True)]
    for start in (0, 3):
        stack = side_by_side(put[start : start + 3])
        assert stack is not None and torch.equal(stack, weights[start : start + 3])
        assert stack.data_ptr() == put[start].data_ptr(), "nothing is held twice"
    assert side_by_side(put) is None, "of two layers"
    assert side_by_side([put[0], put[2], put[1]]) is None
    assert side_by_side(put[2::-1]) is None
    assert side_by_side([weights[0].clone(), weights[1].clone()]) is None
    assert side_by_side([weights[0], weights[1, :2]]) is None
    apart = side_by_side([weights[0], weights[2], weights[4]])
    assert apart is not None and torch.equal(apart, weights[::2]), "other things may lie between"
    assert torch.equal(side_by_side(put[:1]), weights[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize(("capability", "tile"), [(90, tile) for tile in TILES] + [(80, tile) for tile in TILES[:-1]])
def test_the_products_compile(capability: int, tile: tuple[int, ...], gate: int, tmp_path: Path) -> None:
    _, BM, BN, BK, warps, stages = tile
    kinds = dict.fromkeys(("x", "w", "y"), "*bf16") | {"order": "*i32", "counts": "*i32", "weights": "*fp32"}
    kinds |= dict.fromkeys(("distance", "held", "N", "K"), "i32")
    constants: dict[str, Any] = {"PER": 8, "GATED": gate, "EXPERTS": 128, "BM": BM, "BN": BN // (1 + gate), "BK": BK}
    compiled = compiled_for(
        capability, experts._product, kinds, constants, tmp_path, num_warps=warps, num_stages=stages
    )
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert ("HGMMA" if capability == 90 and BM >= 64 else "HMMA") in compiled.code


@pytest.mark.parametrize("capability", [90, 80])
def test_sorting_compiles(capability: int, tmp_path: Path) -> None:
    kinds = {"chosen": "*i64", "order": "*i32", "counts": "*i32", "choices": "i32", "first": "i32"}
    compiled = compiled_for(capability, experts._sort, kinds, {"CHUNK": 1024}, tmp_path)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 8192
