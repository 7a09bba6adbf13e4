"""Multimodal models whose text model is a family of ours: a table, one row for each architecture.

Such a model's config.json has the text model's config under `text_config`, and its checkpoint has
tensors of other parts: towers, projectors. The text model runs; the other parts are carried (see
`ModelSpec.carried`). To add a wrapper: a row of `WRAPPERS`, and a parity test.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.classifiers import HEAD_MODULE
from llmkit.model.spec import (
    ATTENTION_MIXERS,
    DraftHeadSpec,
    ExpertStack,
    LayerSpec,
    ModelSpec,
)
from llmkit.model.text_config_defaults import TEXT_DEFAULTS


@dataclass(frozen=True)
class TextNames:
    """How a checkpoint names the tensors of its text model."""

    prefix: str  # of the embedding, the layers and the last norm
    lm_head: str


@dataclass(frozen=True)
class Wrapper:
    """A multimodal architecture.

    Its checkpoints have one of the `names`. The first is that of the modules in transformers 5; the
    others are in files of the hub, and `save_pretrained` writes them, too.
    """

    model_type: str  # of config.json
    text_types: tuple[str, ...]  # that text_config.model_type may be; the first is the default
    carried: tuple[str, ...]  # the other parts: modules and parameters
    names: tuple[TextNames, ...]
    vllm: TextNames = TextNames("language_model.model", "language_model.lm_head")  # vLLM's modules
    is_flat: bool = False  # an older config.json has the text model's fields at the top level
    tie_word_embeddings: bool = False  # when config.json does not say it
    # Text model types that are a family of ours in another name: that family's model_type.
    families: dict[str, str] = field(default_factory=dict)
    stacks_experts: bool = False  # all experts of a layer are in one tensor; the family's are not


_LLAVA_NAMES = (
    TextNames("model.language_model", "lm_head"),
    TextNames("language_model.model", "language_model.lm_head"),
)
_QWEN_NAMES = (
    TextNames("model.language_model", "lm_head"),
    TextNames("model", "lm_head"),
)
_IDEFICS_NAMES = (TextNames("model.text_model", "lm_head"),)
_TOWER = ("vision_tower", "multi_modal_projector")
# The text models that LLaVA's classes are used with.
_LLAVA_TEXT = ("llama", "mistral", "qwen2", "qwen3")

# By architecture.
WRAPPERS: dict[str, Wrapper] = {
    "Gemma3ForConditionalGeneration": Wrapper(
        "gemma3", ("gemma3_text",), _TOWER, _LLAVA_NAMES, tie_word_embeddings=True
    ),
    "Gemma4ForConditionalGeneration": Wrapper(
        "gemma4",
        ("gemma4_text",),
        ("vision_tower", "embed_vision", "audio_tower", "embed_audio"),
        _LLAVA_NAMES[:1],
        tie_word_embeddings=True,
    ),
    "Mistral3ForConditionalGeneration": Wrapper(
        "mistral3",
        ("mistral", "ministral3", "mistral4"),
        _TOWER,
        _LLAVA_NAMES,
        tie_word_embeddings=True,
    ),
    "Kimi_K25ForConditionalGeneration": Wrapper(
        "kimi_k25",
        ("deepseek_v3", "kimi_k2"),
        ("vision_tower", "mm_projector"),
        _LLAVA_NAMES,
        tie_word_embeddings=True,
        families={"kimi_k2": "deepseek_v3"},
    ),
    "LlavaForConditionalGeneration": Wrapper("llava", _LLAVA_TEXT, _TOWER, _LLAVA_NAMES),
    "LlavaNextForConditionalGeneration": Wrapper(
        "llava_next", _LLAVA_TEXT, (*_TOWER, "image_newline"), _LLAVA_NAMES
    ),
    "LlavaOnevisionForConditionalGeneration": Wrapper(
        "llava_onevision",
        ("qwen2", "llama", "mistral", "qwen3"),
        (*_TOWER, "image_newline"),
        _LLAVA_NAMES,
    ),
    "InternVLForConditionalGeneration": Wrapper(
        "internvl",
        ("qwen2", "qwen3", "llama", "qwen3_moe"),
        _TOWER,
        _LLAVA_NAMES,
        tie_word_embeddings=True,
    ),
    "Qwen2VLForConditionalGeneration": Wrapper(
        "qwen2_vl",
        ("qwen2_vl_text",),
        ("visual",),
        _QWEN_NAMES,
        is_flat=True,
        families={"qwen2_vl_text": "qwen2"},
    ),
    "Qwen2_5_VLForConditionalGeneration": Wrapper(
        "qwen2_5_vl",
        ("qwen2_5_vl_text",),
        ("visual",),
        _QWEN_NAMES,
        is_flat=True,
        families={"qwen2_5_vl_text": "qwen2"},
    ),
    "Qwen3VLForConditionalGeneration": Wrapper(
        "qwen3_vl",
        ("qwen3_vl_text",),
        ("visual",),
        _QWEN_NAMES[:1],
        families={"qwen3_vl_text": "qwen3"},
    ),
    "Qwen3VLMoeForConditionalGeneration": Wrapper(
        "qwen3_vl_moe",
        ("qwen3_vl_moe_text",),
        ("visual",),
        _QWEN_NAMES[:1],
        families={"qwen3_vl_moe_text": "qwen3_moe"},
        stacks_experts=True,
    ),
    "Qwen3_5ForConditionalGeneration": Wrapper(
        "qwen3_5", ("qwen3_5_text",), ("visual",), _QWEN_NAMES[:1]
    ),
    "Qwen3_5MoeForConditionalGeneration": Wrapper(
        "qwen3_5_moe",
        ("qwen3_5_moe_text",),
        ("visual",),
        _QWEN_NAMES[:1],
        stacks_experts=True,
    ),
    "Idefics3ForConditionalGeneration": Wrapper(
        "idefics3",
        ("llama", "mistral"),
        ("vision_model", "connector"),
        _IDEFICS_NAMES,
        vllm=_IDEFICS_NAMES[0],
    ),
    "SmolVLMForConditionalGeneration": Wrapper(
        "smolvlm",
        ("llama",),
        ("vision_model", "connector"),
        _IDEFICS_NAMES,
        vllm=_IDEFICS_NAMES[0],
    ),
}
# The names in files of the hub of architectures that have another name in transformers.
_OTHER_ARCHITECTURES = {"KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration"}
# config.json's fields that give the number of layers for multi-token prediction.
_MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_MTP_MODULE = "mtp"  # in checkpoints whose MTP head is no numbered layer


@dataclass(frozen=True)
class TextModel:
    """The text model of a wrapper's checkpoint."""

    model_type: str  # of the family whose function reads the config
    config: dict[str, Any]  # like the config.json of a text model
    names: TextNames
    carried: tuple[str, ...]  # see ModelSpec.carried
    expert_stack: ExpertStack | None  # see MoeSpec; None: as in the family


def architecture_of(config: dict[str, Any]) -> str:
    """The architecture that a config.json names; "(none)" without one."""
    name = str((config.get("architectures") or ["(none)"])[0])
    return _OTHER_ARCHITECTURES.get(name, name)


def text_model(config: dict[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> TextModel | None:
    """The text model of a config.json; None when its architecture is no wrapper.

    tensors: the shapes of the checkpoint's tensors. Without them, those of transformers 5 are
    assumed.
    Raises InputError for a config without a text model, or with one that does not belong to the
    architecture, and for tensors of several namings.
    """
    architecture = architecture_of(config)
    wrapper = WRAPPERS.get(architecture)
    if wrapper is None:
        return None
    if config.get("model_type") != wrapper.model_type:
        raise InputError(
            f"config.json has model_type {config.get('model_type')!r}",
            f"{wrapper.model_type}, as its architecture {architecture} says",
        )
    given = _text_config(config, wrapper, architecture)
    model_type = given.get("model_type", wrapper.text_types[0])
    if wrapper.is_flat and model_type == wrapper.model_type:  # older configs repeat the wrapper's
        model_type = wrapper.text_types[0]
    if model_type not in wrapper.text_types:
        raise InputError(
            f"config.json has a text_config of model_type {model_type!r}",
            f"{' or '.join(wrapper.text_types)}, as its architecture {architecture} says",
        )
    names = _find_names(wrapper, architecture, tensors)
    text_config = TEXT_DEFAULTS.get(model_type, {}) | given
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text_config.get(key), dict):
            text_config[key] = _text_rope(text_config[key])
    text_config["tie_word_embeddings"] = _is_tied(config, wrapper, names, tensors)
    return TextModel(
        wrapper.families.get(model_type, model_type),
        text_config,
        names,
        _carried_prefixes(wrapper),
        _expert_stack(text_config, tensors) if wrapper.stacks_experts else None,
    )


def module_names(spec: ModelSpec, module: str) -> list[str]:
    """The names that a `quantization_config` needs for a module of the checkpoint's text model.

    They are the checkpoint's own name, and those of transformers' and vLLM's modules, which compare
    names with their own modules.
    """
    wrapper = WRAPPERS.get(spec.architecture)
    if wrapper is None:
        return [module]
    names = (wrapper.names[0], wrapper.vllm)
    if module == spec.lm_head_name:
        return list(dict.fromkeys([module, *(name.lm_head for name in names)]))
    rest = module.removeprefix(spec.tensor_prefix)
    return list(dict.fromkeys([module, *(name.prefix + rest for name in names)]))


def head_modules(spec: ModelSpec) -> list[str]:
    """The names of the output projection, or of the classification head, in such a config.

    Configs say "lm_head", whatever the name of the module.
    """
    heads = ["lm_head", *module_names(spec, spec.lm_head_name)]
    return list(dict.fromkeys([*heads, *([HEAD_MODULE] if spec.num_labels else [])]))


def checkpoint_name(spec: ModelSpec, module: str) -> str:
    """The checkpoint's name of a module of the text model.

    A file that belongs to the model, such as a LoRA adapter, may have another of the `names` than
    the checkpoint: that of the modules of the transformers version that made it.
    """
    wrapper = WRAPPERS.get(spec.architecture)
    prefixes = [names.prefix for names in wrapper.names] if wrapper is not None else []
    for prefix in sorted(prefixes, key=len, reverse=True):
        if module.startswith(f"{prefix}."):
            return spec.tensor_prefix + module.removeprefix(prefix)
    return module


def mtp_prefixes(
    config: dict[str, Any], prefix: str, num_layers: int, tensors: Collection[str] = ()
) -> tuple[str, ...]:
    """The prefixes of the tensors that predict several tokens at once, as `ModelSpec.carried`.

    They are layers after the last one (DeepSeek-V3, GLM-4.5), or in modules of their own. `config`
    says how many there are, but for Qwen3-Next, where the names of the tensors do.
    """
    counts = [config.get(name) for name in _MTP_COUNTS]
    count = next((count for count in counts if isinstance(count, int) and count > 0), 0)
    modules = ("mtp.", f"{prefix}.mtp.", f"{prefix}.mtp_")
    if not count:
        return modules if f"{_MTP_MODULE}.fc.weight" in tensors else ()
    layers = [f"{prefix}.layers.{num_layers + index}." for index in range(count)]
    return (*layers, *modules)


def find_mtp_head(spec: ModelSpec, tensors: Collection[str]) -> DraftHeadSpec | None:
    """The head of a model that predicts the token after the next one; None: there is none.

    It has one of three layouts: a layer after the last one, with norms and a projection of its own
    (DeepSeek-V3, GLM-4.5), a module "mtp" (Qwen3-Next, Qwen3.5), or layers of "mtp" that have one
    block each (Nemotron-H). A model may have several heads, for later tokens; only the first one
    drafts.
    """
    if f"{_MTP_MODULE}.layers.0.eh_proj.weight" in tensors:
        return _head_of_blocks(spec, tensors)
    full = [
        layer
        for layer in spec.layers
        if layer.mixer in ATTENTION_MIXERS and layer.sliding_window is None and layer.has_mlp
    ]
    if not full:
        return None
    layer_spec = replace(full[-1], is_moe=spec.moe is not None, kv_shared_layer_offset=0)
    layer = f"{spec.tensor_prefix}.layers.{len(spec.layers)}"
    if f"{layer}.eh_proj.weight" in tensors:
        return DraftHeadSpec(
            "mtp",
            (layer,),
            (layer_spec,),
            embed_norm=f"{layer}.enorm",
            hidden_norm=f"{layer}.hnorm",
            fc=f"{layer}.eh_proj",
            norm=f"{layer}.shared_head.norm",
        )
    if f"{_MTP_MODULE}.fc.weight" in tensors:
        return DraftHeadSpec(
            "mtp",
            (f"{_MTP_MODULE}.layers.0",),
            (layer_spec,),
            embed_norm=f"{_MTP_MODULE}.pre_fc_norm_embedding",
            hidden_norm=f"{_MTP_MODULE}.pre_fc_norm_hidden",
            fc=f"{_MTP_MODULE}.fc",
            norm=f"{_MTP_MODULE}.norm",
        )
    return None


def _head_of_blocks(spec: ModelSpec, tensors: Collection[str]) -> DraftHeadSpec | None:
    """The MTP head whose layers have one block each: attention, experts or an MLP.

    The first layer has the projection, and the last one the norm. None where a layer is something
    else, such as Mamba 2, whose states would have to be taken back with rejected tokens.
    """
    attention = next((layer for layer in spec.layers if layer.mixer == "attention"), None)
    experts = next((layer for layer in spec.layers if layer.is_moe), None)
    mlp = next((layer for layer in spec.layers if layer.has_mlp and not layer.is_moe), None)
    known = {"q_proj": attention, "experts": experts, "up_proj": mlp}
    layers: list[str] = []
    layer_specs: list[LayerSpec] = []
    while True:
        layer = f"{_MTP_MODULE}.layers.{len(layers)}"
        mixer = f"{layer}.mixer."
        modules = {
            name.removeprefix(mixer).split(".")[0] for name in tensors if name.startswith(mixer)
        }
        block = next((known[module] for module in known if module in modules), None)
        if block is None:
            return None
        layers.append(layer)
        layer_specs.append(block)
        if f"{layer}.final_layernorm.weight" in tensors:
            break
    return DraftHeadSpec(
        "mtp",
        tuple(layers),
        tuple(layer_specs),
        embed_norm=f"{layers[0]}.enorm",
        hidden_norm=f"{layers[0]}.hnorm",
        fc=f"{layers[0]}.eh_proj",
        norm=f"{layers[-1]}.final_layernorm",
    )


def _text_config(config: dict[str, Any], wrapper: Wrapper, architecture: str) -> dict[str, Any]:
    """The text model's part of a config.json, without the defaults."""
    given = config.get("text_config")
    if isinstance(given, dict):
        return given
    if given is None and wrapper.is_flat and "hidden_size" in config:
        return config
    raise InputError(
        f"config.json has {'no text_config' if given is None else 'a text_config of another type'}",
        f"An object with the config of the text model of a {architecture}",
        "Download config.json again",
    )


def _text_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters for text.

    M-RoPE (arXiv 2409.12191, section 2.1) has three positions for each token. For text they are
    equal, and it is plain RoPE.
    """
    plain = {key: value for key, value in parameters.items() if not key.startswith("mrope_")}
    for key in ("type", "rope_type"):
        if plain.get(key) == "mrope":
            plain[key] = "default"
    return plain


def _find_names(wrapper: Wrapper, architecture: str, tensors: Collection[str]) -> TextNames:
    """The naming that a checkpoint's tensors have."""
    examples: dict[TextNames, str] = {}
    for names in wrapper.names:
        parts = tuple(f"{names.prefix}.{part}." for part in ("embed_tokens", "layers", "norm"))
        found = next((tensor for tensor in tensors if tensor.startswith(parts)), None)
        if found is not None:
            examples[names] = found
    if len(examples) > 1:
        raise InputError(
            f"the checkpoint names its text model in {len(examples)} ways"
            f" ({', '.join(examples.values())})",
            f"One prefix for all tensors of the text model of a {architecture}",
            "Save it again with one version of transformers",
        )
    return next(iter(examples), wrapper.names[0])


def _is_tied(
    config: dict[str, Any], wrapper: Wrapper, names: TextNames, tensors: Collection[str]
) -> bool:
    """Whether the output projection is the embedding.

    The wrapper's flag says it, or the text model's, where older versions of transformers wrote it.
    Many checkpoints say neither, and transformers' default is wrong for some of them: an output
    projection that the checkpoint has is never tied.
    """
    # A quantized one has several tensors.
    if any(name.startswith(f"{names.lm_head}.") for name in tensors):
        return False
    text_flag = (config.get("text_config") or {}).get("tie_word_embeddings")
    return bool(text_flag or config.get("tie_word_embeddings", wrapper.tie_word_embeddings))


def _expert_stack(
    text_config: dict[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> ExpertStack:
    """How experts are stored: [out, in] by transformers, [in, out] in files of the hub."""
    stack = ExpertStack()
    shape = next((tensors[name] for name in tensors if name.endswith(stack.down)), None)
    is_plain = shape is None or shape[-2:-1] == (text_config.get("hidden_size"),)
    return stack if is_plain else ExpertStack(transposed=True)


def _carried_prefixes(wrapper: Wrapper) -> tuple[str, ...]:
    """The carried parts with and without "model.", as older and newer checkpoints have them."""
    prefixes = []
    for part in wrapper.carried:
        name = part if part == "image_newline" else f"{part}."
        prefixes += [name, f"model.{name}"]
    return tuple(prefixes)
