"""`model_spec` of a config.json, against the config classes and RoPE functions of transformers."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmkit.checkpoint.config_defaults import ALIASES, FAMILIES, NULLABLE, REQUIRED_SIZES
from llmkit.checkpoint.config_defaults import COMMON as COMMON_DEFAULTS
from llmkit.common.errors import InputError
from llmkit.model.families import SUPPORTED, model_spec
from llmkit.model.hybrid_families import HYBRID_FAMILIES
from llmkit.model.mla_families import MLA_FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
# Families have different names for the same numbers.
EXPERTS = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
}
ARCHITECTURES = {kind: name for name, (kind, _) in SUPPORTED.items()}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
HALF = ["sliding_attention", "full_attention"] * 4
FULL = ["full_attention"] * 8
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 54321.0, "factor": 8.0},
}
HYBRIDS = [kind for kind, _ in HYBRID_FAMILIES.values()]
LATENTS = [kind for kind, _ in MLA_FAMILIES.values()]
NEEDED: dict[str, dict[str, Any]] = {
    "helium": {"num_key_value_heads": 4},
    "hunyuan_v1_moe": {"moe_intermediate_size": 48},
}
# What a config of each family may say beside its sizes.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    # Helium has 20 KV heads by default. Hunyuan's experts have the intermediate_size. Gemma 4 has a
    # test of its own; hybrid models have test_hybrid_families.py, and those with latent attention
    # test_mla_families.py. Each layer of a Granite with sliding windows has its own rope_theta.
    *(
        (kind, NEEDED.get(kind, {}))
        for kind in FAMILIES
        if kind not in ("gemma4_text", "granite_swa", "granitemoe_swa", *HYBRIDS, *LATENTS)
    ),
    (
        "llama",
        {
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    (
        "llama",
        {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "rms_norm_eps": 1e-5},
    ),
    ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1000, "factor": 3.0}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}, "head_dim": 16}),
    ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 700}),
    (
        "llama",
        {
            "rope_scaling": YARN
            | {"truncate": False, "beta_fast": 20, "beta_slow": 2, "attention_factor": 0.7}
        },
    ),
    (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.1,
            }
        },
    ),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("mistral", {"sliding_window": None, "head_dim": 32}),
    ("mistral", {"sliding_window": 100, "rope_theta": 1e6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 12, "layer_types": HALF}),
    ("qwen2", {"rope_scaling": YARN, "rope_theta": 1e6}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
    (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 1024, "sliding_window": 50},
    ),
    (
        "phi3",
        {
            "rope_scaling": LONG | {"attention_factor": 1.5, "factor": 7.0},
            "original_max_position_embeddings": 99,
        },
    ),
    ("phi3", {"rope_scaling": LONG | {"factor": 1.0}, "original_max_position_embeddings": 4096}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    (
        "gemma2",
        {"layer_types": HALF[::-1], "final_logit_softcapping": None, "query_pre_attn_scalar": 24},
    ),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 77.0}),
    (
        "gemma3_text",
        {"sliding_window_pattern": 3, "rope_local_base_freq": 55.0, "sliding_window": 30},
    ),
    ("gemma3_text", {"rope_parameters": GEMMA3_ROPE, "layer_types": HALF}),
    (
        "granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2,
            "residual_multiplier": 0.2,
            "mlp_bias": True,
        },
    ),
    ("granite", {"logits_scaling": 8.0}),
    ("smollm3", {"no_rope_layers": [1, 0] * 4, "use_sliding_window": True, "sliding_window": 20}),
    ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    ("mixtral", {"sliding_window": 12, "rope_theta": 10.0}),
    # As released: EXAONE 4.0 32B and 1.2B, Hunyuan-A13B, InternLM3, the first Phi-3 with 128k.
    ("exaone4", {"sliding_window_pattern": "LLLG", "layer_types": HALF}),
    ("exaone4", {"sliding_window_pattern": None, "sliding_window": None, "layer_types": FULL}),
    (
        "hunyuan_v1_moe",
        {
            "num_experts_per_tok": [2] * 8,
            "moe_intermediate_size": [48] * 8,
            "num_shared_expert": [1] * 8,
        },
    ),
    ("internlm3", {"qkv_bias": True, "bias": True}),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1], "decoder_sparse_step": 2}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 12, "attention_bias": True}),
    # As released: Qwen3-Next and Qwen3.5 say how often full attention comes.
    (
        "qwen3_next",
        {
            "full_attention_interval": 4,
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e7,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    (
        "qwen3_5_text",
        {
            "full_attention_interval": 3,
            "attn_output_gate": True,
            "rope_parameters": {"rope_theta": 1e7, "rope_type": "default"},
        },
    ),
]


def config_of(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    sizes = SIZES | (EXPERTS if "num_local_experts" in FAMILIES[kind] else {})
    return {"architectures": [ARCHITECTURES[kind]], "model_type": kind} | sizes | values


def frequencies(
    config: Any, kind: str | None = None, length: int | None = None
) -> tuple[list[float], float]:
    """transformers' own, of one of the config's layer types (None: of all)."""
    given = config.rope_parameters if kind is None else config.rope_parameters[kind]
    if given["rope_type"] == "default":
        dim = int((config.head_dim or 0) * given.get("partial_rotary_factor", 1.0))
        return (
            1.0 / (given["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim))
        ).tolist(), 1.0
    found, scale = ROPE_INIT_FUNCTIONS[given["rope_type"]](
        config, torch.device("cpu"), seq_len=length, layer_type=kind
    )
    return found.tolist(), scale


def layer_mlp(layer: torch.nn.Module) -> torch.nn.Module:
    """The MLP or the mixture of experts of a layer of transformers' model."""
    return getattr(layer, "block_sparse_moe", None) or layer.mlp


@pytest.mark.parametrize(("kind", "values"), VARIANTS)
def test_model_spec_agrees_with_transformers(kind: str, values: dict[str, Any]) -> None:
    config = config_of(kind, values)
    spec = model_spec(config)
    theirs = transformers.AutoConfig.for_model(**config | {"pad_token_id": 0})
    if getattr(theirs, "head_dim", None) is None:
        theirs.head_dim = theirs.hidden_size // theirs.num_attention_heads
    for ours, name in (
        ("hidden_size", "hidden_size"),
        ("num_heads", "num_attention_heads"),
        ("head_dim", "head_dim"),
        ("intermediate_size", "intermediate_size"),
        ("vocab_size", "vocab_size"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("tie_word_embeddings", "tie_word_embeddings"),
    ):
        assert getattr(spec, ours) == getattr(theirs, name), name
    assert spec.num_kv_heads == (theirs.num_key_value_heads or theirs.num_attention_heads)
    eps_names = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon")
    assert [spec.rms_norm_eps] == [getattr(theirs, x) for x in eps_names if hasattr(theirs, x)]
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 8
    windows = [
        getattr(theirs, "sliding_window", None) if name == "sliding_attention" else None
        for name in types
    ]
    assert [layer.sliding_window for layer in spec.layers] == windows
    is_linear = [layer.mixer == "gated_delta_net" for layer in spec.layers]
    assert is_linear == [name == "linear_attention" for name in types]
    if kind == "smollm3":
        assert [layer.rope is not None for layer in spec.layers] == [
            bool(rotary) for rotary in theirs.no_rope_layers
        ]
    bias_names = ("attention_bias", "use_bias", "use_qkv_bias", "qkv_bias")
    assert spec.qkv_bias == (kind == "qwen2" or any(getattr(theirs, x, 0) for x in bias_names))
    has_expert_biases = kind == "gpt_oss"
    assert has_expert_biases or spec.mlp_bias == (
        getattr(theirs, "mlp_bias", False) or getattr(theirs, "use_bias", 0)
    )
    assert spec.attn_logit_softcapping == getattr(theirs, "attn_logit_softcapping", None)
    assert spec.final_logit_softcapping == getattr(theirs, "final_logit_softcapping", None)
    if spec.moe is not None:
        assert spec.moe.num_experts == 4
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(theirs)
        sparse = [hasattr(layer_mlp(layer), "experts") for layer in model.model.layers]
        assert [layer.is_moe for layer in spec.layers] == sparse
    for name, rope in spec.ropes.items():
        layer_type = None if name == "global" else name
        assert (list(rope.inv_freq), rope.attention_scaling) == frequencies(theirs, layer_type)
        if rope.long_inv_freq:
            assert (list(rope.long_inv_freq), rope.attention_scaling) == frequencies(
                theirs, layer_type, 4097
            )


def test_model_spec_of_gemma4_agrees_with_transformers() -> None:
    """Its layers have sizes of their own."""
    values = {"vocab_size_per_layer_input": SIZES["vocab_size"], "num_kv_shared_layers": 2}
    values |= {"num_global_key_value_heads": 2, "attention_k_eq_v": True}
    config = config_of("gemma4_text", values)
    spec = model_spec(config)
    theirs = transformers.AutoConfig.for_model(**config)
    for index, layer in enumerate(spec.layers):
        own = theirs.per_layer_config[index]
        sizes = spec.for_layer(index)
        assert sizes.num_kv_heads == own.num_key_value_heads
        assert sizes.head_dim == own.head_dim
        is_sliding = theirs.layer_types[index] == "sliding_attention"
        assert layer.sliding_window == (theirs.sliding_window if is_sliding else None)
        assert bool(layer.kv_shared_layer_offset) == (theirs.kv_sharing_modes[index] == "reuse")
        source = index - layer.kv_shared_layer_offset
        assert not layer.kv_shared_layer_offset or theirs.kv_sharing_modes[source] == "store"
    for name, rope in spec.ropes.items():
        found, _ = ROPE_INIT_FUNCTIONS["proportional"](theirs, torch.device("cpu"), layer_type=name)
        assert list(rope.inv_freq) == found.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size_per_layer_input": 7}, "vocab_size_per_layer_input 7"),
        ({"enable_moe_block": True, "hidden_size_per_layer_input": 0}, "no num_local_experts"),
        ({"num_kv_shared_layers": 8}, "8 num_kv_shared_layers"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ],
)
def test_model_spec_refuses_contradictions_of_gemma4(values: dict[str, Any], message: str) -> None:
    config = config_of("gemma4_text", {"vocab_size_per_layer_input": SIZES["vocab_size"]} | values)
    with pytest.raises(InputError, match=message):
        model_spec(config)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("llama", {"hidden_size": "64"}, "hidden_size '64'. A valid llama config"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers 'True'"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps 'None'"),
        ("llama", {"num_attention_heads": 7}, "hidden_size 256 and 7 attention heads"),
        ("llama", {"num_key_value_heads": 3}, "32 heads and 3 KV heads"),
        ("llama", {"hidden_act": "relu"}, r"unsupported activation \(relu\)"),
        (
            "llama",
            {"rope_scaling": {"type": "axial", "factor": 2.0}},
            r"unsupported RoPE scaling \(axial\)",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", "factor": 2.0}},
            "lacks low_freq_factor, high_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": "x"}},
            "linear RoPE scaling that cannot be computed",
        ),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling of Phi-3"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
        ("qwen2", {"layer_types": HALF[:3]}, "for 3 layers"),
        ("qwen2", {"layer_types": ["linear_attention"] * 8}, "the layer_types linear_attention"),
        ("smollm3", {"no_rope_layers": [1]}, "1 no_rope_layers"),
        ("qwen3_5_text", {"layer_types": HALF}, "the layer_types sliding_attention, full_att"),
        ("qwen3_5_text", {"layer_types": FULL[:3]}, "full_attention for 3 layers. linear_att"),
        ("qwen3_5_text", {"full_attention_interval": 0}, "full_attention_interval 0. A positive"),
        ("qwen3_5_text", {"linear_num_value_heads": 24}, "16 key heads of 128, 24 value heads"),
        ("qwen3_next", {"linear_conv_kernel_dim": 0}, "convolutions of 0. Positive"),
        ("qwen3_next", {"attn_output_gate": False}, "attn_output_gate 'False'. One of True"),
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2'. llama"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func 'softmax'. One of sigmoid"),
        ("minimax_m2", {"scoring_func": "sqrtsoftplus"}, "scoring_func 'sqrtsoftplus'"),
        ("dots1", {"topk_method": "greedy"}, "topk_method 'greedy'. One of noaux_tc"),
        ("glm4_moe", {"n_group": 3}, "4 experts, n_group 3 and topk_group 1"),
        ("glm4_moe", {"topk_group": 2}, "n_group 1 and topk_group 2"),
        ("hy_v3", {"mlp_layer_types": ["dense"]}, "mlp_layer_types dense for 1 layers"),
        ("laguna", {"num_attention_heads_per_layer": [8]}, r"num_attention_heads_per_layer \[8\]"),
        ("laguna", {"gating": "twice"}, "gating 'twice'. One of True, 'per-head'"),
        ("granite_swa", {"layer_rope_theta": [1.0]}, "1 layer_rope_theta"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("mixtral", {"num_experts_per_tok": 9}, "4 experts and 9 of them"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok 0. A positive"),
        ("glm4_moe", {"n_group": 4}, "4 experts in 4 groups"),
        ("glm4_moe", {"n_group": 0}, "n_group 0. A positive"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern 0"),
        ("gemma3_text", {"rope_parameters": YARN}, "rope_parameters for all layers"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling 0.0"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps -1.0"),
        ("llama", {"head_dim": 33}, "head_dim 33. An even"),
        ("llama", {"hidden_act": "xielu"}, "with the activation xielu"),
        ("apertus", {"hidden_act": "silu"}, "hidden_act 'silu'. One of 'xielu'"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm 'False'. One of True"),
        ("hunyuan_v1_moe", {"num_experts_per_tok": [2, 3]}, "different numbers for num_experts"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": 24}, "moe_intermediate_size 24"),
        ("hunyuan_v1_moe", NEEDED["hunyuan_v1_moe"] | {"num_shared_expert": [2]}, "num_shared"),
    ],
)
def test_model_spec_refuses_unsupported_configs(
    kind: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model_spec(config_of(kind, values))


@pytest.mark.parametrize("name", SIZES)
def test_model_spec_refuses_a_config_without_a_size(name: str) -> None:
    config = config_of("llama", {})
    del config[name]
    with pytest.raises(InputError, match=f"config.json has no {name}"):
        model_spec(config)


def test_model_spec_does_not_import_transformers() -> None:
    """It takes longer to import than a small model takes to load."""
    config = config_of("gemma3_text", {})
    code = (
        "import sys; from llmkit.model.families import model_spec;"
        f" model_spec({config!r}); print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" in loaded
    assert "transformers" not in loaded


# Fields that transformers' modeling code reads and that change nothing here: dropout and losses of
# training, tokens, towers beside the text model, which logits are computed, how sums are rounded.
UNREAD = {
    "_attn_implementation",
    "_experts_implementation",
    "attention_dropout",
    "dtype",
    "enable_moe_fp32_combine",
    "initializer_range",
    "moe_norm_min",
    "output_router_logits",
    "pad_token_id",
    "resid_pdrop",
    "use_cache",
    "residual_dropout",
    "embedding_dropout",
    "hidden_dropout",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "kv_sharing_modes",
    "text_config",
    "vision_config",
    "audio_config",
    "chunk_size",
    "mamba_chunk_size",
    "num_logits_to_keep",
    "output_hidden_states",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "return_dict",
    "time_step_floor",
    "time_step_max",
    "use_mamba_kernels",
    "z_loss_coefficient",
}
# Only the first weights depend on the least time step. transformers 5.23 also clamps those of
# Nemotron-H to it, against the model's own code.
UNREAD_OF_FAMILY = {
    "mamba2": {"time_step_min", "time_step_rank"},
    "nemotron_h": {"time_step_min"},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_know_every_field_that_transformers_code_reads(kind: str) -> None:
    """A flag that transformers reads and we do not would be a model that is silently another."""
    config = transformers.AutoConfig.for_model(kind)
    folder = Path(inspect.getfile(type(config))).parent
    code = folder / f"modeling_{folder.name}.py"
    if not code.exists():
        pytest.skip("transformers has the config only, for the modeling code of another family")
    source = code.read_text(encoding="utf-8")
    used = set(re.findall(r"config\.([a-z_]\w*)", source))
    used |= set(re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", source))
    fields = used & config.to_dict().keys()  # not methods, nor fields of a vision tower
    known = {*REQUIRED_SIZES, *COMMON_DEFAULTS, *NULLABLE, *FAMILIES[kind], *UNREAD}
    known |= UNREAD_OF_FAMILY.get(kind, set())
    known |= {alias for names in ALIASES.values() for alias in names}
    assert fields <= known
