"""`ShardPlan`: which rank stores what of a checkpoint, worked out before a byte is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.quantized import QuantizationConfig
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import PlannedTensor
from llmkit.model.layout import Split
from llmkit.model.loader import StoredTensor, stored_tensors
from llmkit.model.spec import ModelSpec
from llmkit.shard.slices import Slice, Target, cut
from llmkit.shard.stages import balanced_stages, explicit_stages
from llmkit.shard.validity import expert_count, explain_ep, explain_tp, valid_ep, valid_tp

__all__ = ["RankPlan", "ShardPlan", "explain_ep", "explain_tp", "plan_shards", "valid_ep", "valid_tp"]


@dataclass(frozen=True)
class RankPlan:
    """One rank: its coordinates, its file and what lies in it, in the order of the source."""

    pp: int
    tp: int
    ep: int  # which share of the experts it holds
    file: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class ShardPlan:
    """A checkpoint over tp x pp ranks. `ranks` are ordered by stage, then by tensor-parallel rank.

    Attention and dense layers are split over `tp` ranks. Experts are divided over `ep` groups of tp / ep neighbouring
    ranks, and split by tensor over the ranks of a group: `ep` = 1 splits each over all, `ep` = `tp` none.
    """

    tp: int
    pp: int
    ep: int
    stages: tuple[tuple[int, ...], ...]  # the layers of each pipeline stage
    experts: tuple[tuple[int, ...], ...]  # of each expert-parallel group; () for a dense model
    order: tuple[str, ...]  # the tensors of the source as they lie in its files
    ranks: tuple[RankPlan, ...]
    left_out: tuple[str, ...]  # source tensors that repeat others and are not stored
    kv_bytes_per_layer: int  # K and V of one token in one layer of one rank, in the embedding's dtype or as quantized

    @cached_property
    def replicas(self) -> dict[Slice, tuple[int, ...]]:
        """The ranks, as indices into `ranks`, that store the very same slice."""
        holders: dict[Slice, list[int]] = {}
        for index, rank in enumerate(self.ranks):
            for piece in rank.slices:
                holders.setdefault(piece, []).append(index)
        return {piece: tuple(ranks) for piece, ranks in holders.items()}

    @cached_property
    def _holders(self) -> Counter[tuple[str, tuple[int, int]]]:
        """How many ranks store each interval. Slices of a fused tensor can share an interval without being equal."""
        return Counter(
            (piece.name, interval) for rank in self.ranks for piece in rank.slices for interval in piece.intervals
        )

    def _replicated_bytes(self, piece: Slice) -> int:
        shared = sum(stop - start for start, stop in piece.intervals if self._holders[piece.name, (start, stop)] > 1)
        return piece.nbytes // piece.shape[piece.dim] * shared

    def files(self) -> dict[str, list[PlannedTensor]]:
        """What a CheckpointWriter is to write."""
        return {
            rank.file: [PlannedTensor(piece.name, piece.dtype, piece.shape) for piece in rank.slices]
            for rank in self.ranks
        }

    def targets(self) -> dict[str, list[Target]]:
        """Where each source tensor's slices go."""
        targets: dict[str, list[Target]] = {name: [] for name in self.order}
        for rank in self.ranks:
            for piece in rank.slices:
                targets[piece.name].append(Target(rank.file, piece.name, piece))
        return targets

    def constants(self) -> list[tuple[str, str, bytes]]:
        """What files hold that does not come from the source: file, tensor and bytes."""
        return []

    def layout(self) -> dict[str, Any]:
        """The `layout` of the output's manifest; `llmkit.shard.layout` reads it back."""
        return {
            "tp": self.tp,
            "pp": self.pp,
            "ep": self.ep,
            "stages": [list(stage) for stage in self.stages],
            "experts": [list(group) for group in self.experts],
            "ranks": [{"file": rank.file, "pp": rank.pp, "tp": rank.tp, "ep": rank.ep} for rank in self.ranks],
            "left_out": list(self.left_out),
            "order": list(self.order),
            "tensors": {
                f"{rank.file}::{piece.name}": _entry(piece, self.replicas[piece])
                for rank in self.ranks
                for piece in rank.slices
            },
        }

    def to_json(self) -> dict[str, Any]:
        """The plan's figures, one row per rank.

        `bytes` is everything in the rank's file but its header; `replicated_bytes` is how much of it another rank
        stores too, `padding_bytes` how much is zeros that the source does not have. `kv_bytes_per_token` is in the
        embedding's dtype, or in 8 bits where the checkpoint quantizes keys and values.
        """
        files = self.files()
        sizes = {file: sum(tensor.nbytes for tensor in tensors) for file, tensors in files.items()}
        return {
            "tp": self.tp,
            "pp": self.pp,
            "ep": self.ep,
            "stages": [list(stage) for stage in self.stages],
            "experts": [list(group) for group in self.experts],
            "bytes": sum(sizes.values()),
            "left_out": list(self.left_out),
            "ranks": [
                {
                    "file": rank.file,
                    "pp": rank.pp,
                    "tp": rank.tp,
                    "ep": rank.ep,
                    "layers": list(self.stages[rank.pp]),
                    "tensors": len(files[rank.file]),
                    "bytes": sizes[rank.file],
                    "replicated_bytes": sum(self._replicated_bytes(piece) for piece in rank.slices),
                    "padding_bytes": sum(piece.padding_bytes for piece in rank.slices),
                    "kv_bytes_per_token": self.kv_bytes_per_layer * len(self.stages[rank.pp]),
                }
                for rank in self.ranks
            ],
        }


def plan_shards(
    spec: ModelSpec,
    quantization: QuantizationConfig | None,
    ckpt_tensors: Mapping[str, TensorInfo],
    tp: int,
    pp: int = 1,
    ep: int = 1,
    pp_layers: Sequence[int] = (),
) -> ShardPlan:
    """Divide a checkpoint (one that passed `check_checkpoint`) over `tp` ranks in each of `pp` pipeline stages.

    The order of `ckpt_tensors` is the order in the ranks' files. `pp_layers`: how many layers each stage gets, in
    place of stages that are as equal as they can be; `pp` is then their number or 1.
    Raises UsageError for sizes below 1 or that contradict each other, InputError, with the arithmetic and the sizes
    that work, for a `tp` or `ep` that does not divide the model, and for stages that do not make up its layers.
    """
    if min(tp, pp, ep) < 1:
        raise UsageError(f"--tp {tp} --pp {pp} --ep {ep}", "All are at least 1")
    if pp_layers and pp not in (1, len(pp_layers)):
        raise UsageError(f"--pp {pp} and {len(pp_layers)} numbers in --pp-layers", "One number for each stage")
    if refusal := explain_ep(spec, quantization, tp, ep):
        raise InputError(f"--ep {ep} does not divide: {refusal}", todo="Choose one of these")
    if refusal := explain_tp(spec, quantization, tp, ep):
        raise InputError(f"--tp {tp} does not divide {refusal}", todo="Choose one of these")
    stored = stored_tensors(spec, quantization)
    if pp_layers:
        pp, stages = len(pp_layers), explicit_stages(len(spec.layers), pp_layers)
    else:
        stages = _stages(spec, stored.values(), ckpt_tensors, pp)
    stage_of = {layer: index for index, stage in enumerate(stages) for layer in stage} | {
        -1: 0,
        len(spec.layers): pp - 1,
    }
    order = tuple(name for name in ckpt_tensors if name in stored)
    share = tp // ep  # ranks that an expert is split over
    held = expert_count(spec) // ep
    slices: dict[tuple[int, int], list[Slice]] = {(stage, rank): [] for stage in range(pp) for rank in range(tp)}
    for tensor in map(stored.__getitem__, order):
        expert = tensor.parameter.expert
        for rank in range(tp):
            if expert is None:
                piece = cut(tensor, ckpt_tensors[tensor.name], rank, tp)
            elif expert // held == rank // share:
                piece = cut(tensor, ckpt_tensors[tensor.name], rank % share, share)
            else:
                continue
            for stage in sorted({stage_of[place] for place in tensor.parameter.stages}):
                slices[stage, rank].append(piece)
    embedding = ckpt_tensors["model.embed_tokens.weight"]
    start, stop = Split("kv_heads", 0, spec.kv_heads, spec.head_dim).interval(0, tp)
    itemsize = 1 if quantization is not None and quantization.kv else DTYPES[embedding.dtype].itemsize
    return ShardPlan(
        tp,
        pp,
        ep,
        stages,
        tuple(tuple(range(group * held, (group + 1) * held)) for group in range(ep)) if held else (),
        order,
        tuple(
            RankPlan(stage, rank, rank // share, f"rank-pp{stage}-tp{rank}.safetensors", tuple(pieces))
            for (stage, rank), pieces in slices.items()
        ),
        tuple(name for name in ckpt_tensors if name not in stored),
        2 * (stop - start) * itemsize,
    )


def _stages(
    spec: ModelSpec, stored: Iterable[StoredTensor], tensors: Mapping[str, TensorInfo], pp: int
) -> tuple[tuple[int, ...], ...]:
    sizes = dict.fromkeys(range(-1, len(spec.layers) + 1), 0)
    for tensor in stored:
        for place in tensor.parameter.stages:
            sizes[place] += tensors[tensor.name].nbytes
    layers = [sizes[layer] for layer in range(len(spec.layers))]
    return balanced_stages(layers, pp, first=sizes[-1], last=sizes[len(layers)])


def _entry(piece: Slice, replicas: tuple[int, ...]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "source": piece.name,
        "source_shape": list(piece.source_shape),
        "dtype": piece.dtype,
        "dim": piece.dim,
        "intervals": [list(interval) for interval in piece.intervals],
        "padding": piece.padding,
        "replicas": list(replicas),
    }
    if piece.derived == "group_index":
        entry["derived"] = {"kind": "group_index", "first_group": piece.first_group}
    elif piece.derived == "shape":
        entry["derived"] = {
            "kind": "shape", "shape": list(piece.dense_shape), "source_shape": list(piece.source_dense_shape),
        }  # fmt: skip
    return entry
