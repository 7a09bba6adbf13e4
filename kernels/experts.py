"""A mixture of experts on a GPU, where the host never sees who is chosen.

Legend: T tokens, C chosen experts of each, E experts here, H hidden, I intermediate. Choice t * C + c is token t's c-th.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmkit.kernels.jit import jit, tl

# Up to how many choices an expert: rows and weight rows of a tile, columns of a step, warps, stages.
TILES = ((16, 16, 64, 128, 4, 4), (64, 64, 128, 64, 4, 4), (1 << 30, 128, 256, 64, 8, 3))


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
    step = (last.storage_offset() - first.storage_offset()) // max(1, len(weights) - 1)
    stack = first.as_strided((len(weights), *first.shape), (step, *first.stride()))
    same = all(one.data_ptr() == other.data_ptr() and one.shape == other.shape
               for one, other in zip(stack, weights, strict=True))  # fmt: skip
    return stack if same else None


