"""Makes a `ModelSpec` from a Hugging Face config: a table of families, with a function for each.

A family's function returns only what differs from Llama. To add a family: a function in one of the
modules of families that are imported here, its defaults in checkpoint/config_defaults.py, and a
parity test against transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.config_defaults import FAMILIES
from llmkit.checkpoint.hf_config import complete_config
from llmkit.common.errors import InputError
from llmkit.model.classifiers import (
    is_classifier,
    not_supported,
    num_labels,
    text_architecture,
)
from llmkit.model.dense_families import DENSE_FAMILIES
from llmkit.model.family_fields import (
    FamilyFunction,
    activation,
    equal_layers,
    rope,
    rope_parameters,
)
from llmkit.model.gemma4_family import gemma4
from llmkit.model.hybrid_families import HYBRID_FAMILIES
from llmkit.model.mla_families import MLA_FAMILIES
from llmkit.model.moe_families import MOE_FAMILIES
from llmkit.model.parameter import source_module
from llmkit.model.parameter_table import embedding_tensor
from llmkit.model.qwen3_next_families import QWEN3_NEXT_FAMILIES
from llmkit.model.spec import ExpertStack, GatedDeltaNetSpec, ModelSpec
from llmkit.model.wrappers import (
    WRAPPERS,
    architecture_of,
    find_mtp_head,
    mtp_prefixes,
    text_model,
)

if TYPE_CHECKING:
    from llmkit.checkpoint.checkpoint import Checkpoint

# By architecture: its model_type and its function.
SUPPORTED: dict[str, tuple[str, FamilyFunction]] = {
    **DENSE_FAMILIES,
    **MOE_FAMILIES,
    **QWEN3_NEXT_FAMILIES,
    **HYBRID_FAMILIES,
    **MLA_FAMILIES,
    "Gemma4ForCausalLM": ("gemma4_text", gemma4),
}
# Architectures that transformers' modeling code does not run here either, and why.
_INDEXER = "an indexer chooses the tokens that each token attends to (sparse attention)"
NOT_SUPPORTED = {
    "DeepseekV32ForCausalLM": _INDEXER,
    "GlmMoeDsaForCausalLM": _INDEXER,
    "DeepseekV4ForCausalLM": "its attention reads compressed parts of the context",
}
# What config.json of some checkpoints of a family says as its model_type.
OTHER_MODEL_TYPES = ("kimi_k2",)
# Other prefixes and names of the output projection in checkpoints of an architecture: those of
# transformers' modules, and of Mamba-Codestral.
OTHER_NAMES = {
    "NemotronHForCausalLM": ("model", "lm_head"),
    "Mamba2ForCausalLM": ("model.backbone", "model.lm_head"),
}

NO_TENSORS: Mapping[str, tuple[int, ...]] = MappingProxyType({})


def checkpoint_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a checkpoint, with the names that its tensors have. Raises as `model_spec`."""
    return model_spec(checkpoint.config, checkpoint.tensor_shapes)


def model_spec(
    config: dict[str, Any], tensors: Mapping[str, tuple[int, ...]] = NO_TENSORS
) -> ModelSpec:
    """The spec of a checkpoint's config.json.

    tensors: the shapes of the checkpoint's tensors. Their names say how a multimodal checkpoint
    names its text model, which the config does not. Use `checkpoint_spec` where there is a
    checkpoint.

    An architecture that is not in the tables runs by transformers' own modeling code, the fallback,
    where that is possible (`ModelSpec.transformers`). Remote code is never run: `auto_map` is
    ignored.

    Raises InputError for an unsupported architecture, and for values that its family does not
    allow.
    """
    architecture = architecture_of(config)
    if is_classifier(architecture):
        return _classifier_spec(config, tensors)
    text = text_model(config, tensors)
    names: dict[str, Any] = {}  # the fields of ModelSpec about the checkpoint's names
    if text is not None:
        model_type = text.model_type
        family = _text_family(model_type)
        config = text.config
        names = {
            "tensor_prefix": text.names.prefix,
            "lm_head_name": text.names.lm_head,
            "carried": text.carried,
        }
    elif architecture in NOT_SUPPORTED:
        raise InputError(
            f"unsupported architecture ({architecture}): {NOT_SUPPORTED[architecture]}",
            "A model whose layers attend to all tokens of the context or of a window",
            "DeepseekV3ForCausalLM is the nearest architecture that runs",
        )
    elif architecture not in SUPPORTED:
        return _fallback_spec(config, tensors)
    else:
        model_type, family = SUPPORTED[architecture]
        if config.get("model_type") not in (*FAMILIES, *OTHER_MODEL_TYPES):
            raise InputError(
                f"config.json has model_type {config.get('model_type')!r}",
                f"{model_type}, as its architecture says",
            )
    completed = complete_config(config, model_type)
    differences = family(completed)
    values: dict[str, Any] = {
        "hidden_size": completed.hidden_size,
        "num_heads": completed.num_attention_heads,
        "num_kv_heads": completed.num_key_value_heads,
        "head_dim": completed.head_dim,
        "intermediate_size": completed.intermediate_size,
        "vocab_size": completed.vocab_size,
        "max_position_embeddings": completed.max_position_embeddings,
        "rms_norm_eps": completed.rms_norm_eps,
        "tie_word_embeddings": completed.tie_word_embeddings,
        "attention_scale": completed.head_dim**-0.5,
    }
    # These are computed only for families that use them: their config may lack the fields.
    if "layers" not in differences:
        values["layers"] = equal_layers(completed, None)
    if "ropes" not in differences:
        values["ropes"] = {"global": rope(completed, rope_parameters(completed))}
    if "activation" not in differences:
        values["activation"] = activation(completed.hidden_act)
    spec = ModelSpec(architecture=architecture, **(values | differences | names))
    if not spec.num_recurrent_layers:  # Granite 4 Micro is of a hybrid's architecture
        spec = replace(spec, recurrent=None)
    if text is None:
        spec = _with_stored_names(spec, tensors)
    spec = _with_stored_gates(spec, tensors)
    if text is not None and text.expert_stack is not None and spec.moe is not None:
        spec = replace(spec, moe=replace(spec.moe, expert_stack=text.expert_stack))
    if _stores_experts_one_by_one(spec, tensors):
        spec = unstack_experts(spec)
    elif spec.moe is not None and spec.moe.expert_stack is None:
        stack = stored_expert_stack(spec, tensors)
        spec = replace(spec, moe=replace(spec.moe, expert_stack=stack))
    mtp = mtp_prefixes(config, spec.tensor_prefix, len(spec.layers), tensors)
    spec = replace(spec, carried=(*spec.carried, *mtp), mtp=find_mtp_head(spec, tensors))
    if spec.num_heads % spec.num_kv_heads:
        raise InputError(
            f"{spec.num_heads} heads and {spec.num_kv_heads} KV heads",
            "num_attention_heads must be a multiple of num_key_value_heads",
        )
    _check_values(spec)
    return spec


def _classifier_spec(config: dict[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The spec of a model with a classification head: its text model's, with another head."""
    architecture = architecture_of(config)
    text = text_architecture(architecture)
    if text not in SUPPORTED:
        raise not_supported(architecture)
    spec = model_spec({**config, "architectures": [text]}, tensors)
    return replace(
        spec,
        architecture=architecture,
        num_labels=num_labels(config),
        tie_word_embeddings=False,
        # Neither a head that drafts tokens nor changes to a token's logits have a meaning here.
        mtp=None,
        logit_scale=1.0,
        final_logit_softcapping=None,
    )


def _with_stored_names(spec: ModelSpec, tensors: Collection[str]) -> ModelSpec:
    """The spec with the names of OTHER_NAMES, if a checkpoint's tensors have them."""
    if spec.architecture not in OTHER_NAMES:
        return spec
    prefix, lm_head = OTHER_NAMES[spec.architecture]
    other = replace(spec, tensor_prefix=prefix, lm_head_name=lm_head)
    return other if embedding_tensor(other) in tensors else spec


def _with_stored_gates(spec: ModelSpec, tensors: Collection[str]) -> ModelSpec:
    """The spec with `quantized_gates`, if a checkpoint has scales for beta and decay."""
    gdn = spec.recurrent
    if not isinstance(gdn, GatedDeltaNetSpec):
        return spec
    index = next(i for i, layer in enumerate(spec.layers) if layer.mixer == "gated_delta_net")
    module = source_module(spec, index, "gdn.ba" if gdn.fused_projections else "gdn.b")
    stored = {name.removeprefix(f"{module}.") for name in tensors if name.startswith(f"{module}.")}
    return replace(spec, recurrent=replace(gdn, quantized_gates=bool(stored - {"weight"})))


def unstack_experts(spec: ModelSpec) -> ModelSpec:
    """The spec of the same model in a checkpoint that stores experts one by one.

    Quantized checkpoints do so, because their formats are of linear layers.
    """
    if spec.moe is None:
        return spec
    return replace(spec, moe=replace(spec.moe, expert_stack=None))


def _stores_experts_one_by_one(spec: ModelSpec, tensors: Collection[str]) -> bool:
    """Whether the names of a checkpoint's tensors have the numbers of experts."""
    if spec.moe is None or spec.moe.expert_stack is None:
        return False
    experts = re.compile(rf"\.{re.escape(spec.moe.experts)}\.\d+\.")
    prefix = f"{spec.tensor_prefix}.layers."
    return any(name.startswith(prefix) and experts.search(name) for name in tensors)


def stored_expert_stack(
    spec: ModelSpec, tensors: Mapping[str, tuple[int, ...]]
) -> ExpertStack | None:
    """How a checkpoint stores all experts of a layer in one tensor; None: it has no such tensor.

    transformers writes them so where it is not told to write the names of the hub.
    """
    moe = spec.moe
    assert moe is not None
    stack = ExpertStack()
    layer = next((index for index, layer in enumerate(spec.layers) if layer.is_moe), 0)
    shape = tensors.get(f"{spec.tensor_prefix}.layers.{layer}.{moe.module}.{stack.down}")
    if shape is None:
        return None
    # Some files of the hub have [experts, in, out].
    out_features = moe.latent_size or spec.hidden_size
    return replace(stack, transposed=shape[-2:-1] != (out_features,))


def _check_values(spec: ModelSpec) -> None:
    """Raises InputError for values that contradict each other."""
    if any(spec.for_layer(index).head_dim % 2 for index in range(len(spec.layers))):
        raise InputError(f"config.json has head_dim {spec.head_dim}", "An even number was expected")
    if spec.activation == "xielu" and spec.gated_mlp:
        raise InputError(f"{spec.architecture} with the activation xielu", "One of its family")
    moe = spec.moe
    if moe is None or not any(layer.is_moe for layer in spec.layers):
        return
    if not 1 <= moe.num_experts_per_tok <= moe.num_experts:
        raise InputError(
            f"config.json has {moe.num_experts} experts and {moe.num_experts_per_tok} of them"
            " for each token",
            "At least one for each token, and no more than there are",
        )
    if moe.topk_groups < moe.num_groups and moe.num_experts < 2 * moe.num_groups:
        raise InputError(
            f"config.json has {moe.num_experts} experts in {moe.num_groups} groups",
            "At least two in each group",
        )


# What a user is told when a model runs by the fallback, and what that costs.
FALLBACK = (
    "fallback: no family of llmkit's own, runs by transformers' modeling code; slower (projections"
    " are not fused, no recorded decode steps), whole in memory to calibrate, no adapters, no --pp"
)


def require_native(spec: ModelSpec, feature: str) -> None:
    """Raises InputError for the fallback, which lacks the feature."""
    if spec.transformers is not None:
        raise InputError(
            f"{feature} is not possible with {spec.architecture}: it is no family of llmkit's own"
            " and runs by transformers' modeling code",
            expected=_nearest(spec.architecture),
            todo="Leave it out, or use another model",
        )


def require_tp_plan(spec: ModelSpec) -> None:
    """Raises InputError for a model whose tensors cannot be split over ranks."""
    if spec.transformers is not None and spec.transformers.tp_refusal:
        raise InputError(
            f"sharding is not possible with {spec.architecture}: it is no family of llmkit's own"
            f" and runs by transformers' modeling code, and {spec.transformers.tp_refusal}",
            expected=_nearest(spec.architecture),
            todo="Serve it on one rank; llmkit quantize makes it smaller",
        )


def support(spec: ModelSpec) -> tuple[str, str]:
    """How a model runs, "native" or "fallback", and why."""
    if spec.transformers is None:
        family = "a family of llmkit's own"
        return "native", f"its text model is {family}" if spec.architecture in WRAPPERS else family
    ranks = "on several ranks (TP), too"
    if spec.transformers.tp_refusal:
        ranks = f"on one rank, because {spec.transformers.tp_refusal}"
    return "fallback", f"no family of llmkit's own; runs by transformers' modeling code, {ranks}"


def _fallback_spec(config: dict[str, Any], tensors: Collection[str]) -> ModelSpec:
    """The spec of a model that runs by transformers' own modeling code."""
    # transformers' modeling code takes seconds to import, and only the fallback needs it.
    from llmkit.model.transformers_spec import UnsupportedError, transformers_spec

    architecture = architecture_of(config)
    try:
        return transformers_spec(config, tensors)
    except UnsupportedError as error:
        remote = ""
        if "auto_map" in config:
            names = ", ".join(sorted(config["auto_map"]))
            remote = f"; nor does its auto_map ({names}): remote code is never run"
        raise InputError(
            f"unsupported architecture ({architecture}): it is no family of llmkit's own, and"
            f" transformers' modeling code does not help: {error}{remote}",
            _nearest(architecture),
            f"docs/models.md lists the {len(SUPPORTED) + len(WRAPPERS)} supported architectures",
        ) from error


def _nearest(architecture: str) -> str:
    """A sentence with the supported architecture of a similar name; empty when there is none."""
    stems: dict[str, str] = {}
    for name in (*SUPPORTED, *WRAPPERS):
        stems.setdefault(_stem(name), name)
    matches = get_close_matches(_stem(architecture), stems, n=1, cutoff=0.7)
    if not matches:
        return ""
    return f"The supported architecture with the most similar name is {stems[matches[0]]}"


def _stem(architecture: str) -> str:
    """The part of an architecture's name that tells families apart."""
    for ending in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"):
        architecture = architecture.removesuffix(ending)
    return architecture.lower()


def _text_family(model_type: str) -> FamilyFunction:
    """The family of a multimodal model's text model."""
    for family_type, family in SUPPORTED.values():
        if family_type == model_type:
            return family
    known = dict.fromkeys(family_type for family_type, _ in SUPPORTED.values())
    raise InputError(
        f"config.json has a text_config of model_type {model_type!r}, which is not supported",
        f"One of {', '.join(known)}",
    )
