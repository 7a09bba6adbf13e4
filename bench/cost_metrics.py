"""The cost and energy of tokens, from prices, power and how much of the time a machine works.

An hour of the machine at the measured load costs

    price_per_hour / utilization + power * price_per_kwh

because its idle hours are paid for, too, while the power is that under load. This is divided by
tokens in two ways: all of it over the output tokens, or over all tokens (blended); and split
between prompt and output tokens by the time that requests spend in prefill and in decode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llmkit.bench.bench_metrics import RequestTimeline
from llmkit.bench.bench_options import MEASURED, BenchOptions
from llmkit.common.errors import ShortageError, UsageError

SECONDS_PER_HOUR = 3600
JOULES_PER_KWH = 3.6e6


def check_cost_options(options: BenchOptions) -> None:
    """Raises UsageError for prices that are none and for options that need others."""
    for name, price in (
        ("per hour", options.price_per_hour),
        ("per kWh", options.price_per_kwh),
    ):
        if price is not None and not 0 < price < math.inf:
            raise UsageError(
                f"a price of {price:g} {name} is not a valid price", "More than 0 was expected"
            )
    if options.price_per_kwh is not None and options.power is None:
        raise UsageError(
            "--price-per-kwh without a power",
            "Watts, or the energy that counters measure",
            "Give --power WATTS or --power measured",
        )
    if options.utilization != 1 and options.price_per_hour is None:
        raise UsageError(
            "--utilization without a price",
            "It says in how many of the paid hours the machine works",
            "Give --price-per-hour",
        )


def check_power(options: BenchOptions, has_servers: bool, has_counters: bool) -> None:
    """Raises UsageError or ShortageError when `--power measured` cannot measure a target.

    has_servers: whether a target is a server that runs already, perhaps on another machine.
    """
    if options.power != MEASURED:
        return
    if has_servers:
        raise UsageError(
            "--power measured with --url: the power of a server that runs already is not measured",
            todo="Give its watts",
        )
    if not has_counters:
        raise ShortageError(
            "--power measured: this machine's counters of energy cannot be read",
            "NVML for GPUs (the extra gpu), or readable files energy_uj in /sys/class/powercap",
            "Give the watts, or let root allow reading those files",
        )


def cost_metrics(
    options: BenchOptions,
    metrics: Mapping[str, float],
    timelines: Sequence[RequestTimeline],
    queue_s: float | None = None,
) -> dict[str, float]:
    """The SPEED_METRICS of cost and energy of one run; {} without prices and power.

    metrics: the run's other ones. queue_s: see `input_cost_share`.
    """
    power_w = _power_w(options, metrics)
    found = {}
    if power_w is not None:
        run_kwh = power_w * metrics["wall_s"] / JOULES_PER_KWH
        found["kwh_per_million"] = run_kwh / metrics["output_tokens"] * 1e6
    if options.price_per_hour is None and options.price_per_kwh is None:
        return found
    per_hour = (options.price_per_hour or 0.0) / options.utilization
    if options.price_per_kwh is not None and power_w is not None:
        per_hour += power_w / 1000 * options.price_per_kwh
    run_cost = per_hour * metrics["wall_s"] / SECONDS_PER_HOUR
    share = input_cost_share(timelines, queue_s)
    tokens = metrics["prompt_tokens"] + metrics["output_tokens"]
    return found | {
        "cost_per_million": run_cost / metrics["output_tokens"] * 1e6,
        "cost_per_million_total": run_cost / tokens * 1e6,
        "cost_per_million_input": share * run_cost / metrics["prompt_tokens"] * 1e6,
        "cost_per_million_output": (1 - share) * run_cost / metrics["output_tokens"] * 1e6,
        "input_cost_share": share,
    }


def _power_w(options: BenchOptions, metrics: Mapping[str, float]) -> float | None:
    """The power of a run in watts; None without --power."""
    if options.power == MEASURED:
        return metrics.get("gpu_power_w", 0.0) + metrics.get("cpu_power_w", 0.0)
    return None if options.power is None else float(options.power)


def input_cost_share(timelines: Sequence[RequestTimeline], queue_s: float | None = None) -> float:
    """The share of requests' time that is prefill: until the first token, over all of it.

    queue_s: how long all requests together waited in the server's queue, which is neither prefill
    nor decode; None: not known, and counted as prefill.
    """
    prefill_s = sum(timeline.ttft_s for timeline in timelines)
    all_s = sum(timeline.e2e_s for timeline in timelines)
    waited_s = min(queue_s or 0.0, prefill_s)
    if all_s <= waited_s:
        return 1.0
    return (prefill_s - waited_s) / (all_s - waited_s)
