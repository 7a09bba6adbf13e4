"""Families with Mamba 2 layers and short convolutions: what their configs say in old and new words.

test_model_families.py compares their logits with transformers'.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.paged_sequences import close, tokens_of
from support.tiny_families import COMMON, FAMILIES, family_oracle, oracle_logits

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model.families import model_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.hybrid_families import HYBRID_FAMILIES
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import Mamba2Spec, ModelSpec
from llmkit.model.weight_loader import load_model

ARCHITECTURES = {kind: name for name, (kind, _) in HYBRID_FAMILIES.items()}


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a tiny model, as transformers writes it."""
    kind, differences = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **(COMMON | differences))
    return config.to_dict() | {"architectures": [ARCHITECTURES[kind]]}


def spec_of(name: str, *without: str, **changes: Any) -> ModelSpec:
    """The spec of a tiny model whose config lacks some fields and has `changes`."""
    config = config_of(name)
    for field in without:
        del config[field]
    return model_spec(config | changes)


def blocks(spec: ModelSpec) -> list[tuple[str, bool, bool]]:
    """Of each layer: its mixer, whether it has an MLP or experts, and whether it has experts."""
    return [(layer.mixer, layer.has_mlp, layer.is_moe) for layer in spec.layers]


def mamba(spec: ModelSpec) -> Mamba2Spec:
    assert isinstance(spec.recurrent, Mamba2Spec)
    return spec.recurrent


def test_nemotron_h_layers_have_one_block_each() -> None:
    spec = spec_of("nemotron-3")
    mamba_block = ("mamba2", False, False)
    experts = ("none", True, True)
    attention = ("attention", False, False)
    expected = [mamba_block, experts, mamba_block, attention, experts, mamba_block]
    assert blocks(spec) == expected
    assert spec.kv_elements_per_token == 2 * 2 * 16
    rows = [row.name.split(".", 2)[2] for row in parameters(spec) if row.layers == (3,)]
    assert rows == ["attn_norm.weight", "attn.qkv.weight", "attn.o.weight"]
    rows = [row.name.split(".", 2)[2] for row in parameters(spec) if row.layers == (0,)]
    assert rows[:2] == ["attn_norm.weight", "mamba.in_proj.weight"]
    assert not any(name.startswith("mlp") for name in rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_override_pattern": "M-*M-"},
        {"layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp"]},
        {"layer_types": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nemotron_h_config_lists_its_layers_in_several_ways(changes: dict[str, Any]) -> None:
    spec = spec_of("nemotron-h", "layers_block_type", **{"num_hidden_layers": 52} | changes)
    assert blocks(spec) == blocks(spec_of("nemotron-h"))
    assert spec.moe is None


def test_nemotron_h_config_of_the_first_releases_names_the_head_dim_otherwise() -> None:
    assert spec_of("nemotron-h", "head_dim", attention_head_dim=24).head_dim == 24


def check_logits(path: Path, oracle: torch.nn.Module) -> None:
    model = load_model(open_checkpoint(path), torch.float32)
    tokens = tokens_of(20, 1)
    close(next(window_logits(model, tokens[None])), oracle_logits(oracle, tokens))


@pytest.mark.parametrize("name", ["nemotron-h", "nemotron-3-latent"])
def test_nemotron_h_checkpoint_may_have_the_names_of_transformers_modules(
    name: str, tmp_path: Path
) -> None:
    """All experts of a layer are in one tensor then."""
    oracle = family_oracle(name, tmp_path)
    oracle.save_pretrained(tmp_path, save_original_format=False)
    assert "model.embeddings.weight" in open_checkpoint(tmp_path).tensors
    check_logits(tmp_path, oracle)


def test_mamba2_checkpoint_may_have_the_names_of_codestral(tmp_path: Path) -> None:
    oracle = family_oracle("mamba2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    check_logits(tmp_path, oracle)


def test_granite_hybrid_config_names_layers_as_the_hub_does() -> None:
    """Their position_embedding_type is "nope", where transformers writes null."""
    hub = {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "nope"}
    spec = spec_of("granite-hybrid", **hub, num_experts_per_tok=0)
    assert spec == spec_of("granite-hybrid")
    assert all(layer.rope is None for layer in spec.layers)
    assert spec_of("granite-hybrid-moe").layers[1].rope == "global"


def test_lfm2_config_of_the_first_releases_has_names_of_its_own() -> None:
    """They win over the others, as in transformers."""
    expected = spec_of("lfm2", intermediate_size=96, tie_word_embeddings=False)
    old = {"full_attn_idxs": [1], "block_ff_dim": 96, "tie_embedding": False}
    spec = spec_of("lfm2", "layer_types", **old)
    assert spec == expected
    assert (spec.intermediate_size, spec.tie_word_embeddings) == (64, False)
    assert (
        blocks(spec_of("lfm2", "layer_types", full_attn_idxs=None))
        == [("attention", True, False)] * 4
    )


def test_mamba2_has_no_attention() -> None:
    spec = spec_of("mamba2")
    assert spec.sliding_windows == (None,)
    assert spec.kv_elements_per_token == spec.kv_bytes_per_token(4, per_token_head_scales=True) == 0
    conv = 3 * (64 + 2 * 2 * 16)
    assert spec.recurrent_bytes_per_sequence(2) == 4 * (conv * 2 + 8 * 16 * 8 * 4)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ([0.0, {"__float__": "Infinity"}], (0.0, math.inf)),
        ([0.0, math.inf], (0.0, math.inf)),
        ([0.01, 0.5], (0.01, 0.5)),
        (None, (0.0, math.inf)),
    ],
)
def test_mamba2_time_step_limit_may_be_infinite(limit: Any, expected: tuple[float, float]) -> None:
    assert mamba(spec_of("mamba2", time_step_limit=limit)).time_step_limit == expected


def test_nemotron_h_time_steps_have_the_limits_of_the_config() -> None:
    """`time_step_min` is for the first weights."""
    assert mamba(spec_of("nemotron-h")).time_step_limit == (0.0, math.inf)
    limited = mamba(spec_of("nemotron-h", time_step_limit=[0.01, 0.5]))
    assert limited.time_step_limit == (0.01, 0.5)


@pytest.mark.parametrize("head_dim", ["auto", None, 8])
def test_mamba2_layers_have_heads_as_wide_as_the_expanded_hidden_size(head_dim: Any) -> None:
    assert mamba(spec_of("bamba", mamba_d_head=head_dim)).head_dim == 8


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba2", {"expand": 3}, "8 Mamba heads of 8, and expand 3 with hidden_size 32"),
        ("mamba2", {"n_groups": 3}, "8 Mamba heads of 8 in 3 groups"),
        ("mamba2", {"n_groups": 0}, "in 0 groups"),
        ("mamba2", {"time_step_limit": [0.0]}, r"time_step_limit \[0.0\]"),
        ("mamba2", {"time_step_limit": [0.0, "inf"]}, "time_step_limit"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act 'relu'. One of 'silu'"),
        ("bamba", {"mamba_n_heads": 0}, "0 Mamba heads of"),
        ("bamba", {"mamba_d_head": 7}, "8 Mamba heads of 7"),
        ("nemotron-h", {"layers_block_type": ["rwkv"]}, "layers of the type 'rwkv'"),
        ("nemotron-h", {"layers_block_type": []}, "has no layers"),
        ("nemotron-h", {"hybrid_override_pattern": "MX", "layers_block_type": None}, "type 'X'"),
        ("nemotron-3", {"n_shared_experts": 2}, "n_shared_experts '2'. One of 1"),
        ("nemotron-3", {"n_group": 3}, "8 experts, n_group 3"),
        ("granite-hybrid", {"layer_types": ["mamba"]}, "linear_attention for 1 layers"),
        ("lfm2", {"layer_types": ["conv"] * 3 + ["mamba"]}, "conv, mamba for 4 layers"),
    ],
)
def test_hybrid_config_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_of(name, **changes)
