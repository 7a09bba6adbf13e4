"""How llmkit runs the architectures that other programs list: natively, by the fallback, or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmkit.model.families import SUPPORTED
from llmkit.model.transformers_spec import UnsupportedError, transformers_spec
from support.tiny_families import COMMON

# The lists of other programs, as `make coverage-models` has read them from their sources.
PEER_LISTS = Path(__file__).parent.parent / "data" / "peer_models.json"
# Fields without which transformers cannot build a tiny model, by model_type.
NEEDED: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
}
# The beginnings of the fallback's reasons, some of which name sizes of the tiny model, in words.
REASONS = {
    "its keys have": "keys and values of different sizes, as in latent attention",
    "its layers keep a recurrent state": "a state besides keys and values, such as a recurrent one",
    "it has layers of the type": "a state besides keys and values, such as a recurrent one",
    "its attention is more than": "attention with a selection or chunks of its own",
    "its forward pass takes no position_ids": "positions of its own (ALiBi)",
    "its modeling code does not use": "no registry of attention functions in its modeling code",
    "its forward pass cannot be traced": "a forward pass that cannot be traced",
    "its 32 layers do not call": "layers that do not call attention once each, in order",
}


@dataclass(frozen=True)
class PeerList:
    """The text models that a program lists in its source."""

    name: str
    version: str
    source: str  # where the list is, in words
    architectures: tuple[str, ...]


def peer_lists() -> list[PeerList]:
    """The lists in PEER_LISTS."""
    return [
        PeerList(**entry | {"architectures": tuple(entry["architectures"])})
        for entry in json.loads(PEER_LISTS.read_text())
    ]


@cache
def coverage(architecture: str) -> tuple[str, str]:
    """("native", ""), ("fallback", why it has no TP, or "") or ("no", reason).

    The fallback decides about a tiny model of each model_type that transformers has for the
    architecture, and about one of transformers' default sizes where it cannot build the tiny one.
    """
    if architecture in SUPPORTED:
        return "native", ""
    kinds = [k for k, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
    if not kinds:
        return "no", f"no causal language model of that name in transformers {_version()}"
    reasons = []
    for kind in kinds:
        for sizes in (COMMON | NEEDED.get(kind, {}), {}):
            try:
                config = transformers.AutoConfig.for_model(kind, **sizes).to_dict()
                spec = transformers_spec(config | {"architectures": [architecture]})
            except UnsupportedError as error:
                reasons.append(str(error))
                break
            except Exception as error:  # whatever transformers raises for values it does not allow
                reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                assert spec.transformers is not None
                return "fallback", spec.transformers.tp_refusal
    return "no", _in_words(reasons[-1])


def counts(architectures: Sequence[str]) -> dict[str, int]:
    """How many of them run natively, by the fallback, and not at all."""
    ways = [coverage(architecture)[0] for architecture in architectures]
    return {way: ways.count(way) for way in ("native", "fallback", "no")}


def refusals(architectures: Sequence[str]) -> dict[str, list[str]]:
    """Those that do not run, by reason; the most frequent reason first."""
    found: dict[str, list[str]] = {}
    for architecture in architectures:
        way, reason = coverage(architecture)
        if way == "no":
            found.setdefault(reason, []).append(architecture)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _in_words(reason: str) -> str:
    """The reason in words of REASONS, if it begins as one of them."""
    return next((words for start, words in REASONS.items() if reason.startswith(start)), reason)


def _version() -> str:
    return ".".join(transformers.__version__.split(".")[:2])
