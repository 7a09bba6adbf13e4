"""The loads of `--mode agentic`: sessions at once, sessions per second, or the trace's times."""

from __future__ import annotations

import math
from random import Random

from llmkit.bench.agentic.agent_trace import AgentTrace
from llmkit.bench.agentic.agent_workload import TRACE_TIMES
from llmkit.bench.agentic.read_trace import read_agent_trace
from llmkit.bench.bench_options import LoadOptions
from llmkit.bench.load_modes import gamma_arrivals, require_default_burstiness
from llmkit.bench.workload import Lengths, Scenario
from llmkit.common.errors import UsageError
from llmkit.common.options import changed_options

DEFAULT_SESSIONS = 8  # at once, of a trace without times
# A trace decides them.
_UNUSED_OPTIONS = ("input_tokens", "output_tokens", "prefix_tokens", "turns")


def agentic_scenarios(
    load: LoadOptions, limit: int | None = None
) -> tuple[tuple[Scenario, ...], AgentTrace]:
    """The scenarios from the lowest load to the highest, and the trace that they play.

    limit: sessions, at most, beside `load.requests`.
    Raises UsageError for options that exclude each other, and as `read_agent_trace` does.
    """
    if load.trace is None:
        raise UsageError(
            "--mode agentic plays a trace",
            "--trace FILE was expected",
            "`llmkit bench trace -o FILE` makes one",
        )
    for label in changed_options(load, _UNUSED_OPTIONS):
        raise UsageError(
            f"{label} does not go with --mode agentic", "The trace decides what is sent"
        )
    if load.rates and load.concurrency:
        raise UsageError("--rate does not go with --concurrency", "One kind of load was expected")
    if not all(0 < number < math.inf for number in (*load.rates, *load.concurrency)):
        raise UsageError("rates and concurrencies are more than 0")
    if not 0 < load.burstiness < math.inf:
        raise UsageError("burstiness is more than 0")
    if not load.rates:
        require_default_burstiness(load)
    limits = [count for count in (load.requests, limit) if count is not None]
    trace = read_agent_trace(load.trace, min(limits, default=None), load.hash_block_tokens)
    if load.rates:
        scenarios = [
            Scenario(
                f"rate{rate:g}",
                len(trace.roots),
                _no_lengths,
                "agents",
                draw_arrivals=gamma_arrivals(rate, load.burstiness),
                load_level=rate,
            )
            for rate in sorted(set(load.rates))
        ]
    elif load.concurrency or not trace.is_timed:
        scenarios = [
            Scenario(f"c{sessions}", sessions, _no_lengths, "agents", load_level=float(sessions))
            for sessions in sorted(set(load.concurrency)) or [DEFAULT_SESSIONS]
        ]
    else:
        scenarios = [Scenario(TRACE_TIMES, len(trace.roots), _no_lengths, "agents")]
    return tuple(scenarios), trace


def _no_lengths(_random: Random) -> Lengths:
    """The trace has them."""
    return []
