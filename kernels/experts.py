"""A mixture of experts on a GPU, where the host never sees who is chosen.

Legend: T tokens, C chosen experts of each, E experts here, H hidden, I intermediate. Choice t C + c is token t's c-th.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmkit.kernels.jit import jit, tl

# Up to how many choices an expert: rows and weight rows of a tile, columns of a step, warps, stages.
TILES = ((16, 16, 64, 128, 4, 4), (64, 64, 128, 64, 8, 4), (1 << 30, 128, 256, 64, 8, 3))


@dataclass(frozen=True)
class Experts:
    """Experts `first` to `first` + E of `count`: gate_up [E, 2I, H] and down [E, H, I], contiguous for each."""

    gate_up: torch.Tensor
    down: torch.Tensor
    first: int
    count: int
    gelu: bool

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum over those chosen that are here. x: [T, H]; chosen, weights: int64 and float32 [T, C]."""
        (held, hidden, inner), choices, x = self.down.shape, chosen.numel(), x.contiguous()
        order, counts = (chosen.new_empty(size, dtype=torch.int32) for size in (choices, held))
        middle, answers = x.new_empty(choices, inner), x.new_zeros(choices, hidden)
        BM, BN, BK, warps, stages = _tile(choices / self.count, torch.cuda.get_device_capability(x.device))
        tiles, padded = choices // BM + min(held, choices), 1 << (held - 1).bit_length()
        with torch.cuda.device_of(x):
            _sort[(held,)](chosen, order, counts, choices, self.first, CHUNK=1024)
            for rows, w, y, gated in ((x, self.gate_up, middle, 1 + self.gelu), (middle, self.down, answers, 0)):
                outputs = BN // 2 if gated else BN
                _product[tiles, -(-y.shape[1] // outputs)](
                    rows, w, y, order, counts, weights, w.stride(0), held, y.shape[1], rows.shape[1],
                    PER=chosen.shape[1], GATED=gated, EXPERTS=padded, BM=BM, BN=outputs, BK=BK, num_warps=warps,
                    num_stages=stages,
                )  # fmt: skip
        return answers.view(*chosen.shape, hidden).sum(1)


def _tile(choices: float, capability: tuple[int, int]) -> tuple[int, ...]:
    """For so many choices an expert; the largest is for Hopper, others lack registers for it."""
    return next(tile[1:] for tile in TILES if tile[0] >= choices or (tile is TILES[-2] and capability < (9, 0)))


def shelve(shelves: dict[str, list[torch.Tensor]], name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
    """The weight ("layers.3.mlp.experts.5.down.weight") beside those of the layer's other experts, which come in order:
    `count` in all."""
    shelf = shelves.setdefault(re.sub(r"\.experts\.\d+", "", name), [])
    if not shelf:
        shelf.extend(weight.new_empty(count, *weight.shape))
    return shelf.pop(0).copy_(weight)


def side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Weights [out, in] of 16 bits on a GPU, at equal distances in one memory, as one [E, out, in]; None of others."""
    first, last = weights[0], weights[-1]
    step = max(0, last.storage_offset() - first.storage_offset()) // max(1, len(weights) - 1)
    stack = first.as_strided((len(weights), *first.shape), (step, *first.stride()))
    same = all(one.data_ptr() == other.data_ptr() and one.shape == other.shape
               for one, other in zip(stack, weights, strict=True))  # fmt: skip
    return stack if same else None


def suits(weight: torch.Tensor) -> bool:
    """Whether `Experts` takes weights of this kind, where they are."""
    return tl is not None and weight.is_cuda and weight.element_size() == 2


@jit
def _sort(
    chosen: tl.tensor, order: tl.tensor, counts: tl.tensor, choices: tl.tensor, first: tl.tensor, CHUNK: tl.constexpr
) -> None:
    """The choices of an expert, behind those of the experts before it."""
    expert, place, count = tl.program_id(0), 0, 0
    for own in tl.static_range(2):
        for start in tl.range(0, choices, CHUNK):
            at = start + tl.arange(0, CHUNK)
            one = tl.load(chosen + at, mask=at < choices, other=-1) - first
            if own:
                mine = ((one == expert) & (at < choices)).to(tl.int32)
                tl.store(order + place + count + tl.cumsum(mine, 0) - 1, at, mask=mine > 0)
                count += tl.sum(mine, 0)
            else:
                place += tl.sum(((one >= 0) & (one < expert) & (at < choices)).to(tl.int32), 0)
    tl.store(counts + expert, count)


@jit
def _product(
    x: tl.tensor, w: tl.tensor, y: tl.tensor, order: tl.tensor, counts: tl.tensor, weights: tl.tensor,
    distance: tl.tensor, held: tl.tensor, N: tl.tensor, K: tl.tensor, PER: tl.constexpr, GATED: tl.constexpr,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """BM of an expert's choices, BN outputs. GATED, 1 or 2 for silu or gelu: from tokens' rows, through gate and up, to
    places in `order`; 0: from there to the choices' rows, weighted."""
    e, tile = tl.arange(0, EXPERTS), tl.program_id(0)
    count = tl.load(counts + e, mask=e < held, other=0)
    tiles = tl.cdiv(count, BM)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert >= held:
        return
    begin = tl.sum(tl.where(e < expert, count, 0), 0)
    place = begin + (tile - tl.sum(tl.where(e < expert, tiles, 0), 0)) * BM + tl.arange(0, BM)
    real = (place < begin + tl.sum(tl.where(e == expert, count, 0), 0))[:, None]
    choice = tl.load(order + place[:, None], mask=real, other=0).to(tl.int64)
    n, k = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :], tl.arange(0, BK)
    row, line = choice // PER if GATED else place.to(tl.int64)[:, None], w + expert.to(tl.int64) * distance
    total, second = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK):
        column = start + k
        part = tl.load(x + row * K + column[None, :], mask=real & (column < K)[None, :], other=0.0)
        at, inside = line + n.to(tl.int64) * K + column[:, None], (column < K)[:, None] & (n < N)
        total = tl.dot(part, tl.load(at, mask=inside, other=0.0), total, input_precision="ieee")
        if GATED:
            second = tl.dot(part, tl.load(at + N * K, mask=inside, other=0.0), second, input_precision="ieee")
    if GATED:
        dtype: tl.constexpr = y.dtype.element_ty
        gate, row = total.to(dtype).to(tl.float32), place.to(tl.int64)[:, None]  # rounded as a linear does
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GATED == 2 else gate
        total = gate * second.to(dtype).to(tl.float32) / (1 + tl.exp(-inner))
    else:
        row, total = choice, total * tl.load(weights + choice, mask=real, other=0.0)
    tl.store(y + row * N + n, total.to(y.dtype.element_ty), mask=real & (n < N))
