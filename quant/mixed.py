"""Mixed precision: how much each linear layer costs in KL divergence at 4 and 8 bits, and which bits to give it.

Every unit (a linear, or the same linear of all experts of a layer) is rounded alone and the divergence of the model's
output is measured. All these variants run through the layers side by side, so the model is read once. Their
divergences add up well enough to compare choices; how far the sum is from what a choice really gives is learnt from
the choices that were tried.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.output import writing
from llmkit.checkpoint.progress import Progress
from llmkit.kernels.elementwise import rms_norm
from llmkit.quant.algorithm import Site
from llmkit.quant.grid import FULL_SEARCH, round_to_nearest
from llmkit.quant.stream import LayerStream, MicroBatch

BITS = (4, 8, 16)
TOKENS = 512  # of the calibration text that sensitivity is measured on
WINDOW = 128
ATTEMPTS = 5
SLACK = 0.85  # a result between this share of the bound and the bound is not searched further


@dataclass(frozen=True)
class Unit:
    """Linears that get the same bits: how many weights they have and the KL that rounding them costs, by bits."""

    name: str
    modules: tuple[str, ...]
    weights: int
    kl: Mapping[int, float]  # 16: 0


@torch.no_grad()
def sensitivity(
    source: LayerStream, sites: Mapping[int, Sequence[Site]], windows: torch.Tensor, progress: Progress
) -> list[Unit]:
    """The units of a model, by layer the linears to quantize, with their KL in nats per token on token windows [n, L].

    4 bits are measured; 8 bits follow from how much smaller their rounding error is.
    """
    text = windows[:, : min(WINDOW, windows.shape[1])]
    text = text[: max(1, TOKENS // text.shape[1])]
    progress.start("sensitivity", len(source.spec.layers), "layers")
    (base,) = source.embed(text, text.numel())
    variants: list[tuple[str, MicroBatch]] = []
    found: dict[str, tuple[list[Site], float]] = {}
    for index in range(len(source.spec.layers)):
        layer = source.layer(index)
        source.advance(layer, [batch for _, batch in variants])
        for name, members in _units(sites.get(index, ())).items():
            kept = {site.name: layer.linears[site.name].weight for site in members}
            ratios = []
            for site in members:
                rounded, ratio = _rounded(kept[site.name], site)
                layer.linears[site.name].weight = rounded
                ratios.append(ratio)
            variant = MicroBatch(base.hidden, base.step)
            source.advance(layer, [variant])
            variants.append((name, variant))
            found[name] = (members, sum(ratios) / len(ratios))
            for site in members:
                layer.linears[site.name].weight = kept[site.name]
        source.advance(layer, [base])
        progress.advance(1, f"{len(variants)} linears")
    divergences = _divergences(source, base, [batch for _, batch in variants])
    progress.finish()
    units = []
    for (name, _), kl in zip(variants, divergences, strict=True):
        members, ratio = found[name]
        weights = sum(math.prod(site.row.shape) for site in members)
        units.append(Unit(name, tuple(s.row.module for s in members), weights, {4: kl, 8: kl * ratio, 16: 0.0}))
    return units


def _units(sites: Sequence[Site]) -> dict[str, list[Site]]:
    units: dict[str, list[Site]] = {}
    for site in sites:
        units.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", site.row.module), []).append(site)
    return units


def _rounded(weight: torch.Tensor, site: Site) -> tuple[torch.Tensor, float]:
    """The weight rounded to 4 bits, and how much smaller the squared error of 8 bits is."""
    errors, dense = [], weight
    for bits in (8, 4):
        search = FULL_SEARCH if bits == 4 else None
        dense = round_to_nearest(weight, replace(site.scheme, bits=bits), site.dtype, search).dequantize()
        errors.append((dense - weight).square().sum().item())
    return dense, errors[0] / errors[1] if errors[1] else 0.0


def _divergences(source: LayerStream, base: MicroBatch, variants: Sequence[MicroBatch]) -> list[float]:
    """KL(base || variant) per token of each variant's logits."""
    frame = source.frame(head=True)

    def log_probabilities(batch: MicroBatch) -> torch.Tensor:
        hidden = rms_norm(batch.hidden.to(source.device), frame.final_norm, source.spec.norm_eps)
        return torch.log_softmax(frame.logits(hidden), dim=-1)

    reference = log_probabilities(base)
    weights = reference.exp()
    entropy = (weights * reference).sum().item()
    tokens = len(reference)
    return [max(0.0, (entropy - (weights * log_probabilities(one)).sum().item()) / tokens) for one in variants]


@dataclass
class BitSearch:
    """Chooses the bits of every unit, for at most `target_bits` a weight or at most `target_kl`.

    With `target_kl`, what a choice really gives is told (`tell`) and the next is better informed, until one is within
    the bound and next to none smaller is.
    """

    units: Sequence[Unit]
    target_bits: float | None = None
    target_kl: float | None = None
    file: Path | None = None  # where the units and the attempts lie while the run lasts, for one that takes it up
    key: str = ""  # of the run
    factor: float = 1.0  # what a choice gives over what its units' KL add up to
    attempts: list[tuple[dict[str, int], float]] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Of all units."""
        return sum(unit.weights for unit in self.units)

    def save(self) -> None:
        """Keep the attempts, so that an interrupted run goes on with the one it was at."""
        assert self.file is not None
        units = [asdict(unit) | {"kl": {str(bits): kl for bits, kl in unit.kl.items()}} for unit in self.units]
        with writing(self.file):
            self.file.write_text(json.dumps({"key": self.key, "units": units, "attempts": self.attempts}))

    def remove(self) -> None:
        """The run is over."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def figures(self) -> dict[str, Any]:
        """What the report says: each unit's KL and bits, and what every attempt gave."""
        bits = self.attempts[-1][0] if self.attempts else self.choice()
        return {
            "sensitivity": [
                {"name": u.name, "weights": u.weights, "bits": bits[u.name], "kl": u.kl[4]} for u in self.units
            ],
            "mean_bits": self.size(bits) / self.weights,
            "attempts": [{"mean_bits": self.size(tried) / self.weights, "mean_kl": kl} for tried, kl in self.attempts],
        }

    def choice(self) -> dict[str, int]:
        """The bits to try next, by unit."""
        if self.target_bits is not None:
            return self._within_bits(self.target_bits)
        assert self.target_kl is not None
        if len(self.attempts) == ATTEMPTS and (best := self._best()) is not None:
            return best
        return self._within_kl(self.target_kl)

    def tell(self, bits: dict[str, int], kl: float) -> bool:
        """Whether the choice, which turned out to give `kl`, is to be kept."""
        if self.target_kl is None:
            return True
        final = len(self.attempts) >= ATTEMPTS
        self.attempts.append((dict(bits), kl))
        good = kl <= self.target_kl
        predicted = self._sum(bits)
        if predicted > 0 and kl > 0:
            # What has failed must not be chosen again: beyond a failure, lean to the safe side.
            self.factor = kl / predicted * (1.0 if good else 1.05)
        if good and (final or kl >= SLACK * self.target_kl):
            return True
        following = self.choice()
        if following == bits:
            if good:
                return True
            self.factor *= 1.2
        return good and (self.size(following) >= self.size(bits) or any(following == b for b, _ in self.attempts))

    def size(self, bits: Mapping[str, int]) -> int:
        """Bits of all the codes of a choice."""
        return sum(unit.weights * bits[unit.name] for unit in self.units)

    def by_module(self, bits: Mapping[str, int]) -> dict[str, int]:
        """A choice by runtime module."""
        return {module: bits[unit.name] for unit in self.units for module in unit.modules}

    def _sum(self, bits: Mapping[str, int]) -> float:
        return sum(unit.kl[bits[unit.name]] for unit in self.units)

    @classmethod
    def resume(cls, file: Path, key: str, target_bits: float | None, target_kl: float | None,
               measure: Callable[[], list[Unit]]) -> BitSearch:  # fmt: skip
        """The search of an interrupted run of the same `key`, or a new one with the units that `measure` finds."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(file.read_text())
            if saved["key"] == key:
                units = [
                    Unit(u["name"], tuple(u["modules"]), u["weights"], {int(b): kl for b, kl in u["kl"].items()})
                    for u in saved["units"]
                ]
                search = cls(units, target_bits, target_kl, file, key)
                for bits, kl in saved["attempts"]:
                    search.tell(bits, kl)
                return search
        search = cls(measure(), target_bits, target_kl, file, key)
        search.save()
        return search

    def _best(self) -> dict[str, int] | None:
        assert self.target_kl is not None
        good = [bits for bits, kl in self.attempts if kl <= self.target_kl]
        return min(good, key=self.size) if good else None

    def _steps(self) -> list[tuple[float, Unit, int]]:
        """Raises in bits that pay, the most KL saved per bit first; a unit's come in order."""
        steps = []
        for unit in self.units:
            start = 0
            while start < len(BITS) - 1:
                gains = [
                    ((unit.kl[BITS[start]] - unit.kl[BITS[end]]) / (unit.weights * (BITS[end] - BITS[start])), end)
                    for end in range(start + 1, len(BITS))
                ]
                gain, end = max(gains, key=lambda one: one[0])
                steps.append((gain, unit, BITS[end]))
                start = end
        return sorted(steps, key=lambda step: -step[0])

    def _within_bits(self, bound: float) -> dict[str, int]:
        bits = {unit.name: BITS[0] for unit in self.units}
        room = bound * sum(unit.weights for unit in self.units) - self.size(bits)
        for _, unit, raised in self._steps():
            cost = unit.weights * (raised - bits[unit.name])
            if bits[unit.name] < raised and cost <= room:
                bits[unit.name] = raised
                room -= cost
        return bits

    def _within_kl(self, bound: float) -> dict[str, int]:
        bits = {unit.name: BITS[0] for unit in self.units}
        left = self._sum(bits)
        for _, unit, raised in self._steps():
            if left * self.factor <= bound:
                break
            left -= unit.kl[bits[unit.name]] - unit.kl[raised]
            bits[unit.name] = raised
        return bits
