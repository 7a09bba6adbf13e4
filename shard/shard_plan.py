"""`ShardPlan`: which rank stores which slices of a checkpoint. No tensor is read to make it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.quantized_weight import QuantizationConfig
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError, UsageError
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.parallel_group import rank_spec
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import EMBEDDING_STAGE, embedding_tensor, is_carried
from llmkit.model.spec import ModelSpec
from llmkit.shard.pipeline_stages import balanced_stages, explicit_stages
from llmkit.shard.tensor_slice import (
    TensorSlice,
    length_along,
    slice_for_expert_group,
    slice_for_rank,
    whole_slice,
)
from llmkit.shard.valid_layouts import expert_count, explain_ep, explain_tp

# The file of the tensors that no rank loads (see `ModelSpec.carried`).
CARRIED_FILE = "carried.safetensors"


@dataclass(frozen=True)
class RankPlan:
    """One rank: its coordinates, its file and its slices, in the order of the source."""

    pp: int  # pipeline stage
    tp: int  # tensor-parallel rank
    ep: int  # expert-parallel group
    file: str
    slices: tuple[TensorSlice, ...]


@dataclass(frozen=True)
class ShardPlan:
    """A checkpoint over tp x pp ranks. `ranks` are ordered by stage, then by tensor-parallel rank.

    Attention and dense layers are split over the `tp` ranks of a stage. These ranks form `ep`
    groups of tp / ep neighbouring ranks. Each group holds an equal share of the experts, and splits
    them over its ranks: with ep = 1 every expert is split over all ranks, with ep = tp no expert is
    split.
    """

    tp: int
    pp: int
    ep: int
    stages: tuple[tuple[int, ...], ...]  # the layers of each pipeline stage
    experts: tuple[tuple[int, ...], ...]  # of each expert-parallel group; () for a dense model
    order: tuple[str, ...]  # the tensors of the source in the order of its files
    ranks: tuple[RankPlan, ...]
    carried: tuple[TensorSlice, ...]  # whole tensors of parts that do not run, in CARRIED_FILE
    left_out: tuple[str, ...]  # source tensors that repeat others and are not stored
    # The bytes of K and V of one token in each layer, on one rank.
    kv_bytes_per_layer: tuple[int, ...]
    state_bytes_per_layer: tuple[int, ...]  # of a request

    @cached_property
    def replicas(self) -> dict[TensorSlice, tuple[int, ...]]:
        """The ranks, as indices into `ranks`, that store an equal slice."""
        holders: dict[TensorSlice, list[int]] = {}
        for index, rank in enumerate(self.ranks):
            for piece in rank.slices:
                holders.setdefault(piece, []).append(index)
        return {piece: tuple(ranks) for piece, ranks in holders.items()}

    @cached_property
    def _interval_counts(self) -> Counter[tuple[str, tuple[int, int]]]:
        """The number of ranks that store each interval.

        Slices of a fused tensor can differ and still share an interval, for example a KV head.
        """
        return Counter(
            (piece.name, interval)
            for rank in self.ranks
            for piece in rank.slices
            for interval in piece.intervals
        )

    def _replicated_bytes(self, piece: TensorSlice) -> int:
        shared = sum(
            stop - start
            for start, stop in piece.intervals
            if self._interval_counts[piece.name, (start, stop)] > 1
        )
        return piece.nbytes // length_along(piece.shape, piece.dim) * shared

    def files(self) -> dict[str, list[TensorInfo]]:
        """The tensors that a CheckpointWriter writes into each file."""
        files = {rank.file: _slice_infos(rank.slices) for rank in self.ranks}
        return files | self._carried_files()

    def _carried_files(self) -> dict[str, list[TensorInfo]]:
        return {CARRIED_FILE: _slice_infos(self.carried)} if self.carried else {}

    def slices_by_source(self) -> dict[str, list[TensorSlice]]:
        """The slices of each source tensor over all ranks."""
        slices: dict[str, list[TensorSlice]] = {name: [] for name in self.order}
        for rank in self.ranks:
            for piece in rank.slices:
                slices[piece.name].append(piece)
        for piece in self.carried:
            slices[piece.name].append(piece)
        return slices

    def constants(self) -> list[tuple[str, str, bytes]]:
        """Tensors that do not come from the source: file, name and content."""
        return []

    def layout(self) -> dict[str, Any]:
        """The `layout` of the output's manifest; sharded_layout.py reads it back."""
        return {
            "tp": self.tp,
            "pp": self.pp,
            "ep": self.ep,
            "stages": [list(stage) for stage in self.stages],
            "experts": [list(group) for group in self.experts],
            "ranks": [
                {"file": rank.file, "pp": rank.pp, "tp": rank.tp, "ep": rank.ep}
                for rank in self.ranks
            ],
            "carried_files": list(self._carried_files()),
            "left_out": list(self.left_out),
            "order": list(self.order),
            "tensors": {
                f"{rank.file}::{piece.name}": _layout_entry(piece, self.replicas[piece])
                for rank in self.ranks
                for piece in rank.slices
            }
            | {f"{piece.file}::{piece.name}": _layout_entry(piece, ()) for piece in self.carried},
        }

    def to_json(self) -> dict[str, Any]:
        """The plan's figures as a JSON document, with one entry per rank.

        `bytes` is the size of the tensors in the rank's file. `replicated_bytes` of them are stored
        by another rank, too; `padding_bytes` are zeros that the source does not have.
        `kv_bytes_per_token` is in the embedding's dtype, or in 8 bits where the checkpoint
        quantizes keys and values. `state_bytes_per_request` is of recurrent layers.
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
            "carried": {
                "file": CARRIED_FILE,
                "tensors": len(self.carried),
                "bytes": sizes.get(CARRIED_FILE, 0),
            },
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
                    "kv_bytes_per_token": sum(
                        self.kv_bytes_per_layer[layer] for layer in self.stages[rank.pp]
                    ),
                    "state_bytes_per_request": sum(
                        self.state_bytes_per_layer[layer] for layer in self.stages[rank.pp]
                    ),
                }
                for rank in self.ranks
            ],
        }


def plan_shards(
    spec: ModelSpec,
    quantization: QuantizationConfig | None,
    source_tensors: Mapping[str, TensorInfo],
    tp: int,
    pp: int = 1,
    ep: int = 1,
    pp_layers: Sequence[int] = (),
) -> ShardPlan:
    """Divide a checkpoint over `tp` ranks in each of `pp` pipeline stages.

    source_tensors: of a checkpoint that passed `check_checkpoint`. Their order is the order in the
    ranks' files.
    pp_layers: the number of layers of each stage, in place of balanced stages; `pp` is then the
    number of stages or 1.

    Raises UsageError for sizes below 1 or that contradict each other; InputError, with the
    arithmetic and the sizes that work, for a `tp` or `ep` that does not divide the model, and for
    stages that do not cover its layers or that its layers do not allow.
    """
    if min(tp, pp, ep) < 1:
        raise UsageError(f"--tp {tp} --pp {pp} --ep {ep}", "All are at least 1")
    if pp_layers and pp not in (1, len(pp_layers)):
        raise UsageError(
            f"--pp {pp} and {len(pp_layers)} numbers in --pp-layers", "One number for each stage"
        )
    refusal = explain_ep(spec, quantization, tp, ep)
    if refusal:
        raise InputError(f"--ep {ep} does not divide: {refusal}", todo="Choose one of these")
    refusal = explain_tp(spec, quantization, tp, ep)
    if refusal:
        raise InputError(f"--tp {tp} does not divide {refusal}", todo="Choose one of these")
    expected = checkpoint_tensors(spec, quantization)
    num_layers = len(spec.layers)
    if pp_layers:
        pp = len(pp_layers)
        stages = explicit_stages(num_layers, pp_layers, spec.stage_starts)
    else:
        rows = [(parameter, source_tensors[name]) for name, (parameter, _) in expected.items()]
        stages = _balanced_stages(spec, rows, pp)
    if pp > 1 and spec.transformers is not None:
        raise UsageError(
            f"--pp {pp}: {spec.architecture} runs by transformers' modeling code, which is not"
            " divided into stages",
            "One stage",
            "Use --tp",
        )
    stage_of_layer = {EMBEDDING_STAGE: 0, num_layers: pp - 1}
    for stage, layers in enumerate(stages):
        for layer in layers:
            stage_of_layer[layer] = stage
    carried = tuple(
        whole_slice(info, CARRIED_FILE)
        for name, info in source_tensors.items()
        if name not in expected and is_carried(spec, name)
    )
    kept = expected.keys() | {piece.name for piece in carried}
    order = tuple(name for name in source_tensors if name in kept)
    ranks_per_group = tp // ep  # the ranks that an expert is split over
    experts_per_group = expert_count(spec) // ep
    slices: dict[tuple[int, int], list[TensorSlice]] = {
        (stage, rank): [] for stage in range(pp) for rank in range(tp)
    }
    for name in order:
        if name not in expected:
            continue
        parameter, packed = expected[name]
        info = source_tensors[name]
        for rank in range(tp):
            if parameter.expert is None:
                piece = slice_for_rank(parameter, packed, info, rank, tp)
            elif packed.num_experts and ep > 1:
                piece = slice_for_expert_group(packed, info, rank // ranks_per_group, ep)
            elif packed.num_experts:
                piece = slice_for_rank(parameter, packed, info, rank, tp)
            elif parameter.expert // experts_per_group == rank // ranks_per_group:
                rank_in_group = rank % ranks_per_group
                piece = slice_for_rank(parameter, packed, info, rank_in_group, ranks_per_group)
            else:
                continue
            for stage in sorted({stage_of_layer[layer] for layer in parameter.layers}):
                slices[stage, rank].append(replace(piece, file=_rank_file(stage, rank)))
    experts: tuple[tuple[int, ...], ...] = ()
    if experts_per_group:
        experts = tuple(
            tuple(range(group * experts_per_group, (group + 1) * experts_per_group))
            for group in range(ep)
        )
    return ShardPlan(
        tp=tp,
        pp=pp,
        ep=ep,
        stages=stages,
        experts=experts,
        order=order,
        ranks=tuple(
            RankPlan(stage, rank, rank // ranks_per_group, _rank_file(stage, rank), tuple(pieces))
            for (stage, rank), pieces in slices.items()
        ),
        carried=carried,
        left_out=tuple(name for name in source_tensors if name not in kept),
        kv_bytes_per_layer=_kv_bytes_per_layer(spec, quantization, source_tensors, tp),
        state_bytes_per_layer=_state_bytes_per_layer(spec, source_tensors, tp),
    )


def _slice_infos(slices: Iterable[TensorSlice]) -> list[TensorInfo]:
    return [TensorInfo(piece.name, piece.dtype, piece.shape) for piece in slices]


def _rank_file(stage: int, rank: int) -> str:
    return f"rank-pp{stage}-tp{rank}.safetensors"


def _balanced_stages(
    spec: ModelSpec, rows: Iterable[tuple[Parameter, TensorInfo]], pp: int
) -> tuple[tuple[int, ...], ...]:
    num_layers = len(spec.layers)
    sizes = dict.fromkeys(range(EMBEDDING_STAGE, num_layers + 1), 0)
    for parameter, info in rows:
        for layer in parameter.layers:
            sizes[layer] += info.nbytes
    layer_bytes = [sizes[layer] for layer in range(num_layers)]
    return balanced_stages(
        layer_bytes,
        pp,
        embedding_bytes=sizes[EMBEDDING_STAGE],
        head_bytes=sizes[num_layers],
        starts=spec.stage_starts,
    )


def _itemsize(spec: ModelSpec, source_tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of a value in the dtype of the model."""
    head = spec.draft_head  # it reads the model's embedding
    name = embedding_tensor(spec) if head is None else f"{head.norm}.weight"
    return DTYPES[source_tensors[name].dtype].itemsize


def _kv_bytes_per_layer(
    spec: ModelSpec,
    quantization: QuantizationConfig | None,
    source_tensors: Mapping[str, TensorInfo],
    tp: int,
) -> tuple[int, ...]:
    if quantization is not None and quantization.kv:
        itemsize = 1
    else:
        itemsize = _itemsize(spec, source_tensors)
    rank = rank_spec(spec, 0, tp)
    return tuple(rank.kv_elements_of_layer(index) * itemsize for index in range(len(rank.layers)))


def _state_bytes_per_layer(
    spec: ModelSpec, source_tensors: Mapping[str, TensorInfo], tp: int
) -> tuple[int, ...]:
    """The bytes of a request's recurrent state in each layer, on one rank."""
    itemsize = _itemsize(spec, source_tensors)
    rank = rank_spec(spec, 0, tp)
    return tuple(
        rank.recurrent_bytes_of_layer(index, itemsize) for index in range(len(rank.layers))
    )


def _layout_entry(piece: TensorSlice, replicas: tuple[int, ...]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "source": piece.name,
        "source_shape": list(piece.source_shape),
        "dtype": piece.dtype,
        "dim": piece.dim,
        "intervals": [list(interval) for interval in piece.intervals],
        "padding": piece.padding,
        "replicas": list(replicas),
    }
    if piece.may_overlap:
        entry["may_overlap"] = True
    if piece.derived == "group_index":
        entry["derived"] = {"kind": "group_index", "first_group": piece.first_group}
    elif piece.derived == "shape":
        entry["derived"] = {
            "kind": "shape",
            "shape": list(piece.dense_shape),
            "source_shape": list(piece.source_dense_shape),
        }
    return entry
