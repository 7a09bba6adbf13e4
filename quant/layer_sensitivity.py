"""Measures how much KL divergence each linear costs at 4 and 8 bits, for mixed precision.

Each linear is rounded alone and the divergence of the model's output is measured. All these
variants of the model run through the layers together, so the model is read once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from llmkit.common.progress import Progress
from llmkit.quant.algorithm import QuantTarget
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.layer_stream import LayerStream, MicroBatch

MAX_TOKENS = 512  # of the calibration text, for the measurement
MAX_WINDOW_TOKENS = 128


@dataclass(frozen=True)
class LayerSensitivity:
    """The KL divergence that rounding one linear costs.

    The same linear of all experts of a layer counts as one: they get the same bits.
    """

    name: str
    modules: tuple[str, ...]  # runtime modules
    num_weights: int
    kl: Mapping[int, float]  # nats per token, by bits; 0 for 16 bits


@torch.no_grad()
def measure_sensitivity(
    source: LayerStream,
    targets: Mapping[int, Sequence[QuantTarget]],
    windows: torch.Tensor,
    progress: Progress,
) -> list[LayerSensitivity]:
    """The sensitivity of the targets, given by layer, on token windows [n, L].

    4 bits are measured. 8 bits are estimated with the ratio of the squared rounding errors.
    """
    text = windows[:, : min(MAX_WINDOW_TOKENS, windows.shape[1])]
    text = text[: max(1, MAX_TOKENS // text.shape[1])]
    progress.start("sensitivity", len(source.spec.layers), "layers")
    (base,) = source.embed(text, text.numel())
    variants: dict[str, MicroBatch] = {}
    members: dict[str, list[QuantTarget]] = {}
    error_ratios: dict[str, float] = {}
    for index in range(len(source.spec.layers)):
        layer = source.layer(index)
        source.run_layer(layer, list(variants.values()))
        for name, group in _group_experts(targets.get(index, ())).items():
            original = {target.name: layer.linears[target.name].weight for target in group}
            ratios = []
            for target in group:
                rounded, ratio = _round_to_4_bits(original[target.name], target)
                layer.linears[target.name].weight = rounded
                ratios.append(ratio)
            variant = base.snapshot()
            source.run_layer(layer, [variant])
            variants[name] = variant
            members[name] = group
            error_ratios[name] = sum(ratios) / len(ratios)
            for target in group:
                layer.linears[target.name].weight = original[target.name]
        source.run_layer(layer, [base])
        progress.advance(1, f"{len(variants)} linears")
    divergences = _kl_divergences(source, base, list(variants.values()))
    progress.finish()
    result = []
    for name, kl in zip(variants, divergences, strict=True):
        parameters = [target.parameter for target in members[name]]
        result.append(
            LayerSensitivity(
                name,
                tuple(parameter.module for parameter in parameters),
                sum(math.prod(parameter.shape) for parameter in parameters),
                {4: kl, 8: kl * error_ratios[name], 16: 0.0},
            )
        )
    return result


def _group_experts(targets: Sequence[QuantTarget]) -> dict[str, list[QuantTarget]]:
    """The targets by module name, without the number of the expert."""
    groups: dict[str, list[QuantTarget]] = {}
    for target in targets:
        name = re.sub(r"\.experts\.\d+\.", ".experts.", target.parameter.module)
        groups.setdefault(name, []).append(target)
    return groups


def _round_to_4_bits(weight: torch.Tensor, target: QuantTarget) -> tuple[torch.Tensor, float]:
    """The weight rounded to 4 bits, and the squared error of 8 bits over that of 4 bits."""
    rounded_8 = round_to_nearest(
        weight, replace(target.scheme, bits=8), target.scale_dtype
    ).dequantize()
    error_8 = (rounded_8 - weight).square().sum().item()
    del rounded_8
    rounded_4 = round_to_nearest(
        weight, replace(target.scheme, bits=4), target.scale_dtype, FULL_SEARCH
    ).dequantize()
    error_4 = (rounded_4 - weight).square().sum().item()
    return rounded_4, error_8 / error_4 if error_4 else 0.0


def _kl_divergences(
    source: LayerStream, base: MicroBatch, variants: Sequence[MicroBatch]
) -> list[float]:
    """KL(base || variant) in nats per token, from the logits of each variant."""
    decoder = source.decoder_without_layers(with_head=True)

    def log_probs(batch: MicroBatch) -> torch.Tensor:
        hidden = batch.hidden.to(source.device)
        hidden = decoder.normalize(hidden)
        return torch.log_softmax(decoder.logits(hidden), dim=-1)

    reference = log_probs(base)
    probs = reference.exp()
    negative_entropy = (probs * reference).sum().item()
    num_tokens = len(reference)
    divergences = []
    for variant in variants:
        cross_entropy = (probs * log_probs(variant)).sum().item()
        divergences.append(max(0.0, (negative_entropy - cross_entropy) / num_tokens))
    return divergences
