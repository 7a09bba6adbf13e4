"""`TensorSlice`: the slice of a checkpoint tensor that a rank stores, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from llmkit.checkpoint.manifest import tensor_key
from llmkit.checkpoint.quantized_weight import PackedTensor, ScaleRule
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count
from llmkit.common.errors import InputError
from llmkit.model.parameter import Parameter
from llmkit.model.split import REPLICATED

Intervals = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TensorSlice:
    """A slice of the checkpoint tensor `name`.

    It holds the source's `intervals` [start, stop) along `dim`, in order, then `padding` zeros.
    Slices are equal when they hold the same data; the fields that say where a slice is stored are
    not compared.

    The values of derived slices are not copied. `group_index` numbers groups from `first_group` on
    (GPTQ's g_idx). `shape` holds `dense_shape`, where the source holds `source_dense_shape`
    (compressed-tensors' weight_shape).
    """

    name: str  # of the source tensor
    dtype: str  # as in a safetensors header
    source_shape: tuple[int, ...]
    dim: int
    intervals: Intervals
    padding: int = 0  # elements along `dim`
    # Its first and its last element may be in the slices of other ranks, too: the scales of blocks
    # that a split cuts.
    may_overlap: bool = False
    derived: Literal["", "group_index", "shape"] = ""
    first_group: int = 0
    dense_shape: tuple[int, ...] = ()
    source_dense_shape: tuple[int, ...] = ()
    # Where the slice is stored. Plans and layouts read from disk set these fields.
    file: str = field(default="", compare=False)
    # The tensor of `file` that holds the slice, and the slice's first byte in that tensor: 0 except
    # in vLLM's files, where a tensor concatenates several slices.
    target: str = field(default="", compare=False)
    target_offset: int = field(default=0, compare=False)
    # Plans set it: the scales are checked while they are copied.
    scale: ScaleRule = field(default="", compare=False)
    # Set only for a layout that was read from disk.
    replicas: tuple[str, ...] = field(default=(), compare=False)  # files with an equal slice
    sha256: str = field(default="", compare=False)

    @property
    def length(self) -> int:
        """The number of elements along `dim`, without padding."""
        return sum(stop - start for start, stop in self.intervals)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice, including padding."""
        if not self.source_shape:  # a scalar is whole
            return ()
        shape = list(self.source_shape)
        shape[self.dim] = self.length + self.padding
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """The size of the slice, including padding."""
        return byte_count(self.dtype, self.shape)

    @property
    def padding_bytes(self) -> int:
        """The size of the padding."""
        return self.nbytes // self.shape[self.dim] * self.padding if self.padding else 0

    @property
    def key(self) -> str:
        """The slice's key in the manifest of a sharded directory."""
        return tensor_key(self.name, self.file, sharded=True)

    def full_slice(self) -> TensorSlice:
        """The slice that is the whole source tensor. `file` and `target` are not set."""
        return TensorSlice(
            self.name,
            self.dtype,
            self.source_shape,
            self.dim,
            ((0, length_along(self.source_shape, self.dim)),),
            may_overlap=self.may_overlap,
            derived=self.derived,
            dense_shape=self.source_dense_shape,
            source_dense_shape=self.source_dense_shape,
        )


def whole_slice(info: TensorInfo, file: str) -> TensorSlice:
    """The slice of `file` that is a whole source tensor. Raises InputError for an empty one."""
    if not info.nbytes:
        raise InputError(
            f"tensor {info.name} has shape {list(info.shape)}", "A tensor with values was expected"
        )
    length = length_along(info.shape, 0)
    piece = TensorSlice(info.name, info.dtype, info.shape, 0, ((0, length),))
    return replace(piece, file=file, target=info.name)


def length_along(shape: tuple[int, ...], dim: int) -> int:
    """The size along `dim`. A scalar has one element along dimension 0."""
    return shape[dim] if shape else 1


def slice_for_rank(
    parameter: Parameter, packed: PackedTensor, info: TensorInfo, rank: int, tp: int
) -> TensorSlice:
    """The slice of a checkpoint tensor that tensor-parallel `rank` of `tp` stores.

    parameter, packed: the entry of `checkpoint_tensors`. info: the tensor in the source.
    The split must divide over `tp` (see valid_layouts.py).
    """
    if not info.shape:  # a number
        return TensorSlice(
            info.name, info.dtype, (), 0, ((0, 1),), target=info.name, scale=packed.scale
        )
    sources = parameter.sources_in(packed.source_name)
    split = sources[0].split if sources else REPLICATED
    axis = packed.out if split.dim == 0 else packed.in_
    dense_intervals, padding = _dense_intervals(parameter, packed, rank, tp)
    if axis is None:  # every rank needs the whole tensor
        dim = 0
        intervals: Intervals = ((0, info.shape[0]),)
    else:
        dim, dense_per_element = axis
        intervals = tuple(
            (start // dense_per_element, -(-stop // dense_per_element))
            for start, stop in dense_intervals
        )
    piece = TensorSlice(
        info.name,
        info.dtype,
        info.shape,
        dim,
        intervals,
        padding,
        may_overlap=packed.covers,
        target=info.name,
        scale=packed.scale,
    )
    if packed.derived == "group_index":
        has_groups = split.dim == 1 and packed.group_size != -1
        first_group = dense_intervals[0][0] // packed.group_size if has_groups else 0
        return replace(piece, derived="group_index", first_group=first_group)
    if packed.derived == "shape":
        dense_shape = list(packed.source_shape)
        dense_shape[split.dim] = sum(stop - start for start, stop in dense_intervals)
        return replace(
            piece,
            derived="shape",
            dense_shape=tuple(dense_shape),
            source_dense_shape=packed.source_shape,
        )
    return piece


def slice_for_expert_group(
    packed: PackedTensor, info: TensorInfo, group: int, num_groups: int
) -> TensorSlice:
    """The experts that a group of expert-parallel ranks stores of a tensor that holds all."""
    experts = packed.num_experts // num_groups
    intervals = ((group * experts, (group + 1) * experts),)
    return TensorSlice(
        info.name, info.dtype, info.shape, 0, intervals, target=info.name, scale=packed.scale
    )


def _dense_intervals(
    parameter: Parameter, packed: PackedTensor, rank: int, tp: int
) -> tuple[Intervals, int]:
    """The rank's intervals of the dense tensor along the split's dimension, and its padding rows.

    A fused tensor has an interval for each of its projections.
    """
    sources = parameter.sources_in(packed.source_name)
    if not sources:  # a KV scale: no dense tensor, every rank needs it
        return (), 0
    split = sources[0].split
    if split.kind == "replicated":
        return ((0, packed.source_shape[0]),), 0
    if tp == 1:  # one interval: a packed word may span two projections of a fused tensor
        return ((0, packed.source_shape[split.dim]),), 0
    intervals: list[tuple[int, int]] = []
    for source in sources:
        # Projections whose rows alternate share an interval.
        is_first = source.split.dim == 1 or source.block_step > 0
        first_row = 0 if is_first else source.first_row
        for start, stop in source.tensor_split.intervals(rank, tp):
            interval = first_row + start, first_row + stop
            is_empty = start == stop  # the last ranks of a small vocabulary hold only padding
            if not is_empty and interval not in intervals:
                intervals.append(interval)
    padding = 0
    if split.kind == "vocab":
        padding = split.padded_rows(tp) - sum(stop - start for start, stop in intervals)
    return tuple(intervals), padding
