"""What one rank of a layout serves: its own file of a sharded checkpoint, or its slices of a whole one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.reading import CHUNK_BYTES, row_chunks, tensor_bytes
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.source import Checkpoint
from llmkit.model.families import model_spec
from llmkit.model.loader import check_checkpoint
from llmkit.model.ranks import rank_spec
from llmkit.model.spec import ModelSpec
from llmkit.shard.layout import read_layout
from llmkit.shard.plan import plan_shards
from llmkit.shard.slices import Slice
from llmkit.shard.source import Source
from llmkit.shard.stream import derived_values


@dataclass(frozen=True)
class RankPart:
    """A rank's part of a model. `checkpoint` has the rank's tensors under the names of the whole, in its own shapes."""

    checkpoint: Checkpoint
    spec: ModelSpec
    file: str  # where they lie; "" when they are cut out of a whole checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())


def rank_parts(checkpoint: Checkpoint, tp: int = 1, pp: int = 1, ep: int = 1) -> list[RankPart]:
    """The parts of all ranks, by stage, then by tensor-parallel rank; only headers are read.

    Of an output of `llmkit shard` those that it was made for; sizes of 1 then stand for its own. Raises UsageError
    when other ones are asked for, InputError for a layout that does not fit the model or that its files do not have.
    """
    whole = model_spec(checkpoint.config)
    if checkpoint.layout is None:
        return _sliced(checkpoint, whole, tp, pp, ep)
    layout = read_layout(checkpoint.path)
    made, asked = (layout.tp, layout.pp, layout.ep), (tp, pp, ep)
    if any(size not in (1, own) for size, own in zip(asked, made, strict=True)):
        raise UsageError(
            f"{checkpoint.reference} is sharded for TP {layout.tp}, PP {layout.pp}, EP {layout.ep}; "
            f"asked for was TP {tp}, PP {pp}, EP {ep}",
            "The sizes it was made for, or none",
            f"Leave them out, or shard it again: llmkit shard {checkpoint.reference} --tp {tp} --pp {pp} -o DIR",
        )
    parts = []
    for index, file in enumerate(layout.files):
        stage = layout.stages[index // layout.tp]
        spec = rank_spec(whole, index % layout.tp, layout.tp, layout.ep, (stage[0], stage[-1] + 1))
        tensors = read_header(checkpoint.path / file)
        parts.append(RankPart(replace(checkpoint, tensors=tensors, weight_files=(file,), _stamps={}), spec, file))
    return parts


def _sliced(checkpoint: Checkpoint, whole: ModelSpec, tp: int, pp: int, ep: int) -> list[RankPart]:
    check_checkpoint(checkpoint, whole)
    plan = plan_shards(whole, checkpoint.quantization, checkpoint.tensors, tp, pp, ep)
    parts = []
    for rank in plan.ranks:
        stage = plan.stages[rank.pp]
        slices = {piece.name: piece for piece in rank.slices}
        tensors = {name: TensorInfo(name, one.dtype, one.shape, "", 0, one.nbytes) for name, one in slices.items()}
        own = replace(checkpoint, tensors=tensors, manifest=None, _rows=_SlicedRows(checkpoint, slices))
        parts.append(RankPart(own, rank_spec(whole, rank.tp, tp, ep, (stage[0], stage[-1] + 1)), ""))
    return parts


class _SlicedRows:
    """Rows of slices, cut out of the whole tensors as they are read."""

    def __init__(self, checkpoint: Checkpoint, slices: Mapping[str, Slice]) -> None:
        self._checkpoint, self._slices = checkpoint, slices

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`."""
        piece, checkpoint = self._slices[info.name], self._checkpoint
        if piece.derived:
            values = tensor_bytes(checkpoint.read(info.name)).tobytes()
            made = np.frombuffer(bytearray(derived_values(values, piece, Source(checkpoint))), np.uint8)
            return torch.from_numpy(made).view(DTYPES[piece.dtype])[start:stop]
        if piece.dim > 0:
            result = torch.empty((stop - start, *piece.shape[1:]), dtype=info.torch_dtype)
            for row, end in row_chunks(checkpoint.tensors[info.name], CHUNK_BYTES):
                low, high = max(start, row), min(stop, end)
                if low < high:
                    chunk = checkpoint.read_slice(info.name, [(low, high)], 0)
                    cut = [chunk.narrow(piece.dim, first, last - first) for first, last in piece.intervals]
                    torch.cat(cut, piece.dim, out=result[low - start : high - start])
            return result
        wanted, at = [], 0  # the slice's rows [start, stop) among the tensor's
        for first, last in piece.intervals:
            low, high = max(start - at, 0), min(stop - at, last - first)
            if low < high:
                wanted.append((first + low, first + high))
            at += last - first
        found = [checkpoint.read_slice(info.name, wanted, 0)] if wanted else []
        padding = stop - start - sum(last - first for first, last in wanted)
        if padding:
            found.append(torch.zeros((padding, *piece.shape[1:]), dtype=info.torch_dtype))
        return torch.cat(found) if len(found) > 1 else found[0]
