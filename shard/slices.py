"""`Slice`: what one rank stores of one checkpoint tensor, and the routine that cuts the table's rows into slices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count
from llmkit.model.loader import StoredTensor

Intervals = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Slice:
    """A rank's part of the checkpoint tensor `name`, stored under the same name in the rank's file.

    It is the source's `intervals` [start, stop) along `dim`, in order, followed by `padding` zeros along `dim`.
    Derived tensors change their values on the way: `group_index` counts groups from `first_group`; `shape` holds
    `dense_shape` where the source holds `source_dense_shape`.
    """

    name: str
    dtype: str  # as in a safetensors header
    source_shape: tuple[int, ...]
    dim: int
    intervals: Intervals
    padding: int = 0
    derived: Literal["", "group_index", "shape"] = ""
    first_group: int = 0
    dense_shape: tuple[int, ...] = ()
    source_dense_shape: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Elements along `dim`, padding excluded."""
        return sum(stop - start for start, stop in self.intervals)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the rank's file."""
        shape = list(self.source_shape)
        shape[self.dim] = self.length + self.padding
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the rank's file, padding included."""
        return byte_count(self.dtype, self.shape)

    @property
    def padding_bytes(self) -> int:
        """Bytes of zeros that the source does not have."""
        return self.nbytes // self.shape[self.dim] * self.padding if self.padding else 0

    def whole(self) -> Slice:
        """All of the source tensor, as the source has it."""
        return replace(
            self, intervals=((0, self.source_shape[self.dim]),), padding=0, first_group=0,
            dense_shape=self.source_dense_shape,
        )  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A slice's place in an output: in the tensor `name` of `file`, from byte `first` of it."""

    file: str
    name: str
    piece: Slice
    first: int = 0


def cut(stored: StoredTensor, info: TensorInfo, rank: int, tp: int) -> Slice:
    """What tensor-parallel `rank` of `tp` keeps of a stored tensor. The split must fit (see `validity`)."""
    split = stored.parts[0].split
    if split.kind == "replicated":
        dense: Intervals = ((0, stored.dense[0]),)
        padding = 0
    else:
        dense, padding = _dense_intervals(stored, rank, tp)
    dim, intervals, packed = split.dim, dense, stored.packed
    if packed is not None:
        axis = packed.out if split.dim == 0 else packed.in_
        if axis is None:  # every rank needs all of it
            dim, intervals = 0, ((0, info.shape[0]),)
        else:
            dim, per = axis
            intervals = tuple((start // per, -(-stop // per)) for start, stop in dense)
    piece = Slice(info.name, info.dtype, info.shape, dim, intervals, padding)
    if packed is None or not packed.derived:
        return piece
    if packed.derived == "group_index":
        size = -1 if stored.scheme is None else stored.scheme.group_size
        first = dense[0][0] // size if split.dim == 1 and size != -1 else 0
        return replace(piece, derived="group_index", first_group=first)
    local = list(stored.dense)
    local[split.dim] = sum(stop - start for start, stop in dense)
    return replace(piece, derived="shape", dense_shape=tuple(local), source_dense_shape=stored.dense)


def _dense_intervals(stored: StoredTensor, rank: int, tp: int) -> tuple[Intervals, int]:
    """The rank's intervals of the dense tensor along the split's dimension, one for each part, and its padding."""
    first = stored.parts[0].split
    if tp == 1:  # in one piece: packed words may cross the parts of a fused tensor
        return ((0, stored.dense[first.dim]),), 0
    intervals: list[tuple[int, int]] = []
    for part in stored.parts:
        start, stop = part.split.interval(rank, tp)
        row = part.row if part.split.dim == 0 else 0
        if start < stop:  # the last ranks of a small vocabulary hold padding only
            intervals.append((row + start, row + stop))
    padding = 0
    if first.kind == "vocab":
        padding = first.padded_rows(tp) - sum(stop - start for start, stop in intervals)
    return tuple(intervals), padding
