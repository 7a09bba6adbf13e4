"""A draft head as a model of its layers: the MTP head of a checkpoint, or an EAGLE-3 head.

`wrappers.find_mtp_head` recognizes MTP heads by their tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import FLOATS
from llmkit.common.errors import InputError
from llmkit.model.checkpoint_tensors import checkpoint_tensors, kv_scales
from llmkit.model.families import model_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import DraftHeadSpec, ExpertStack, ModelSpec

EAGLE3_ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3DraftModel",
    "Eagle3Speculator",
)
# Where checkpoints have the decoder layer of an EAGLE-3 head: the layout of the paper's
# checkpoints, and that of the `speculators` library.
EAGLE3_LAYERS = ("midlayer", "layers.0", "model.midlayer", "model.layers.0")
# What heads that compute something else say in their configs.
EAGLE3_VARIANTS = ("norm_before_fc", "fc_norm", "norm_output")


def mtp_model_spec(spec: ModelSpec, tensors: Mapping[str, tuple[int, ...]]) -> ModelSpec | None:
    """The MTP head of a model as a model of its layers; None when it has none that can draft.

    tensors: the shapes of the checkpoint's tensors.
    """
    head = spec.mtp
    if head is None:
        return None
    moe = spec.moe
    moe_layers = [
        name for name, layer in zip(head.layers, head.layer_specs, strict=True) if layer.is_moe
    ]
    if moe is not None and moe_layers:
        # The layers of the model and that of the head may store experts differently.
        stack = moe.expert_stack or ExpertStack()
        module = ".".join(filter(None, (moe_layers[0], moe.module)))
        is_stacked = f"{module}.{stack.down}" in tensors
        moe = replace(moe, expert_stack=stack if is_stacked else None)
    return replace(
        spec,
        layers=head.layer_specs,
        moe=moe,
        carried=(),
        per_layer_input_size=0,
        recurrent=None,
        mtp=None,
        draft_head=head,
    )


def with_own_embedding(spec: ModelSpec, name: str) -> ModelSpec:
    """The same head with an embedding of its own: the checkpoint's tensor `name`."""
    assert spec.draft_head is not None
    head = replace(spec.draft_head, embed=name.removesuffix(".weight"))
    return replace(spec, draft_head=head)


def with_dense_modules(checkpoint: Checkpoint, spec: ModelSpec) -> Checkpoint:
    """The same checkpoint, whose quantization leaves out what it stores of a head as it was.

    Configs seldom say which parts of an MTP head are not quantized: DeepSeek-V3's projection is
    none of the modules that its config lists, and other checkpoints have a whole head in 16 bits.
    """
    quantization = checkpoint.quantization
    if quantization is None:
        return checkpoint
    dense: list[str] = []
    for row in parameters(spec):
        for name in row.source_names if row.is_linear or row.is_lm_head else ():
            info = checkpoint.tensors.get(name)
            if info is not None and info.dtype in FLOATS and name.endswith(".weight"):
                dense.append(name.removesuffix(".weight"))
    ignore = (*quantization.ignore, *dense)
    kv = quantization.kv
    for row in parameters(spec):
        if any(name not in checkpoint.tensors for name in kv_scales(row, quantization).values()):
            kv = ""  # the head is as it was; its cache has the model's dtype
    return replace(checkpoint, quantization=replace(quantization, ignore=ignore, kv=kv))


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an EAGLE-3 head."""
    architectures = config.get("architectures") or []
    return (
        config.get("speculators_model_type") == "eagle3"
        or any(name in EAGLE3_ARCHITECTURES for name in architectures)
        or ("draft_vocab_size" in config and not config.get("num_nextn_predict_layers"))
    )


def eagle3_model_spec(checkpoint: Checkpoint, target: ModelSpec) -> ModelSpec:
    """The EAGLE-3 head of a checkpoint as a model of one layer.

    target: the model that it drafts for. Raises InputError when it cannot.
    """
    config = checkpoint.config
    own = config.get("transformer_layer_config", config)  # of `speculators`
    _refuse_eagle3_variants(checkpoint, config | (config.get("eagle_config") or {}), own)
    tensors = checkpoint.tensor_shapes
    layer = next((name for name in EAGLE3_LAYERS if f"{name}.hidden_norm.weight" in tensors), None)
    if layer is None:
        raise InputError(
            f"{checkpoint.reference} is an EAGLE-3 head without a hidden_norm",
            f"Its layer as {' or '.join(EAGLE3_LAYERS[:2])} was expected",
        )
    # The original heads say how many tokens they know only by the size of their output projection.
    prefix = "model." if layer.startswith("model.") else ""
    llama = {"num_hidden_layers": 1, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    spec = model_spec({**own, **llama})
    lm_head = "lm_head" if "lm_head.weight" in tensors else None
    embed = f"{prefix}embed_tokens"
    has_embed = f"{embed}.weight" in tensors
    target_size = target.hidden_size
    if not has_embed and spec.hidden_size != target_size:
        raise InputError(
            f"the EAGLE-3 head {checkpoint.reference} has the hidden size {spec.hidden_size} and no"
            f" embedding, and the model has {target_size}",
            "A head of this model was expected",
        )
    head = DraftHeadSpec(
        "eagle3",
        (layer,),
        spec.layers[:1],
        embed_norm=f"{layer}.input_layernorm",
        hidden_norm=f"{layer}.hidden_norm",
        fc=f"{prefix}fc",
        norm=f"{prefix}norm",
        aux_layers=_aux_layers(config, len(target.layers)),
        target_hidden_size=target_size,
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        embed=embed if has_embed else None,
        lm_head=lm_head,
        draft_vocab_size=tensors["lm_head.weight"][0] if lm_head else 0,
    )
    if spec.vocab_size != target.vocab_size:
        raise InputError(
            f"the EAGLE-3 head {checkpoint.reference} is for {spec.vocab_size} tokens and the model"
            f" has {target.vocab_size}",
            "A head of this model was expected",
        )
    if lm_head and head.draft_vocab_size != spec.vocab_size and "d2t" not in tensors:
        raise InputError(
            f"{checkpoint.reference} has no tensor d2t",
            f"The model's token of each of its {head.draft_vocab_size} tokens was expected",
        )
    # The output projection is a row of the table of its own, which the embedding is not tied to.
    return replace(
        spec, architecture=target.architecture, draft_head=head, tie_word_embeddings=False
    )


def _refuse_eagle3_variants(
    checkpoint: Checkpoint, config: Mapping[str, Any], layer_config: Mapping[str, Any]
) -> None:
    """Raises InputError for a head that computes something else than the paper's."""
    variants = [name for name in EAGLE3_VARIANTS if config.get(name)]
    if config.get("use_aux_hidden_state") is False:
        variants.append("use_aux_hidden_state false")
    if layer_config.get("num_hidden_layers", 1) != 1:
        variants.append(f"num_hidden_layers {layer_config['num_hidden_layers']}")
    norms = [
        name for name in checkpoint.tensors if name.endswith((".q_norm.weight", ".k_norm.weight"))
    ]
    if variants or norms:
        raise InputError(
            f"the EAGLE-3 head {checkpoint.reference} has {', '.join(variants + norms[:2])}",
            "One layer as Llama's that reads three layers of the model was expected",
            "Choose another head, or draft in another way, such as --speculate suffix",
        )


def check_draft_head(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises InputError unless a checkpoint has all tensors of a draft head. No tensor is read."""
    for name, (_, packed) in checkpoint_tensors(spec, checkpoint.quantization).items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise InputError(
                f"{checkpoint.reference} has a draft head without the tensor {name}",
                "A complete head was expected",
                "Draft in another way, such as --speculate ngram",
            )
        is_float = not packed.dtype or packed.dtype in FLOATS
        if not packed.accepts(info.shape) or info.dtype not in (
            FLOATS if is_float else (packed.dtype,)
        ):
            raise InputError(
                f"tensor {name} of the draft head has shape {list(info.shape)} and dtype"
                f" {info.dtype}",
                f"Shape {list(packed.shape)}, in {packed.dtype or 'floats'} was expected",
            )


def _aux_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers of the model whose inputs an EAGLE-3 head reads."""
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    ids = ids or (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not ids:  # those of the paper's code
        ids = (min(2, num_layers), num_layers // 2, max(0, num_layers - 3))
    if not _are_layers(ids, num_layers):
        raise InputError(
            f"the EAGLE-3 head reads the layers {ids}",
            f"Numbers of the model's layers were expected, 0 to {num_layers}",
        )
    return tuple(ids)


def _are_layers(ids: object, num_layers: int) -> bool:
    return (
        isinstance(ids, Sequence)
        and len(ids) > 0
        and all(isinstance(index, int) and 0 <= index <= num_layers for index in ids)
    )
