"""Mixed precision: chooses 4, 8 or 16 bits for each linear.

The choice keeps within a mean number of bits, or within a KL divergence.

The KL divergences of single linears add up well enough to compare choices. A correction factor, the
measured KL of a whole choice over that sum, is updated after every attempt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.checkpoint.output_directory import write_errors
from llmkit.quant.layer_sensitivity import LayerSensitivity

BITS = (4, 8, 16)
# After this many attempts the smallest one within the target KL is used. The search continues if
# there is none.
MAX_ATTEMPTS = 5
# A KL between this fraction of the target and the target ends the search.
GOOD_ENOUGH = 0.85

Bits = dict[str, int]  # by name of a LayerSensitivity


@dataclass
class BitSearch:
    """Searches the bits of every linear for a target.

    With `target_bits` the first choice is final. With `target_kl` the caller tries `next_bits`,
    reports the KL to `record_attempt`, and repeats that until it returns True.
    """

    layers: Sequence[LayerSensitivity]
    target_bits: float | None = None  # the mean bits per weight, at most
    target_kl: float | None = None  # the mean KL, at most
    # Holds the sensitivity and the attempts, for a run that continues this one.
    file: Path | None = None
    key: str = ""  # identifies the run in `file`
    # The KL of a choice over the sum of its linears' KL, from the last attempt.
    kl_correction: float = 1.0
    attempts: list[tuple[Bits, float]] = field(default_factory=list)
    # The smallest attempt within the target KL, once no smaller choice is worth an attempt. The
    # caller has to write it once more unless it was the last attempt.
    _final: Bits | None = field(default=None, init=False)

    @classmethod
    def resume(
        cls,
        file: Path,
        key: str,
        target_bits: float | None,
        target_kl: float | None,
        measure: Callable[[], list[LayerSensitivity]],
    ) -> BitSearch:
        """Continue the search that an interrupted run with the same `key` saved in `file`.

        Without one, start a new search with the sensitivity that `measure` returns.
        """
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(file.read_text())
            if saved["key"] == key:
                layers = [_layer_from_json(entry) for entry in saved["units"]]
                search = cls(layers, target_bits, target_kl, file, key)
                for bits, kl in saved["attempts"]:
                    search.record_attempt(bits, kl)
                return search
        search = cls(measure(), target_bits, target_kl, file, key)
        search.save()
        return search

    @property
    def num_weights(self) -> int:
        """The weights of all linears."""
        return sum(layer.num_weights for layer in self.layers)

    def save(self) -> None:
        """Save the attempts, so that an interrupted run continues with the current one."""
        assert self.file is not None
        document = {
            "key": self.key,
            "units": [_layer_to_json(layer) for layer in self.layers],
            "attempts": self.attempts,
        }
        with write_errors(self.file):
            self.file.write_text(json.dumps(document))

    def remove_file(self) -> None:
        """Delete the file of a finished search."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def next_bits(self) -> Bits:
        """The bits to try next."""
        if self.target_bits is not None:
            return self._best_within_bits(self.target_bits)
        assert self.target_kl is not None
        return self._final or self._smallest_within_kl(self.target_kl)

    def record_attempt(self, bits: Bits, kl: float) -> bool:
        """Record the KL of a choice. Returns whether the choice is final."""
        if self.target_kl is None:
            return True
        was_tried = [tried for tried, _ in self.attempts]
        self.attempts.append((dict(bits), kl))
        is_good = kl <= self.target_kl
        predicted = self._predicted_kl(bits)
        if predicted > 0 and kl > 0:
            # After a failure the correction is a little too large, so that the same choice is not
            # made again.
            self.kl_correction = kl / predicted * (1.0 if is_good else 1.05)
        following = self._smallest_within_kl(self.target_kl)
        best = self._smallest_good_attempt()
        if best is None:
            if following == bits:
                self.kl_correction *= 1.2
            return False
        if (
            (is_good and kl >= GOOD_ENOUGH * self.target_kl)
            or len(self.attempts) >= MAX_ATTEMPTS
            or following in was_tried
            or self.total_bits(following) >= self.total_bits(best)
        ):
            self._final = best
        return self._final == bits

    def total_bits(self, bits: Mapping[str, int]) -> int:
        """The bits of all quantized values of a choice."""
        return sum(layer.num_weights * bits[layer.name] for layer in self.layers)

    def mean_bits(self, bits: Mapping[str, int]) -> float:
        """The mean bits per weight of a choice."""
        return self.total_bits(bits) / self.num_weights

    def bits_by_module(self, bits: Mapping[str, int]) -> dict[str, int]:
        """A choice by runtime module."""
        return {module: bits[layer.name] for layer in self.layers for module in layer.modules}

    def report_entries(self) -> dict[str, Any]:
        """What the report says: each linear's KL and bits, and the result of every attempt."""
        bits = self.attempts[-1][0] if self.attempts else self.next_bits()
        return {
            "sensitivity": [
                {
                    "name": layer.name,
                    "weights": layer.num_weights,
                    "bits": bits[layer.name],
                    "kl": layer.kl[4],
                }
                for layer in self.layers
            ],
            "mean_bits": self.mean_bits(bits),
            "attempts": [
                {"mean_bits": self.mean_bits(tried), "mean_kl": kl} for tried, kl in self.attempts
            ],
        }

    def _predicted_kl(self, bits: Mapping[str, int]) -> float:
        return sum(layer.kl[bits[layer.name]] for layer in self.layers)

    def _smallest_good_attempt(self) -> Bits | None:
        assert self.target_kl is not None
        bad = [bits for bits, kl in self.attempts if kl > self.target_kl]
        good = [bits for bits, _ in self.attempts if bits not in bad]
        return min(good, key=self.total_bits) if good else None

    def _upgrades(self) -> list[tuple[LayerSensitivity, int]]:
        """Linears and the bits to raise them to: those that save the most KL per bit come first.

        The upgrades of one linear are in order, and none saves less per bit than the next one.
        """
        upgrades: list[tuple[float, LayerSensitivity, int]] = []
        for layer in self.layers:
            start = 0
            while start < len(BITS) - 1:
                gains = []
                for end in range(start + 1, len(BITS)):
                    saved_kl = layer.kl[BITS[start]] - layer.kl[BITS[end]]
                    added_bits = layer.num_weights * (BITS[end] - BITS[start])
                    gains.append((saved_kl / added_bits, end))
                gain, end = max(gains, key=lambda candidate: candidate[0])
                upgrades.append((gain, layer, BITS[end]))
                start = end
        upgrades.sort(key=lambda upgrade: -upgrade[0])
        return [(layer, bits) for _, layer, bits in upgrades]

    def _best_within_bits(self, max_mean_bits: float) -> Bits:
        bits = {layer.name: BITS[0] for layer in self.layers}
        budget = max_mean_bits * self.num_weights - self.total_bits(bits)
        for layer, new_bits in self._upgrades():
            cost = layer.num_weights * (new_bits - bits[layer.name])
            if bits[layer.name] < new_bits and cost <= budget:
                bits[layer.name] = new_bits
                budget -= cost
        return bits

    def _smallest_within_kl(self, max_kl: float) -> Bits:
        bits = {layer.name: BITS[0] for layer in self.layers}
        kl = self._predicted_kl(bits)
        for layer, new_bits in self._upgrades():
            if kl * self.kl_correction <= max_kl:
                break
            kl -= layer.kl[bits[layer.name]] - layer.kl[new_bits]
            bits[layer.name] = new_bits
        return bits


def _layer_to_json(layer: LayerSensitivity) -> dict[str, Any]:
    return {
        "name": layer.name,
        "modules": layer.modules,
        "weights": layer.num_weights,
        "kl": {str(bits): kl for bits, kl in layer.kl.items()},
    }


def _layer_from_json(entry: dict[str, Any]) -> LayerSensitivity:
    return LayerSensitivity(
        entry["name"],
        tuple(entry["modules"]),
        entry["weights"],
        {int(bits): kl for bits, kl in entry["kl"].items()},
    )
