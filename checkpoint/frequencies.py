"""The frequencies of rotary embeddings, from the RoPE entries of a config.json: plain, linear, Llama 3, YaRN, LongRoPE.

Every step is in float32 and in the order of transformers, so that both give the same bits; a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from llmkit.checkpoint.config import RopeSpec
from llmkit.checkpoint.errors import InputError

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def rope_spec(given: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeSpec:
    """One rotary embedding. `given`: rope_type, rope_theta and what the type needs, complete but for defaults.

    Raises InputError for other types than those of NEEDED and for parameters that are missing or no numbers.
    """
    kind = given["rope_type"]
    if kind not in NEEDED:
        raise InputError(f"unsupported RoPE scaling ({kind})", f"One of {', '.join(NEEDED)}")
    if missing := [name for name in NEEDED[kind] if name not in given]:
        raise InputError(f"config.json lacks {', '.join(missing)} of its {kind} RoPE scaling")
    dim = int(head_dim * given.get("partial_rotary_factor", 1.0))
    try:
        powers = given["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)  # radians of a full turn, over 2 pi
        original = given.get("original_max_position_embeddings") or max_positions
        if kind == "llama3":
            return _spec(_llama3(1.0 / powers, given, original))
        if kind == "yarn":
            return _spec(_yarn(powers, given, dim, original), _yarn_scale(given))
        if kind == "longrope":
            short, long = (1.0 / (torch.tensor(given[f"{n}_factor"]).float() * powers) for n in ("short", "long"))
            factors = (given.get("factor") or max_positions / original, given.get("attention_factor"))
            return RopeSpec(
                _spec(short).frequencies, _long_scale(*factors, original), _spec(long).frequencies, original
            )
        return _spec(1.0 / powers / (given["factor"] if kind == "linear" else 1.0))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"config.json has a {kind} RoPE scaling that cannot be computed ({error})") from error


def _spec(frequencies: torch.Tensor, scale: float = 1.0) -> RopeSpec:
    return RopeSpec(tuple(frequencies.tolist()), scale)


def _llama3(plain: torch.Tensor, given: Mapping[str, Any], original: int) -> torch.Tensor:
    """Low frequencies are divided by `factor`, high ones stay, those between are mixed (arXiv 2407.21783)."""
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = original / (2 * math.pi / plain)  # within the context it was trained on
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    mixed: torch.Tensor = (1 - mix) * plain / given["factor"] + mix * plain
    return mixed


def _yarn(powers: torch.Tensor, given: Mapping[str, Any], dim: int, original: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over dimensions between interpolated and plain frequencies."""

    def dimension(turns: float) -> float:
        """Where the frequency is that makes so many turns within the context it was trained on."""
        return (dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(given["rope_theta"]))

    first, last = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    plain = 1 - ((torch.arange(dim // 2).float() - first) / width).clamp(0, 1)  # how much of the plain frequency
    interpolated: torch.Tensor = 1.0 / (given["factor"] * powers)
    return interpolated * (1 - plain) + 1.0 / powers * plain


def _yarn_scale(given: Mapping[str, Any]) -> float:
    def scale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    top, bottom = given.get("mscale"), given.get("mscale_all_dim")
    return scale(top) / scale(bottom) if top and bottom else scale()


def _long_scale(factor: float, chosen: float | None, original: int) -> float:
    """LongRoPE (arXiv 2402.13753): the attention scale of a context `factor` times the original."""
    if chosen is not None:
        return chosen
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
