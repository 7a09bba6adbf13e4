"""`Slice`: what one rank stores of one checkpoint tensor, and the routine that cuts the table's rows into slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmkit.checkpoint.quantized import QuantizationConfig
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


def cut(stored: StoredTensor, info: TensorInfo, quantization: QuantizationConfig | None, rank: int, tp: int) -> Slice:
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
    first_group, dense_shape = 0, list(stored.dense)
    dense_shape[split.dim] = sum(stop - start for start, stop in dense)
    if split.dim == 1 and quantization is not None and quantization.group_size != -1:
        first_group = dense[0][0] // quantization.group_size
    if packed.derived == "group_index":
        return Slice(*_place(piece), derived="group_index", first_group=first_group)
    return Slice(
        *_place(piece), derived="shape", dense_shape=tuple(dense_shape), source_dense_shape=tuple(stored.dense)
    )


def _place(piece: Slice) -> tuple[str, str, tuple[int, ...], int, Intervals, int]:
    return piece.name, piece.dtype, piece.source_shape, piece.dim, piece.intervals, piece.padding


def _dense_intervals(stored: StoredTensor, rank: int, tp: int) -> tuple[Intervals, int]:
    """The rank's intervals of the dense tensor along the split's dimension, neighbours joined, and its padding."""
    intervals: list[tuple[int, int]] = []
    for part in stored.parts:
        start, stop = part.split.interval(rank, tp)
        if part.split.dim == 0:
            start, stop = start + part.row, stop + part.row
        if intervals and intervals[-1][1] == start:
            start = intervals.pop()[0]
        intervals.append((start, stop))
    first = stored.parts[0].split
    padding = 0
    if first.kind == "vocab":
        padding = first.padded_rows(tp) - sum(stop - start for start, stop in intervals)
    return tuple(intervals), padding
