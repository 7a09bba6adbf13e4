"""`Split`: how a tensor divides over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VOCAB_MULTIPLE = 64  # the vocabulary rows of a rank are padded to a multiple of this

SplitKind = Literal["replicated", "heads", "kv_heads", "key_heads", "features", "vocab"]


@dataclass(frozen=True)
class Split:
    """How a tensor divides over tensor-parallel ranks.

    The tensor consists of `count` units of `unit` elements along `dim`. A unit is never divided.
    For a q_proj with 9 heads of 64 elements: Split("heads", 0, 9, 64).

    A tensor may consist of several equal `parts` along `dim`, such as a gate and an up projection.
    Each part has `count` units, and a rank holds a share of each.
    """

    kind: SplitKind = "replicated"
    dim: int = 0
    count: int = 1
    unit: int = 1
    parts: int = 1

    def divides_over(self, tp: int) -> bool:
        """Whether each of `tp` ranks gets the same number of units.

        KV heads may be replicated instead, and the vocabulary is padded.
        """
        if self.kind in ("replicated", "vocab"):
            return True
        if self.kind == "kv_heads" and tp > self.count:
            return tp % self.count == 0
        return self.count % tp == 0

    def interval(self, rank: int, tp: int) -> tuple[int, int]:
        """The elements [start, stop) along `dim` that `rank` of `tp` holds of the first part.

        The vocabulary interval of the last ranks may be shorter than that of others, or empty.
        """
        if self.kind == "vocab":
            rows = self.padded_rows(tp)
            return min(rank * rows, self.count), min((rank + 1) * rows, self.count)
        if self.kind == "kv_heads" and tp > self.count:
            head = rank * self.count // tp
            return head * self.unit, (head + 1) * self.unit
        units_per_rank = self.count // tp
        return rank * units_per_rank * self.unit, (rank + 1) * units_per_rank * self.unit

    def intervals(self, rank: int, tp: int) -> tuple[tuple[int, int], ...]:
        """As `interval`, for every part of the tensor."""
        start, stop = self.interval(rank, tp)
        size = self.count * self.unit
        return tuple((part * size + start, part * size + stop) for part in range(self.parts))

    def padded_rows(self, tp: int) -> int:
        """The vocabulary rows of each rank, including padding."""
        if tp == 1:
            return self.count
        rows = -(-self.count // tp)
        return -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def num_replicas(self, tp: int) -> int:
        """The number of ranks that hold the same slice."""
        if self.kind == "replicated":
            return tp
        return max(1, tp // self.count) if self.kind == "kv_heads" else 1


REPLICATED = Split()
