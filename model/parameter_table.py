"""The parameter table: every parameter of a model, the checkpoint tensors it comes from, its split.

All commands read this table: the loader fuses tensors by it, `shard` slices by it, `quantize` walks
through it, and the decoder is built from it. A new architecture needs only a `ModelSpec`
(see families.py).

The first rows for SmolLM2-135M (9 heads and 3 KV heads of 64, hidden size 576):

    name                    shape         made of                                       split
    embed.weight            [49152, 576]  model.embed_tokens.weight                     vocab
    layers.0.attn_norm...   [576]         model.layers.0.input_layernorm.weight         replicated
    layers.0.attn.qkv...    [960, 576]    model.layers.0.self_attn.q_proj.weight  576   heads
                                          model.layers.0.self_attn.k_proj.weight  192   kv_heads
                                          model.layers.0.self_attn.v_proj.weight  192   kv_heads
    layers.0.attn.o...      [576, 576]    model.layers.0.self_attn.o_proj.weight        heads, dim 1

(`...` stands for `.weight`.) `layers.0.attn.qkv.weight` is one runtime tensor. Its rows are those
of q_proj, k_proj and v_proj, in this order. Over 3 ranks each rank holds 3 heads of q_proj and one
KV head of k_proj and v_proj, so the rank's qkv has 192 + 64 + 64 rows. The table row also says that
the weight reads `layers.0.attn_norm.weight` (`input_from`) and that it is quantized (`is_linear`).

Weights have the shape [out, in]. A column-parallel weight splits its rows (dimension 0), a
row-parallel one its columns (dimension 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from llmkit.model.spec import (
    ExpertStack,
    ModelSpec,
    MoeSpec,
    RankSpec,
    TransformersSpec,
    TransformersTensor,
)
from llmkit.model.split import REPLICATED, Split

XIELU_PARAMETERS = ("alpha_p", "alpha_n", "beta", "eps")
# Buffers of attention that old versions of transformers stored.
OLD_BUFFERS = r"\.(attn|attention)\.(masked_)?bias$"
EMBEDDING_STAGE = -1  # in Parameter.layers: the first pipeline stage, with the embedding

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
# The norms of a layer whose MLP is beside its experts (`MoeSpec.parallel_mlp`).
BESIDE_MLP_NORMS = ("mlp.post_mlp_norm", "mlp.pre_experts_norm", "mlp.post_experts_norm")


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
    row_step: int = 1  # the distance of these rows in the checkpoint tensor; 2: every second row
    # Set when the checkpoint tensor holds all experts. The rows are those of this expert's weight.
    expert: ExpertSlice | None = None
    start: tuple[int, int] = (0, 0)  # the row and column of the full model where a rank's begin

    @property
    def rows(self) -> slice:
        """These rows in the checkpoint tensor."""
        end_row = self.first_row + (self.shape[0] - 1) * self.row_step + 1
        return slice(self.first_row, end_row, self.row_step)


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


def parameters(spec: ModelSpec) -> list[Parameter]:
    """The table, in the order of a forward pass.

    For the spec of a rank, it has only the parameters that the rank holds, in the rank's shapes.
    """
    if spec.transformers is not None:
        return _transformers_rows(spec, spec.transformers)
    rank = spec.rank
    if rank is None:
        return list(_model_rows(spec))
    # Runtime names count the layers of a stage from 0.
    full_rows = {(row.source_names, row.expert): row for row in _model_rows(rank.full_model)}
    return [
        _with_starts(row, full_rows[row.source_names, row.expert], rank)
        for row in _model_rows(spec)
        if _is_held_by(row, spec, rank)
    ]


def _with_starts(row: Parameter, full_row: Parameter, rank: RankSpec) -> Parameter:
    """A rank's row of the table, with the places where its sources begin in the full model."""
    tp_rank = rank.tp_rank
    tp = rank.tp_size
    if row.expert is not None:
        tp //= rank.ep_size
        tp_rank %= tp
    sources = []
    for source, full in zip(row.sources, full_row.sources, strict=True):
        first, _ = full.split.interval(tp_rank, tp)
        is_split = full.split.kind != "replicated"
        start = (0, first) if full.split.dim == 1 else (first, 0)
        sources.append(replace(source, start=start) if is_split else source)
    return replace(row, sources=tuple(sources))


def is_redundant(spec: ModelSpec, name: str) -> bool:
    """Whether a checkpoint tensor repeats others or can be computed, and may be left out."""
    if re.search(r"rotary_emb\.inv_freq$", name):
        return True
    if spec.transformers is not None:
        return name in spec.transformers.tied or re.search(OLD_BUFFERS, name) is not None
    # Checkpoints of Gemma 4 have keys and values of layers that read those of another layer.
    prefix = re.escape(spec.tensor_prefix)
    unused = re.match(rf"{prefix}\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.", name)
    layers = spec.full_model.layers
    if unused and int(unused[1]) < len(layers) and layers[int(unused[1])].kv_shared_layer_offset:
        return True
    return spec.tie_word_embeddings and name == f"{spec.lm_head_name}.weight"


def is_carried(spec: ModelSpec, name: str) -> bool:
    """Whether a checkpoint tensor belongs to a part that does not run (see `ModelSpec.carried`)."""
    return name.startswith(spec.carried)


def _is_held_by(row: Parameter, spec: ModelSpec, rank: RankSpec) -> bool:
    if row.expert is not None and spec.moe is not None:
        ranks_per_group = rank.tp_size // rank.ep_size
        experts_per_group = spec.moe.num_experts // rank.ep_size
        return row.expert // experts_per_group == rank.tp_rank // ranks_per_group
    for layer in row.layers:
        if layer == EMBEDDING_STAGE:
            is_held = spec.is_first_stage
        elif layer == len(spec.layers):
            is_held = spec.is_last_stage
        else:
            is_held = True
        if is_held:
            return True
    return False


def _transformers_rows(spec: ModelSpec, model: TransformersSpec) -> list[Parameter]:
    """The table of the fallback: a row for each checkpoint tensor."""
    row_parallel_biases = {
        f"{tensor.name.removesuffix('.weight')}.bias"
        for tensor in model.tensors
        if tensor.split.dim == 1
    }
    rows = [
        Parameter(
            tensor.name,
            (SourceTensor(tensor.source, _shape_on_rank(tensor, spec.rank), tensor.split),),
            (len(spec.layers) if tensor.layer is None else tensor.layer,),
            is_linear=tensor.is_linear,
            is_float32=tensor.is_float32,
            is_added_once=tensor.name in row_parallel_biases,
        )
        for tensor in model.tensors
    ]
    return rows if spec.rank is None else [_with_starts(row, row, spec.rank) for row in rows]


def _shape_on_rank(tensor: TransformersTensor, rank: RankSpec | None) -> tuple[int, ...]:
    """The shape of the part of a tensor that a rank holds; None: of all of it."""
    split = tensor.split
    if rank is None or split.kind == "replicated":
        return tensor.shape
    shape = list(tensor.shape)
    if split.kind == "vocab":
        shape[split.dim] = split.padded_rows(rank.tp_size)
    else:
        intervals = split.intervals(rank.tp_rank, rank.tp_size)
        shape[split.dim] = sum(stop - start for start, stop in intervals)
    return tuple(shape)


def _model_rows(spec: ModelSpec) -> Iterator[Parameter]:
    num_layers = len(spec.layers)
    vocab = Split("vocab", 0, spec.vocab_size)
    shape = (spec.vocab_size, spec.hidden_size)
    embedding = SourceTensor(embedding_tensor(spec), shape, vocab)
    stages = (EMBEDDING_STAGE, num_layers) if spec.tie_word_embeddings else (EMBEDDING_STAGE,)
    yield Parameter("embed.weight", (embedding,), stages)
    if spec.per_layer_input_size:
        yield from _per_layer_input_rows(spec, vocab)
    for index in range(num_layers):
        yield from _layer_rows(spec, index)
    last_linear = f"layers.{num_layers - 1}.mlp.down.weight"
    for kind in ("weight", "bias") if spec.norm_bias else ("weight",):
        source = f"{spec.tensor_prefix}.{_module(spec, 'norm')}.{kind}"
        norm = SourceTensor(source, (spec.hidden_size,))
        yield Parameter(f"norm.{kind}", (norm,), (num_layers,), input_from=last_linear)
    if not spec.tie_word_embeddings:
        head = SourceTensor(f"{spec.lm_head_name}.weight", shape, vocab)
        yield Parameter("lm_head.weight", (head,), (num_layers,), input_from="norm.weight")


def _per_layer_input_rows(spec: ModelSpec, vocab: Split) -> Iterator[Parameter]:
    """The second embedding, which gives every layer a vector for each token."""
    prefix = spec.tensor_prefix
    size = len(spec.full_model.layers) * spec.per_layer_input_size
    layers = (EMBEDDING_STAGE,)
    embedding = SourceTensor(
        f"{prefix}.embed_tokens_per_layer.weight", (spec.vocab_size, size), vocab
    )
    yield Parameter("per_layer.embed.weight", (embedding,), layers)
    projection = SourceTensor(
        f"{prefix}.per_layer_model_projection.weight", (size, spec.hidden_size)
    )
    yield Parameter("per_layer.projection.weight", (projection,), layers)
    norm = SourceTensor(f"{prefix}.per_layer_projection_norm.weight", (spec.per_layer_input_size,))
    yield Parameter("per_layer.norm.weight", (norm,), layers)


def embedding_tensor(spec: ModelSpec) -> str:
    """The checkpoint's name of the embedding."""
    if spec.transformers is not None:
        return next(row.source for row in spec.transformers.tensors if row.name == "embed.weight")
    return f"{spec.tensor_prefix}.{_module(spec, 'embed')}.weight"


def _module(spec: ModelSpec, name: str) -> str:
    """The checkpoint's name of a runtime module of `MODULES`."""
    return spec.module_names.get(name, MODULES[name])


def _layer_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    source = _source_layer(spec, index)
    name = f"layers.{index}"
    layers = (index,)
    layer = spec.layers[index]
    spec = spec.for_layer(index)

    def norm(module: str, *shape: int, split: Split = REPLICATED) -> Iterator[Parameter]:
        checkpoint = _module(spec, module)
        if module == "mlp_norm" and spec.post_norm and module not in spec.module_names:
            # In Llama, `post_attention_layernorm` is the norm before the MLP. In families that
            # normalize the output of attention, it is the norm of that output.
            checkpoint = "pre_feedforward_layernorm"
        is_qk_norm = module.startswith("attn.")
        for kind in ("weight", "bias") if spec.norm_bias and not is_qk_norm else ("weight",):
            tensor = SourceTensor(f"{source}.{checkpoint}.{kind}", shape, split)
            yield Parameter(f"{name}.{module}.{kind}", (tensor,), layers)

    def linear(module: str) -> str:
        return f"{source}.{_module(spec, module)}"

    heads = Split("heads", 0, spec.num_heads, spec.head_dim)
    kv_heads = Split("kv_heads", 0, spec.num_kv_heads, spec.head_dim)
    q_size = spec.num_heads * spec.head_dim
    kv_size = spec.num_kv_heads * spec.head_dim
    if spec.pre_norm:
        yield from norm("attn_norm", spec.hidden_size)
    projections = [(linear("attn.q"), q_size, heads)]
    if not layer.kv_shared_layer_offset:
        projections.append((linear("attn.k"), kv_size, kv_heads))
    if not layer.kv_shared_layer_offset and not layer.k_eq_v:
        projections.append((linear("attn.v"), kv_size, kv_heads))
    has_gate = spec.attention_gate != "none"
    is_only_reader = spec.pre_norm and not spec.parallel_block and not has_gate
    yield from _fused_linear(
        spec,
        f"{name}.attn.qkv",
        linear("attn.qkv") if spec.fused_qkv else None,
        projections,
        spec.qkv_bias,
        layers,
        f"{name}.attn_norm.weight" if is_only_reader else None,
    )
    if spec.qk_norm == "full":
        yield from norm("attn.q_norm", q_size, split=heads)
        yield from norm("attn.k_norm", kv_size, split=kv_heads)
    elif spec.qk_norm == "each_head":
        for module, split in (("attn.q_norm", heads), ("attn.k_norm", kv_heads)):
            yield from norm(module, split.count, spec.head_dim, split=replace(split, unit=1))
    elif spec.qk_norm == "head":
        yield from norm("attn.q_norm", spec.head_dim)
        if not layer.kv_shared_layer_offset:
            yield from norm("attn.k_norm", spec.head_dim)
    if spec.attention_sinks:
        sinks = SourceTensor(
            f"{source}.self_attn.sinks",
            (spec.num_heads,),
            Split("heads", 0, spec.num_heads, 1),
        )
        yield Parameter(f"{name}.attn.sinks", (sinks,), layers, is_float32=True)
    if has_gate:
        unit = spec.head_dim if spec.attention_gate == "element" else 1
        yield from _linear(
            f"{name}.attn.gate",
            linear("attn.gate"),
            (spec.num_heads * unit, spec.hidden_size),
            Split("heads", 0, spec.num_heads, unit),
            False,
            layers,
            None,
            is_linear=spec.attention_gate == "element",
        )
    yield from _linear(
        f"{name}.attn.o",
        linear("attn.o"),
        (spec.hidden_size, q_size),
        Split("heads", 1, spec.num_heads, spec.head_dim),
        spec.o_proj_bias,
        layers,
        None if spec.v_norm else f"{name}.attn.qkv.weight",
    )
    if spec.post_norm:
        yield from norm("attn_post_norm", spec.hidden_size)
    has_mlp_norm = spec.pre_norm and not spec.parallel_block
    if has_mlp_norm:
        yield from norm("mlp_norm", spec.hidden_size)
    mlp_input = f"{name}.mlp_norm.weight" if has_mlp_norm else None
    has_mlp = not layer.is_moe or (spec.moe is not None and spec.moe.parallel_mlp)
    if layer.is_moe:
        yield from _moe_rows(spec, index, None if has_mlp else mlp_input)
        if has_mlp:
            for module in BESIDE_MLP_NORMS:
                yield from norm(module, spec.hidden_size)
    if has_mlp:
        yield from _mlp_rows(
            spec,
            f"{name}.mlp",
            (linear("mlp.gate_up"), linear("mlp.gate"), linear("mlp.up"), linear("mlp.down")),
            spec.intermediate_size,
            layers,
            mlp_input,
        )
        if spec.activation == "xielu":
            for parameter in XIELU_PARAMETERS:
                shape = (1,) if parameter.startswith("alpha") else ()
                tensor = SourceTensor(f"{source}.mlp.act_fn.{parameter}", shape)
                yield Parameter(f"{name}.mlp.act.{parameter}", (tensor,), layers, is_float32=True)
    if spec.post_norm:
        yield from norm("mlp_post_norm", spec.hidden_size)
    if spec.per_layer_input_size:
        sizes = (spec.per_layer_input_size, spec.hidden_size)
        for module, weight_shape in (
            ("per_layer.gate", sizes),
            ("per_layer.projection", (sizes[1], sizes[0])),
        ):
            yield from _linear(
                f"{name}.{module}",
                linear(module),
                weight_shape,
                REPLICATED,
                False,
                layers,
                None,
                is_linear=False,
            )
        yield from norm("per_layer.norm", spec.hidden_size)
    if spec.layer_scalar:
        scalar = SourceTensor(f"{source}.layer_scalar", (1,))
        yield Parameter(f"{name}.layer_scalar", (scalar,), layers)


def _source_layer(spec: ModelSpec, index: int) -> str:
    """The prefix of a layer's tensors in the checkpoint. A rank numbers its layers from 0."""
    first_layer = spec.rank.first_layer if spec.rank else 0
    return f"{spec.tensor_prefix}.layers.{first_layer + index}"


def _moe_rows(spec: ModelSpec, index: int, input_from: str | None) -> Iterator[Parameter]:
    moe = spec.moe
    assert moe is not None
    source = _source_layer(spec, index)
    if moe.module:
        source = f"{source}.{moe.module}"
    name = f"layers.{index}.mlp"
    layers = (index,)
    router = _linear(
        f"{name}.router",
        f"{source}.{moe.router}",
        (moe.num_experts, spec.hidden_size),
        REPLICATED,
        moe.router_bias,
        layers,
        input_from,
        is_linear=False,
    )
    for row in router:
        yield replace(row, is_float32=moe.float32_router)
    if moe.correction_bias is not None:
        shape = moe.correction_bias_shape or (moe.num_experts,)
        bias = SourceTensor(f"{source}.{moe.correction_bias}", shape)
        yield Parameter(f"{name}.router.correction_bias", (bias,), layers, is_float32=True)

    if moe.parallel_mlp:
        for vector, size in (("scale", spec.hidden_size), ("per_expert_scale", moe.num_experts)):
            tensor = SourceTensor(f"{source}.router.{vector}", (size,))
            yield Parameter(f"{name}.router.{vector}", (tensor,), layers)

    if moe.shared_intermediate_size:
        linears = (moe.shared_gate_up, moe.gate, moe.up, moe.shared_down)
        modules = tuple(f"{source}.{moe.shared_expert}.{linear}" for linear in linears)
        size = moe.shared_intermediate_size
        yield from _mlp_rows(spec, f"{name}.shared_expert", modules, size, layers, None)
    if moe.shared_expert_gate is not None:
        yield from _linear(
            f"{name}.shared_expert_gate",
            f"{source}.{moe.shared_expert_gate}",
            (1, spec.hidden_size),
            REPLICATED,
            False,
            layers,
            None,
            is_linear=False,
        )
    expert_spec = replace(spec, mlp_bias=moe.expert_bias, fused_gate_up=False)
    for expert in range(moe.num_experts):
        linears = ("", moe.gate, moe.up, moe.down)  # gate and up have tensors of their own
        modules = tuple(f"{source}.{moe.experts}.{expert}.{linear}" for linear in linears)
        size = moe.intermediate_size
        runtime = f"{name}.experts.{expert}"
        for row in _mlp_rows(expert_spec, runtime, modules, size, layers, None):
            sources = row.sources
            if moe.expert_stack is not None:
                sources = _stacked_sources(spec, moe, moe.expert_stack, source, expert, row)
            yield replace(row, sources=sources, expert=expert)


def _stacked_sources(
    spec: ModelSpec,
    moe: MoeSpec,
    stack: ExpertStack,
    source: str,
    expert: int,
    row: Parameter,
) -> tuple[SourceTensor, ...]:
    """Where the rows of one expert lie in the tensors of all experts.

    row: that of an expert that is stored on its own.
    """
    first_expert = 0
    num_experts = moe.num_experts
    if spec.rank is not None:
        num_experts //= spec.rank.ep_size
        ranks_per_group = spec.rank.tp_size // spec.rank.ep_size
        first_expert = spec.rank.tp_rank // ranks_per_group * num_experts
    is_bias = row.name.endswith(".bias")
    part = ExpertSlice(expert - first_expert, num_experts, stack.transposed and not is_bias)
    if row.module.endswith(".down"):
        tensor = stack.down
        first_rows = [0]
        row_step = 1
    else:
        tensor = stack.gate_up
        first_rows = [0, 1 if stack.interleaved else moe.intermediate_size]
        row_step = 2 if stack.interleaved else 1
    return tuple(
        replace(
            own,
            name=f"{source}.{tensor}{stack.bias_suffix if is_bias else ''}",
            first_row=first_row,
            row_step=row_step,
            expert=part,
        )
        for own, first_row in zip(row.sources, first_rows, strict=True)
    )


def _mlp_rows(
    spec: ModelSpec,
    name: str,
    modules: tuple[str, ...],
    size: int,
    layers: tuple[int, ...],
    input_from: str | None,
) -> Iterator[Parameter]:
    """The linears of an MLP, `size` features wide.

    modules: the checkpoint's modules of gate and up in one, of gate, of up and of down.
    """
    gate_up, gate, up, down = modules
    features = Split("features", 0, size)
    # The output of up is multiplied, unless it is clamped first.
    scales_move = spec.gated_mlp and spec.activation != "swiglu_clamped"
    if spec.gated_mlp:
        yield from _fused_linear(
            spec,
            f"{name}.gate_up",
            gate_up if spec.fused_gate_up else None,
            [(gate, size, features), (up, size, features)],
            spec.mlp_bias,
            layers,
            input_from,
        )
    else:
        shape = (size, spec.hidden_size)
        yield from _linear(f"{name}.up", up, shape, features, spec.mlp_bias, layers, input_from)
    yield from _linear(
        f"{name}.down",
        down,
        (spec.hidden_size, size),
        Split("features", 1, size),
        spec.mlp_bias,
        layers,
        f"{name}.gate_up.weight" if scales_move else None,
    )


def _fused_linear(
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


def _linear(
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
