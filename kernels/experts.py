"""A mixture of experts on a GPU, where the host never sees who is chosen.

Legend: T tokens, C chosen experts of each, E experts here, H hidden, I intermediate. A choice is a token's place among
its experts: number token * C + place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llmkit.kernels.jit import jit, tl

# Up to how many choices an expert: rows and weight rows of a tile, columns of a step, warps, stages.
TILES = ((16, 16, 64, 128, 4, 4), (64, 64, 128, 64, 4, 4), (1 << 30, 128, 256, 64, 8, 3))


@dataclass(frozen=True)
class Experts:
    """Experts `first` to `first` + E of `count`: gate_up [E, 2I, H] and down [E, H, I], each expert's contiguous."""

    gate_up: torch.Tensor
    down: torch.Tensor
    first: int
    count: int
    gelu: bool

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sums over the chosen that are here; x: [T, H]; chosen, weights: int64 and float32 [T, C]. Returns [T, H]."""
        held, hidden, inner = self.down.shape
        choices, x = chosen.numel(), x.contiguous()
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


def grouped(
    gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], first: int, count: int, gelu: bool
) -> Experts | None:
    """Of each expert's weights, of 16 bits and side by side on a GPU; None of others."""
    ups, downs = side_by_side(gate_up), side_by_side(down)
    fits = tl is not None and gate_up[0].is_cuda and gate_up[0].element_size() == 2
    return Experts(ups, downs, first, count, gelu) if fits and ups is not None and downs is not None else None


def _tile(choices: float, capability: tuple[int, int]) -> tuple[int, ...]:
    """For so many choices an expert; the largest is for Hopper, others lack registers for it."""
    return next(tile[1:] for tile in TILES if tile[0] >= choices or (tile is TILES[-2] and capability < (9, 0)))


def side_by_side(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Weights [out, in] that lie in one memory at equal distances, as one [E, out, in]; None of others."""
    first, storage = weights[0], weights[0].untyped_storage().data_ptr()
    step = weights[-1].storage_offset() - first.storage_offset()
    step = step // (len(weights) - 1) if len(weights) > 1 else first.numel()
    places = ((one.untyped_storage().data_ptr(), one.storage_offset(), one.shape, one.dtype) for one in weights)
    for index, place in enumerate(places):
        if place != (storage, first.storage_offset() + index * step, first.shape, first.dtype):
            return None
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()))


class Shelves:
    """Puts the weights of a layer's experts side by side."""

    def __init__(self, names: Iterable[str]) -> None:
        """names: of all weights that will come ("layers.3.mlp.experts.5.down.weight")."""
        self._sizes = Counter(map(_shelf, names))
        self._free: dict[str, list[torch.Tensor]] = {}

    def put(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The same weight, at its place; a layer's come in their order."""
        shelf = _shelf(name)
        if shelf not in self._free:
            self._free[shelf] = list(weight.new_empty(self._sizes[shelf], *weight.shape))
        return self._free[shelf].pop(0).copy_(weight)


def _shelf(name: str) -> str:
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


@jit
def _sort(
    chosen: tl.tensor, order: tl.tensor, counts: tl.tensor, choices: tl.tensor, first: tl.tensor, CHUNK: tl.constexpr
) -> None:
    """The choices of an expert, behind those of the experts before it."""
    expert, before, count = tl.program_id(0), 0, 0
    for start in tl.range(0, choices, CHUNK):
        at = start + tl.arange(0, CHUNK)
        one = tl.load(chosen + at, mask=at < choices, other=-1) - first
        before += tl.sum(((one >= 0) & (one < expert) & (at < choices)).to(tl.int32))
    for start in tl.range(0, choices, CHUNK):
        at = start + tl.arange(0, CHUNK)
        mine = (tl.load(chosen + at, mask=at < choices, other=-1) - first == expert) & (at < choices)
        tl.store(order + before + count + tl.cumsum(mine.to(tl.int32)) - 1, at, mask=mine)
        count += tl.sum(mine.to(tl.int32))
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
    expert = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    if expert >= held:
        return
    begin = tl.sum(tl.where(e < expert, count, 0))
    place = begin + (tile - tl.sum(tl.where(e < expert, tiles, 0))) * BM + tl.arange(0, BM)
    real = place < begin + tl.sum(tl.where(e == expert, count, 0))
    choice = tl.load(order + place, mask=real, other=0)
    n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    row = (choice // PER if GATED else place).to(tl.int64)
    line = w + expert.to(tl.int64) * distance + n.to(tl.int64)[None, :] * K
    total, second = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK):
        inside = start + k < K
        part = tl.load(x + row[:, None] * K + (start + k)[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        at, there = line + (start + k)[:, None], inside[:, None] & (n < N)[None, :]
        total = tl.dot(part, tl.load(at, mask=there, other=0.0), total, input_precision="ieee")
        if GATED:
            second = tl.dot(part, tl.load(at + N * K, mask=there, other=0.0), second, input_precision="ieee")
    where = real[:, None] & (n < N)[None, :]
    if GATED:
        dtype: tl.constexpr = y.dtype.element_ty
        gate, up = total.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)  # as the linear rounds them
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GATED == 2 else gate
        total = gate * up / (1 + tl.exp(-inner))
        row = place.to(tl.int64)
    else:
        total *= tl.load(weights + choice, mask=real, other=0.0)[:, None]
        row = choice.to(tl.int64)
    tl.store(y + row[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=where)
