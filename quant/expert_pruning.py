"""Chooses the experts of a mixture that can be left out: REAP (arXiv 2510.13999).

An expert matters as much as it adds to the hidden states: its saliency is the mean, over the tokens
that the router sends to it, of the router's weight times the norm of the expert's output. Those
with the smallest saliency are dropped, the same number in every layer, because config.json has one
number for all.

Legend: T tokens that an expert gets, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import Progress
from llmkit.model.spec import MoeSpec
from llmkit.quant.layer_stream import LayerStream


@dataclass(frozen=True)
class ExpertSaliency:
    """What the experts of one layer add on the calibration text."""

    saliency: tuple[float, ...]  # by expert; 0 for one that no token chose
    tokens: tuple[int, ...]  # that chose the expert


class _Sums:
    """Adds up what the experts of a layer add, while the layer runs."""

    def __init__(self, num_experts: int) -> None:
        self._sums = torch.zeros(num_experts, dtype=torch.float64)
        self._tokens = torch.zeros(num_experts, dtype=torch.int64)

    def add(self, expert: int, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        """outputs: [T, H] of an expert. weights: [T, 1] of the router."""
        norms = torch.linalg.vector_norm(outputs.float(), dim=-1)
        self._sums[expert] += (norms * weights.float().flatten()).sum().item()
        self._tokens[expert] += len(outputs)

    @property
    def saliency(self) -> ExpertSaliency:
        """The means so far."""
        means = self._sums / self._tokens.clamp(min=1)
        return ExpertSaliency(tuple(means.tolist()), tuple(self._tokens.tolist()))


@torch.no_grad()
def measure_saliency(
    stream: LayerStream, windows: torch.Tensor, progress: Progress
) -> dict[int, ExpertSaliency]:
    """The saliency of the experts of each layer that has some, on token windows [n, L]."""
    spec = stream.spec
    assert spec.moe is not None
    found = {}
    progress.start("experts", len(spec.layers), "layers")
    batches = stream.embed(windows)
    for index in range(len(spec.layers)):
        layer = stream.layer(index)
        sums = _Sums(spec.moe.num_experts)
        layer.expert_observer = sums.add
        stream.run_layer(layer, batches)
        if layer.layer.is_moe:
            found[index] = sums.saliency
        progress.advance(1)
    progress.finish()
    return found


def num_kept_experts(moe: MoeSpec | None, share: float) -> int:
    """How many experts of a layer stay when `share` of them are dropped, rounded up.

    In groups, every group keeps the same number. Raises UsageError for a share out of range or too
    large, InputError for a model without experts.
    """
    if not 0 < share < 1:
        raise UsageError(f"--prune-experts is {share:g}", "A share between 0 and 1 was expected")
    if moe is None:
        raise InputError(
            "--prune-experts: this model has no experts",
            "A mixture of experts was expected",
            "Leave out --prune-experts",
        )
    per_group = moe.num_experts // moe.num_groups
    kept_per_group = per_group - int(per_group * share)
    reachable = kept_per_group * min(moe.topk_groups, moe.num_groups)
    has_group_score = moe.num_groups == 1 or moe.group_score == "max" or kept_per_group >= 2
    if reachable < moe.num_experts_per_tok or not has_group_score:
        raise UsageError(
            f"--prune-experts {share:g} leaves {kept_per_group * moe.num_groups} of"
            f" {moe.num_experts} experts, of which a token needs {moe.num_experts_per_tok}"
            + (f" from {moe.topk_groups} of {moe.num_groups} groups" if moe.num_groups > 1 else ""),
            todo="Choose a smaller share",
        )
    return kept_per_group * moe.num_groups


def choose_experts(
    saliency: Mapping[int, ExpertSaliency], moe: MoeSpec, num_kept: int
) -> dict[int, list[int]]:
    """The experts that stay in each layer, ascending: of each group those with most saliency."""
    per_group = moe.num_experts // moe.num_groups
    kept_per_group = num_kept // moe.num_groups
    chosen = {}
    for layer, measured in saliency.items():
        experts: list[int] = []
        for first in range(0, moe.num_experts, per_group):
            group = range(first, first + per_group)
            best = sorted(group, key=lambda expert: (-measured.saliency[expert], expert))
            experts += sorted(best[:kept_per_group])
        chosen[layer] = experts
    return chosen


def report_entries(
    saliency: Mapping[int, ExpertSaliency], kept: Mapping[int, list[int]]
) -> list[dict[str, Any]]:
    """What the report says of each layer: the dropped experts and what they added."""
    entries = []
    for layer, measured in saliency.items():
        dropped = [index for index in range(len(measured.saliency)) if index not in kept[layer]]
        added = [
            mean * count for mean, count in zip(measured.saliency, measured.tokens, strict=True)
        ]
        total = sum(added)
        entries.append(
            {
                "layer": layer,
                "kept": list(kept[layer]),
                "dropped": dropped,
                "saliency": list(measured.saliency),
                "dropped_share": sum(added[expert] for expert in dropped) / total if total else 0.0,
                "dropped_tokens": sum(measured.tokens[expert] for expert in dropped),
                "tokens": sum(measured.tokens),
            }
        )
    return entries
