"""`Parameter`: a row of the parameter table, and the rows of norms and linear layers.

parameter_table.py makes the table of a model from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from llmkit.model.spec import ModelSpec
from llmkit.model.split import REPLICATED, Split

if TYPE_CHECKING:
    import torch

# The modules of Llama's checkpoints by runtime module, without the prefix of the layer.
# `ModelSpec.module_names` has what differs.
MODULES = {
    "embed": "embed_tokens",
    "norm": "norm",
    "attn_norm": "input_layernorm",
    "attn.qkv": "self_attn.qkv_proj",  # only with `fused_qkv`
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.gate": "self_attn.gate_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_a": "self_attn.q_a_proj",  # this and the next five: multi-head latent attention
    "attn.q_a_norm": "self_attn.q_a_layernorm",
    "attn.q_b": "self_attn.q_b_proj",
    "attn.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_a_norm": "self_attn.kv_a_layernorm",
    "attn.kv_b": "self_attn.kv_b_proj",
    "gdn.qkvz": "linear_attn.in_proj_qkvz",  # only with `fused_projections`
    "gdn.qkv": "linear_attn.in_proj_qkv",
    "gdn.z": "linear_attn.in_proj_z",
    "gdn.ba": "linear_attn.in_proj_ba",  # only with `fused_projections`
    "gdn.b": "linear_attn.in_proj_b",
    "gdn.a": "linear_attn.in_proj_a",
    "gdn.conv": "linear_attn.conv1d",
    "gdn.A_log": "linear_attn.A_log",
    "gdn.dt_bias": "linear_attn.dt_bias",
    "gdn.norm": "linear_attn.norm",
    "gdn.out": "linear_attn.out_proj",
    "mamba.in_proj": "mamba.in_proj",
    "mamba.conv": "mamba.conv1d",
    "mamba.A_log": "mamba.A_log",
    "mamba.D": "mamba.D",
    "mamba.dt_bias": "mamba.dt_bias",
    "mamba.norm": "mamba.norm",
    "mamba.out": "mamba.out_proj",
    "conv.in_proj": "conv.in_proj",
    "conv.conv": "conv.conv",
    "conv.out": "conv.out_proj",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "post_attention_layernorm",  # "pre_feedforward_layernorm" with `post_norm`
    "mlp": "mlp",
    "mlp.gate_up": "mlp.gate_up_proj",  # only with `fused_gate_up`
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp_post_norm": "post_feedforward_layernorm",
    "mlp.post_mlp_norm": "post_feedforward_layernorm_1",
    "mlp.pre_experts_norm": "pre_feedforward_layernorm_2",
    "mlp.post_experts_norm": "post_feedforward_layernorm_2",
    "per_layer.gate": "per_layer_input_gate",
    "per_layer.projection": "per_layer_projection",
    "per_layer.norm": "post_per_layer_input_norm",
}


@dataclass(frozen=True)
class ExpertSlice:
    """One expert's part of a checkpoint tensor that holds all of a layer's, [experts, ...]."""

    index: int  # in the checkpoint tensor; the tensor of a rank holds the rank's experts
    num_experts: int  # in the checkpoint tensor
    transposed: bool = False  # a dense weight is stored as [in, out]


@dataclass(frozen=True)
class SourceTensor:
    """The rows of a parameter that come from one checkpoint tensor."""

    name: str  # of the dense checkpoint tensor, "model.layers.3.self_attn.q_proj.weight"
    shape: tuple[int, ...]  # the shape of these rows
    split: Split = REPLICATED
    # The first of these rows in the checkpoint tensor. It is 0 unless the checkpoint stores several
    # projections in one tensor, as Phi-3 does.
    first_row: int = 0
    # Where several projections alternate in a checkpoint tensor, these rows are blocks of
    # `block_rows` rows. They begin `block_step` rows apart. 0: the rows are adjacent.
    block_rows: int = 0
    block_step: int = 0
    # Set when the checkpoint tensor holds all experts. The rows are those of this expert's weight.
    expert: ExpertSlice | None = None
    start: tuple[int, int] = (0, 0)  # the row and column of the full model where a rank's begin

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of the checkpoint tensor, or of one with a row for each of its rows."""
        if not self.block_step:
            return tensor[self.first_row : self.first_row + self.shape[0]]
        blocks: torch.Tensor = tensor.unflatten(0, (-1, self.block_step))
        return blocks[:, self.first_row : self.first_row + self.block_rows].flatten(0, 1)

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The first row in the checkpoint tensor and the length of each block of adjacent rows."""
        if not self.block_step:
            return ((self.first_row, self.shape[0]),)
        return tuple(
            (self.first_row + block * self.block_step, self.block_rows)
            for block in range(self.shape[0] // self.block_rows)
        )

    @property
    def tensor_split(self) -> Split:
        """The split of the checkpoint tensor's rows: a unit of these also has what alternates."""
        if not self.block_step:
            return self.split
        unit = self.split.unit * self.block_step // self.block_rows
        return replace(self.split, unit=unit)


@dataclass(frozen=True)
class Parameter:
    """A row of the table. Its runtime tensor is its sources concatenated along dimension 0."""

    name: str  # of the runtime tensor, "layers.3.attn.qkv.weight"
    sources: tuple[SourceTensor, ...]
    # Its layer, which determines the pipeline stage: EMBEDDING_STAGE for the embedding, and
    # len(spec.layers) for the final norm and lm_head. A tied embedding has both of these.
    layers: tuple[int, ...]
    is_linear: bool = False  # the weight of a linear layer that quantization may pack
    # The norm or linear whose output is its input. None also where scales cannot be moved from one
    # to the other: others read the output too, or something not linear lies between them.
    input_from: str | None = None
    expert: int | None = None  # the expert it belongs to; None outside experts
    is_float32: bool = False  # kept in float32 whatever the dtype of the model
    # The bias of a row-parallel linear. Every rank stores it, and only the first one adds it.
    is_added_once: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the runtime tensor."""
        first = self.sources[0].shape
        if not first:  # a number
            return ()
        return (sum(source.shape[0] for source in self.sources), *first[1:])

    @property
    def module(self) -> str:
        """The runtime module: the name without `.weight` or `.bias`."""
        return self.name.rpartition(".")[0]

    @property
    def is_lm_head(self) -> bool:
        """Whether it is the output projection, which is quantized only on request."""
        return self.name == "lm_head.weight"

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """The distinct checkpoint tensors, in order."""
        return tuple(dict.fromkeys(source.name for source in self.sources))

    def expert_slice(self, tensor: str) -> ExpertSlice | None:
        """The part of the checkpoint tensor `tensor` that it uses; None: the whole tensor."""
        return self.sources_in(tensor)[0].expert

    def sources_in(self, tensor: str) -> tuple[SourceTensor, ...]:
        """The sources in the checkpoint tensor `tensor`, in order. Phi-3's qkv_proj has three."""
        return tuple(source for source in self.sources if source.name == tensor)


def module_name(spec: ModelSpec, name: str) -> str:
    """The checkpoint's name of a runtime module of `MODULES`."""
    return spec.module_names.get(name, MODULES[name])


def source_layer(spec: ModelSpec, index: int) -> str:
    """The prefix of a layer's tensors in the checkpoint. A rank numbers its layers from 0."""
    if spec.draft_head is not None:
        return spec.draft_head.layers[index]
    first_layer = spec.rank.first_layer if spec.rank else 0
    return f"{spec.tensor_prefix}.layers.{first_layer + index}"


def source_module(spec: ModelSpec, index: int, name: str) -> str:
    """The checkpoint's name of a runtime module of a layer, with the layer's prefix."""
    return f"{source_layer(spec, index)}.{module_name(spec, name)}"


def fused_linear_rows(
    spec: ModelSpec,
    name: str,
    fused_source: str | None,
    linears: list[tuple[str, int, Split]],
    has_bias: bool,
    layers: tuple[int, ...],
    input_from: str | None,
) -> Iterator[Parameter]:
    """A runtime linear that concatenates several checkpoint linears of the hidden state.

    fused_source: the checkpoint module that holds all of them, if there is one.
    linears: for each: its checkpoint module (otherwise), its output size and its split.
    """
    for kind in ("weight", "bias") if has_bias else ("weight",):
        columns = (spec.hidden_size,) if kind == "weight" else ()
        sources = []
        first_row = 0
        for module, size, split in linears:
            if fused_source is not None:
                tensor = f"{fused_source}.{kind}"
                sources.append(SourceTensor(tensor, (size, *columns), split, first_row))
            else:
                sources.append(SourceTensor(f"{module}.{kind}", (size, *columns), split))
            first_row += size
        yield Parameter(
            f"{name}.{kind}",
            tuple(sources),
            layers,
            is_linear=kind == "weight",
            input_from=input_from,
        )


def linear_rows(
    name: str,
    source: str,
    shape: tuple[int, int],
    split: Split,
    has_bias: bool,
    layers: tuple[int, ...],
    input_from: str | None,
    is_linear: bool = True,
) -> Iterator[Parameter]:
    """A runtime linear that comes from one checkpoint linear."""
    yield Parameter(
        f"{name}.weight",
        (SourceTensor(f"{source}.weight", shape, split),),
        layers,
        is_linear=is_linear,
        input_from=input_from,
    )
    if has_bias:
        is_row_parallel = split.dim == 1
        bias = SourceTensor(f"{source}.bias", shape[:1], REPLICATED if is_row_parallel else split)
        yield Parameter(
            f"{name}.bias",
            (bias,),
            layers,
            input_from=input_from,
            is_added_once=is_row_parallel,
        )
