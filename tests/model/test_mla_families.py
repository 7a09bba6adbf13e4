"""Families with multi-head latent attention: configs, refusals, checkpoints as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.float_format_cases import keep_inputs
from support.fp8_files import edit_config, write_fp8
from support.paged_sequences import close, tokens_of
from support.tiny_adapters import write_adapter
from support.tiny_families import COMMON, MLA, MLA_YARN, family_oracle, oracle_logits

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli import main
from llmkit.common.errors import InputError
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.lora import load_adapter
from llmkit.model.mla import LatentLinear
from llmkit.model.mla_families import MLA_FAMILIES
from llmkit.model.parallel_group import rank_spec
from llmkit.model.parameter_table import is_carried
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_loader import load_engine

SIZES = COMMON | {"num_key_value_heads": 4, "n_routed_experts": 64, "num_experts_per_tok": 3}
# What the files of the hub say.
DEEPSEEK_V3 = {
    "num_hidden_layers": 5,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}


def config_of(architecture: str, **values: Any) -> dict[str, Any]:
    kind, _ = MLA_FAMILIES[architecture]
    return {"architectures": [architecture], "model_type": kind} | SIZES | values


@pytest.mark.parametrize("architecture", MLA_FAMILIES)
def test_mla_spec_agrees_with_transformers(architecture: str) -> None:
    config = config_of(architecture)
    if architecture == "Mistral4ForCausalLM":  # without it, transformers rotates too many
        config |= {"rope_parameters": dict(MLA_YARN)}
    spec = model_spec(config)
    theirs = transformers.AutoConfig.for_model(**config)
    mla = spec.mla
    assert mla is not None
    for name in (
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "qk_head_dim",
    ):
        assert getattr(mla, name) == getattr(theirs, name), name
    assert spec.rms_norm_eps == theirs.rms_norm_eps
    assert spec.moe is not None
    assert spec.moe.num_experts_per_tok == (theirs.num_experts_per_tok or 0)
    assert spec.moe.routed_scaling_factor == theirs.routed_scaling_factor
    assert 2 * len(spec.ropes["global"].inv_freq) == mla.qk_rope_head_dim
    assert spec.kv_elements_per_token == len(spec.layers) * mla.latent_dim
    assert spec.kv_bytes_per_token(2) == 2 * spec.kv_elements_per_token
    assert rank_spec(spec, 1, 2).kv_elements_per_token == spec.kv_elements_per_token


def test_mla_spec_of_published_configs() -> None:
    """DeepSeek-V3's config.json, and Kimi K2's, whose model_type transformers does not know."""
    config = config_of("DeepseekV3ForCausalLM", **DEEPSEEK_V3)
    spec = model_spec(config)
    assert spec.attention_scale == pytest.approx(192**-0.5 * 1.3688879454113936**2)
    assert [layer.is_moe for layer in spec.layers] == [False] * 3 + [True] * 2
    assert spec.moe is not None
    assert (spec.moe.num_groups, spec.moe.topk_groups) == (8, 4)
    assert is_carried(spec, "model.layers.5.self_attn.kv_b_proj.weight")
    kimi = model_spec(config | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1})
    assert kimi.moe is not None
    assert kimi.moe.num_groups == 1


def test_kimi_k25_has_the_architecture_of_its_files() -> None:
    """Files of the hub have another name of the architecture than transformers."""
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": config_of("DeepseekV3ForCausalLM") | {"model_type": "kimi_k2"},
    }
    spec = model_spec(config)
    assert spec.architecture == "Kimi_K25ForConditionalGeneration"
    assert spec.mla is not None


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("DeepseekV2ForCausalLM", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("DeepseekV2ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("DeepseekV3ForCausalLM", {"n_group": 5}, "n_group 5"),
        ("Mistral4ForCausalLM", {"n_group": 2, "topk_group": 3}, "topk_group 3"),
        ("DeepseekV3ForCausalLM", {"v_head_dim": 0}, "v_head_dim 0"),
        (
            "DeepseekV3ForCausalLM",
            {"attention_bias": True, "q_lora_rank": None},
            "attention_bias true and q_lora_rank null",
        ),
    ],
)
def test_mla_spec_refuses_values(architecture: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_spec(config_of(architecture, **values))


@pytest.mark.parametrize(
    ("architecture", "kind", "reason"),
    [
        ("DeepseekV32ForCausalLM", "deepseek_v32", "an indexer chooses the tokens"),
        ("GlmMoeDsaForCausalLM", "glm_moe_dsa", "an indexer chooses the tokens"),
        ("DeepseekV4ForCausalLM", "deepseek_v4", "compressed parts of the context"),
    ],
)
def test_sparse_attention_is_refused_by_name(architecture: str, kind: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"{architecture}.*{reason}"):
        model_spec({"architectures": [architecture], "model_type": kind} | SIZES)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A tiny DeepSeek V3 with a layer that predicts a further token, and transformers' model."""
    path = tmp_path_factory.mktemp("deepseek")
    oracle = family_oracle("deepseek-v3", path)
    tensors = load_file(path / "model.safetensors")
    last = {
        name.replace("layers.3.", "layers.4."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.3." in name
    }
    save_file(tensors | last, path / "model.safetensors", {"format": "pt"})
    edit_config(path, num_nextn_predict_layers=1)
    return path, oracle


@pytest.mark.parametrize("packed", [False, True], ids=["expanded", "absorbed"])
def test_mla_reads_fp8_blocks(
    deepseek: tuple[Path, torch.nn.Module], tmp_path: Path, packed: bool
) -> None:
    """As DeepSeek-V3 is published. kv_b_proj is dequantized, and its inputs are not rounded."""
    path, _ = deepseek
    dense = tmp_path / "dense"
    dense.mkdir()
    for file in path.iterdir():
        (dense / file.name).write_bytes(file.read_bytes())
    write_fp8(dense, tmp_path / "fp8", (16, 16), linears=r"_proj(_with_mqa)?\.weight$")
    model = load_model(open_checkpoint(tmp_path / "fp8"), torch.float32, packed=packed)
    for layer in model.layers:
        assert isinstance(layer.linears["attn.kv_b"], LatentLinear) == packed
        assert layer.linears["attn.kv_b"].activation_quant is None
        assert packed or layer.linears["attn.q_b"].activation_quant is not None
        for linear in layer.linears.values():
            keep_inputs(linear)
    tokens = tokens_of(40, 1)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        dense, attn_implementation="eager", dtype="float32"
    ).eval()
    with torch.inference_mode():
        close(next(window_logits(model, tokens[None])), oracle_logits(oracle, tokens))


@pytest.mark.skipif(cpu_kernels.library is None, reason="no compiled kernels")
def test_mla_weights_of_16_bits_stay_so_on_a_cpu(tmp_path: Path) -> None:
    family_oracle("deepseek-v3", tmp_path, num_hidden_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(open_checkpoint(tmp_path), torch.float32, packed=True)
    kv_b = model.layers[0].linears["attn.kv_b"]
    assert isinstance(kv_b, LatentLinear)
    heads, nope, rank, value = 4, 16, 16, 24
    # Inputs are padded to 64, outputs to 16.
    assert kv_b.projection.nbytes == 2 * heads * 64 * (rank + nope + 32)
    assert kv_b.weight.shape == (heads * (nope + value), rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mla_forms_agree_in_16_bits(
    deepseek: tuple[Path, torch.nn.Module], dtype: torch.dtype
) -> None:
    """Of which the compiled kernels take none."""
    path, oracle = deepseek
    tokens = tokens_of(40, 1)
    expected = oracle_logits(oracle, tokens)
    for packed in (False, True):
        model = load_model(open_checkpoint(path), dtype, packed=packed)
        with torch.inference_mode():
            logits = next(window_logits(model, tokens[None])).float()
        assert (logits - expected).abs().mean() < 0.05 * expected.std()


def test_mla_refuses_caches_of_8_bits(deepseek: tuple[Path, torch.nn.Module]) -> None:
    path, _ = deepseek
    options = EngineOptions(device="cpu", kv_cache_memory=1 << 20, kv_cache_dtype="int8")
    with pytest.raises(InputError, match="--kv-cache-dtype int8 is not possible with Deepseek"):
        load_engine(path, options)


def test_mla_refuses_scales_of_keys_and_values(
    deepseek: tuple[Path, torch.nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = deepseek
    out = tmp_path / "out"
    arguments = ["quantize", str(path), "--method", "fp8", "--kv", "fp8", "-o", str(out)]
    assert main.run(arguments) == 3
    assert "--kv fp8 is not possible with DeepseekV3ForCausalLM" in capsys.readouterr().err
    assert not out.exists()


def test_mla_takes_adapters_except_of_kv_b(
    deepseek: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    path, _ = deepseek
    spec = checkpoint_spec(open_checkpoint(path))
    write_adapter(path, tmp_path / "a", r"layers\.0\.self_attn\.(q_|kv_a|o_).*proj")
    weights = load_adapter(tmp_path / "a", spec, torch.float32)
    assert set(weights) == {f"layers.0.attn.{name}" for name in ("qkv_a", "q_b", "o")}
    write_adapter(path, tmp_path / "b", r"layers\.0\.self_attn\.kv_b")
    with pytest.raises(InputError, match="the adapter changes"):
        load_adapter(tmp_path / "b", spec, torch.float32)


def test_inspect_shows_latent_attention(
    deepseek: tuple[Path, torch.nn.Module],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = deepseek
    assert main.run(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["attention"][0]["latent_dim"] == MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"]
    assert facts["kv_bytes_per_token"] == {"fp32": 4 * 4 * 24, "bf16": 4 * 2 * 24}
    assert facts["recurrent"] is None
    monkeypatch.setenv("COLUMNS", "160")
    assert main.run(["inspect", str(path)]) == 0
    assert "4 heads of 24, latent: 24 elements of each token" in capsys.readouterr().out
