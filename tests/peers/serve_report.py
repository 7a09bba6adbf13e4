"""The tables that `bench_serve.py` prints. README.md defines the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import median
from typing import Any, NamedTuple

from common import table
from llmkit.bench.bench_metrics import median_metrics

MIB = 1 << 20
SCENARIO_NAMES = ("single", "batch", "online", "prefix")


class Comparison(NamedTuple):
    """A metric of a scenario whose ratio to that of a baseline is shown."""

    scenario: str
    title: str
    metric: str
    is_inverse: bool = False  # the ratio is the baseline's value over the server's

    def ratio(self, value: float, baseline: float) -> float:
        """How many times the baseline's."""
        return baseline / value if self.is_inverse else value / baseline


COMPARISONS = (
    Comparison("single", "output tokens/s", "output_tps"),
    Comparison("single", "decode tokens/s", "tpot_mean_ms", is_inverse=True),
    Comparison("single", "TTFT mean", "ttft_mean_ms"),
    *(
        Comparison(scenario, title, metric)
        for scenario in ("batch", "online", "prefix")
        for title, metric in (
            ("output tokens/s", "output_tps"),
            ("TTFT mean", "ttft_mean_ms"),
            ("TTFT p99", "ttft_p99_ms"),
        )
    ),
)
# What is compared with the same server alone, when there were runs beside busy processes.
SPEEDS = {
    "output tokens/s": Comparison("", "", "output_tps"),
    "decode tokens/s": Comparison("", "", "tpot_mean_ms", is_inverse=True),
}
Metrics = dict[str, float]


def metrics_by_round(
    runs: Sequence[dict[str, Any]], server: str, scenario: str, busy: int = 0
) -> dict[int, Metrics]:
    """The metrics of a server's complete runs of a scenario, by round.

    busy: the number of busy processes beside it.
    """
    key = (server, scenario, busy)
    return {
        run["round"]: {name: value for name, value in run.items() if not isinstance(value, str)}
        for run in runs
        if (run["server"], run["scenario"], run["busy"]) == key and "error" not in run
    }


def paired_ratios(
    compare: Callable[[float, float], float],
    metric: str,
    own: dict[int, Metrics],
    baseline: dict[int, Metrics],
) -> str:
    """The median, smallest and largest ratio within a round; empty without a common round."""
    found = [
        compare(own[number][metric], baseline[number][metric])
        for number in own
        if metric in own[number] and metric in baseline.get(number, {})
    ]
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""


def report(results: dict[str, Any]) -> str:
    """The machine, the servers, medians over the rounds, and llmkit's servers over the others."""
    servers = results["servers"]
    names = list(servers)
    runs = results["runs"]
    counts = sorted({run["busy"] for run in runs})
    baselines = [name for name in names if not name.startswith("llmkit=")]
    parts = [
        describe_machine(results),
        table(("server", "ready, s", "memory when ready, MiB", "peak, MiB"), _facts(servers)),
        table(
            (
                "",
                "",
                "output tokens/s",
                "TTFT mean, ms",
                "TTFT p99, ms",
                "TPOT, ms",
                "MBU",
                "cached tokens",
            ),
            list(_medians(results, counts)),
        ),
    ]
    ratios = list(_ratios(runs, names, baselines, counts))
    if ratios:
        parts.append(table(("", "", "times that of", *baselines), ratios))
    shares = list(_shares(runs, names, counts))
    if shares:
        parts.append(table(("", "", *(f"{title}, of alone" for title in SPEEDS)), shares))
    return "\n\n".join(parts)


def describe_machine(results: dict[str, Any]) -> str:
    """The processor, its flags, the measured bandwidth, and the servers' limit, as one line."""
    environment = results["environment"]
    parts = [
        f"{environment['cpu']}, {environment['cores']} cores",
        f"flags {environment['cpu_flags'] or 'not known'}",
        f"llmkit's level {results['cpu_level'] or 'none'}",
    ]
    if results["bandwidths"]:
        parts.append(f"memory reads at {max(results['bandwidths']) / 1e9:.1f} GB/s")
    if results["cpus"] is not None:
        parts.append(f"servers limited to {results['cpus']:g} CPUs")
    return "; ".join([*parts, results["date"]])


def mbu(results: dict[str, Any], server: str, tpot_ms: float) -> float | None:
    """The share of the measured memory bandwidth that reading the weights for a token takes.

    None where one of the two is not known.
    """
    token_bytes = results["servers"][server]["token_bytes"]
    if token_bytes is None or not results["bandwidths"]:
        return None
    share: float = token_bytes / (tpot_ms / 1e3) / max(results["bandwidths"])
    return share


def _facts(servers: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{one['ready_s']:.1f}",
            f"{one['ready_bytes'] / MIB:.0f}",
            f"{one['peak_bytes'] / MIB:.0f}",
        ]
        for name, one in servers.items()
    ]


def _title(scenario: str, busy: int) -> str:
    return f"{scenario}, {busy} busy" if busy else scenario


def _medians(results: dict[str, Any], counts: Sequence[int]) -> Iterator[list[str]]:
    for scenario, busy, name in product(SCENARIO_NAMES, counts, results["servers"]):
        rounds = metrics_by_round(results["runs"], name, scenario, busy)
        if not rounds:
            continue
        one = median_metrics(list(rounds.values()))
        tpot_ms = one.get("tpot_mean_ms")
        share = None
        if scenario == "single" and not busy and tpot_ms:
            share = mbu(results, name, tpot_ms)
        yield [
            _title(scenario, busy),
            name,
            f"{one['output_tps']:.1f}",
            f"{one['ttft_mean_ms']:.1f}",
            f"{one['ttft_p99_ms']:.1f}",
            "" if tpot_ms is None else f"{tpot_ms:.1f}",
            "" if share is None else f"{share:.0%}",
            f"{one['cached_tokens']:.0f}",
        ]


def _ratios(
    runs: Sequence[dict[str, Any]],
    names: Sequence[str],
    baselines: Sequence[str],
    counts: Sequence[int],
) -> Iterator[list[str]]:
    if not baselines:
        return
    for name, comparison, busy in product(names, COMPARISONS, counts):
        own = metrics_by_round(runs, name, comparison.scenario, busy)
        if name in baselines or not own:
            continue
        cells = []
        for baseline in baselines:
            rounds = metrics_by_round(runs, baseline, comparison.scenario, busy)
            cells.append(paired_ratios(comparison.ratio, comparison.metric, own, rounds))
        yield [name, _title(comparison.scenario, busy), comparison.title, *cells]


def _shares(
    runs: Sequence[dict[str, Any]], names: Sequence[str], counts: Sequence[int]
) -> Iterator[list[str]]:
    """The speed beside busy processes, as shares of the server's speed alone in the same round."""
    if 0 not in counts:
        return
    for scenario, busy, name in product(SCENARIO_NAMES, counts, names):
        alone = metrics_by_round(runs, name, scenario)
        beside = metrics_by_round(runs, name, scenario, busy)
        if busy and alone and beside:
            cells = [
                paired_ratios(speed.ratio, speed.metric, beside, alone) for speed in SPEEDS.values()
            ]
            yield [_title(scenario, busy), name, *cells]
