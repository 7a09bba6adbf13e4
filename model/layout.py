"""The one parameter table: every parameter of a model, where it comes from and how it splits.

The loader fuses by it, `shard` slices by it, `quantize` walks it and the decoder is built from it.
Shapes are `[out, in]`; "column parallel" splits rows (dim 0), "row parallel" splits columns (dim 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from llmkit.model.spec import ModelSpec, RankSpec

VOCAB_MULTIPLE = 64  # rows of a rank's vocabulary slice are padded to a multiple of this

SplitKind = Literal["replicated", "heads", "kv_heads", "features", "vocab"]


@dataclass(frozen=True)
class Split:
    """How a tensor divides over tensor-parallel ranks: `count` indivisible units of `unit` elements."""

    kind: SplitKind = "replicated"
    dim: int = 0
    count: int = 1
    unit: int = 1

    def fits(self, tp: int) -> bool:
        """Whether `tp` ranks can share the units evenly (KV heads may be replicated instead)."""
        if self.kind in ("replicated", "vocab"):
            return True
        if self.kind == "kv_heads" and tp > self.count:
            return tp % self.count == 0
        return self.count % tp == 0

    def interval(self, rank: int, tp: int) -> tuple[int, int]:
        """The elements [start, stop) along `dim` that `rank` holds; a vocabulary's may be short or empty."""
        if self.kind == "vocab":
            rows = self.padded_rows(tp)
            return min(rank * rows, self.count), min((rank + 1) * rows, self.count)
        if self.kind == "kv_heads" and tp > self.count:
            head = rank * self.count // tp
            return head * self.unit, (head + 1) * self.unit
        share = self.count // tp
        return rank * share * self.unit, (rank + 1) * share * self.unit

    def padded_rows(self, tp: int) -> int:
        """Rows of each rank's vocabulary slice, padding included."""
        if tp == 1:
            return self.count
        share = -(-self.count // tp)
        return -(-share // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def replicas(self, tp: int) -> int:
        """How many ranks hold the same slice."""
        if self.kind == "replicated":
            return tp
        return max(1, tp // self.count) if self.kind == "kv_heads" else 1


REPLICATED = Split()


@dataclass(frozen=True)
class Part:
    """The rows of a parameter that come from one checkpoint tensor, in order."""

    tensor: str  # the dense checkpoint tensor, "model.layers.3.self_attn.q_proj.weight"
    shape: tuple[int, ...]
    split: Split = REPLICATED
    row: int = 0  # its first row within the checkpoint tensor (Phi-3 stores several parts in one)


@dataclass(frozen=True)
class Parameter:
    """A row of the table. Its runtime tensor is its parts concatenated along dimension 0."""

    name: str  # "layers.3.attn.qkv.weight"
    parts: tuple[Part, ...]
    stages: tuple[int, ...]  # the layers it belongs with; -1 the embedding's place, len(layers) the head's
    linear: bool = False  # the weight of a linear layer of the decoder: what quantizing quantizes
    fed_by: str | None = None  # the parameter whose output it reads
    expert: int | None = None  # of a mixture, the one it belongs to: expert parallelism moves those whole

    @property
    def shape(self) -> tuple[int, ...]:
        """The runtime shape."""
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:])

    @property
    def module(self) -> str:
        """The runtime module, the name without `.weight` or `.bias`."""
        return self.name.rpartition(".")[0]

    @property
    def head(self) -> bool:
        """Whether it is the output projection, which is quantized only when that is asked for."""
        return self.module == "lm_head"

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The distinct checkpoint tensors, in order."""
        return tuple(dict.fromkeys(part.tensor for part in self.parts))


def parameters(spec: ModelSpec) -> list[Parameter]:
    """The whole table, in the order a request visits it; a rank's rows of it, with its own shapes."""
    return [row for row in _rows(spec) if spec.rank is None or _holds(spec, spec.rank, row)]


def _holds(spec: ModelSpec, part: RankSpec, row: Parameter) -> bool:
    if row.expert is not None and spec.experts is not None:
        group = part.rank // (part.tp // part.ep)
        return row.expert // (spec.experts.count // part.ep) == group
    last = len(spec.layers)
    return any({-1: spec.begins, last: spec.ends}.get(stage, True) for stage in row.stages)


def ignored_tensor(spec: ModelSpec, name: str) -> bool:
    """Whether a checkpoint tensor repeats what the table already holds (and so may be left out)."""
    return bool(re.search(r"rotary_emb\.inv_freq$", name)) or (spec.tied and name == "lm_head.weight")


def _rows(spec: ModelSpec) -> Iterator[Parameter]:
    last = len(spec.layers)
    vocab = Split("vocab", 0, spec.vocab)
    embed = Part("model.embed_tokens.weight", (spec.vocab, spec.hidden), vocab)
    yield Parameter("embed.weight", (embed,), (-1, last) if spec.tied else (-1,))
    for index in range(last):
        yield from _layer_rows(spec, index)
    norm = Part("model.norm.weight", (spec.hidden,))
    yield Parameter("norm.weight", (norm,), (last,), fed_by=f"layers.{last - 1}.mlp.down.weight")
    if not spec.tied:
        head = Part("lm_head.weight", (spec.vocab, spec.hidden), vocab)
        yield Parameter("lm_head.weight", (head,), (last,), fed_by="norm.weight")


def _layer_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    source, name, stage = f"model.layers.{_source_index(spec, index)}", f"layers.{index}", (index,)

    def norm(ours: str, theirs: str, size: int, split: Split = REPLICATED) -> Parameter:
        return Parameter(f"{name}.{ours}.weight", (Part(f"{source}.{theirs}.weight", (size,), split),), stage)

    heads = Split("heads", 0, spec.heads, spec.head_dim)
    kv_heads = Split("kv_heads", 0, spec.kv_heads, spec.head_dim)
    q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.norm_before:
        yield norm("attn_norm", "input_layernorm", spec.hidden)
    yield from _fused(
        spec, f"{name}.attn.qkv", f"{source}.self_attn.qkv_proj",
        [(f"{source}.self_attn.{n}_proj", size, split)
         for n, size, split in (("q", q_size, heads), ("k", kv_size, kv_heads), ("v", kv_size, kv_heads))],
        spec.hidden, spec.qkv_bias, stage, f"{name}.attn_norm.weight" if spec.norm_before else None,
    )  # fmt: skip
    if spec.qk_norm != "none":
        full = spec.qk_norm == "full"
        yield norm("attn.q_norm", "self_attn.q_norm", q_size if full else spec.head_dim, heads if full else REPLICATED)
        yield norm(
            "attn.k_norm", "self_attn.k_norm", kv_size if full else spec.head_dim, kv_heads if full else REPLICATED
        )
    yield from _linear(
        f"{name}.attn.o", f"{source}.self_attn.o_proj", (spec.hidden, q_size),
        Split("heads", 1, spec.heads, spec.head_dim), spec.output_bias, stage, f"{name}.attn.qkv.weight",
    )  # fmt: skip
    after = "post_attention_layernorm"
    if spec.norm_after:
        yield norm("attn_post_norm", after, spec.hidden)
        after = "pre_feedforward_layernorm"
    if spec.norm_before:
        yield norm("mlp_norm", after, spec.hidden)
    feed = f"{name}.mlp_norm.weight" if spec.norm_before else None
    if spec.layers[index].moe:
        yield from _expert_rows(spec, index, feed)
    else:
        yield from _mlp_rows(
            spec, f"{name}.mlp", f"{source}.mlp", ("gate_proj", "up_proj", "down_proj"), spec.intermediate, stage, feed
        )
    if spec.norm_after:
        yield norm("mlp_post_norm", "post_feedforward_layernorm", spec.hidden)


def _source_index(spec: ModelSpec, index: int) -> int:
    """A layer's number in the checkpoint."""
    return index + (spec.rank.first if spec.rank else 0)


def _expert_rows(spec: ModelSpec, index: int, feed: str | None) -> Iterator[Parameter]:
    experts = spec.experts
    assert experts is not None
    source, name = f"model.layers.{_source_index(spec, index)}.{experts.block}", f"layers.{index}.mlp"
    shape = experts.count, spec.hidden
    yield from _linear(f"{name}.router", f"{source}.gate", shape, REPLICATED, False, (index,), feed, linear=False)
    for expert in range(experts.count):
        rows = _mlp_rows(
            spec, f"{name}.experts.{expert}", f"{source}.experts.{expert}",
            (experts.gate, experts.up, experts.down), experts.intermediate, (index,), feed,
        )  # fmt: skip
        yield from (replace(row, expert=expert) for row in rows)


def _mlp_rows(
    spec: ModelSpec, name: str, source: str, names: tuple[str, str, str], size: int, stage: tuple[int, ...],
    feed: str | None,
) -> Iterator[Parameter]:  # fmt: skip
    gate, up, down = (f"{source}.{n}" for n in names)
    features = Split("features", 0, size)
    yield from _fused(
        spec, f"{name}.gate_up", f"{source}.gate_up_proj", [(gate, size, features), (up, size, features)],
        spec.hidden, spec.mlp_bias, stage, feed,
    )  # fmt: skip
    feed, split = f"{name}.gate_up.weight", Split("features", 1, size)
    yield from _linear(f"{name}.down", down, (spec.hidden, size), split, spec.mlp_bias, stage, feed)


def _fused(
    spec: ModelSpec, name: str, fused: str, parts: list[tuple[str, int, Split]],
    columns: int, bias: bool, stage: tuple[int, ...], feed: str | None,
) -> Iterator[Parameter]:  # fmt: skip
    """A runtime linear made of several checkpoint linears, which the checkpoint may itself store as one."""
    for kind, tail in (("weight", (columns,)), ("bias", ())):
        if kind == "bias" and not bias:
            continue
        rows, made = 0, []
        for source, size, split in parts:
            tensor = f"{fused if spec.fused_checkpoint else source}.{kind}"
            made.append(Part(tensor, (size, *tail), split, rows if spec.fused_checkpoint else 0))
            rows += size
        yield Parameter(f"{name}.{kind}", tuple(made), stage, linear=kind == "weight", fed_by=feed)


def _linear(
    name: str, source: str, shape: tuple[int, int], split: Split, bias: bool, stage: tuple[int, ...],
    feed: str | None, linear: bool = True,
) -> Iterator[Parameter]:  # fmt: skip
    yield Parameter(f"{name}.weight", (Part(f"{source}.weight", shape, split),), stage, linear=linear, fed_by=feed)
    if bias:
        # A row-parallel bias is added once, after the ranks' sums: every rank stores it, rank 0 adds it.
        kept = split if split.dim == 0 else REPLICATED
        yield Parameter(f"{name}.bias", (Part(f"{source}.bias", shape[:1], kept),), stage, fed_by=feed)
