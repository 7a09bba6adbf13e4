"""The requests of the loads that `--mode slo` probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from llmkit.bench.bench_options import LoadOptions
from llmkit.bench.load_modes import draw_lengths, gamma_arrivals
from llmkit.bench.slo.slo_options import SLO
from llmkit.bench.workload import (
    PromptDataset,
    Scenario,
    Workload,
    WorkloadRequest,
    build_workload,
)


@dataclass(frozen=True)
class SloWorkload(Workload):
    """Requests for loads that are known only during the search.

    The requests of the `Workload` are a sample, by which reports are compared.
    """

    data: PromptDataset
    load: LoadOptions

    @staticmethod
    def of(sample: Workload, data: PromptDataset, load: LoadOptions) -> SloWorkload:
        """The workload whose sample was made from the same data and options."""
        return SloWorkload(sample.seed, sample.scenarios, sample.warmup, sample.rounds, data, load)

    def at(self, scenario: Scenario, rounds: int = 1) -> Workload:
        """The requests of one load."""
        return build_workload(self.data, [scenario], rounds, self.seed)

    def probe(self, load: float, count: int, number: int) -> tuple[WorkloadRequest, ...]:
        """The requests of a probe's run.

        number: of the run among all runs of the search. Each has other text, so that no prefix is
        cached, and other arrivals, so that chance is not the same at every load.
        """
        is_rate = self.scenarios[0].draw_arrivals is not None
        scenario = slo_scenario(self.load, is_rate, load, count, f"{SLO}-{number}")
        (requests,) = self.at(scenario).rounds[0].values()
        return requests

    def alone(self, count: int) -> tuple[WorkloadRequest, ...]:
        """Requests without a schedule."""
        scenario = slo_scenario(self.load, False, 1, count, f"{SLO}-alone-{count}")
        (requests,) = self.at(scenario).rounds[0].values()
        return requests


def slo_scenario(
    load: LoadOptions, is_rate: bool, level: float, count: int, name: str = SLO
) -> Scenario:
    """A load of `level` requests a second or clients."""
    draw_arrivals: Callable[[Random, int], Sequence[float]] | None = None
    if is_rate:
        draw_arrivals = _exact_rate(gamma_arrivals(level, load.burstiness), level)
    return Scenario(
        name,
        count if is_rate else int(level),
        draw_lengths(load, count),
        name,
        load.prefix_tokens,
        draw_arrivals=draw_arrivals,
        load_level=level,
    )


def _exact_rate(
    draw: Callable[[Random, int], Sequence[float]], rate: float
) -> Callable[[Random, int], Sequence[float]]:
    """Arrivals scaled to the exact rate, which a few hundred would miss by some percent."""

    def arrival_times(random: Random, count: int) -> Sequence[float]:
        times = draw(random, count)
        if count < 2:
            return times
        scale = (count - 1) / rate / times[-1]
        return [scale * time_s for time_s in times]

    return arrival_times
