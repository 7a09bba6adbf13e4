"""The part of a model that one rank serves.

It is the rank's file of a sharded checkpoint, or slices that are cut when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.tensor_reader import CHUNK_BYTES, RowReader, row_chunks, tensor_bytes
from llmkit.common.errors import InputError, UsageError
from llmkit.model.checkpoint_tensors import check_checkpoint, checkpoint_tensors
from llmkit.model.draft_head_spec import with_own_embedding
from llmkit.model.families import checkpoint_spec, require_tp_plan
from llmkit.model.parallel_group import rank_spec
from llmkit.model.parameter_table import embedding_tensor
from llmkit.model.spec import ModelSpec, RankSpec
from llmkit.shard.copy_slices import derived_values
from llmkit.shard.shard_plan import plan_shards
from llmkit.shard.shard_source import ShardSource
from llmkit.shard.sharded_layout import read_layout
from llmkit.shard.tensor_slice import TensorSlice


@dataclass(frozen=True)
class RankPart:
    """A rank's part of a model."""

    checkpoint: Checkpoint  # the rank's tensors, with the full model's names and the rank's shapes
    spec: ModelSpec  # of the rank
    file: str  # the rank's file; "" when its slices are cut out of an unsharded checkpoint
    # What the parts are cut out of. Of a sharded checkpoint: the tensors that no rank loads and,
    # for draft heads, the embedding as the rank has it, or would have it on the first stage.
    whole: Checkpoint

    @property
    def nbytes(self) -> int:
        """The size of its tensors."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())


def rank_parts(checkpoint: Checkpoint, tp: int = 1, pp: int = 1, ep: int = 1) -> list[RankPart]:
    """The parts of all ranks, by stage, then by tensor-parallel rank. Only headers are read.

    An output of `llmkit shard` determines the sizes; leave them at 1, or give the same.
    Raises UsageError for other sizes, InputError for a layout that does not match the model or the
    files.
    """
    full_spec = checkpoint_spec(checkpoint)
    require_tp_plan(full_spec)
    _require_split_vocabulary(full_spec)
    if checkpoint.layout is None:
        return _slice_checkpoint(checkpoint, full_spec, tp, pp, ep)
    layout = read_layout(checkpoint.path)
    sizes = ((tp, layout.tp), (pp, layout.pp), (ep, layout.ep))
    if any(size not in (1, layout_size) for size, layout_size in sizes):
        raise UsageError(
            f"{checkpoint.reference} is sharded for TP {layout.tp}, PP {layout.pp}, EP {layout.ep};"
            f" the command asks for TP {tp}, PP {pp}, EP {ep}",
            "The sizes it was made for, or none",
            "Leave them out, or shard it again:"
            f" llmkit shard {checkpoint.reference} --tp {tp} --pp {pp} -o DIR",
        )
    carried: dict[str, TensorInfo] = {}
    for file in layout.carried_files:  # one or none
        carried |= read_header(checkpoint.path / file)
    parts = []
    for index, file in enumerate(layout.files):
        layers = layout.stages[index // layout.tp]
        spec = rank_spec(
            full_spec, index % layout.tp, layout.tp, layout.ep, (layers[0], layers[-1] + 1)
        )
        tensors = read_header(checkpoint.path / file)
        rank_checkpoint = replace(checkpoint, tensors=tensors, weight_files=(file,), stamps={})
        first_stage = layout.files[index % layout.tp]
        embedding = read_header(checkpoint.path / first_stage)[embedding_tensor(full_spec)]
        whole = replace(
            checkpoint,
            tensors=carried | {embedding.name: embedding},
            weight_files=(*layout.carried_files, first_stage),
            stamps={},
        )
        parts.append(RankPart(rank_checkpoint, spec, file, whole))
    return parts


def _require_split_vocabulary(spec: ModelSpec) -> None:
    """Raises InputError for a model whose ranks would not each compute a part of the logits."""
    if spec.transformers is None:
        return
    head = "embed.weight" if spec.tie_word_embeddings else "lm_head.weight"
    splits = {tensor.name: tensor.split for tensor in spec.transformers.tensors}
    if splits[head].kind != "vocab":
        raise InputError(
            f"the tp_plan of {spec.architecture} does not split its output projection by the"
            " vocabulary, so it cannot be served on several ranks",
            todo="Serve it on one rank",
        )


def _slice_checkpoint(
    checkpoint: Checkpoint, full_spec: ModelSpec, tp: int, pp: int, ep: int
) -> list[RankPart]:
    check_checkpoint(checkpoint, full_spec)
    return _cut(checkpoint, full_spec, tp, pp, ep)


def draft_head_part(checkpoint: Checkpoint, head: ModelSpec, rank: RankSpec) -> RankPart:
    """The part of a draft head that the ranks of a model's last stage serve.

    checkpoint: has the whole head, see `RankPart.whole`. head: its spec. rank: that of the model's
    part. Raises InputError when the head cannot be split over as many ranks.
    """
    assert head.draft_head is not None
    embed = head.draft_head.embed
    is_cut = embed is not None and checkpoint.layout is not None
    if is_cut:
        head = replace(head, draft_head=replace(head.draft_head, embed=None))
    names = checkpoint_tensors(head, checkpoint.quantization)
    tensors = {name: checkpoint.tensors[name] for name in names}
    of_head = replace(checkpoint, tensors=tensors)
    part = _cut(of_head, head, rank.tp_size, 1, rank.ep_size)[rank.tp_rank]
    return _with_embedding(part, checkpoint, f"{embed}.weight") if is_cut else part


def _with_embedding(part: RankPart, checkpoint: Checkpoint, name: str) -> RankPart:
    """The part of a draft head with the rank's part of an embedding, which `checkpoint` has."""
    info = checkpoint.tensors[name]
    reader = _EmbeddingReader(part.checkpoint.row_reader, checkpoint, name)
    tensors = part.checkpoint.tensors | {name: replace(info, file="", start=0, end=info.nbytes)}
    spec = part.spec
    assert spec.rank is not None
    full_model = with_own_embedding(spec.full_model, name)
    rank = replace(spec.rank, full_model=full_model)
    spec = replace(with_own_embedding(spec, name), rank=rank)
    return replace(
        part,
        checkpoint=replace(part.checkpoint, tensors=tensors, row_reader=reader),
        spec=spec,
    )


def _cut(checkpoint: Checkpoint, full_spec: ModelSpec, tp: int, pp: int, ep: int) -> list[RankPart]:
    """The parts of a checkpoint that was checked."""
    plan = plan_shards(full_spec, checkpoint.quantization, checkpoint.tensors, tp, pp, ep)
    parts = []
    for rank in plan.ranks:
        layers = plan.stages[rank.pp]
        slices = {piece.name: piece for piece in rank.slices}
        tensors = {
            name: TensorInfo(name, piece.dtype, piece.shape, end=piece.nbytes)
            for name, piece in slices.items()
        }
        rank_checkpoint = replace(
            checkpoint, tensors=tensors, manifest=None, row_reader=_SliceReader(checkpoint, slices)
        )
        spec = rank_spec(full_spec, rank.tp, tp, ep, (layers[0], layers[-1] + 1))
        parts.append(RankPart(rank_checkpoint, spec, "", checkpoint))
    return parts


class _EmbeddingReader:
    """Reads an embedding from another checkpoint than the other tensors. See `RowReader`."""

    def __init__(self, others: RowReader, checkpoint: Checkpoint, name: str) -> None:
        self._others = others
        self._checkpoint = checkpoint
        self._name = name

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`."""
        if info.name == self._name:
            return self._checkpoint.read_slice(info.name, [(start, stop)], 0)
        return self._others.rows(info, start, stop)


class _SliceReader:
    """Reads rows of slices by cutting them out of the full tensors. See `RowReader`."""

    def __init__(self, checkpoint: Checkpoint, slices: Mapping[str, TensorSlice]) -> None:
        self._checkpoint = checkpoint
        self._slices = slices

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`."""
        piece = self._slices[info.name]
        if piece.derived:
            return self._derived_rows(piece, start, stop)
        if piece.dim > 0:
            return self._read_column_slice(piece, start, stop)
        return self._read_row_slice(piece, start, stop)

    def _derived_rows(self, piece: TensorSlice, start: int, stop: int) -> torch.Tensor:
        values = tensor_bytes(self._checkpoint.read(piece.name)).tobytes()
        derived = derived_values(values, piece, ShardSource(self._checkpoint))
        data = np.frombuffer(bytearray(derived), np.uint8)
        return torch.from_numpy(data).view(DTYPES[piece.dtype])[start:stop]

    def _read_column_slice(self, piece: TensorSlice, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a slice of columns, which has as many rows as the full tensor."""
        shape = (stop - start, *piece.shape[1:])
        result = torch.empty(shape, dtype=DTYPES[piece.dtype])
        for first_row, end_row in row_chunks(self._checkpoint.tensors[piece.name], CHUNK_BYTES):
            low = max(start, first_row)
            high = min(stop, end_row)
            if low < high:
                chunk = self._checkpoint.read_slice(piece.name, [(low, high)], 0)
                columns = [
                    chunk.narrow(piece.dim, first, end - first) for first, end in piece.intervals
                ]
                torch.cat(columns, piece.dim, out=result[low - start : high - start])
        return result

    def _read_row_slice(self, piece: TensorSlice, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a slice of rows, including padding."""
        source_rows = []  # the same rows in the full tensor
        offset = 0  # where the interval begins in the slice
        for first, end in piece.intervals:
            low = max(start - offset, 0)
            high = min(stop - offset, end - first)
            if low < high:
                source_rows.append((first + low, first + high))
            offset += end - first
        rows = []
        if source_rows:
            rows.append(self._checkpoint.read_slice(piece.name, source_rows, 0))
        padding = stop - start - sum(end - first for first, end in source_rows)
        if padding:
            rows.append(torch.zeros((padding, *piece.shape[1:]), dtype=DTYPES[piece.dtype]))
        return torch.cat(rows) if len(rows) > 1 else rows[0]
