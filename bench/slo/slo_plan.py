"""Checking the options of `--mode slo` and `--sweep-options` before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.load_modes import require_default_burstiness
from llmkit.bench.slo.attainment import requests_to_decide
from llmkit.bench.slo.slo_options import SLO, SloOptions
from llmkit.bench.slo.slo_search import SloGoal, default_max_requests
from llmkit.bench.slo.slo_workload import slo_scenario
from llmkit.bench.slo.sweep_options import SWEPT_MODES, ServePoint, parse_sweep
from llmkit.bench.workload import Scenario
from llmkit.common.errors import UsageError

_SAMPLE_REQUESTS = 64  # by which workloads are compared
# The options that multiply the GPUs of a server.
_RANK_OPTIONS = ("--tp", "--pp", "--dp")


def slo_goal(options: BenchOptions, slo: Mapping[str, float]) -> SloGoal | None:
    """What `--mode slo` searches for; None for another mode. Raises UsageError."""
    load = options.load
    if load is None or load.mode != SLO:
        return None
    if not slo:
        raise UsageError(
            "--mode slo has no bounds",
            "Bounds like --slo ttft:500ms,tpot:50ms were expected",
        )
    if options.limit is not None:
        raise UsageError("--limit does not go with --mode slo", todo="Use --requests")
    search = options.slo_search or SloOptions()
    if search.search != "rate":
        require_default_burstiness(load)
    decisive = requests_to_decide(search.attained)
    if load.requests is not None and load.requests < 2 * decisive:
        raise UsageError(
            f"{load.requests} requests of a load cannot show that {search.attained:g} of them keep"
            " the bounds",
            f"At least {2 * decisive} were expected, or a smaller --attained",
        )
    return SloGoal(
        slo,
        search.attained,
        search.search == "rate",
        search.precision,
        search.max_probes,
        load.requests or default_max_requests(search.attained),
    )


def slo_scenarios(options: BenchOptions) -> tuple[Scenario, ...]:
    """The sample of requests that stands for the workload of `--mode slo` in reports."""
    assert options.load is not None
    is_rate = options.slo_search is None or options.slo_search.search == "rate"
    return (slo_scenario(options.load, is_rate, 1.0, _SAMPLE_REQUESTS),)


def sweep_points(options: BenchOptions, has_servers: bool) -> Sequence[ServePoint]:
    """The combinations of `--sweep-options`; () without them. Raises UsageError."""
    if not options.sweep_options:
        return ()
    points = parse_sweep(options.sweep_options)
    if has_servers:
        raise UsageError(
            "--sweep-options starts servers, and an address is one that runs already",
            "Checkpoints alone were expected",
        )
    if options.offline:
        raise UsageError(
            "--sweep-options sets options of servers, and --offline has none",
            todo="Drop one of them; --mode throughput implies --offline",
        )
    mode = options.load.mode if options.load is not None else "scenarios"
    if mode not in SWEPT_MODES or not options.speed:
        other = f"--mode {mode}" if options.speed else "--no-speed"
        raise UsageError(
            f"--sweep-options does not go with {other}",
            f"It goes with {', '.join(SWEPT_MODES)}",
        )
    return points


def count_gpus(device: str, options: Mapping[str, str]) -> int:
    """The GPUs of a server with these options; 0 on a CPU."""
    if device != "cuda":
        return 0
    return prod(int(options.get(flag, 1)) for flag in _RANK_OPTIONS)
