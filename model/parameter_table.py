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
from dataclasses import replace

from llmkit.model.classifiers import HEAD_MODULE
from llmkit.model.draft_head_rows import draft_head_rows
from llmkit.model.mla_rows import mla_rows
from llmkit.model.parameter import (
    ExpertSlice,
    Parameter,
    SourceTensor,
    fused_linear_rows,
    linear_rows,
    module_name,
    source_layer,
    source_module,
)
from llmkit.model.recurrent_rows import recurrent_rows
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

# The norms of a layer whose MLP is beside its experts (`MoeSpec.parallel_mlp`).
BESIDE_MLP_NORMS = ("mlp.post_mlp_norm", "mlp.pre_experts_norm", "mlp.post_experts_norm")

# The linears before and after experts of another size (`MoeSpec.latent_size`).
LATENT_LINEARS = ("fc1_latent_proj", "fc2_latent_proj")


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
        first, _ = full.tensor_split.interval(tp_rank, tp)
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
    if spec.draft_head is not None:
        layer_rows = (row for index in range(len(spec.layers)) for row in _layer_rows(spec, index))
        yield from draft_head_rows(spec, spec.draft_head, layer_rows)
        return
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
        source = f"{spec.tensor_prefix}.{module_name(spec, 'norm')}.{kind}"
        norm = SourceTensor(source, (spec.hidden_size,))
        yield Parameter(f"norm.{kind}", (norm,), (num_layers,), input_from=last_linear)
    if spec.num_labels:
        score = SourceTensor(f"{HEAD_MODULE}.weight", (spec.num_labels, spec.hidden_size))
        yield Parameter("score.weight", (score,), (num_layers,), is_float32=True)
    elif not spec.tie_word_embeddings:
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
    return f"{spec.tensor_prefix}.{module_name(spec, 'embed')}.weight"


def _layer_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    name = f"layers.{index}"
    layer = spec.layers[index]
    layers = (index,)
    has_mixer = layer.mixer != "none"
    if has_mixer and spec.pre_norm:
        yield from _norm_rows(spec, index, "attn_norm", spec.hidden_size)
    if layer.mixer == "attention":
        yield from _attention_rows(spec.for_layer(index), index)
    elif layer.mixer == "mla":
        yield from mla_rows(spec, index)
    elif has_mixer:
        yield from recurrent_rows(spec, index)
    if has_mixer and spec.post_norm:
        yield from _norm_rows(spec, index, "attn_post_norm", spec.hidden_size)
    if layer.has_mlp:
        yield from _mlp_block_rows(spec.for_layer(index), index)
    if spec.per_layer_input_size:
        sizes = (spec.per_layer_input_size, spec.hidden_size)
        for module, weight_shape in (
            ("per_layer.gate", sizes),
            ("per_layer.projection", (sizes[1], sizes[0])),
        ):
            yield from linear_rows(
                f"{name}.{module}",
                source_module(spec, index, module),
                weight_shape,
                REPLICATED,
                False,
                layers,
                None,
                is_linear=False,
            )
        yield from _norm_rows(spec, index, "per_layer.norm", spec.hidden_size)
    if spec.layer_scalar:
        scalar = SourceTensor(f"{source_layer(spec, index)}.layer_scalar", (1,))
        yield Parameter(f"{name}.layer_scalar", (scalar,), layers)


def _norm_rows(
    spec: ModelSpec, index: int, module: str, *shape: int, split: Split = REPLICATED
) -> Iterator[Parameter]:
    """The weight of a norm of a layer, and its bias."""
    checkpoint = module_name(spec, module)
    if module == "mlp_norm" and spec.post_norm and module not in spec.module_names:
        # In Llama, `post_attention_layernorm` is the norm before the MLP. In families that
        # normalize the output of attention, it is the norm of that output.
        checkpoint = "pre_feedforward_layernorm"
    is_qk_norm = module.startswith("attn.")
    for kind in ("weight", "bias") if spec.norm_bias and not is_qk_norm else ("weight",):
        tensor = SourceTensor(f"{source_layer(spec, index)}.{checkpoint}.{kind}", shape, split)
        yield Parameter(f"layers.{index}.{module}.{kind}", (tensor,), (index,))


def _attention_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    """The rows of attention, without the norms before and after it.

    spec: with the layer's sizes.
    """
    name = f"layers.{index}"
    layer = spec.layers[index]
    layers = (index,)

    def linear(module: str) -> str:
        return source_module(spec, index, module)

    heads = Split("heads", 0, spec.num_heads, spec.head_dim)
    kv_heads = Split("kv_heads", 0, spec.num_kv_heads, spec.head_dim)
    q_size = spec.num_heads * spec.head_dim
    kv_size = spec.num_kv_heads * spec.head_dim
    projections = [(linear("attn.q"), q_size, heads)]
    if not layer.kv_shared_layer_offset:
        projections.append((linear("attn.k"), kv_size, kv_heads))
    if not layer.kv_shared_layer_offset and not layer.k_eq_v:
        projections.append((linear("attn.v"), kv_size, kv_heads))
    has_gate = spec.attention_gate != "none" and not spec.fused_q_gate
    is_only_reader = spec.pre_norm and not spec.parallel_block and not has_gate
    head = spec.draft_head
    reads_both = head is not None and head.method == "eagle3"
    qkv_rows = fused_linear_rows(
        replace(spec, hidden_size=2 * spec.hidden_size) if reads_both else spec,
        f"{name}.attn.qkv",
        linear("attn.qkv") if spec.fused_qkv else None,
        projections,
        spec.qkv_bias,
        layers,
        f"{name}.attn_norm.weight" if is_only_reader else None,
    )
    for row in qkv_rows:
        yield _with_gate(row, spec.head_dim) if spec.fused_q_gate else row
    if spec.qk_norm == "full":
        yield from _norm_rows(spec, index, "attn.q_norm", q_size, split=heads)
        yield from _norm_rows(spec, index, "attn.k_norm", kv_size, split=kv_heads)
    elif spec.qk_norm == "each_head":
        for module, split in (("attn.q_norm", heads), ("attn.k_norm", kv_heads)):
            yield from _norm_rows(
                spec, index, module, split.count, spec.head_dim, split=replace(split, unit=1)
            )
    elif spec.qk_norm == "head":
        yield from _norm_rows(spec, index, "attn.q_norm", spec.head_dim)
        if not layer.kv_shared_layer_offset:
            yield from _norm_rows(spec, index, "attn.k_norm", spec.head_dim)
    if spec.attention_sinks:
        sinks = SourceTensor(
            f"{source_layer(spec, index)}.self_attn.sinks",
            (spec.num_heads,),
            Split("heads", 0, spec.num_heads, 1),
        )
        yield Parameter(f"{name}.attn.sinks", (sinks,), layers, is_float32=True)
    if has_gate:
        unit = spec.head_dim if spec.attention_gate == "element" else 1
        yield from linear_rows(
            f"{name}.attn.gate",
            linear("attn.gate"),
            (spec.num_heads * unit, spec.hidden_size),
            Split("heads", 0, spec.num_heads, unit),
            False,
            layers,
            None,
            is_linear=spec.attention_gate == "element",
        )
    yield from linear_rows(
        f"{name}.attn.o",
        linear("attn.o"),
        (spec.hidden_size, q_size),
        Split("heads", 1, spec.num_heads, spec.head_dim),
        spec.o_proj_bias,
        layers,
        None if spec.v_norm else f"{name}.attn.qkv.weight",
    )


def _with_gate(row: Parameter, head_dim: int) -> Parameter:
    """The row of queries, keys and values, where q_proj has the gate of each head after its query.

    The runtime tensor has the gates last.
    """
    q, *kv = row.sources
    q = replace(q, block_rows=head_dim, block_step=2 * head_dim)
    return replace(row, sources=(q, *kv, replace(q, first_row=head_dim)))


def _mlp_block_rows(spec: ModelSpec, index: int) -> Iterator[Parameter]:
    """The rows of an MLP or of experts, and of the norms before and after it.

    spec: with the layer's sizes.
    """
    name = f"layers.{index}"
    layer = spec.layers[index]
    layers = (index,)

    def linear(module: str) -> str:
        return source_module(spec, index, module)

    has_mlp_norm = spec.pre_norm and not spec.parallel_block
    if has_mlp_norm:
        yield from _norm_rows(spec, index, "mlp_norm", spec.hidden_size)
    mlp_input = f"{name}.mlp_norm.weight" if has_mlp_norm else None
    has_mlp = not layer.is_moe or (spec.moe is not None and spec.moe.parallel_mlp)
    if layer.is_moe:
        yield from _moe_rows(spec, index, None if has_mlp else mlp_input)
        if has_mlp:
            for module in BESIDE_MLP_NORMS:
                yield from _norm_rows(spec, index, module, spec.hidden_size)
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
                tensor = SourceTensor(f"{source_layer(spec, index)}.mlp.act_fn.{parameter}", shape)
                yield Parameter(f"{name}.mlp.act.{parameter}", (tensor,), layers, is_float32=True)
    if spec.post_norm:
        yield from _norm_rows(spec, index, "mlp_post_norm", spec.hidden_size)


def _moe_rows(spec: ModelSpec, index: int, input_from: str | None) -> Iterator[Parameter]:
    moe = spec.moe
    assert moe is not None
    source = source_layer(spec, index)
    if moe.module:
        source = f"{source}.{moe.module}"
    name = f"layers.{index}.mlp"
    layers = (index,)
    router = linear_rows(
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
        yield from linear_rows(
            f"{name}.shared_expert_gate",
            f"{source}.{moe.shared_expert_gate}",
            (1, spec.hidden_size),
            REPLICATED,
            False,
            layers,
            None,
            is_linear=False,
        )
    if moe.latent_size:
        sizes = (moe.latent_size, spec.hidden_size)
        for module, weight_shape in zip(LATENT_LINEARS, (sizes, sizes[::-1]), strict=True):
            rows = linear_rows(
                f"{name}.{module}",
                f"{source}.{module}",
                weight_shape,
                REPLICATED,
                spec.mlp_bias,
                layers,
                None,
                is_linear=False,
            )
            # The second one reads a rank's part of the sum of experts.
            is_last = module == LATENT_LINEARS[1]
            for row in rows:
                yield replace(row, is_added_once=is_last and row.name.endswith(".bias"))
    expert_spec = replace(
        spec,
        hidden_size=moe.latent_size or spec.hidden_size,
        mlp_bias=moe.expert_bias,
        fused_gate_up=False,
    )
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
        is_interleaved = False
    else:
        tensor = stack.gate_up if spec.gated_mlp else stack.up
        first_rows = [0, 1 if stack.interleaved else moe.intermediate_size][: len(row.sources)]
        is_interleaved = stack.interleaved
    return tuple(
        replace(
            own,
            name=f"{source}.{tensor}{stack.bias_suffix if is_bias else ''}",
            first_row=first_row,
            block_rows=int(is_interleaved),
            block_step=2 * is_interleaved,
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
        yield from fused_linear_rows(
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
        yield from linear_rows(f"{name}.up", up, shape, features, spec.mlp_bias, layers, input_from)
    yield from linear_rows(
        f"{name}.down",
        down,
        (spec.hidden_size, size),
        Split("features", 1, size),
        spec.mlp_bias,
        layers,
        f"{name}.gate_up.weight" if scales_move else None,
    )
