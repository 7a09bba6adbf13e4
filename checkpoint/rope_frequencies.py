"""Computes the RoPE frequencies of a config.json: default, linear, Llama 3, YaRN and LongRoPE.

Every step is in float32 and in the order of transformers, so that both give the same bits. A test
compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from llmkit.checkpoint.hf_config import RopeSpec
from llmkit.common.errors import InputError

# The parameters that each rope_type requires.
REQUIRED_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),  # up to max_position_embeddings, the longest request, it is the default
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}


def rope_spec(
    parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int
) -> RopeSpec:
    """One rotary embedding.

    parameters: rope_type, rope_theta and the parameters of the type, as in HF's rope_parameters.
    Raises InputError for an unknown type and for parameters that are missing or not numbers.
    """
    rope_type = parameters["rope_type"]
    if rope_type not in REQUIRED_PARAMETERS:
        raise InputError(
            f"unsupported RoPE scaling ({rope_type})", f"One of {', '.join(REQUIRED_PARAMETERS)}"
        )
    missing = [name for name in REQUIRED_PARAMETERS[rope_type] if name not in parameters]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)} of its {rope_type} RoPE scaling")
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    try:
        # Positions per radian: the inverse of each frequency.
        wavelengths = parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
        original = parameters.get("original_max_position_embeddings") or max_position_embeddings
        if rope_type == "llama3":
            return _to_spec(_llama3(1.0 / wavelengths, parameters, original))
        if rope_type == "yarn":
            inv_freq = _yarn(wavelengths, parameters, dim, original)
            return RopeSpec(
                tuple(inv_freq.tolist()),
                _yarn_attention_scaling(parameters),
                original_max_position_embeddings=original,
                query_scale_beta=float(parameters.get("llama_4_scaling_beta") or 0.0),
            )
        if rope_type == "longrope":
            short = 1.0 / (torch.tensor(parameters["short_factor"]).float() * wavelengths)
            long = 1.0 / (torch.tensor(parameters["long_factor"]).float() * wavelengths)
            factor = parameters.get("factor") or max_position_embeddings / original
            attention_factor = parameters.get("attention_factor")
            return RopeSpec(
                tuple(short.tolist()),
                _longrope_attention_scaling(factor, attention_factor, original),
                tuple(long.tolist()),
                original,
            )
        if rope_type == "proportional":
            return _to_spec(_proportional(parameters, head_dim))
        factor = parameters["factor"] if rope_type == "linear" else 1.0
        return _to_spec(1.0 / wavelengths / factor)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"config.json has a {rope_type} RoPE scaling that cannot be computed ({error})"
        ) from error


def _to_spec(inv_freq: torch.Tensor, attention_scaling: float = 1.0) -> RopeSpec:
    return RopeSpec(tuple(inv_freq.tolist()), attention_scaling)


def _llama3(inv_freq: torch.Tensor, parameters: Mapping[str, Any], original: int) -> torch.Tensor:
    """Llama 3 (arXiv 2407.21783): low frequencies are divided by `factor`, high ones stay.

    Frequencies between them are interpolated.
    """
    low = parameters["low_freq_factor"]
    high = parameters["high_freq_factor"]
    turns = original / (2 * math.pi / inv_freq)  # full rotations within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: torch.Tensor = (1 - smooth) * inv_freq / parameters["factor"] + smooth * inv_freq
    return scaled


def _yarn(
    wavelengths: torch.Tensor, parameters: Mapping[str, Any], dim: int, original: int
) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp from original to interpolated frequencies."""

    def dimension(turns: float) -> float:
        """The dimension whose frequency makes `turns` full rotations in the original context."""
        return (dim * math.log(original / (turns * 2 * math.pi))) / (
            2 * math.log(parameters["rope_theta"])
        )

    first = dimension(parameters.get("beta_fast") or 32)
    last = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, dim - 1)
    width = (last - first) or 0.001
    ramp = ((torch.arange(dim // 2).float() - first) / width).clamp(0, 1)
    original_share = 1 - ramp
    interpolated: torch.Tensor = 1.0 / (parameters["factor"] * wavelengths)
    return interpolated * (1 - original_share) + 1.0 / wavelengths * original_share


def _proportional(parameters: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """A share of the pairs rotates; the others have the frequency 0 (Gemma 4).

    The frequencies are those of a head that rotates completely.
    """
    num_rotated = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2)
    exponents = torch.arange(0, 2 * num_rotated, 2).float() / head_dim
    inv_freq = torch.zeros(head_dim // 2)
    inv_freq[:num_rotated] = 1.0 / (parameters["rope_theta"] ** exponents)
    scaled: torch.Tensor = inv_freq / parameters.get("factor", 1.0)
    return scaled


def _yarn_attention_scaling(parameters: Mapping[str, Any]) -> float:
    factor = parameters["factor"]

    def scaling(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    mscale = parameters.get("mscale")
    mscale_all_dim = parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return scaling(mscale) / scaling(mscale_all_dim)
    return scaling()


def _longrope_attention_scaling(
    factor: float, attention_factor: float | None, original: int
) -> float:
    """LongRoPE (arXiv 2402.13753): the scaling for a context `factor` times the original one."""
    if attention_factor is not None:
        return attention_factor
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
