"""RoPE frequencies at the limits of their formulas, against the functions of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmkit.checkpoint.hf_config import RopeSpec
from llmkit.checkpoint.rope_frequencies import rope_spec
from llmkit.common.errors import InputError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 1024,
}


def spec(parameters: dict[str, Any], length: int = 4096) -> RopeSpec:
    return rope_spec({"rope_theta": 10000.0} | parameters, 16, length)


@pytest.mark.parametrize(
    "changes",
    [
        {"truncate": False},  # so that the default turns, 32 and 1, count to the last bit
        {"truncate": False, "beta_fast": 0, "beta_slow": 0.0},
        {"truncate": True, "beta_fast": 24.0, "beta_slow": 3.0},
        {"original_max_position_embeddings": 64},  # the ramp would begin before dimension 0
        {"original_max_position_embeddings": 6},  # and end there too
        {"rope_theta": 7.0},  # it would end after the last dimension
        {"rope_theta": 7.0, "truncate": False},
        {"original_max_position_embeddings": None},
        {"factor": 0.5},
        {"factor": 1.0},
        {"factor": 1.5},
        {"factor": 2},
        {"mscale": 0.7},
        {"mscale_all_dim": 0.7},
        {"mscale": 0.5, "mscale_all_dim": 0.8},
        {"attention_factor": 0.0},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_yarn_agrees_with_transformers(changes: dict[str, Any]) -> None:
    parameters = {"rope_theta": 10000.0} | YARN | changes
    config = LlamaConfig(
        head_dim=16,
        num_attention_heads=4,
        hidden_size=64,
        max_position_embeddings=4096,
        rope_parameters={key: value for key, value in parameters.items() if value is not None},
    )
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    found = spec(parameters)
    assert (list(found.inv_freq), found.attention_scaling) == (inv_freq.tolist(), attention_scaling)
    assert found.long_inv_freq == ()
    original = parameters["original_max_position_embeddings"] or 4096
    assert (found.original_max_position_embeddings, found.query_scale_beta) == (original, 0.0)


def test_yarn_may_scale_queries() -> None:
    assert spec(YARN | {"llama_4_scaling_beta": 0.25}).query_scale_beta == 0.25


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, math.sqrt(1 + math.log(4) / math.log(1024))),  # 4096 / 1024
        ({"factor": 1.5}, math.sqrt(1 + math.log(1.5) / math.log(1024))),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"original_max_position_embeddings": None}, 1.0),  # 4096 / 4096
        ({"original_max_position_embeddings": 8192}, 1.0),
        ({"attention_factor": 0.0, "factor": 8.0}, 0.0),
    ],
)
def test_longrope_scales_attention_beyond_the_original_length(
    changes: dict[str, Any], expected: float
) -> None:
    found = spec(LONG | changes)
    assert found.attention_scaling == expected
    assert found.original_max_position_embeddings == (
        (LONG | changes)["original_max_position_embeddings"] or 4096
    )
    assert found.inv_freq == spec({"rope_type": "default"}).inv_freq
    assert found.long_inv_freq == tuple(value / 2 for value in found.inv_freq)


def test_rope_spec_without_scaling() -> None:
    plain = spec({"rope_type": "default"})
    assert plain == RopeSpec(plain.inv_freq, 1.0, (), 0)
    assert plain == RopeSpec(plain.inv_freq)
    assert plain.inv_freq == pytest.approx([10000 ** (-i / 8) for i in range(8)])
    half = spec({"rope_type": "default", "partial_rotary_factor": 0.5})
    assert half.inv_freq == pytest.approx([10000 ** (-i / 4) for i in range(4)])
    linear = spec({"rope_type": "linear", "factor": 4.0})
    assert linear == RopeSpec(tuple(value / 4 for value in plain.inv_freq))
    ignored = spec({"rope_type": "default", "factor": 4.0})
    assert ignored == plain


def test_llama3_keeps_high_frequencies_and_divides_low_ones() -> None:
    parameters = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    plain = [10000 ** (-i / 8) for i in range(8)]
    turns = [1024 / (2 * math.pi) * value for value in plain]  # 163, 52, 16, 5.2, 1.63, 0.5, ...
    share = (turns[4] - 1) / 3
    between = plain[4] * ((1 - share) / 8 + share)
    expected = [*plain[:4], between, *(value / 8 for value in plain[5:])]
    assert spec(parameters).inv_freq == pytest.approx(expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "axial"}, r"RoPE scaling \(axial\). One of default, linear, dynamic"),
        ({"rope_type": "yarn"}, "config.json lacks factor of its yarn RoPE scaling"),
        ({"rope_type": "longrope"}, "lacks short_factor, long_factor of its longrope"),
        ({"rope_type": "linear", "factor": "x"}, "a linear RoPE scaling that cannot be computed"),
        (YARN | {"rope_theta": 1.0}, r"cannot be computed \(.*division by zero"),
        (LONG | {"original_max_position_embeddings": 1}, r"computed \(.*division by zero"),
        (LONG | {"short_factor": [1.0] * 7}, "longrope RoPE scaling that cannot be computed"),
        (YARN | {"attention_factor": 10**400}, r"computed \(int too large"),
        (YARN | {"original_max_position_embeddings": -1}, "yarn RoPE scaling that cannot"),
    ],
)
def test_rope_spec_refuses_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec(parameters)
