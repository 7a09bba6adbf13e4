"""A config.json completed with defaults: transformers' own, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from llmkit.checkpoint.config_defaults import COMMON, FAMILIES
from llmkit.checkpoint.hf_config import RopeSpec, complete_config
from llmkit.common.errors import InputError

SIZES = {
    "vocab_size": 1,
    "hidden_size": 64,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 1,
}
EXPERTS = {"num_experts_per_tok": 1}


@pytest.mark.parametrize("kind", FAMILIES)
def test_config_defaults_are_those_of_transformers(kind: str) -> None:
    """Of the fields that the class of transformers still has under the same name."""
    completed = transformers.AutoConfig.for_model(kind)
    rope = getattr(completed, "rope_parameters", None) or {}
    compared = 0
    for name, ours in (COMMON | FAMILIES[kind]).items():
        # Of the class, because an instance has computed some of its fields, as properties are.
        value = getattr(type(completed), name, rope.get(name))
        if value is None or isinstance(value, property) or ours is None or isinstance(ours, type):
            continue
        if isinstance(ours, tuple):
            (ours, *_) = ours
        if isinstance(ours, dict):  # theirs has rope_theta in it
            value = {key: value[key] for key in ours}
        assert value == ours, name
        compared += 1
    assert compared > 1


def complete(kind: str = "llama", **changes: Any) -> Any:
    return complete_config(SIZES | changes, kind)


def test_complete_config_derives_head_dim_and_kv_heads() -> None:
    found = complete()
    assert (found.head_dim, found.num_key_value_heads) == (16, 4)
    assert found.vocab_size == found.num_hidden_layers == found.max_position_embeddings == 1
    given = complete(head_dim=1, num_key_value_heads=1)
    assert (given.head_dim, given.num_key_value_heads) == (1, 1)
    assert complete(num_attention_heads=7, head_dim=16).head_dim == 16
    assert complete(unknown_field=1).__dict__.keys() == found.__dict__.keys()


def test_complete_config_reads_the_experts_under_both_names() -> None:
    assert complete("mixtral", num_experts=3, **EXPERTS).num_local_experts == 3
    both = {"num_experts": 3, "num_local_experts": 2} | EXPERTS
    assert complete("mixtral", **both).num_local_experts == 2
    with pytest.raises(InputError, match=r"no num_local_experts. A complete mixtral config was"):
        complete("mixtral", **EXPERTS)


def test_complete_config_accepts_integers_for_floats_and_null_for_optional_fields() -> None:
    found = complete(rms_norm_eps=1, sliding_window=None, partial_rotary_factor=1, head_dim=None)
    assert (found.rms_norm_eps, found.partial_rotary_factor, found.head_dim) == (1, 1, 16)
    assert found.sliding_window is None
    assert complete(tie_word_embeddings=True).tie_word_embeddings is True
    assert complete(layer_types=["a"], rope_scaling={}).layer_types == ["a"]


@pytest.mark.parametrize("name", [*SIZES, "head_dim", "num_key_value_heads"])
def test_complete_config_refuses_sizes_below_one(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(InputError, match=f"has {name} {value}. A positive number was expected"):
            complete(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 66}, "hidden_size 66 and 4 attention heads"),
        ({"hidden_size": 64.0}, "hidden_size '64.0'"),
        ({"hidden_size": None}, "hidden_size 'None'. A valid llama config"),
        ({"rms_norm_eps": True}, "rms_norm_eps 'True'"),
        ({"head_dim": False}, "head_dim 'False'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings '1'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings 'None'"),
        ({"sliding_window": 4.0}, "sliding_window '4.0'"),
        ({"rope_theta": "1e4"}, "rope_theta '1e4'"),
        ({"layer_types": "x" * 50}, f"layer_types '{'x' * 40}'"),
    ],
)
def test_complete_config_refuses_values_of_another_type(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        complete(**changes)


def test_rope_spec_has_no_scaling_by_default() -> None:
    plain = RopeSpec((1.0, 0.5))
    assert plain == RopeSpec((1.0, 0.5), 1.0, (), 0, 0.0)
    assert len({plain, RopeSpec((1.0, 0.5))}) == 1
