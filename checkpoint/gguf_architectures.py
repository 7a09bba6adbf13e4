"""The architectures of GGUF files: tensor names, and a function to config.json for each.

Tensor names are those of the `gguf` package (`gguf.constants.MODEL_TENSORS`). How each family's
weights are stored is what llama.cpp's converter does to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from llmkit.checkpoint.gguf_metadata import GgufMetadata
from llmkit.checkpoint.gguf_moves import (
    GgufMove,
    MoveFunction,
    added,
    by_key_head,
    chained,
    column,
    grouped,
    interleaved_halves,
    latent_heads,
    negative_exponential,
    split_rows,
    tiled_value_heads,
)
from llmkit.common.errors import InputError

# From the metadata to the fields of config.json that differ from Llama's.
ConfigFunction = Callable[[GgufMetadata], dict[str, Any]]

ROPE_FREQS = "rope_freqs.weight"
ROPE_FACTORS_LONG = "rope_factors_long.weight"
ROPE_FACTORS_SHORT = "rope_factors_short.weight"
# The key of what multiplies the attention factor that llama.cpp computes of YaRN's factor.
ATTENTION_FACTOR = "rope.scaling.attn_factor"
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"  # of mscale_all_dim
# A key of this project's files: rows of q and k are in the order that llama.cpp's RoPE of a part of
# a head needs. Without it, they are in that of llama.cpp's converter, with which llama.cpp rotates
# other pairs of rows than the model.
ROTATED_ROWS = "rope.rotated_rows_interleaved"
# Tensors that become values of config.json.
CONFIG_TENSORS = (ROPE_FREQS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT)

TOP_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "token_embd_norm": "model.embedding_norm",  # LFM2's norm before the output projection
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
_LLAMA = _ATTENTION | _QK_NORM | _FFN_NORM | _MLP
_GEMMA2 = (
    _ATTENTION
    | _MLP
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
_GEMMA4 = (
    _GEMMA2
    | _QK_NORM
    | {
        "layer_output_scale": "layer_scalar",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
    }
)
# Norms after attention and MLP only.
_POST_NORM = {
    name: module for name, module in (_ATTENTION | _QK_NORM | _MLP).items() if name != "attn_norm"
} | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NO_GATE = {name: module for name, module in _MLP.items() if name != "ffn_gate"}
_GLM4 = (
    _ATTENTION
    | {
        "post_attention_norm": "post_self_attn_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    }
    | {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
)
_QWEN_MOE = _ATTENTION | _QK_NORM | _FFN_NORM | {"ffn_gate_inp": "mlp.gate"}
# Of one expert, by the name of the GGUF tensor that holds all of a layer.
EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_GRANITE_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.gate_proj",
    "ffn_up_exps": "block_sparse_moe.experts.{}.up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.{}.down_proj",
}
_GRANITE_SWA = _ATTENTION | _FFN_NORM | {"attn_sinks": "self_attn.sinks"}
_APERTUS = (
    _ATTENTION
    | _QK_NORM
    | _NO_GATE
    | {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"}
)
# The numbers of xIELU. Those that are trained have a dimension.
_XIELU = {
    "xielu.alpha_p": ("mlp.act_fn.alpha_p", (1,)),
    "xielu.alpha_n": ("mlp.act_fn.alpha_n", (1,)),
    "xielu.beta": ("mlp.act_fn.beta", ()),
    "xielu.eps": ("mlp.act_fn.eps", ()),
}
_LFM2 = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
# The layers of a hybrid that have a gated delta net in place of attention.
_DELTA_NET = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt": "linear_attn.dt_bias",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_QWEN3_NEXT = (
    _ATTENTION
    | _QK_NORM
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ssm_ba": "linear_attn.in_proj_ba",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    }
    | {name: _DELTA_NET[name] for name in ("ssm_a", "ssm_dt", "ssm_conv1d", "ssm_norm", "ssm_out")}
)
_QWEN3_5 = _ATTENTION | _QK_NORM | _DELTA_NET | {"post_attention_norm": "post_attention_layernorm"}
# Mamba 2 layers, whose block is named "mixer".
_MAMBA2 = {
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_dt": "mixer.dt_bias",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
}
_HYBRID_MAMBA2 = {
    name: module.replace("mixer.", "mamba.") for name, module in _MAMBA2.items() if module != "norm"
}
_GRANITE_HYBRID = _ATTENTION | _FFN_NORM | _HYBRID_MAMBA2
_BAMBA = (
    _ATTENTION
    | _HYBRID_MAMBA2
    | {
        "ffn_norm": "pre_ff_layernorm",
        "ffn_gate": "feed_forward.gate_proj",
        "ffn_up": "feed_forward.up_proj",
        "ffn_down": "feed_forward.down_proj",
    }
)
_BAMBA_TOP = {"output_norm": "model.final_layernorm"}
_MAMBA2_TOP = {"token_embd": "model.embeddings", "output_norm": "model.norm_f"}
_NEMOTRON_H = _MAMBA2 | {
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
}
_LATENT_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_output": "self_attn.o_proj",
}
_DEEPSEEK = (
    _LATENT_ATTENTION
    | _FFN_NORM
    | _MLP
    | {"ffn_gate_inp": "mlp.gate", "exp_probs_b": "mlp.gate.e_score_correction_bias"}
)
_LFM2_EXPERTS = {
    "ffn_gate_exps": "feed_forward.experts.{}.w1",
    "ffn_up_exps": "feed_forward.experts.{}.w3",
    "ffn_down_exps": "feed_forward.experts.{}.w2",
}
# Hugging Face's names of tensors without the ending ".weight".
BARE_MODULES = (
    "self_attn.sinks",
    "e_score_correction_bias",
    "expert_bias",
    "layer_scalar",
    ".A_log",
    ".dt_bias",
    "mixer.D",
    "mamba.D",
)
# Of one dimension in GGUF files and of two in Hugging Face's.
ONE_ROW_MODULES = ("mlp.shared_expert_gate", "moe_statics.e_score_correction_bias")
# Of a layer that predicts several tokens at once.
_PREDICTION = {
    "nextn.eh_proj": "eh_proj",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_norm": "shared_head.norm",
    "nextn.shared_head_head": "shared_head.head",
}


_INTERLEAVED_QK = {
    "self_attn.q_proj": interleaved_halves("num_attention_heads"),
    "self_attn.k_proj": interleaved_halves("num_key_value_heads"),
}
_TILED_DELTA_NET = {
    "linear_attn.in_proj_qkv": tiled_value_heads("qkv"),
    "linear_attn.conv1d": tiled_value_heads("qkv"),
    "linear_attn.in_proj_z": tiled_value_heads("values"),
    "linear_attn.in_proj_a": tiled_value_heads("heads"),
    "linear_attn.in_proj_b": tiled_value_heads("heads"),
    "linear_attn.dt_bias": tiled_value_heads("heads"),
    "linear_attn.A_log": chained(negative_exponential, tiled_value_heads("heads")),
    "linear_attn.out_proj": tiled_value_heads("columns"),
}
_MAMBA2_MOVES = {
    "mixer.A_log": chained(negative_exponential, column),
    "mixer.D": column,
    "mixer.norm": grouped("n_groups"),
}
_HYBRID_MAMBA2_MOVES = {
    "mamba.A_log": chained(negative_exponential, column),
    "mamba.D": column,
    "mamba.norm": grouped("mamba_n_groups"),
}
_GRANITE_HYBRID_MOVES = (
    _INTERLEAVED_QK
    | _HYBRID_MAMBA2_MOVES
    | {
        "shared_mlp.input_linear": split_rows(
            "shared_intermediate_size", "shared_intermediate_size"
        )
    }
)
# llama.cpp rotates the first rows of a head, and its converter moves those of the whole head.
_INTERLEAVED_ROTATED_QK = {
    "self_attn.q_proj": interleaved_halves("num_attention_heads", is_partial=True),
    "self_attn.k_proj": interleaved_halves("num_key_value_heads", is_partial=True),
}


def _shared_expert(module: str) -> dict[str, str]:
    return {
        "ffn_gate_shexp": f"{module}.gate_proj",
        "ffn_up_shexp": f"{module}.up_proj",
        "ffn_down_shexp": f"{module}.down_proj",
    }


@dataclass(frozen=True)
class StackedExperts:
    """How Hugging Face stores the experts of a layer: gate and up in one tensor, down in another.

    The names are those of tensors without the layer. in_turn: rows of gate and up in turn, and
    transposed to [experts, in, out]; otherwise [experts, out, in], all rows of gate first.
    """

    gate_up: str
    down: str
    in_turn: bool = False


@dataclass(frozen=True)
class GgufArchitecture:
    """How a family's GGUF files are read, and written."""

    architecture: str  # the Hugging Face architecture
    model_type: str
    config: ConfigFunction
    modules: Mapping[str, str]  # of a layer: from GGUF names to Hugging Face ones
    # The field of config.json for the epsilon of norms. RMS norms and layer norms have different
    # keys in GGUF.
    epsilon: Literal["rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon"] = "rms_norm_eps"
    norm_offset: float = 0.0  # stored norms are larger by this
    partial_rotary: bool = False  # RoPE may rotate a part of a head
    sliding_window: bool = False  # the family has sliding windows
    # Sizes of the MLP and numbers of KV heads may be lists with a value for each layer. In Gemma 4,
    # rope_freqs says which pairs of a head RoPE rotates; in LFM2, layers with 0 KV heads are
    # convolutions.
    differs_by_layer: bool = False
    # Tensors that end with ".scale" in files, by what is before that. Hugging Face has no ending.
    scales: Mapping[str, str] = field(default_factory=dict)
    # Modules of one expert in a checkpoint that stores each expert in tensors of its own; None: the
    # family has no experts.
    experts: Mapping[str, str] | None = None
    stacked_experts: StackedExperts | None = None  # of families that store all of them together
    # Hugging Face modules whose values are in several tensors of a file, which a move splits.
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # By Hugging Face module of a layer: in which order its values are stored.
    moves: Mapping[str, MoveFunction] = field(default_factory=dict)
    bare_tensors: tuple[str, ...] = ("ssm_a", "ssm_d")  # that have no ending in a file
    has_attention: bool = True  # in some layers
    has_mrope_sections: bool = False  # llama.cpp requires the sections of multimodal RoPE
    has_log_multiplier: bool = False  # YaRN's mscale_all_dim is in a key, without latent attention
    tensor_prefix: str = "model"  # of Hugging Face's names of layers
    # Modules outside layers that have other names than those of TOP_MODULES.
    top_modules: Mapping[str, str] | None = None
    is_written: bool = True  # False: files of another row are written for its family
    # Tensors of one number in each layer that files have in the metadata, by the key with those of
    # all layers. A key is without the architecture's name; a tensor is a module and its shape.
    layer_numbers: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    heads_differ: bool = False  # layers may have different numbers of heads

    @property
    def has_experts(self) -> bool:
        return self.experts is not None

    @property
    def has_latent_attention(self) -> bool:
        """Whether keys and values are made of latents, so that head sizes have other keys."""
        return bool(self.joined.get("self_attn.kv_b_proj"))

    @property
    def all_top_modules(self) -> Mapping[str, str]:
        """The modules outside layers, by GGUF name."""
        return TOP_MODULES | dict(self.top_modules or {})

    def move(self, module: str, kind: str, config: Mapping[str, Any]) -> GgufMove | None:
        """In which order a module's values are stored; None: as in the checkpoint.

        module: without the layer. kind: "weight" or "bias". config: the fields of config.json.
        """
        move = self.moves.get(module)
        if move is not None:
            return move(config)
        # The norm of a gated delta net has no offset.
        is_norm = module.endswith("norm") and kind == "weight" and "linear_attn" not in module
        is_shifted = is_norm and self.norm_offset
        return added(self.norm_offset) if is_shifted else None


def gguf_architecture(metadata: GgufMetadata) -> GgufArchitecture:
    """The architecture of a file. Raises InputError, with the nearest name, for unknown ones."""
    name = metadata.architecture
    if name not in ARCHITECTURES:
        nearest = get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{metadata.path} has the architecture {name}",
            f"One of {', '.join(ARCHITECTURES)} was expected; the most similar name is {nearest}",
            "Use the original checkpoint, or convert the model to another format",
        )
    for (key, value), variant in VARIANTS.get(name, {}).items():
        found = metadata.optional(key)
        if found if value is None else found == value:
            return variant
    return ARCHITECTURES[name]


def gguf_config(metadata: GgufMetadata, architecture: GgufArchitecture) -> dict[str, Any]:
    """The config.json of a file, without the ids of special tokens.

    Raises InputError when the metadata lacks a value or contradicts itself.
    """
    hidden_size = metadata.integer("embedding_length")
    if not metadata.has_tensor("token_embd.weight"):
        raise InputError(f"{metadata.path} has no token_embd.weight")
    if architecture.heads_differ:
        num_heads = metadata.integers("attention.head_count", _num_layers(metadata))[0]
    else:
        num_heads = metadata.integer("attention.head_count") if architecture.has_attention else 1
    head_dim = metadata.integer("attention.key_length", hidden_size // num_heads)
    if not architecture.has_latent_attention:
        metadata.expect("attention.value_length", head_dim)
    if not architecture.partial_rotary:
        metadata.expect("rope.dimension_count", head_dim)
    for key, is_known in (
        ("expert_count", architecture.has_experts),
        ("attention.sliding_window", architecture.sliding_window),
    ):
        if metadata.optional(key) and not is_known:
            raise metadata.error(key, "A dense decoder was expected")
    if architecture.differs_by_layer:
        sizes = {}  # `architecture.config` reads them
        scaling = None
    else:
        sizes = {
            "intermediate_size": metadata.integer("feed_forward_length"),
            "num_key_value_heads": metadata.integer("attention.head_count_kv", num_heads),
        }
        scaling = _rope_scaling(metadata, head_dim)
    is_rms = architecture.epsilon in ("rms_norm_eps", "norm_eps")
    config: dict[str, Any] = {
        "architectures": [architecture.architecture],
        "model_type": architecture.model_type,
        "vocab_size": metadata.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": _num_layers(metadata),
        "num_attention_heads": num_heads,
        **sizes,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.integer("context_length"),
        architecture.epsilon: metadata.get(
            "attention.layer_norm_rms_epsilon" if is_rms else "attention.layer_norm_epsilon"
        ),
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "dtype": "bfloat16",
        "use_cache": True,
    }
    if architecture.partial_rotary:
        rotary_dim = _rotary_dim(metadata, "rope.dimension_count", head_dim, head_dim)
        config["partial_rotary_factor"] = rotary_dim / head_dim
    if scaling is not None:
        config["rope_scaling"] = scaling
    config |= architecture.config(metadata)
    return {name: value for name, value in config.items() if value is not _ABSENT}


_MSCALE = 0.1  # by which files of DeepSeek's families multiply mscale_all_dim
# Of expert_gating_func.
SOFTMAX = 1
SIGMOID = 2
# The value of a field of config.json that a family does not have.
_ABSENT = object()


def _num_layers(metadata: GgufMetadata) -> int:
    """The layers without those that predict several tokens at once, which are the last ones."""
    num_predicting = metadata.get("nextn_predict_layers", 0)
    num_layers = metadata.integer("block_count")
    if type(num_predicting) is not int or not 0 <= num_predicting < num_layers:
        raise metadata.error(
            "nextn_predict_layers", f"A number below {num_layers} was expected, the block_count"
        )
    return num_layers - num_predicting


def _rotary_dim(metadata: GgufMetadata, key: str, head_dim: int, default: int) -> int:
    """How many dimensions of a head RoPE rotates."""
    rotary_dim = metadata.get(key, default)
    if type(rotary_dim) is not int or not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise metadata.error(key, f"An even number up to {head_dim} was expected")
    return rotary_dim


def _rope_scaling(metadata: GgufMetadata, head_dim: int) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type", "none")
    if metadata.has_tensor(ROPE_FREQS):
        return _llama3_scaling(metadata, head_dim)
    if metadata.has_tensor(ROPE_FACTORS_LONG) or metadata.has_tensor(ROPE_FACTORS_SHORT):
        return _longrope_scaling(metadata, head_dim)
    if kind != "yarn":
        metadata.expect(ATTENTION_FACTOR, 1.0)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(
            f"{metadata.path} scales RoPE by {kind}", "none, linear, yarn or llama3 was expected"
        )
    scaling = {"rope_type": kind, "factor": float(metadata.get("rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = metadata.integer(
            "rope.scaling.original_context_length"
        )
        metadata.expect("rope.scaling.yarn_ext_factor", 1.0)
        for key, field_name in (
            ("rope.scaling.yarn_beta_fast", "beta_fast"),
            ("rope.scaling.yarn_beta_slow", "beta_slow"),
            ("rope.scaling.yarn_attn_factor", "attention_factor"),
        ):
            if metadata.optional(key) is not None:
                scaling[field_name] = metadata.number(key)
        # llama.cpp reads this one. Its converter writes the one before, which llama.cpp ignores.
        if metadata.optional(ATTENTION_FACTOR) is not None:
            multiplier = 0.0
            has_multiplier = ARCHITECTURES[metadata.architecture].has_log_multiplier
            if has_multiplier and metadata.optional(LOG_MULTIPLIER) is not None:
                multiplier = metadata.number(LOG_MULTIPLIER)
            computed = yarn_attention_factor(scaling["factor"], multiplier)
            scaling["attention_factor"] = computed * metadata.number(ATTENTION_FACTOR)
    return scaling


def yarn_attention_factor(factor: float, log_multiplier: float) -> float:
    """What llama.cpp multiplies queries and keys by, where the factor of YaRN is `factor`.

    log_multiplier: the key LOG_MULTIPLIER of families without latent attention; 0: none.
    ATTENTION_FACTOR multiplies it.
    """
    if factor <= 1:
        return 1.0
    return (1 + 0.1 * math.log(factor)) / (1 + 0.1 * log_multiplier * math.log(factor))


def _llama3_scaling(metadata: GgufMetadata, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3's RoPE scaling.

    The file has no parameters, only the divisor of each frequency. `factor` is the largest
    divisor; the other parameters are assumed to be Llama 3's, and the divisors that follow from
    them are compared with those of the file.
    """
    found = np.array(metadata.vector(ROPE_FREQS))
    factor = float(found.max())
    low = 1.0
    high = 4.0
    original = 8192
    theta = metadata.get("rope.freq_base", 10000.0)
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clip(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise InputError(
            f"{metadata.path}: {ROPE_FREQS} is not Llama 3's scaling", "Llama 3's was expected"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _longrope_scaling(metadata: GgufMetadata, head_dim: int) -> dict[str, Any]:
    rotary_dim = metadata.get("rope.dimension_count", head_dim)
    factors = {}
    for name, kind in ((ROPE_FACTORS_SHORT, "short_factor"), (ROPE_FACTORS_LONG, "long_factor")):
        factors[kind] = metadata.vector(name)
        if len(factors[kind]) != rotary_dim // 2:
            raise InputError(
                f"{metadata.path}: {name} has {len(factors[kind])} values",
                f"{rotary_dim // 2} were expected, one for each pair of rotated dimensions",
            )
    original = metadata.integer("rope.scaling.original_context_length")
    scaling = {
        "rope_type": "longrope",
        **factors,
        "original_max_position_embeddings": original,
    }
    scale = max(1.0, metadata.integer("context_length") / original)
    computed = math.sqrt(1 + math.log(scale) / math.log(original))
    stored = metadata.number(ATTENTION_FACTOR, computed)
    if not math.isclose(stored, computed, rel_tol=1e-5):  # otherwise it follows from the sizes
        scaling["attention_factor"] = stored
    return scaling


def _layer_types(metadata: GgufMetadata, period: int, full_first: bool = False) -> list[str]:
    """The attention of each layer. Without a pattern in the file, each `period`th is full.

    full_first: of each period the first layer is full, not the last one.
    """
    num_layers = _num_layers(metadata)
    key = "attention.sliding_window_pattern"
    pattern = metadata.get(key, period)
    if isinstance(pattern, list):
        if len(pattern) != num_layers or not set(pattern) <= {0, 1}:
            raise metadata.error(key, f"True or False for each of {num_layers} layers was expected")
        has_window = pattern
    else:
        period = metadata.integer(key, period)
        full = 0 if full_first else period - 1
        has_window = [index % period != full for index in range(num_layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in has_window]


def _windows(metadata: GgufMetadata, period: int, full_first: bool = False) -> dict[str, Any]:
    """The sliding window, if there is one, and which layers have it.

    period, full_first: of layers without a window, in a file without a pattern (`_layer_types`).
    """
    has_window = bool(metadata.optional("attention.sliding_window"))
    return {
        "sliding_window": metadata.integer("attention.sliding_window") if has_window else None,
        "layer_types": _layer_types(metadata, period if has_window else 1, full_first),
    }


def _ropes_by_layer_type(
    metadata: GgufMetadata, full_base: float, sliding_base: float
) -> dict[str, Any]:
    """RoPE of layers with windows and of the others. The bases are those of a file without keys."""
    full = {
        "rope_type": "default",
        **(_rope_scaling(metadata, metadata.integer("attention.key_length")) or {}),
        "rope_theta": metadata.number("rope.freq_base", full_base),
    }
    sliding = {
        "rope_type": "default",
        "rope_theta": metadata.number("rope.freq_base_swa", sliding_base),
    }
    return {
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "rope_theta": _ABSENT,
        "rope_scaling": _ABSENT,
    }


def _biases(metadata: GgufMetadata) -> dict[str, bool]:
    return {
        "attention_bias": metadata.has_tensor("attn_q.bias"),
        "mlp_bias": metadata.has_tensor("ffn_up.bias"),
    }


def _experts(
    metadata: GgufMetadata,
    count: str = "num_experts",
    used: str = "num_experts_per_tok",
    size: str | None = None,
) -> dict[str, int]:
    """The numbers of experts, in all and for each token, under the names of the family's config.

    size: the name of the intermediate size of one; None: the file does not say it.
    """
    fields = {
        count: metadata.integer("expert_count"),
        used: metadata.integer("expert_used_count"),
    }
    if size is not None:
        fields[size] = metadata.integer("expert_feed_forward_length")
    return fields


def _mixtral(metadata: GgufMetadata) -> dict[str, Any]:
    return _experts(metadata, "num_local_experts") | {"sliding_window": None}


def _qwen2(metadata: GgufMetadata) -> dict[str, Any]:
    return {}


def _attention_bias(metadata: GgufMetadata) -> dict[str, Any]:
    return {"attention_bias": metadata.has_tensor("attn_q.bias")}


def _qwen3_moe(metadata: GgufMetadata) -> dict[str, Any]:
    metadata.expect("expert_weights_norm", True)  # what llama.cpp computes, whatever the file says
    return _attention_bias(metadata) | {
        **_experts(metadata, size="moe_intermediate_size"),
        "norm_topk_prob": True,
    }


def _mellum(metadata: GgufMetadata) -> dict[str, Any]:
    base = metadata.number("rope.freq_base")
    return {
        **_qwen3_moe(metadata),
        **_windows(metadata, 4),
        **_ropes_by_layer_type(metadata, base, base),
    }


def _qwen2_moe(metadata: GgufMetadata) -> dict[str, Any]:
    metadata.expect("expert_weights_norm", False)
    return {
        **_experts(metadata, size="moe_intermediate_size"),
        "shared_expert_intermediate_size": metadata.integer("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
    }


def _glm4_moe(metadata: GgufMetadata) -> dict[str, Any]:
    _expect_sigmoid(metadata)
    metadata.integer("rope.dimension_count")  # required
    return _attention_bias(metadata) | {
        **_experts(metadata, "n_routed_experts", size="moe_intermediate_size"),
        "n_shared_experts": metadata.integer("expert_shared_count"),
        "first_k_dense_replace": metadata.get("leading_dense_block_count"),
        "n_group": metadata.integer("expert_group_count", 1),
        "topk_group": metadata.integer("expert_group_used_count", 1),
        "norm_topk_prob": metadata.get("expert_weights_norm"),
        "routed_scaling_factor": metadata.number("expert_weights_scale"),
        "use_qk_norm": metadata.has_tensor("attn_q_norm.weight"),
        "num_nextn_predict_layers": metadata.get("nextn_predict_layers", 0),
    }


def _expect_sigmoid(metadata: GgufMetadata) -> None:
    """Raises InputError for a router whose scores are not sigmoids."""
    metadata.expect("expert_gating_func", SIGMOID)


def _minimax_m2(metadata: GgufMetadata) -> dict[str, Any]:
    _expect_sigmoid(metadata)
    return {
        **_experts(metadata, "num_local_experts", size="intermediate_size"),
        "rotary_dim": metadata.integer("rope.dimension_count"),
    }


def _ernie4_5_moe(metadata: GgufMetadata) -> dict[str, Any]:
    return _ernie4_5(metadata) | {
        **_experts(metadata, "moe_num_experts", "moe_k", "moe_intermediate_size"),
        "moe_num_shared_experts": metadata.get("expert_shared_count"),
        "moe_layer_start_index": metadata.get("leading_dense_block_count"),
        "moe_layer_interval": metadata.integer("interleave_moe_layer_step"),
    }


def _hunyuan_moe(metadata: GgufMetadata) -> dict[str, Any]:
    experts = _experts(metadata, used="moe_topk", size="intermediate_size")
    return _biases(metadata) | experts


def _olmoe(metadata: GgufMetadata) -> dict[str, Any]:
    metadata.expect("expert_weights_norm", False)
    return _experts(metadata) | {"norm_topk_prob": False}


def _gemma(metadata: GgufMetadata) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _query_scalar(metadata: GgufMetadata, largest_num_layers: int) -> dict[str, Any]:
    """What queries are scaled by, which no key of a Gemma file says.

    It is the size of a head, except in the largest model, known by its number of layers.
    """
    hidden_size = metadata.integer("embedding_length")
    per_head = hidden_size // metadata.integer("attention.head_count")
    if metadata.integer("block_count") == largest_num_layers:
        return {"query_pre_attn_scalar": per_head}
    return {"query_pre_attn_scalar": metadata.integer("attention.key_length", per_head)}


def _gemma2(metadata: GgufMetadata) -> dict[str, Any]:
    return {
        **_gemma(metadata),
        **_query_scalar(metadata, 46),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.number("final_logit_softcapping"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 2),
    }


def _gemma3(metadata: GgufMetadata) -> dict[str, Any]:
    differences = {
        **_gemma(metadata),
        **_query_scalar(metadata, 62),
        **_windows(metadata, 6),
        **_ropes_by_layer_type(metadata, 1e6, 1e4),
    }
    if metadata.optional("final_logit_softcapping"):
        differences["final_logit_softcapping"] = metadata.number("final_logit_softcapping")
    return differences


def _gemma4(metadata: GgufMetadata) -> dict[str, Any]:
    layer_types = _layer_types(metadata, 6)
    num_layers = len(layer_types)
    num_shared = metadata.get("attention.shared_kv_layers", 0)
    if type(num_shared) is not int or not 0 <= num_shared < num_layers:
        raise metadata.error(
            "attention.shared_kv_layers", f"A number below {num_layers} was expected"
        )
    sliding_dim = metadata.integer("attention.key_length_swa")
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        metadata.expect(key, sliding_dim)
    kv_heads = {}
    all_kv_heads = metadata.integers("attention.head_count_kv", num_layers)
    for kind in ("sliding_attention", "full_attention"):
        of_kind = [
            count for layer, count in zip(layer_types, all_kv_heads, strict=True) if layer == kind
        ]
        if len(set(of_kind)) > 1:
            raise metadata.error(
                "attention.head_count_kv", f"One number for all layers of {kind} was expected"
            )
        kv_heads[kind] = of_kind[0] if of_kind else all_kv_heads[0]
    sizes = metadata.integers("feed_forward_length", num_layers)
    first_shared = num_layers - num_shared
    is_double = sizes[-1] == 2 * sizes[0]
    expected = [
        sizes[0] * (2 if is_double and index >= first_shared else 1) for index in range(num_layers)
    ]
    if sizes != expected:
        raise metadata.error(
            "feed_forward_length",
            "One number, or twice as much in the layers that read the keys of others",
        )
    full_layers = [index for index in range(first_shared) if layer_types[index] == "full_attention"]
    has_values = [metadata.has_tensor(f"blk.{index}.attn_v.weight") for index in full_layers]
    per_layer_size = metadata.get("embedding_length_per_layer_input", 0)
    differences = {
        **_gemma(metadata),
        **_attention_bias(metadata),
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": is_double,
        "num_kv_shared_layers": num_shared,
        "num_key_value_heads": kv_heads["sliding_attention"],
        "num_global_key_value_heads": kv_heads["full_attention"],
        "attention_k_eq_v": bool(has_values) and not any(has_values),
        "head_dim": sliding_dim,
        "global_head_dim": metadata.integer("attention.key_length"),
        "hidden_size_per_layer_input": per_layer_size,
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": layer_types,
        "rope_parameters": {
            "full_attention": _proportional_rope(metadata),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("rope.freq_base_swa", 1e4),
            },
        },
        "rope_theta": _ABSENT,
        "final_logit_softcapping": None,
    }
    if per_layer_size and metadata.has_tensor("per_layer_token_embd.weight"):
        rows = metadata.tensors["per_layer_token_embd.weight"].shape[0]
        differences["vocab_size_per_layer_input"] = rows
    if metadata.optional("final_logit_softcapping"):
        differences["final_logit_softcapping"] = metadata.number("final_logit_softcapping")
    return differences


def _proportional_rope(metadata: GgufMetadata) -> dict[str, Any]:
    """RoPE of Gemma 4's full attention: rope_freqs has 1 for pairs that are rotated, then 1e30."""
    num_pairs = metadata.integer("attention.key_length") // 2
    divisors = metadata.vector(ROPE_FREQS)
    num_rotated = divisors.count(1.0)
    if divisors != [1.0] * num_rotated + [1e30] * (num_pairs - num_rotated):
        raise InputError(
            f"{metadata.path}: {ROPE_FREQS} is not Gemma 4's",
            f"{num_pairs} values were expected, first 1, then 1e30",
        )
    return {
        "rope_type": "proportional",
        "partial_rotary_factor": num_rotated / num_pairs,
        "rope_theta": metadata.number("rope.freq_base", 1e6),
    }


def _glm4(metadata: GgufMetadata) -> dict[str, Any]:
    metadata.integer("rope.dimension_count")  # required
    return _attention_bias(metadata)


def _gpt_oss(metadata: GgufMetadata) -> dict[str, Any]:
    if metadata.get("rope.scaling.type") != "yarn":
        raise metadata.error("rope.scaling.type", "yarn was expected")
    scaling = _rope_scaling(metadata, metadata.integer("attention.key_length"))
    return {
        **_attention_bias(metadata),
        **_experts(metadata, "num_local_experts", size="intermediate_size"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 2),
        "swiglu_limit": 7.0,
        "rope_scaling": {**(scaling or {}), "truncate": False},
    }


def _granite(metadata: GgufMetadata) -> dict[str, Any]:
    return _biases(metadata) | {
        "attention_multiplier": metadata.number("attention.scale"),
        "embedding_multiplier": metadata.number("embedding_scale"),
        "residual_multiplier": metadata.number("residual_scale"),
        "logits_scaling": metadata.number("logit_scale"),
    }


def _granite_swa(metadata: GgufMetadata) -> dict[str, Any]:
    num_layers = _num_layers(metadata)
    key = "attention.rope_pattern"
    has_rope = metadata.get(key, [True] * num_layers)
    if not isinstance(has_rope, list) or len(has_rope) != num_layers:
        raise metadata.error(key, f"True or False for each of {num_layers} layers was expected")
    theta = metadata.number("rope.freq_base", 10000.0)
    return _granite(metadata) | {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 4),
        "layer_rope_theta": [theta if rotates else 0 for rotates in has_rope],
    }


def _granite_moe_swa(metadata: GgufMetadata) -> dict[str, Any]:
    shared_size = metadata.get("expert_shared_feed_forward_length", 0)
    return _granite_swa(metadata) | {
        **_experts(metadata, "num_local_experts"),
        "shared_intermediate_size": shared_size,
    }


def _olmo3(metadata: GgufMetadata) -> dict[str, Any]:
    return _attention_bias(metadata) | {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 4),
    }


def _phi3(metadata: GgufMetadata) -> dict[str, Any]:
    window = metadata.get("attention.sliding_window")  # 0: none
    return {
        "sliding_window": metadata.integer("attention.sliding_window") if window else None,
        "original_max_position_embeddings": metadata.integer(
            "rope.scaling.original_context_length", metadata.integer("context_length")
        ),
    }


def _starcoder2(metadata: GgufMetadata) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": metadata.has_tensor("attn_q.bias"),
        "sliding_window": None,  # no key says it
    }


def _cohere(metadata: GgufMetadata) -> dict[str, Any]:
    return _attention_bias(metadata) | {"logit_scale": metadata.number("logit_scale")}


def _cohere2(metadata: GgufMetadata) -> dict[str, Any]:
    return _cohere(metadata) | {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 4),
    }


def _exaone4(metadata: GgufMetadata) -> dict[str, Any]:
    return _windows(metadata, 4)


def _ernie4_5(metadata: GgufMetadata) -> dict[str, Any]:
    return {"use_bias": metadata.has_tensor("attn_q.bias")}


def _seed_oss(metadata: GgufMetadata) -> dict[str, Any]:
    return _biases(metadata) | {"attention_out_bias": metadata.has_tensor("attn_output.bias")}


def _smollm3(metadata: GgufMetadata) -> dict[str, Any]:
    # No key says it: every fourth layer has no RoPE.
    has_rope = [int((index + 1) % 4 != 0) for index in range(metadata.integer("block_count"))]
    return _biases(metadata) | {"no_rope_layers": has_rope, "use_sliding_window": False}


def _arcee(metadata: GgufMetadata) -> dict[str, Any]:
    return _biases(metadata) | {"hidden_act": "relu2"}


def _apertus(metadata: GgufMetadata) -> dict[str, Any]:
    # Without these parameters the family's own scaling would be assumed.
    parameters = _rope_scaling(metadata, metadata.integer("attention.key_length"))
    return _attention_bias(metadata) | {
        "hidden_act": "xielu",
        "rope_parameters": {
            **(parameters or {"rope_type": "default"}),
            "rope_theta": metadata.number("rope.freq_base", 10000.0),
        },
        "rope_theta": _ABSENT,
        "rope_scaling": _ABSENT,
    }


def _lfm2(metadata: GgufMetadata) -> dict[str, Any]:
    num_layers = metadata.integer("block_count")
    kv_heads = metadata.get("attention.head_count_kv")
    counts = kv_heads if isinstance(kv_heads, list) else [kv_heads] * num_layers
    of_attention = {count for count in counts if count != 0}
    are_numbers = all(type(count) is int and count >= 0 for count in counts)
    if len(counts) != num_layers or len(of_attention) > 1 or not are_numbers:
        raise metadata.error(
            "attention.head_count_kv", f"{num_layers} numbers, 0 or the same one, were expected"
        )
    metadata.expect("rope.scaling.type", "none")
    return {
        "intermediate_size": metadata.integer("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,  # it is the size of the tensors
        "num_key_value_heads": max(of_attention, default=metadata.integer("attention.head_count")),
        "layer_types": ["full_attention" if count else "conv" for count in counts],
        "conv_L_cache": metadata.integer("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.conv.bias") for name in metadata.tensors),
    }


def _qwen3_5(metadata: GgufMetadata) -> dict[str, Any]:
    num_layers = _num_layers(metadata)
    key = "attention.recurrent_layers"
    pattern = metadata.optional(key)
    if pattern is None:
        interval = metadata.integer("full_attention_interval", 4)
        pattern = [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(pattern, list) or len(pattern) < num_layers or not set(pattern) <= {0, 1}:
        raise metadata.error(key, f"True or False for each of {num_layers} layers was expected")
    num_value_heads = metadata.integer("ssm.time_step_rank")
    return {
        "layer_types": [
            "linear_attention" if is_recurrent else "full_attention"
            for is_recurrent in pattern[:num_layers]
        ],
        "attention_bias": any(name.endswith("attn_output.bias") for name in metadata.tensors),
        "linear_conv_kernel_dim": metadata.integer("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.integer("ssm.state_size"),
        "linear_num_key_heads": metadata.integer("ssm.group_count"),
        "linear_num_value_heads": num_value_heads,
        "linear_value_head_dim": metadata.integer("ssm.inner_size") // num_value_heads,
        "num_nextn_predict_layers": metadata.get("nextn_predict_layers", 0),
    }


def _qwen3_5_moe(metadata: GgufMetadata) -> dict[str, Any]:
    return _qwen3_5(metadata) | {
        **_experts(metadata, size="moe_intermediate_size"),
        "shared_expert_intermediate_size": metadata.integer("expert_shared_feed_forward_length"),
    }


def _qwen3_next(metadata: GgufMetadata) -> dict[str, Any]:
    metadata.expect("expert_weights_norm", True)
    return _qwen3_5_moe(metadata) | {"norm_topk_prob": True}


def _deepseek(metadata: GgufMetadata) -> dict[str, Any]:
    rotary_dim = metadata.integer("rope.dimension_count")
    latent = metadata.integer("attention.kv_lora_rank")
    # Of latents and rotated keys, which llama.cpp caches. Files from 2024 have other lengths.
    metadata.expect("attention.key_length", latent + rotary_dim)
    metadata.expect("attention.value_length", latent)
    metadata.expect("attention.head_count_kv", 1)
    size = metadata.integer("expert_feed_forward_length")
    return {
        **_experts(metadata, "n_routed_experts"),
        "moe_intermediate_size": size,
        "n_shared_experts": metadata.get("expert_shared_count"),
        "first_k_dense_replace": metadata.get("leading_dense_block_count"),
        "n_group": metadata.integer("expert_group_count", 1),
        "topk_group": metadata.integer("expert_group_used_count", 1),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0),
        "q_lora_rank": metadata.optional("attention.q_lora_rank") or None,
        "kv_lora_rank": latent,
        "qk_rope_head_dim": rotary_dim,
        "qk_nope_head_dim": metadata.integer("attention.key_length_mla") - rotary_dim,
        "v_head_dim": metadata.integer("attention.value_length_mla"),
        "num_key_value_heads": metadata.integer("attention.head_count"),
        "num_nextn_predict_layers": metadata.get("nextn_predict_layers", 0),
        "rope_scaling": _latent_rope_scaling(metadata),
        "head_dim": _ABSENT,
        "partial_rotary_factor": _ABSENT,
    }


def _latent_rope_scaling(metadata: GgufMetadata) -> dict[str, Any] | None:
    """YaRN of latent attention. Its factor of queries and keys is in a key of its own."""
    metadata.expect(ATTENTION_FACTOR, 1.0)
    scaling = _rope_scaling(metadata, metadata.integer("rope.dimension_count"))
    if scaling is not None and metadata.optional(LOG_MULTIPLIER):
        factor = _shortest(metadata.number(LOG_MULTIPLIER) / _MSCALE)
        scaling |= {"mscale": factor, "mscale_all_dim": factor}
    return scaling


def _deepseek_v2(metadata: GgufMetadata) -> dict[str, Any]:
    metadata.expect("expert_weights_norm", False)
    metadata.expect("expert_gating_func", SOFTMAX)
    return _deepseek(metadata) | {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
    }


def _deepseek_v3(metadata: GgufMetadata) -> dict[str, Any]:
    return _deepseek(metadata) | {
        "norm_topk_prob": metadata.get("expert_weights_norm"),
        "rope_interleave": True,
    }


def _mistral4(metadata: GgufMetadata) -> dict[str, Any]:
    metadata.expect("expert_gating_func", SOFTMAX)
    fields = _deepseek_v3(metadata)
    parameters = fields.pop("rope_scaling") or {"rope_type": "default"}
    parameters["rope_theta"] = metadata.get("rope.freq_base", 10000.0)
    if metadata.optional("attention.temperature_scale"):
        scale = _shortest(metadata.number("attention.temperature_scale"))
        parameters["llama_4_scaling_beta"] = scale
        original = parameters.get("original_max_position_embeddings")
        metadata.expect("attention.temperature_length", original)
    return fields | {
        "rope_parameters": parameters,
        "rope_scaling": _ABSENT,
        "rope_theta": _ABSENT,
    }


def _shortest(value: float) -> float:
    """The number with few decimals that was stored in float32."""
    return round(value, 5)


def _mistral3(metadata: GgufMetadata) -> dict[str, Any]:
    scaling = _rope_scaling(metadata, metadata.integer("attention.key_length"))
    if scaling is None or scaling["rope_type"] != "yarn":
        raise metadata.error("rope.scaling.type", "yarn was expected")
    if metadata.optional(LOG_MULTIPLIER) is not None:
        factor = _shortest(metadata.number(LOG_MULTIPLIER))
        scaling |= {"mscale": 1.0, "mscale_all_dim": factor}
    scale = _shortest(metadata.number("attention.temperature_scale"))
    return {
        "rope_parameters": scaling
        | {
            "rope_theta": metadata.get("rope.freq_base", 10000.0),
            "llama_4_scaling_beta": scale,
        },
        "rope_scaling": _ABSENT,
        "rope_theta": _ABSENT,
        "sliding_window": None,
    }


def _nemotron(metadata: GgufMetadata) -> dict[str, Any]:
    return _biases(metadata) | {
        "hidden_act": "relu2",
        "norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "layer_norm_eps": _ABSENT,
    }


def _jais2(metadata: GgufMetadata) -> dict[str, Any]:
    # Without biases llama.cpp does not load a file.
    return {"hidden_act": "relu2", "attention_bias": True, "mlp_bias": True}


def _stablelm(metadata: GgufMetadata) -> dict[str, Any]:
    is_parallel = not metadata.has_tensor("ffn_norm.weight")
    if metadata.get("use_parallel_residual", is_parallel) != is_parallel:
        raise metadata.error("use_parallel_residual", f"{is_parallel} was expected")
    return {
        "use_qkv_bias": metadata.has_tensor("attn_q.bias"),
        "use_parallel_residual": is_parallel,
    }


def _sigmoid_experts(metadata: GgufMetadata, count: str, shared: str) -> dict[str, Any]:
    """The router of DeepSeek V3 and its like. count, shared: the names of the family's config."""
    _expect_sigmoid(metadata)
    return {
        **_experts(metadata, count, size="moe_intermediate_size"),
        shared: metadata.get("expert_shared_count", 0),
        "first_k_dense_replace": metadata.get("leading_dense_block_count"),
        "n_group": metadata.integer("expert_group_count", 1),
        "topk_group": metadata.integer("expert_group_used_count", 1),
        "norm_topk_prob": metadata.get("expert_weights_norm"),
        "routed_scaling_factor": metadata.number("expert_weights_scale"),
    }


def _dots1(metadata: GgufMetadata) -> dict[str, Any]:
    return _attention_bias(metadata) | {
        **_sigmoid_experts(metadata, "n_routed_experts", "n_shared_experts"),
        "sliding_window": None,
    }


def _exaone_moe(metadata: GgufMetadata) -> dict[str, Any]:
    fields = _sigmoid_experts(metadata, "num_experts", "num_shared_experts")
    num_layers = _num_layers(metadata)
    num_dense = fields["first_k_dense_replace"]
    return fields | {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": _layer_types(metadata, 4),
        "mlp_layer_types": ["dense" if i < num_dense else "sparse" for i in range(num_layers)],
    }


def _afmoe(metadata: GgufMetadata) -> dict[str, Any]:
    _expect_sigmoid(metadata)
    metadata.expect("expert_weights_norm", True)
    return {
        **_experts(metadata, size="moe_intermediate_size"),
        "num_shared_experts": metadata.get("expert_shared_count"),
        "num_dense_layers": metadata.get("leading_dense_block_count"),
        "route_norm": True,
        "route_scale": metadata.number("expert_weights_scale"),
        "sliding_window": metadata.integer("attention.sliding_window"),
        # No key says these.
        "global_attn_every_n_layers": 4,
        "layer_types": _layer_types(metadata, 4),
        "mup_enabled": True,
    }


# Keys of Laguna files that were made before llama.cpp had the family.
_OLD_LAGUNA_KEYS = ("attention.layer_types", "rope.swa.dimension_count", "rope.swa.freq_base")


def _laguna(metadata: GgufMetadata) -> dict[str, Any]:
    _expect_sigmoid(metadata)
    metadata.expect("expert_weights_norm", True)
    metadata.expect("expert_group_count", 1, 0)
    for key in _OLD_LAGUNA_KEYS:
        if metadata.optional(key) is not None:
            raise metadata.error(key, "The keys of llama.cpp's own converter were expected")
    for name in CONFIG_TENSORS:
        if metadata.has_tensor(name):
            raise InputError(
                f"{metadata.path} has {name}", "RoPE without factors of its own was expected"
            )
    num_layers = _num_layers(metadata)
    key = "leading_dense_block_count"
    num_dense = metadata.get(key)
    if type(num_dense) is not int or not 0 <= num_dense <= num_layers:
        raise metadata.error(key, f"A number up to {num_layers} was expected")
    heads = metadata.integers("attention.head_count", num_layers)
    fields = _windows(metadata, 4, full_first=True)
    if fields["sliding_window"] is None:
        fields["sliding_window"] = _ABSENT
    return _attention_bias(metadata) | {
        **fields,
        **_experts(metadata, size="moe_intermediate_size"),
        **_laguna_ropes(metadata),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_key_value_heads": metadata.integer("attention.head_count_kv"),
        "num_attention_heads_per_layer": heads,
        "gating": _laguna_gating(metadata, heads),
        "shared_expert_intermediate_size": metadata.integer("expert_shared_feed_forward_length"),
        "moe_routed_scaling_factor": metadata.number("expert_weights_scale"),
        "mlp_layer_types": ["dense" if i < num_dense else "sparse" for i in range(num_layers)],
    }


def _laguna_ropes(metadata: GgufMetadata) -> dict[str, Any]:
    """RoPE of both kinds of layers. Keys of those with windows default to those of the others."""
    head_dim = metadata.integer("attention.key_length")
    for key in ("attention.key_length_swa", "attention.value_length_swa"):
        metadata.expect(key, head_dim)
    base = metadata.number("rope.freq_base", 10000.0)
    fields = _ropes_by_layer_type(metadata, base, base)
    rotary_dim = _rotary_dim(metadata, "rope.dimension_count", head_dim, head_dim)
    sliding_dim = _rotary_dim(metadata, "rope.dimension_count_swa", head_dim, rotary_dim)
    for kind, dim in (("full_attention", rotary_dim), ("sliding_attention", sliding_dim)):
        fields["rope_parameters"][kind]["partial_rotary_factor"] = dim / head_dim
    return fields | {"partial_rotary_factor": _ABSENT}


def _laguna_gating(metadata: GgufMetadata, heads: list[int]) -> str:
    """Whether a gate is of a head or of one of its features. The rows of the tensors say it."""
    head_dim = metadata.integer("attention.key_length")
    found = []
    for layer, num_heads in enumerate(heads):
        name = f"blk.{layer}.attn_gate.weight"
        if name not in metadata.tensors:
            raise InputError(f"{metadata.path} has no {name}")
        num_rows = metadata.tensors[name].shape[0]
        kinds = {num_heads: "per-head", num_heads * head_dim: "per-element"}
        if num_rows not in kinds:
            raise InputError(
                f"{metadata.path}: tensor {name} has {num_rows} rows",
                f"{num_heads} were expected, one for each head, or {num_heads * head_dim}, one for"
                " each of their features",
            )
        found.append(kinds[num_rows])
    if len(set(found)) > 1:
        raise InputError(
            f"{metadata.path} has gates of heads in some layers and of features in others",
            "Gates of one kind were expected",
        )
    return found[0]


def _hy_v3(metadata: GgufMetadata) -> dict[str, Any]:
    _expect_sigmoid(metadata)
    metadata.expect("expert_weights_norm", True)
    fields = _experts(metadata, size="moe_intermediate_size")
    shared_size = metadata.integer("expert_shared_feed_forward_length")
    is_sparse = [
        metadata.has_tensor(f"blk.{index}.ffn_gate_inp.weight")
        for index in range(_num_layers(metadata))
    ]
    return _attention_bias(metadata) | {
        **fields,
        "num_shared_experts": shared_size // fields["moe_intermediate_size"],
        "router_scaling_factor": metadata.number("expert_weights_scale"),
        "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in is_sparse],
        "mlp_bias": False,
        "num_nextn_predict_layers": metadata.get("nextn_predict_layers", 0),
    }


def _gemma4_moe(metadata: GgufMetadata) -> dict[str, Any]:
    return _gemma4(metadata) | {
        **_experts(metadata, used="top_k_experts", size="moe_intermediate_size"),
        "enable_moe_block": True,
    }


def _granite_moe(metadata: GgufMetadata) -> dict[str, Any]:
    return _granite(metadata) | _experts(metadata, "num_local_experts")


def _granite_moe_shared(metadata: GgufMetadata) -> dict[str, Any]:
    size = metadata.integer("expert_shared_feed_forward_length")
    return _granite_moe(metadata) | {"shared_intermediate_size": size}


def _mamba2(metadata: GgufMetadata) -> dict[str, Any]:
    num_heads = metadata.integer("ssm.time_step_rank")
    inner_size = metadata.integer("ssm.inner_size")
    return {
        "num_heads": num_heads,
        "head_dim": inner_size // num_heads,
        "expand": inner_size // metadata.integer("embedding_length"),
        "state_size": metadata.integer("ssm.state_size"),
        "n_groups": metadata.integer("ssm.group_count"),
        "conv_kernel": metadata.integer("ssm.conv_kernel"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in metadata.tensors),
        "use_bias": any(name.endswith("ssm_in.bias") for name in metadata.tensors),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_rms_epsilon"),
        "rms_norm_eps": _ABSENT,
        "rope_theta": _ABSENT,
    }


def _granite_hybrid(metadata: GgufMetadata) -> dict[str, Any]:
    kv_heads = _counts(metadata, "attention.head_count_kv")
    size = metadata.integer("feed_forward_length")
    has_rope = metadata.get("rope.scaling.finetuned", True)
    return _granite(metadata) | {
        **_hybrid_mamba2(metadata),
        "layer_types": ["full_attention" if heads else "linear_attention" for heads in kv_heads],
        "num_key_value_heads": max(kv_heads) or metadata.integer("attention.head_count"),
        "position_embedding_type": "rope" if has_rope else "nope",
        "intermediate_size": size,
        "shared_intermediate_size": size,
        "num_local_experts": 0,
    }


def _hybrid_mamba2(metadata: GgufMetadata) -> dict[str, Any]:
    """The Mamba 2 layers of a hybrid whose fields have names of their own."""
    num_heads = metadata.integer("ssm.time_step_rank")
    inner_size = metadata.integer("ssm.inner_size")
    return {
        "mamba_n_heads": num_heads,
        "mamba_d_head": inner_size // num_heads,
        "mamba_expand": inner_size // metadata.integer("embedding_length"),
        "mamba_n_groups": metadata.integer("ssm.group_count"),
        "mamba_d_state": metadata.integer("ssm.state_size"),
        "mamba_d_conv": metadata.integer("ssm.conv_kernel"),
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in metadata.tensors),
        "mamba_proj_bias": any(name.endswith("ssm_in.bias") for name in metadata.tensors),
    }


def _bamba(metadata: GgufMetadata) -> dict[str, Any]:
    kv_heads = _counts(metadata, "attention.head_count_kv")
    for key in ("attention.scale", "residual_scale", "logit_scale"):
        if metadata.optional(key):
            raise metadata.error(key, "With it, embedding_scale was expected too")
    metadata.expect("rope.scaling.type", "none")
    metadata.expect("rope.scaling.finetuned", True)
    return _hybrid_mamba2(metadata) | {
        "attn_layer_indices": [index for index, heads in enumerate(kv_heads) if heads],
        "num_key_value_heads": max(kv_heads) or metadata.integer("attention.head_count"),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "attention_bias": any(name.endswith("attn_q.bias") for name in metadata.tensors),
        "mlp_bias": metadata.has_tensor("ffn_up.bias"),
    }


def _converted_bamba(metadata: GgufMetadata) -> dict[str, Any]:
    # The converter writes the size of a head where config.json has no attn_rotary_emb.
    return _bamba(metadata) | {"partial_rotary_factor": 0.5}


def _granite_hybrid_moe(metadata: GgufMetadata) -> dict[str, Any]:
    shared_size = metadata.get("expert_shared_feed_forward_length", 0)
    return _granite_hybrid(metadata) | {
        **_experts(metadata, "num_local_experts"),
        "shared_intermediate_size": shared_size,
    }


def _counts(metadata: GgufMetadata, key: str) -> list[int]:
    """A number for each layer, 0 where it has none of what is counted."""
    num_layers = _num_layers(metadata)
    counts = metadata.get(key)
    are_numbers = isinstance(counts, list) and all(
        type(count) is int and count >= 0 for count in counts
    )
    if not are_numbers or len(counts) != num_layers:
        raise metadata.error(key, f"{num_layers} numbers were expected, one for each layer")
    return list(counts)


def _nemotron_h(metadata: GgufMetadata) -> dict[str, Any]:
    kv_heads = _counts(metadata, "attention.head_count_kv")
    mlp_sizes = _counts(metadata, "feed_forward_length")
    num_experts = metadata.get("expert_count", 0)
    types = [
        "full_attention"
        if heads
        else ("moe" if num_experts else "mlp")
        if size
        else "linear_attention"
        for heads, size in zip(kv_heads, mlp_sizes, strict=True)
    ]
    num_mamba_heads = metadata.integer("ssm.time_step_rank")
    return {
        "layers_block_type": types,
        "num_key_value_heads": max(kv_heads) or metadata.integer("attention.head_count"),
        "intermediate_size": max(mlp_sizes),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_rms_epsilon"),
        "mamba_num_heads": num_mamba_heads,
        "mamba_head_dim": metadata.integer("ssm.inner_size") // num_mamba_heads,
        "ssm_state_size": metadata.integer("ssm.state_size"),
        "n_groups": metadata.integer("ssm.group_count"),
        "conv_kernel": metadata.integer("ssm.conv_kernel"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in metadata.tensors),
        "use_bias": any(name.endswith("ssm_in.bias") for name in metadata.tensors),
        "attention_bias": any(name.endswith("attn_q.bias") for name in metadata.tensors),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in metadata.tensors),
        "mlp_hidden_act": "relu2",
        "hidden_act": _ABSENT,
        "rms_norm_eps": _ABSENT,
        "rope_theta": _ABSENT,
    }


def _nemotron_h_moe(metadata: GgufMetadata) -> dict[str, Any]:
    return _nemotron_h(metadata) | {
        **_experts(metadata, "n_routed_experts", size="moe_intermediate_size"),
        "n_shared_experts": metadata.integer("expert_shared_count"),
        "moe_shared_expert_intermediate_size": metadata.integer(
            "expert_shared_feed_forward_length"
        ),
        "norm_topk_prob": metadata.get("expert_weights_norm"),
        "routed_scaling_factor": metadata.number("expert_weights_scale"),
        "n_group": metadata.integer("expert_group_count", 1),
        "topk_group": metadata.integer("expert_group_used_count", 1),
        "moe_latent_size": metadata.optional("moe_latent_size"),
    }


def _lfm2_moe(metadata: GgufMetadata) -> dict[str, Any]:
    _expect_sigmoid(metadata)
    return _lfm2(metadata) | {
        **_experts(metadata, size="moe_intermediate_size"),
        "num_dense_layers": metadata.get("leading_dense_block_count"),
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in metadata.tensors),
        "norm_topk_prob": True,
        "block_auto_adjust_ff_dim": _ABSENT,
    }


_LATENT_HEADS = {"self_attn.kv_b_proj": ("attn_k_b", "attn_v_b")}
_LATENT_MOVES = {"self_attn.kv_b_proj": latent_heads}
_GRANITE_STACK = StackedExperts(
    "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"
)

# By GGUF architecture.
ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", "llama", _biases, _LLAMA, moves=_INTERLEAVED_QK),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2", _qwen2, _LLAMA),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3", _attention_bias, _LLAMA),
    "gemma": GgufArchitecture(
        "GemmaForCausalLM", "gemma", _gemma, _ATTENTION | _FFN_NORM | _MLP, norm_offset=1.0
    ),
    "gemma2": GgufArchitecture(
        "Gemma2ForCausalLM", "gemma2", _gemma2, _GEMMA2, norm_offset=1.0, sliding_window=True
    ),
    "gemma3": GgufArchitecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _gemma3,
        _GEMMA2 | _QK_NORM,
        norm_offset=1.0,
        sliding_window=True,
    ),
    "gemma4": GgufArchitecture(
        "Gemma4ForCausalLM",
        "gemma4_text",
        _gemma4,
        _GEMMA4,
        sliding_window=True,
        differs_by_layer=True,
    ),
    "glm4": GgufArchitecture("Glm4ForCausalLM", "glm4", _glm4, _GLM4, partial_rotary=True),
    "gpt-oss": GgufArchitecture(
        "GptOssForCausalLM",
        "gpt_oss",
        _gpt_oss,
        _ATTENTION
        | {
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        sliding_window=True,
        experts=EXPERTS,
        stacked_experts=StackedExperts(
            "mlp.experts.gate_up_proj", "mlp.experts.down_proj", in_turn=True
        ),
    ),
    "granite": GgufArchitecture(
        "GraniteForCausalLM",
        "granite",
        _granite,
        _ATTENTION | _FFN_NORM | _MLP,
        moves=_INTERLEAVED_QK,
    ),
    "granite_swa": GgufArchitecture(
        "GraniteSWAForCausalLM",
        "granite_swa",
        _granite_swa,
        _GRANITE_SWA | _MLP,
        sliding_window=True,
        moves=_INTERLEAVED_QK,
    ),
    "olmo2": GgufArchitecture("Olmo2ForCausalLM", "olmo2", _attention_bias, _POST_NORM),
    "phi3": GgufArchitecture(
        "Phi3ForCausalLM",
        "phi3",
        _phi3,
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        partial_rotary=True,
        sliding_window=True,
    ),
    "starcoder2": GgufArchitecture(
        "Starcoder2ForCausalLM",
        "starcoder2",
        _starcoder2,
        _ATTENTION | _FFN_NORM | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        epsilon="norm_epsilon",
    ),
    "command-r": GgufArchitecture(
        "CohereForCausalLM", "cohere", _cohere, _ATTENTION | _MLP, epsilon="layer_norm_eps"
    ),
    "cohere2": GgufArchitecture(
        "Cohere2ForCausalLM",
        "cohere2",
        _cohere2,
        _ATTENTION | _MLP,
        epsilon="layer_norm_eps",
        sliding_window=True,
    ),
    "exaone4": GgufArchitecture(
        "Exaone4ForCausalLM", "exaone4", _exaone4, _POST_NORM, sliding_window=True
    ),
    "ernie4_5": GgufArchitecture(
        "Ernie4_5ForCausalLM", "ernie4_5", _ernie4_5, _ATTENTION | _FFN_NORM | _MLP
    ),
    "hunyuan-dense": GgufArchitecture(
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        _biases,
        _ATTENTION
        | _FFN_NORM
        | _MLP
        | {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "seed_oss": GgufArchitecture(
        "SeedOssForCausalLM",
        "seed_oss",
        _seed_oss,
        _ATTENTION | _MLP | {"post_attention_norm": "post_attention_layernorm"},
    ),
    "smollm3": GgufArchitecture(
        "SmolLM3ForCausalLM",
        "smollm3",
        _smollm3,
        _ATTENTION | _FFN_NORM | _MLP,
        moves=_INTERLEAVED_QK,
    ),
    "arcee": GgufArchitecture(
        "ArceeForCausalLM",
        "arcee",
        _arcee,
        _ATTENTION | _FFN_NORM | _NO_GATE,
        moves=_INTERLEAVED_QK,
    ),
    "apertus": GgufArchitecture(
        "ApertusForCausalLM", "apertus", _apertus, _APERTUS, layer_numbers=_XIELU
    ),
    "qwen3moe": GgufArchitecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe, _QWEN_MOE, experts=EXPERTS
    ),
    "qwen2moe": GgufArchitecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        _qwen2_moe,
        _QWEN_MOE
        | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
        | _shared_expert("mlp.shared_expert"),
        experts=EXPERTS,
    ),
    "olmoe": GgufArchitecture("OlmoeForCausalLM", "olmoe", _olmoe, _QWEN_MOE, experts=EXPERTS),
    "glm4moe": GgufArchitecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        _glm4_moe,
        _ATTENTION
        | _QK_NORM
        | _MLP
        | _PREDICTION
        | _shared_expert("mlp.shared_experts")
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.gate",
            "exp_probs_b": "mlp.gate.e_score_correction_bias",
        },
        partial_rotary=True,
        experts=EXPERTS,
    ),
    "minimax-m2": GgufArchitecture(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        _minimax_m2,
        _ATTENTION
        | _QK_NORM
        | _FFN_NORM
        | {
            "ffn_gate_inp": "block_sparse_moe.gate",
            "exp_probs_b": "block_sparse_moe.e_score_correction_bias",
        },
        partial_rotary=True,
        experts=_MIXTRAL_EXPERTS,
    ),
    "ernie4_5-moe": GgufArchitecture(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        _ernie4_5_moe,
        _ATTENTION
        | _FFN_NORM
        | _MLP
        | _shared_expert("mlp.shared_experts")
        | {
            "ffn_gate_inp": "mlp.gate",
            "exp_probs_b": "mlp.moe_statics.e_score_correction_bias",
        },
        experts=EXPERTS,
    ),
    "lfm2": GgufArchitecture(
        "Lfm2ForCausalLM",
        "lfm2",
        _lfm2,
        _LFM2,
        epsilon="norm_eps",
        differs_by_layer=True,
    ),
    "lfm2moe": GgufArchitecture(
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        _lfm2_moe,
        _LFM2 | {"ffn_gate_inp": "feed_forward.gate", "exp_probs_b": "feed_forward.expert_bias"},
        epsilon="norm_eps",
        differs_by_layer=True,
        experts=_LFM2_EXPERTS,
    ),
    "qwen35": GgufArchitecture(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        _qwen3_5,
        _QWEN3_5 | _MLP | _PREDICTION,
        norm_offset=1.0,
        partial_rotary=True,
        moves=_TILED_DELTA_NET,
        has_mrope_sections=True,
    ),
    "qwen35moe": GgufArchitecture(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        _qwen3_5_moe,
        _QWEN3_5
        | _PREDICTION
        | _shared_expert("mlp.shared_expert")
        | {"ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        norm_offset=1.0,
        partial_rotary=True,
        moves=_TILED_DELTA_NET,
        has_mrope_sections=True,
        experts=EXPERTS,
    ),
    "qwen3next": GgufArchitecture(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        _qwen3_next,
        _QWEN3_NEXT | _PREDICTION | _shared_expert("mlp.shared_expert"),
        norm_offset=1.0,
        partial_rotary=True,
        joined={"linear_attn.in_proj_qkvz": ("attn_qkv", "attn_gate")},
        moves={
            "linear_attn.in_proj_qkvz": by_key_head,
            "linear_attn.A_log": negative_exponential,
        },
        experts=EXPERTS,
    ),
    "chatglm": GgufArchitecture(
        "GlmForCausalLM",
        "glm",
        _glm4,
        _ATTENTION | _FFN_NORM | {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        partial_rotary=True,
    ),
    "mistral3": GgufArchitecture(
        "Ministral3ForCausalLM",
        "ministral3",
        _mistral3,
        _ATTENTION | _FFN_NORM | _MLP,
        moves=_INTERLEAVED_QK,
        has_log_multiplier=True,
    ),
    "mistral4": GgufArchitecture(
        "Mistral4ForCausalLM",
        "mistral4",
        _mistral4,
        _DEEPSEEK | _shared_expert("mlp.shared_experts"),
        partial_rotary=True,
        joined=_LATENT_HEADS,
        moves=_LATENT_MOVES,
        experts=EXPERTS,
        stacked_experts=StackedExperts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "nemotron": GgufArchitecture(
        "NemotronForCausalLM",
        "nemotron",
        _nemotron,
        _ATTENTION | _FFN_NORM | _NO_GATE,
        epsilon="layer_norm_eps",
        norm_offset=1.0,
        partial_rotary=True,
    ),
    "hy_v3": GgufArchitecture(
        "HYV3ForCausalLM",
        "hy_v3",
        _hy_v3,
        _ATTENTION
        | _QK_NORM
        | _FFN_NORM
        | _MLP
        | _PREDICTION
        | _shared_expert("mlp.shared_mlp")
        | {
            "ffn_gate_inp": "mlp.router.gate",
            "exp_probs_b": "mlp.expert_bias",
            "nextn.shared_head_norm": "final_layernorm",
        },
        experts=EXPERTS,
        bare_tensors=("exp_probs_b",),
    ),
    "jais2": GgufArchitecture(
        "Jais2ForCausalLM",
        "jais2",
        _jais2,
        _ATTENTION | _FFN_NORM | _NO_GATE,
        epsilon="layer_norm_eps",
    ),
    "mellum": GgufArchitecture(
        "MellumForCausalLM",
        "mellum",
        _mellum,
        _QWEN_MOE,
        sliding_window=True,
        experts=EXPERTS,
    ),
    "stablelm": GgufArchitecture(
        "StableLmForCausalLM",
        "stablelm",
        _stablelm,
        _ATTENTION | _FFN_NORM | _MLP,
        epsilon="layer_norm_eps",
        partial_rotary=True,
    ),
    "dots1": GgufArchitecture(
        "Dots1ForCausalLM",
        "dots1",
        _dots1,
        _ATTENTION
        | _QK_NORM
        | _FFN_NORM
        | _MLP
        | _shared_expert("mlp.shared_experts")
        | {"ffn_gate_inp": "mlp.gate", "exp_probs_b": "mlp.gate.e_score_correction_bias"},
        experts=EXPERTS,
    ),
    "exaone-moe": GgufArchitecture(
        "ExaoneMoeForCausalLM",
        "exaone_moe",
        _exaone_moe,
        _ATTENTION
        | _QK_NORM
        | _FFN_NORM
        | _MLP
        | _shared_expert("mlp.shared_experts")
        | {"ffn_gate_inp": "mlp.gate", "exp_probs_b": "mlp.e_score_correction_bias"},
        sliding_window=True,
        experts=EXPERTS,
    ),
    "afmoe": GgufArchitecture(
        "AfmoeForCausalLM",
        "afmoe",
        _afmoe,
        _ATTENTION
        | _QK_NORM
        | _MLP
        | _shared_expert("mlp.shared_experts")
        | {
            "attn_gate": "self_attn.gate_proj",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_mlp_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_gate_inp": "mlp.router.gate",
            "exp_probs_b": "mlp.expert_bias",
        },
        sliding_window=True,
        experts=EXPERTS,
    ),
    "laguna": GgufArchitecture(
        "LagunaForCausalLM",
        "laguna",
        _laguna,
        _ATTENTION
        | _QK_NORM
        | _FFN_NORM
        | _MLP
        | _shared_expert("mlp.shared_expert")
        | {
            "attn_gate": "self_attn.g_proj",
            "ffn_gate_inp": "mlp.gate",
            "exp_probs_b": "mlp.experts.e_score_correction_bias",
        },
        partial_rotary=True,
        sliding_window=True,
        differs_by_layer=True,
        heads_differ=True,
        experts=EXPERTS,
    ),
    "granitemoe": GgufArchitecture(
        "GraniteMoeForCausalLM",
        "granitemoe",
        _granite_moe,
        _ATTENTION | _FFN_NORM | {"ffn_gate_inp": "block_sparse_moe.router.layer"},
        moves=_INTERLEAVED_QK,
        experts=_GRANITE_EXPERTS,
        stacked_experts=_GRANITE_STACK,
    ),
    "deepseek2": GgufArchitecture(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        _deepseek_v2,
        _DEEPSEEK | _PREDICTION | _shared_expert("mlp.shared_experts"),
        partial_rotary=True,
        joined=_LATENT_HEADS,
        moves=_LATENT_MOVES,
        experts=EXPERTS,
    ),
    "granitehybrid": GgufArchitecture(
        "BambaForCausalLM",
        "bamba",
        _converted_bamba,
        _BAMBA,
        partial_rotary=True,
        differs_by_layer=True,
        top_modules=_BAMBA_TOP,
        moves=_INTERLEAVED_QK | _HYBRID_MAMBA2_MOVES,
        is_written=False,
    ),
    "mamba2": GgufArchitecture(
        "Mamba2ForCausalLM",
        "mamba2",
        _mamba2,
        _MAMBA2,
        differs_by_layer=True,
        has_attention=False,
        tensor_prefix="backbone",
        top_modules={"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f"},
        moves=_MAMBA2_MOVES,
    ),
    "nemotron_h": GgufArchitecture(
        "NemotronHForCausalLM",
        "nemotron_h",
        _nemotron_h,
        _NEMOTRON_H,
        differs_by_layer=True,
        partial_rotary=True,  # RoPE is not used; files may have any size
        top_modules=_MAMBA2_TOP,
        moves=_MAMBA2_MOVES,
    ),
    "nemotron_h_moe": GgufArchitecture(
        "NemotronHForCausalLM",
        "nemotron_h",
        _nemotron_h_moe,
        _NEMOTRON_H
        | {
            "ffn_gate_inp": "mixer.gate",
            "exp_probs_b": "mixer.gate.e_score_correction_bias",
            "ffn_up_shexp": "mixer.shared_experts.up_proj",
            "ffn_down_shexp": "mixer.shared_experts.down_proj",
            "ffn_latent_down": "mixer.fc1_latent_proj",
            "ffn_latent_up": "mixer.fc2_latent_proj",
        },
        differs_by_layer=True,
        partial_rotary=True,
        experts={
            "ffn_up_exps": "mixer.experts.{}.up_proj",
            "ffn_down_exps": "mixer.experts.{}.down_proj",
        },
        top_modules=_MAMBA2_TOP,
        moves=_MAMBA2_MOVES,
    ),
    "hunyuan-moe": GgufArchitecture(
        "HunYuanMoEV1ForCausalLM",
        "hunyuan_v1_moe",
        _hunyuan_moe,
        _ATTENTION
        | _FFN_NORM
        | _shared_expert("mlp.shared_mlp")
        | {
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
            "ffn_gate_inp": "mlp.gate.wg",
        },
        experts=EXPERTS,
    ),
}
# By GGUF architecture: a key with a value, and the family of files that have it. None: any value
# but 0.
VARIANTS: dict[str, dict[tuple[str, int | None], GgufArchitecture]] = {
    "granite_swa": {
        ("expert_count", None): GgufArchitecture(
            "GraniteMoeSWAForCausalLM",
            "granitemoe_swa",
            _granite_moe_swa,
            _GRANITE_SWA
            | {
                "ffn_gate_inp": "block_sparse_moe.router",
                "ffn_up_shexp": "shared_mlp.input_linear",
                "ffn_down_shexp": "shared_mlp.output_linear",
            },
            sliding_window=True,
            moves=_INTERLEAVED_QK,
            experts=_GRANITE_EXPERTS,
            stacked_experts=StackedExperts(
                "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"
            ),
        )
    },
    "gemma4": {
        ("expert_count", None): GgufArchitecture(
            "Gemma4ForCausalLM",
            "gemma4_text",
            _gemma4_moe,
            _GEMMA4
            | {
                "ffn_gate_inp": "router.proj",
                "post_ffw_norm_1": "post_feedforward_layernorm_1",
                "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
                "post_ffw_norm_2": "post_feedforward_layernorm_2",
            },
            sliding_window=True,
            differs_by_layer=True,
            scales={"ffn_gate_inp": "router.scale", "ffn_down_exps": "router.per_expert_scale"},
            experts={
                "ffn_gate_exps": "experts.{}.gate_proj",
                "ffn_up_exps": "experts.{}.up_proj",
                "ffn_down_exps": "experts.{}.down_proj",
            },
            stacked_experts=StackedExperts("experts.gate_up_proj", "experts.down_proj"),
        )
    },
    "deepseek2": {
        ("expert_gating_func", SIGMOID): GgufArchitecture(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            _deepseek_v3,
            _DEEPSEEK | _PREDICTION | _shared_expert("mlp.shared_experts"),
            partial_rotary=True,
            joined=_LATENT_HEADS,
            moves=_LATENT_MOVES,
            experts=EXPERTS,
        )
    },
    "granitehybrid": {
        ("expert_count", None): GgufArchitecture(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            _granite_hybrid_moe,
            _GRANITE_HYBRID
            | {
                "ffn_gate_inp": "block_sparse_moe.router.layer",
                "ffn_down_shexp": "shared_mlp.output_linear",
            },
            differs_by_layer=True,
            joined={"shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp")},
            moves=_GRANITE_HYBRID_MOVES,
            experts=_GRANITE_EXPERTS,
            stacked_experts=_GRANITE_STACK,
        ),
        ("embedding_scale", None): GgufArchitecture(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            _granite_hybrid,
            _GRANITE_HYBRID | {"ffn_down": "shared_mlp.output_linear"},
            differs_by_layer=True,
            joined={"shared_mlp.input_linear": ("ffn_gate", "ffn_up")},
            moves=_GRANITE_HYBRID_MOVES,
        ),
        (ROTATED_ROWS, None): GgufArchitecture(
            "BambaForCausalLM",
            "bamba",
            _bamba,
            _BAMBA,
            partial_rotary=True,
            differs_by_layer=True,
            top_modules=_BAMBA_TOP,
            moves=_INTERLEAVED_ROTATED_QK | _HYBRID_MAMBA2_MOVES,
        ),
    },
    "granitemoe": {
        ("expert_shared_feed_forward_length", None): GgufArchitecture(
            "GraniteMoeSharedForCausalLM",
            "granitemoeshared",
            _granite_moe_shared,
            _ATTENTION
            | _FFN_NORM
            | {
                "ffn_gate_inp": "block_sparse_moe.router.layer",
                "ffn_down_shexp": "shared_mlp.output_linear",
            },
            joined={"shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp")},
            moves=_INTERLEAVED_QK
            | {
                "shared_mlp.input_linear": split_rows(
                    "shared_intermediate_size", "shared_intermediate_size"
                )
            },
            experts=_GRANITE_EXPERTS,
            stacked_experts=_GRANITE_STACK,
        )
    },
    "llama": {
        ("expert_count", None): GgufArchitecture(
            "MixtralForCausalLM",
            "mixtral",
            _mixtral,
            _ATTENTION | _FFN_NORM | {"ffn_gate_inp": "block_sparse_moe.gate"},
            moves=_INTERLEAVED_QK,
            experts=_MIXTRAL_EXPERTS,
        )
    },
    "olmo2": {
        ("attention.sliding_window", None): GgufArchitecture(
            "Olmo3ForCausalLM", "olmo3", _olmo3, _POST_NORM, sliding_window=True
        )
    },
}
