"""`llmkit shard --format vllm`: writes the files that vLLM's `--load-format sharded_state` reads.

Written for vLLM 0.32. The tensor names are those of vLLM's model classes, whose projections are
fused. vLLM refuses files that lack one of its tensors.
(vllm/model_executor/model_loader/sharded_state_loader.py and vllm/model_executor/models/)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llmkit.checkpoint.quantized_weight import QuantizationConfig
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.shard.shard_plan import RankPlan, ShardPlan, plan_shards
from llmkit.shard.tensor_slice import TensorSlice

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("BF16", "F16")
VOCAB_MULTIPLE = 64  # vLLM pads the whole vocabulary to a multiple of this, then divides it
VOCAB_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
ATTENTION_SCALES = ("k", "v", "q", "prob")  # each layer has these; 1 without quantization


@dataclass(frozen=True)
class VllmPlan(ShardPlan):
    """A plan for vLLM's files. Some of their tensors concatenate several tensors of the source."""

    fused: tuple[tuple[str, tuple[str, ...]], ...]  # each vLLM tensor and its source tensors

    def files(self) -> dict[str, list[TensorInfo]]:
        """The tensors that a CheckpointWriter writes into each file."""
        scales = [TensorInfo(name, "F32", ()) for name in self._scale_names]
        return {
            rank.file: scales
            + [_fused_tensor(name, pieces) for name, pieces in self._slices_by_target(rank)]
            for rank in self.ranks
        }

    def slices_by_source(self) -> dict[str, list[TensorSlice]]:
        """The slices of each source tensor over all ranks, with their place in vLLM's tensors."""
        slices: dict[str, list[TensorSlice]] = {name: [] for name in self.order}
        for rank in self.ranks:
            for name, pieces in self._slices_by_target(rank):
                offset = 0
                for piece in pieces:
                    slices[piece.name].append(
                        replace(piece, file=rank.file, target=name, target_offset=offset)
                    )
                    offset += piece.nbytes
        return slices

    def constants(self) -> list[tuple[str, str, bytes]]:
        """The attention scales."""
        return [
            (rank.file, name, struct.pack("<f", 1.0))
            for rank in self.ranks
            for name in self._scale_names
        ]

    def layout(self) -> dict[str, Any]:
        """The `layout` of the output's manifest. llmkit does not read such files."""
        ranks = [{"file": rank.file, "tp": rank.tp} for rank in self.ranks]
        return {"format": "vllm", "tp": self.tp, "pp": self.pp, "ep": self.ep, "ranks": ranks}

    @property
    def _scale_names(self) -> list[str]:
        layers = [layer for stage in self.stages for layer in stage]
        return [
            f"model.layers.{layer}.self_attn.attn._{name}_scale"
            for layer in layers
            for name in ATTENTION_SCALES
        ]

    def _slices_by_target(self, rank: RankPlan) -> list[tuple[str, list[TensorSlice]]]:
        pieces = {piece.name: piece for piece in rank.slices}
        return [(name, [pieces[source] for source in sources]) for name, sources in self.fused]


def plan_vllm(
    spec: ModelSpec,
    quantization: QuantizationConfig | None,
    source_tensors: Mapping[str, TensorInfo],
    tp: int,
) -> VllmPlan:
    """Divide a checkpoint over `tp` ranks as vLLM does.

    source_tensors: of a checkpoint that passed `check_checkpoint`.
    Raises InputError for families that are not in FAMILIES, for quantized checkpoints, for dtypes
    that are not in DTYPES, and as `plan_shards` does.
    """
    todo = "Shard it with --format llmkit, or let vLLM shard the whole checkpoint when it loads it"
    if spec.architecture not in FAMILIES:
        raise InputError(
            f"--format vllm of {spec.architecture}", f"One of {', '.join(FAMILIES)}", todo
        )
    if quantization is not None:
        raise InputError(
            f"--format vllm of a checkpoint in {quantization.format} format", "A dense one", todo
        )
    if spec.architecture == "Qwen3ForCausalLM" and spec.o_proj_bias:
        raise InputError(
            "--format vllm of a Qwen3 with attention_bias",
            "vLLM's has no bias after attention",
            todo,
        )
    dtypes = sorted({info.dtype for info in source_tensors.values()})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise InputError(
            f"--format vllm of {' and '.join(dtypes)} tensors",
            f"All {' or all '.join(DTYPES)}",
            todo,
        )
    plan = plan_shards(spec, quantization, source_tensors, tp)
    if plan.carried:
        raise InputError(
            f"--format vllm of a checkpoint with {plan.carried[0].name}",
            "A model without parts that do not run",
            todo,
        )
    padded_vocab = -(-spec.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if padded_vocab % tp:
        works = [size for size in range(1, spec.num_heads + 1) if padded_vocab % size == 0]
        raise InputError(
            f"--tp {tp} does not divide the vocabulary: {padded_vocab}/{tp} ="
            f" {padded_vocab / tp:.3f} rows, padded to {VOCAB_MULTIPLE} first as vLLM does;"
            f" TP {', '.join(map(str, works))} divide it",
            todo="Choose one of these",
        )
    ranks = []
    for rank in plan.ranks:
        slices = []
        for piece in rank.slices:
            if piece.name in VOCAB_TENSORS:
                piece = _pad_as_vllm(piece, rank.tp, padded_vocab // tp)
            slices.append(piece)
        file = f"model-rank-{rank.tp}-part-0.safetensors"
        ranks.append(replace(rank, file=file, slices=tuple(slices)))
    fused = tuple(
        (_vllm_name(parameter.source_names, spec.tie_word_embeddings), parameter.source_names)
        for parameter in parameters(spec)
    )
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return VllmPlan(**(values | {"ranks": tuple(ranks)}), fused=fused)


def _vllm_name(source_names: tuple[str, ...], is_tied: bool) -> str:
    """vLLM's name of the tensor that concatenates these source tensors.

    vLLM stores a tied embedding under the name of the output projection only.
    """
    embedding, lm_head = VOCAB_TENSORS
    if is_tied and source_names[0] == embedding:
        return lm_head
    name = re.sub(r"\bself_attn\.[qkv]_proj\b", "self_attn.qkv_proj", source_names[0])
    return re.sub(r"\bmlp\.gate_proj\b", "mlp.gate_up_proj", name)


def _pad_as_vllm(piece: TensorSlice, rank: int, rows_per_rank: int) -> TensorSlice:
    """The rank's vocabulary rows, with padding to `rows_per_rank`."""
    vocab_size = piece.source_shape[0]
    start = min(rows_per_rank * rank, vocab_size)
    stop = min(rows_per_rank * (rank + 1), vocab_size)
    intervals = ((start, stop),) if start < stop else ()
    return replace(piece, intervals=intervals, padding=rows_per_rank - (stop - start))


def _fused_tensor(name: str, pieces: list[TensorSlice]) -> TensorInfo:
    rows = sum(piece.shape[0] for piece in pieces)
    return TensorInfo(name, pieces[0].dtype, (rows, *pieces[0].shape[1:]))
