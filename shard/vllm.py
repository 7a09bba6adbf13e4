"""`llmkit shard --format vllm`: the files that vLLM's `--load-format sharded_state` reads.

Written against vLLM 0.32: the keys are those of its model classes, whose projections are fused, and every key must be
there. (vllm/model_executor/model_loader/sharded_state_loader.py and vllm/model_executor/models/)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.quantized import QuantizationConfig
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import PlannedTensor
from llmkit.model.layout import parameters
from llmkit.model.spec import ModelSpec
from llmkit.shard.plan import RankPlan, ShardPlan, plan_shards
from llmkit.shard.slices import Slice, Target

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("BF16", "F16")
VOCAB_MULTIPLE = 64  # the whole vocabulary is padded to it, and then divided
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
SCALES = ("k", "v", "q", "prob")  # of a layer's attention; 1 where nothing is quantized


@dataclass(frozen=True)
class VllmPlan(ShardPlan):
    """A plan whose files are vLLM's: some tensors are several of the source's, one after the other."""

    fused: tuple[tuple[str, tuple[str, ...]], ...]  # vLLM's tensors and the source's that each is made of

    def files(self) -> dict[str, list[PlannedTensor]]:
        """What a CheckpointWriter is to write."""
        scales = [PlannedTensor(name, "F32", ()) for name in self._scales]
        return {
            rank.file: scales + [_fused(name, pieces) for name, pieces in self._tensors(rank)] for rank in self.ranks
        }

    def targets(self) -> dict[str, list[Target]]:
        """Where each source tensor's slices go."""
        targets: dict[str, list[Target]] = {name: [] for name in self.order}
        for rank in self.ranks:
            for name, pieces in self._tensors(rank):
                first = 0
                for piece in pieces:
                    targets[piece.name].append(Target(rank.file, name, piece, first))
                    first += piece.nbytes
        return targets

    def constants(self) -> list[tuple[str, str, bytes]]:
        """The scales of each layer's attention."""
        return [(rank.file, name, struct.pack("<f", 1.0)) for rank in self.ranks for name in self._scales]

    def layout(self) -> dict[str, Any]:
        """The `layout` of the output's manifest, which llmkit reads no tensors by."""
        ranks = [{"file": rank.file, "tp": rank.tp} for rank in self.ranks]
        return {"format": "vllm", "tp": self.tp, "pp": self.pp, "ep": self.ep, "ranks": ranks}

    @property
    def _scales(self) -> list[str]:
        layers = [layer for stage in self.stages for layer in stage]
        return [f"model.layers.{layer}.self_attn.attn._{name}_scale" for layer in layers for name in SCALES]

    def _tensors(self, rank: RankPlan) -> list[tuple[str, list[Slice]]]:
        pieces = {piece.name: piece for piece in rank.slices}
        return [(name, [pieces[source] for source in sources]) for name, sources in self.fused]


def plan_vllm(
    spec: ModelSpec, quantization: QuantizationConfig | None, ckpt_tensors: Mapping[str, TensorInfo], tp: int
) -> VllmPlan:
    """Divide a checkpoint (one that passed `check_checkpoint`) over `tp` ranks as vLLM does.

    Raises InputError for what is not covered: other families than FAMILIES, quantized checkpoints, other dtypes than
    DTYPES; and as `plan_shards` does.
    """
    todo = "Shard it with --format llmkit, or let vLLM shard the whole checkpoint when it loads it"
    if spec.architecture not in FAMILIES:
        raise InputError(f"--format vllm of {spec.architecture}", f"One of {', '.join(FAMILIES)}", todo)
    if quantization is not None:
        raise InputError(f"--format vllm of a checkpoint in {quantization.format} format", "A dense one", todo)
    if spec.architecture == "Qwen3ForCausalLM" and spec.output_bias:
        raise InputError("--format vllm of a Qwen3 with attention_bias", "vLLM's has no bias after attention", todo)
    dtypes = sorted({info.dtype for name, info in ckpt_tensors.items()})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise InputError(f"--format vllm of {' and '.join(dtypes)} tensors", f"All {' or all '.join(DTYPES)}", todo)
    plan = plan_shards(spec, quantization, ckpt_tensors, tp)
    padded = -(-spec.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if padded % tp:
        works = [size for size in range(1, spec.heads + 1) if padded % size == 0]
        raise InputError(
            f"--tp {tp} does not divide the vocabulary: {padded}/{tp} = {padded / tp:.3f} rows, padded to"
            f" {VOCAB_MULTIPLE} first as vLLM does; TP {', '.join(map(str, works))} divide it",
            todo="Choose one of these",
        )
    ranks = tuple(
        replace(
            rank,
            file=f"model-rank-{rank.tp}-part-0.safetensors",
            slices=tuple(
                _vocabulary(piece, rank.tp, padded // tp) if piece.name in VOCABULARY else piece
                for piece in rank.slices
            ),
        )
        for rank in plan.ranks
    )
    fused = tuple((_name(parameter.tensors, spec.tied), parameter.tensors) for parameter in parameters(spec))
    same = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return VllmPlan(**(same | {"ranks": ranks}), fused=fused)


def _name(tensors: tuple[str, ...], tied: bool) -> str:
    """vLLM's key of what is made of these tensors. A tied embedding is stored under the name of the output only."""
    if tied and tensors[0] == VOCABULARY[0]:
        return VOCABULARY[1]
    name = re.sub(r"\bself_attn\.[qkv]_proj\b", "self_attn.qkv_proj", tensors[0])
    return re.sub(r"\bmlp\.gate_proj\b", "mlp.gate_up_proj", name)


def _vocabulary(piece: Slice, rank: int, rows: int) -> Slice:
    start, stop = (min(rows * edge, piece.source_shape[0]) for edge in (rank, rank + 1))
    return replace(piece, intervals=((start, stop),) if start < stop else (), padding=rows - (stop - start))


def _fused(name: str, pieces: list[Slice]) -> PlannedTensor:
    rows = sum(piece.shape[0] for piece in pieces)
    return PlannedTensor(name, pieces[0].dtype, (rows, *pieces[0].shape[1:]))
