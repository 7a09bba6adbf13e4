"""The specs of models that run by transformers' own modeling code: the fallback.

No family's fields are read. The model is built on the meta device, where tensors have no values,
and one forward pass is traced: it shows the heads and windows of every layer, and whether the model
can run with a paged KV cache at all.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmkit.common.errors import InputError
from llmkit.model.parameter_table import is_redundant
from llmkit.model.spec import LayerSpec, ModelSpec, TransformersSpec, TransformersTensor
from llmkit.model.split import REPLICATED, Split
from llmkit.model.transformers_tp_plan import AttentionHeads, NoSplitError, tensor_splits
from llmkit.model.wrappers import mtp_prefixes

TRACED_ATTENTION = "llmkit_traced"
NUM_TRACED_TOKENS = 3
# Keyword arguments of attention functions that change nothing here: positions are applied before.
KNOWN_TENSORS = {"position_ids", "cache_position", "position_embeddings"}
# Layers whose past is keys and values. Every other type of layer keeps another state or mask.
KNOWN_LAYER_TYPES = {"full_attention", "attention", "sliding_attention"}
# RoPE frequencies that depend on the longest request of a step.
DYNAMIC_ROPES = {"dynamic", "longrope"}


class UnsupportedError(Exception):
    """The fallback cannot run this model. The message is the reason, in a few words."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None
    is_causal: bool
    tensors: tuple[str, ...]  # arguments that `paged_attention` has no place for


@dataclass
class Trace:
    """What a forward pass showed."""

    calls: list[AttentionCall] = field(default_factory=list)
    mask_windows: set[int | None] = field(default_factory=set)  # of the masks that were made


_trace: ContextVar[Trace] = ContextVar("_trace")


def _traced_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function that only notes how it was called. query: [1, N, T, D]."""
    is_causal = arguments.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    others = {
        name
        for name, argument in arguments.items()
        if isinstance(argument, torch.Tensor) and name != "s_aux"
    }
    others -= KNOWN_TENSORS
    if attention_mask is not None:
        others.add("attention_mask")
    call = AttentionCall(
        module,
        query.shape[1],
        key.shape[1],
        key.shape[-1],
        value.shape[-1],
        arguments.get("sliding_window"),
        bool(is_causal),
        tuple(sorted(others)),
    )
    _trace.get().calls.append(call)
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _traced_mask(local_size: int | None = None, **_: Any) -> None:
    """A mask function that only notes which window the mask is for."""
    _trace.get().mask_windows.add(local_size)


ALL_ATTENTION_FUNCTIONS.register(TRACED_ATTENTION, _traced_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(TRACED_ATTENTION, _traced_mask)


@dataclass
class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Has every field that one of transformers' decoders returns."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    shared_kv_states: dict[str, Any] | None = None


class GivenHiddenStates(nn.Module):
    """Takes the decoder's place, so that the model computes the logits of given hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None  # [1, T, H]

    def forward(self, *_: Any, **__: Any) -> DecoderOutput:
        """Returns the hidden states as a decoder does."""
        return DecoderOutput(last_hidden_state=self.hidden)


def transformers_spec(config: dict[str, Any], names: Collection[str] = ()) -> ModelSpec:
    """The spec of a checkpoint's config.json. Raises UnsupportedError with the reason.

    names: of the checkpoint's tensors. Some checkpoints leave out the prefix of the decoder, and
    transformers adds it ("h.0.ln_1.weight" in GPT-2).
    """
    weightless = {
        key: value
        for key, value in config.items()
        if key not in ("auto_map", "quantization_config", "dtype", "torch_dtype")
    }
    spec, unused = _spec_of(json.dumps(weightless, sort_keys=True))
    assert spec.transformers is not None
    prefix = f"{spec.tensor_prefix}."
    if names and not any(name.startswith(prefix) for name in names):
        tensors = tuple(
            replace(tensor, source=tensor.source.removeprefix(prefix))
            for tensor in spec.transformers.tensors
        )
        spec = replace(spec, transformers=replace(spec.transformers, tensors=tensors))
    return replace(spec, carried=_carried_prefixes(spec, config, names, unused))


@lru_cache(maxsize=4)
def _spec_of(config_json: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec, and patterns of the names of tensors that transformers does not load."""
    config = json.loads(config_json)
    model_class = _model_class(config)
    try:
        model = build_model(config, TRACED_ATTENTION, torch.float32)
    except Exception as error:  # whatever transformers raises for values that it does not allow
        raise InputError(
            f"config.json is no {model_class.__name__} that transformers can build"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})",
            "Values that the model's config class allows were expected",
        ) from error
    _check_config(model.config)
    trace = Trace()
    token = _trace.set(trace)
    try:
        hidden, logits = _trace_forward(model)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever a modeling file raises on the meta device
        raise UnsupportedError(
            f"its forward pass cannot be traced ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:80] if str(error) else 'no message'})"
        ) from error
    finally:
        _trace.reset(token)
    layers, prefixes = _traced_layers(model, trace)
    first = trace.calls[0]
    tensors = _tensors(model, prefixes)
    splits: dict[str, Split] = {}
    tp_refusal = ""
    try:
        splits = tensor_splits(model, tensors, _attention_heads(model, trace))
    except NoSplitError as error:
        tp_refusal = str(error)
    widths = [
        tensor.shape[0] for tensor in tensors if tensor.is_linear and tensor.layer is not None
    ]
    heads = [tensor.source for tensor in tensors if tensor.name == "lm_head.weight"]
    spec = ModelSpec(
        architecture=model_class.__name__,
        hidden_size=hidden.shape[-1],
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        intermediate_size=max(widths, default=4 * hidden.shape[-1]),
        vocab_size=logits.shape[-1],
        max_position_embeddings=_max_positions(model.config),
        layers=layers,
        ropes={},
        tensor_prefix=model.base_model_prefix,
        tie_word_embeddings=not heads,
        lm_head_name=heads[0].removesuffix(".weight") if heads else "lm_head",
        transformers=TransformersSpec(
            config,
            tuple(prefix.removesuffix(".") for prefix in prefixes),
            tuple(
                replace(tensor, split=splits.get(tensor.source, REPLICATED)) for tensor in tensors
            ),
            tuple(sorted(model.all_tied_weights_keys)),
            tp_refusal,
        ),
    )
    return spec, tuple(sorted(model._keys_to_ignore_on_load_unexpected or ()))


def _model_class(config: dict[str, Any]) -> Any:
    """The class of the architecture, which must be transformers' own causal LM of its type."""
    architecture = (config.get("architectures") or ["(none)"])[0]
    model_type = str(config.get("model_type"))
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != architecture:
        known = getattr(transformers, architecture, None) is not None
        raise UnsupportedError(
            f"transformers {transformers.__version__} has it, but not as a causal language model"
            if known
            else f"transformers {transformers.__version__} has no causal language model"
            f" {architecture} of model_type {model_type}"
        )
    model_class = getattr(transformers, architecture)
    if model_class._is_stateful:
        raise UnsupportedError("its layers keep a recurrent state besides keys and values")
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        raise UnsupportedError("its forward pass takes no position_ids")
    if not model_class._can_set_attn_implementation():
        raise UnsupportedError("its modeling code does not use the registry of attention functions")
    if not model_class._supports_flash_attn:
        raise UnsupportedError("its attention is more than causal attention within a window")
    return model_class


def build_model(config: dict[str, Any], attention: str, dtype: torch.dtype) -> Any:
    """The model on the meta device, with the attention function `attention`."""
    model_config = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model_class = getattr(transformers, config["architectures"][0])
    # On the meta device, only this one of transformers' implementations of experts can be traced.
    experts = {"experts_implementation": "batched_mm"} if attention == TRACED_ATTENTION else {}
    if not model_class._can_set_experts_implementation():
        experts = {}
    with torch.device("meta"):
        model = model_class._from_config(
            model_config, attn_implementation=attention, dtype=dtype, **experts
        )
    # Otherwise some models search every step for padding, to warn of it.
    model.config.pad_token_id = None
    return model.eval()


def _check_config(config: Any) -> None:
    if config.is_encoder_decoder:
        raise UnsupportedError("it is an encoder-decoder")
    text_config = config.get_text_config()
    types = set(getattr(text_config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if types:
        raise UnsupportedError(f"it has layers of the type {', '.join(sorted(types))}")
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    ropes = {entry.get("rope_type") for entry in [parameters, *nested]} & DYNAMIC_ROPES
    if ropes:
        raise UnsupportedError(f"its {ropes.pop()} RoPE depends on the longest request of a step")


def split_head(model: Any) -> tuple[nn.Module, GivenHiddenStates]:
    """Take the decoder out of a model: the decoder, and what has taken its place."""
    decoder = model.get_decoder()
    (name,) = [name for name, module in model.named_modules() if module is decoder]
    if not name:
        raise UnsupportedError("its decoder and its output projection are one module")
    given = GivenHiddenStates()
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, given)
    return decoder, given


def _trace_forward(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [1, T, H] and logits [1, T, vocab] on the meta device."""
    names = {id(module): name for name, module in model.named_modules()}
    decoder, given = split_head(model)
    try:
        tokens = torch.zeros(1, NUM_TRACED_TOKENS, dtype=torch.int64, device="meta")
        with torch.no_grad():
            # Without a mask, transformers would look for the ends of sequences in the positions.
            output = decoder(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                position_ids=tokens,
                use_cache=False,
            )
            given.hidden = output[0]
            return output[0], model(input_ids=tokens, use_cache=False).logits
    finally:
        parent, _, attribute = names[id(decoder)].rpartition(".")
        setattr(model.get_submodule(parent), attribute, decoder)


def _traced_layers(model: Any, trace: Trace) -> tuple[tuple[LayerSpec, ...], list[str]]:
    """The layers, and the prefixes of their modules' names."""
    calls = trace.calls
    num_layers = model.config.get_text_config().num_hidden_layers
    if not calls:
        raise UnsupportedError("its attention does not use the registry of attention functions")
    indices = [getattr(call.module, "layer_idx", None) for call in calls]
    if indices != list(range(num_layers)):
        raise UnsupportedError(
            f"its {num_layers} layers do not call attention once each, one after the other"
        )
    first = calls[0]
    for index, call in enumerate(calls):
        if call.tensors:
            raise UnsupportedError(f"its attention takes {', '.join(call.tensors)}")
        if not call.is_causal:
            raise UnsupportedError("its attention is not causal")
        if call.head_dim != call.value_dim:
            raise UnsupportedError(
                f"its keys have {call.head_dim} and its values {call.value_dim} dimensions"
            )
        if (call.num_heads, call.num_kv_heads, call.head_dim) != (
            first.num_heads,
            first.num_kv_heads,
            first.head_dim,
        ):
            raise UnsupportedError(f"layer {index} has other heads than layer 0")
    types = getattr(model.config.get_text_config(), "layer_types", None)
    for index, layer_type in enumerate(types or ()):
        if (layer_type == "sliding_attention") != (calls[index].sliding_window is not None):
            raise UnsupportedError(
                f"layer {index} is {layer_type}, and its attention function is not told so"
            )
    windows = {call.sliding_window for call in calls}
    if trace.mask_windows and not windows <= trace.mask_windows:
        raise UnsupportedError("its attention function is not told the window of its mask")
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = [_layer_prefix(model, names[id(call.module)]) for call in calls]
    lists = {prefix.rstrip(".").rpartition(".")[0] for prefix in prefixes}
    if len(lists) != 1 or len(set(prefixes)) != num_layers:
        raise UnsupportedError("its layers are not one list of modules")
    return tuple(LayerSpec(call.sliding_window, rope=None) for call in calls), prefixes


def _layer_prefix(model: Any, name: str) -> str:
    """The prefix of the layer of an attention module: the item of the outermost list of modules."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1]) + "."
    raise UnsupportedError("its layers are not a list of modules")


def _tensors(model: Any, prefixes: list[str]) -> tuple[TransformersTensor, ...]:
    """Every tensor of the checkpoint that `save_pretrained` would write."""
    state = model.state_dict(keep_vars=True)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    name_of = {id(tensor): name for name, tensor in state.items()}
    linears = {
        f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear
    }
    embedding = _name_of(model, model.get_input_embeddings())
    head = _name_of(model, model.get_output_embeddings())
    float32_names = model._keep_in_fp32_modules_strict or ()
    tensors = []
    for source, tensor in revert_weight_conversion(model, state).items():
        parameter = name_of.get(id(tensor))
        layer = None
        # The layers' tensors keep the layer's prefix in every conversion.
        name = source if parameter is None else parameter
        for index, prefix in enumerate(prefixes):
            if name.startswith(prefix):
                layer = index
                name = f"layers.{index}.{name.removeprefix(prefix)}"
        module, _, kind = name.rpartition(".")
        if module == embedding:
            name = f"embed.{kind}"
        elif module == head:
            name = f"lm_head.{kind}"
        tensors.append(
            TransformersTensor(
                name,
                source,
                parameter,
                tuple(tensor.shape),
                layer,
                is_linear=layer is not None and parameter in linears,
                is_float32=any(re.search(pattern, name) for pattern in float32_names),
            )
        )
    order = {name: index for index, name in enumerate(state)}
    tensors.sort(key=lambda tensor: order.get(tensor.parameter or "", len(order)))
    names = {tensor.name for tensor in tensors}
    if "lm_head.bias" in names and "lm_head.weight" not in names:
        raise UnsupportedError("its output projection has a bias and the embedding's weight")
    return tuple(tensors)


def _name_of(model: Any, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _attention_heads(model: Any, trace: Trace) -> AttentionHeads:
    names = {id(module): name for name, module in model.named_modules()}
    first = trace.calls[0]
    modules = tuple(f"{names[id(call.module)]}." for call in trace.calls)
    return AttentionHeads(modules, first.num_heads, first.num_kv_heads, first.head_dim)


def _carried_prefixes(
    spec: ModelSpec, config: dict[str, Any], names: Collection[str], unused: Collection[str]
) -> tuple[str, ...]:
    """The prefixes of tensors that do not run, as `ModelSpec.carried`.

    unused: patterns of the names of tensors that transformers does not load.
    """
    rows = {row.source for row in spec.transformers.tensors} if spec.transformers else set()
    prefixes: dict[str, None] = {}
    for name in names:
        if name in rows or is_redundant(spec, name):
            continue
        parts = re.findall(r"[^.]+\.?", name)
        starts = ("".join(parts[: end + 1]) for end in range(len(parts)))
        # The shortest one: a module, where the pattern is one of modules.
        found = next((start for start in starts if any(re.search(p, start) for p in unused)), None)
        if found is not None:
            prefixes[found] = None
    return (*prefixes, *mtp_prefixes(config, spec.tensor_prefix, len(spec.layers)))


def _max_positions(config: Any) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise UnsupportedError("its config has no max_position_embeddings")
    return limit
