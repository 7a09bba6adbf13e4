"""Mixed precision: chooses a scheme for each linear.

The choice keeps within a mean number of bits, or within a KL divergence.

The KL divergences of single linears add up well enough to compare choices. A correction factor, the
measured KL of a whole choice over that sum, is updated after every attempt.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.checkpoint.output_directory import write_errors
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.errors import GateError
from llmkit.quant.layer_sensitivity import LayerSensitivity, SchemeCost, Sensitivity, UniformCost
from llmkit.quant.scheme_candidates import UNQUANTIZED

# After this many attempts the smallest one within the target KL is used. The search continues if
# there is none.
MAX_ATTEMPTS = 5
# A KL between this fraction of the target and the target ends the search.
GOOD_ENOUGH = 0.85
MAX_FRONTIER_POINTS = 60  # of the report's curve

Choice = dict[str, str]  # the name of a scheme, or UNQUANTIZED, by name of a LayerSensitivity


@dataclass
class SchemeSearch:
    """Searches the schemes of all linears for a target.

    With `target_bits` the first choice is final. With `target_kl` the caller tries `next_choice`,
    reports the KL to `record_attempt`, and repeats that until it returns True.
    """

    layers: Sequence[LayerSensitivity]
    target_bits: float | None = None  # the mean bits per weight, with scales, at most
    target_kl: float | None = None  # the mean KL, at most
    # Holds the sensitivity and the attempts, for a run that continues this one.
    file: Path | None = None
    key: str = ""  # identifies the run in `file`
    # What one scheme for all linears costs.
    uniform: Sequence[UniformCost] = ()
    # The KL of a choice over the sum of its linears' KL, from the last attempt.
    kl_correction: float = 1.0
    attempts: list[tuple[Choice, float]] = field(default_factory=list)
    # The smallest attempt within the target KL, once no smaller choice is worth an attempt. The
    # caller has to write it once more unless it was the last attempt.
    _final: Choice | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        ratios = []
        for cost in self.uniform:
            if not all(cost.name in layer.costs for layer in self.layers):
                continue
            predicted = self._predicted_kl({layer.name: cost.name for layer in self.layers})
            if predicted > 0 and cost.kl > 0:
                ratios.append(cost.kl / predicted)
        if ratios:
            self.kl_correction = statistics.median(ratios)

    @classmethod
    def resume(
        cls,
        file: Path,
        key: str,
        target_bits: float | None,
        target_kl: float | None,
        measure: Callable[[], Sensitivity],
    ) -> SchemeSearch:
        """Continue the search that an interrupted run with the same `key` saved in `file`.

        Without one, start a new search with the sensitivity that `measure` returns.
        """
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(file.read_text())
            if saved["key"] == key:
                layers = [_layer_from_json(entry) for entry in saved["units"]]
                uniform = [UniformCost(**entry) for entry in saved["uniform"]]
                search = cls(layers, target_bits, target_kl, file, key, uniform)
                for choice, kl in saved["attempts"]:
                    search.record_attempt(choice, kl)
                return search
        found = measure()
        search = cls(found.layers, target_bits, target_kl, file, key, found.uniform)
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
            "units": [dataclasses.asdict(layer) for layer in self.layers],
            "uniform": [dataclasses.asdict(cost) for cost in self.uniform],
            "attempts": self.attempts,
        }
        with write_errors(self.file):
            self.file.write_text(json.dumps(document))

    def remove_file(self) -> None:
        """Delete the file of a finished search."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def next_choice(self) -> Choice:
        """The schemes to try next."""
        if self.target_bits is not None:
            return self._best_within_bits(self.target_bits)
        assert self.target_kl is not None
        return self._final or self._smallest_within_kl(self.target_kl)

    def record_attempt(self, choice: Choice, kl: float) -> bool:
        """Record the KL of a choice. Returns whether the choice is final.

        Raises GateError when even the choice of the lowest KL is above the target.
        """
        if self.target_kl is None:
            self.attempts.append((dict(choice), kl))
            return True
        was_tried = [tried for tried, _ in self.attempts]
        self.attempts.append((dict(choice), kl))
        is_good = kl <= self.target_kl
        predicted = self._predicted_kl(choice)
        if predicted > 0 and kl > 0:
            # After a failure the correction is a little too large, so that the same choice is not
            # made again.
            self.kl_correction = kl / predicted * (1.0 if is_good else 1.05)
        following = self._smallest_within_kl(self.target_kl)
        best = self._smallest_good_attempt()
        if best is None:
            if predicted == 0:  # there is nothing left that would lower the KL
                raise GateError(
                    f"with every linear layer in {UNQUANTIZED} the mean KL is {kl:.4g}, and"
                    f" --target-kl is {self.target_kl:g}",
                    todo="Choose a larger one, or leave out what else changes the model: --lm-head,"
                    " --kv or --prune-experts",
                )
            if following == choice:
                self.kl_correction *= 1.2
            return False
        if (
            (is_good and kl >= GOOD_ENOUGH * self.target_kl)
            or len(self.attempts) >= MAX_ATTEMPTS
            or following in was_tried
            or self.total_bits(following) >= self.total_bits(best)
        ):
            self._final = best
        return self._final == choice

    def total_bits(self, choice: Mapping[str, str]) -> int:
        """The bits that a checkpoint stores for the linears of a choice, with the scales."""
        return sum(layer.costs[choice[layer.name]].stored_bits for layer in self.layers)

    def mean_bits(self, choice: Mapping[str, str]) -> float:
        """The mean bits per weight of a choice, with the scales."""
        return self.total_bits(choice) / self.num_weights

    def schemes_by_module(self, choice: Mapping[str, str]) -> dict[str, Scheme | None]:
        """The schemes of a choice by runtime module; None: not quantized."""
        return {
            module: layer.costs[choice[layer.name]].scheme
            for layer in self.layers
            for module in layer.modules
        }

    def report_entries(self) -> dict[str, Any]:
        """What the report says: what each scheme costs at each linear, and all attempts."""
        choice = self.attempts[-1][0] if self.attempts else self.next_choice()
        return {
            "sensitivity": [
                {
                    "name": layer.name,
                    "weights": layer.num_weights,
                    "scheme": choice[layer.name],
                    "bits": layer.costs[choice[layer.name]].stored_bits / layer.num_weights,
                    "kl": {
                        name: cost.kl for name, cost in layer.costs.items() if name != UNQUANTIZED
                    },
                }
                for layer in self.layers
            ],
            "mean_bits": self.mean_bits(choice),
            "attempts": [
                {"mean_bits": self.mean_bits(tried), "mean_kl": kl} for tried, kl in self.attempts
            ],
            "uniform": [
                {
                    "scheme": cost.name,
                    "mean_bits": cost.stored_bits / self.num_weights,
                    "mean_kl": cost.kl,
                }
                for cost in self.uniform
            ],
            "frontier": self._frontier(),
        }

    def _frontier(self) -> list[dict[str, float]]:
        """The mean bits and the expected KL of the best choices, the smallest first."""
        choice = self._smallest_choice()
        points = [(self.mean_bits(choice), self._predicted_kl(choice))]
        for layer, name in self._upgrades():
            choice[layer.name] = name
            points.append((self.mean_bits(choice), self._predicted_kl(choice)))
        step = -(-len(points) // MAX_FRONTIER_POINTS)
        shown = [*points[:-1:step], points[-1]]
        return [{"mean_bits": bits, "mean_kl": kl * self.kl_correction} for bits, kl in shown]

    def _predicted_kl(self, choice: Mapping[str, str]) -> float:
        return sum(layer.costs[choice[layer.name]].kl for layer in self.layers)

    def _smallest_good_attempt(self) -> Choice | None:
        assert self.target_kl is not None
        bad = [choice for choice, kl in self.attempts if kl > self.target_kl]
        good = [choice for choice, _ in self.attempts if choice not in bad]
        return min(good, key=self.total_bits) if good else None

    def _smallest_choice(self) -> Choice:
        """The smallest scheme of each linear, among those the one of the lowest KL."""
        return {layer.name: _ladder(layer)[0][0] for layer in self.layers}

    def _upgrades(self) -> list[tuple[LayerSensitivity, str]]:
        """Linears and the schemes to raise them to: those that save the most KL per bit first.

        The upgrades of one linear are in order, and none saves less per bit than the next one.
        """
        upgrades: list[tuple[float, LayerSensitivity, str]] = []
        for layer in self.layers:
            ladder = _ladder(layer)
            start = 0
            while start < len(ladder) - 1:
                gains = []
                for end in range(start + 1, len(ladder)):
                    saved_kl = ladder[start][1].kl - ladder[end][1].kl
                    added_bits = ladder[end][1].stored_bits - ladder[start][1].stored_bits
                    gains.append((saved_kl / added_bits, end))
                gain, end = max(gains, key=lambda candidate: candidate[0])
                upgrades.append((gain, layer, ladder[end][0]))
                start = end
        upgrades.sort(key=lambda upgrade: -upgrade[0])
        return [(layer, name) for _, layer, name in upgrades]

    def _best_within_bits(self, max_mean_bits: float) -> Choice:
        choice = self._smallest_choice()
        budget = max_mean_bits * self.num_weights - self.total_bits(choice)
        for layer, name in self._upgrades():
            cost = layer.costs[name].stored_bits - layer.costs[choice[layer.name]].stored_bits
            if 0 < cost <= budget:
                choice[layer.name] = name
                budget -= cost
        return choice

    def _smallest_within_kl(self, max_kl: float) -> Choice:
        choice = self._smallest_choice()
        kl = self._predicted_kl(choice)
        for layer, name in self._upgrades():
            if kl * self.kl_correction <= max_kl:
                break
            kl -= layer.costs[choice[layer.name]].kl - layer.costs[name].kl
            choice[layer.name] = name
        return choice


def _ladder(layer: LayerSensitivity) -> list[tuple[str, SchemeCost]]:
    """The choices of a linear that are worth their bits: each has more bits and a lower KL."""
    by_size = sorted(layer.costs.items(), key=lambda item: (item[1].stored_bits, item[1].kl))
    ladder = by_size[:1]
    for name, cost in by_size[1:]:
        if cost.kl < ladder[-1][1].kl:
            ladder.append((name, cost))
    return ladder


def _layer_from_json(entry: dict[str, Any]) -> LayerSensitivity:
    costs = {}
    for name, cost in entry["costs"].items():
        scheme = None if cost["scheme"] is None else Scheme(**cost["scheme"])
        costs[name] = SchemeCost(cost["stored_bits"], cost["kl"], scheme)
    return LayerSensitivity(entry["name"], tuple(entry["modules"]), entry["num_weights"], costs)
