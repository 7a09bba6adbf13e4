"""`llmkit plan`: how many replicas, on how many GPUs, a load needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.output import Output
from llmkit.common.errors import UsageError
from llmkit.common.formatting import milliseconds_text
from llmkit.common.option_values import DURATION, INTEGERS, RATE, TOKEN_RANGE, within
from llmkit.common.options import SEED, Argument, Option, changed_options

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.deploy.capacity_planning import Demand, Engine
    from llmkit.deploy.load_pattern import Period

PATTERN_PANEL = "Daily pattern"
# The tokens of a KV cache without a limit.
NO_LIMIT = 1 << 60


@dataclass(frozen=True, kw_only=True)
class PatternOptions:
    """A recorded load, and replicas ahead of its daily or weekly pattern."""

    pre_scale: Annotated[
        bool,
        Option(
            "Plan the replicas of each hour of the pattern of --trace, as cron triggers of KEDA.",
            panel=PATTERN_PANEL,
        ),
    ] = False
    trace: Annotated[
        str | None,
        Option(
            "A load over days: a trace of requests as for `llmkit bench`, Prometheus' JSON of a "
            "range query of request rates, or CSV with hour and rate.",
            metavar="FILE",
            unset="none",
            panel=PATTERN_PANEL,
        ),
    ] = None
    trace_start: Annotated[
        str,
        Option(
            "When a trace without dates begins.",
            metavar="TIME",
            panel=PATTERN_PANEL,
        ),
    ] = "1970-01-05T00:00"
    period: Annotated[
        str,
        Option(
            "day or week: after what the pattern repeats itself.",
            choices=("day", "week"),
            metavar="PERIOD",
            panel=PATTERN_PANEL,
        ),
    ] = "day"
    quantile: Annotated[
        float,
        Option(
            "Which of an hour's rates counts, over all days: 0.95 is above 95 % of them.",
            metavar="SHARE",
            check=within(0, 1),
            panel=PATTERN_PANEL,
        ),
    ] = 0.95
    time_zone: Annotated[
        str,
        Option("The pattern's hours are local ones of it.", metavar="NAME", panel=PATTERN_PANEL),
    ] = "UTC"
    lead_time: Annotated[
        float | None,
        Option(
            "From requesting a replica until it is ready, with its node and its image: 90s, 5m.",
            metavar="TIME",
            format=DURATION,
            unset="ready_s of --bench",
            panel=PATTERN_PANEL,
        ),
    ] = None
    min_replicas: Annotated[
        int,
        Option("Replicas at all times.", metavar="N", check=within(1), panel=PATTERN_PANEL),
    ] = 1
    scaled_object: Annotated[
        str | None,
        Option(
            "A ScaledObject whose other triggers stay.",
            metavar="FILE",
            unset="that of recipes/kubernetes/components/keda",
            panel=PATTERN_PANEL,
        ),
    ] = None
    output: Annotated[
        Path | None,
        Option(
            "Write the ScaledObject with the cron triggers.",
            flags=("--output", "-o"),
            metavar="FILE",
            unset="none",
            panel=PATTERN_PANEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What `llmkit plan` takes."""

    model: Annotated[
        str | None,
        Argument("A checkpoint; not needed with --bench.", metavar="MODEL", is_model=True),
    ] = None
    rate: Annotated[float, Option("Requests a second.", metavar="N/s", format=RATE)] = 1.0
    input_tokens: Annotated[
        tuple[int, int],
        Option(
            "Tokens of a prompt, spread evenly.",
            flags=("--in",),
            metavar="N|LOW-HIGH",
            format=TOKEN_RANGE,
        ),
    ] = (1000, 1000)
    output_tokens: Annotated[
        tuple[int, int],
        Option(
            "Tokens of an answer, spread evenly.",
            flags=("--out",),
            metavar="N|LOW-HIGH",
            format=TOKEN_RANGE,
        ),
    ] = (300, 300)
    slo: Annotated[
        str | None,
        Option(
            "Bounds that a request must keep: ttft:500ms,tpot:50ms.",
            metavar="BOUNDS",
            unset="a queue that does not grow",
        ),
    ] = None
    attained: Annotated[
        float,
        Option(
            "Share of the requests that must keep the bounds.",
            metavar="SHARE",
            check=within(0.01, 1),
        ),
    ] = 0.99
    gpu: Annotated[
        str | None,
        Option(
            "h200, l4 ...: estimate step times from its data sheet; cpu: from this machine's "
            "measured peaks.",
            metavar="NAME",
            unset="none",
        ),
    ] = None
    tp: Annotated[
        tuple[int, ...],
        Option("Tensor-parallel sizes to try with --gpu.", metavar="N,N,...", format=INTEGERS),
    ] = (1, 2, 4, 8)
    bench: Annotated[
        str | None,
        Option(
            "A report of `llmkit bench` of one replica: fit step times to it.",
            metavar="FILE",
            unset="none",
        ),
    ] = None
    gpus: Annotated[int, Option("GPUs of the replica that --bench measured.", metavar="N")] = 0
    max_num_seqs: Annotated[
        int,
        Option(
            "Maximum requests in a step of each replica, see `llmkit serve`.",
            metavar="N",
            check=within(1),
        ),
    ] = 256
    max_num_batched_tokens: Annotated[
        int,
        Option(
            "Maximum tokens in a step of each replica, see `llmkit serve`; 512 on a CPU.",
            metavar="N",
            check=within(1),
        ),
    ] = 8192
    kv_cache_tokens: Annotated[
        int | None,
        Option(
            "Tokens that the KV cache of a --bench replica holds, see `serve --plan`.",
            metavar="N",
            unset="no limit",
        ),
    ] = None
    cached: Annotated[
        float,
        Option(
            "Share of the prompt tokens that are in the prefix cache.",
            metavar="SHARE",
            check=within(0, 1),
        ),
    ] = 0.0
    burstiness: Annotated[
        float,
        Option(
            "Burstiness of the arrivals, as in `llmkit bench`; 1 is Poisson.",
            metavar="SHAPE",
            check=within(0.01),
        ),
    ] = 1.0
    replicas: Annotated[
        int | None,
        Option(
            "Simulate this number of replicas instead of finding the smallest.",
            metavar="N",
            unset="none",
            check=within(1),
        ),
    ] = None
    price_per_hour: Annotated[
        float | None,
        Option(
            "Price of a GPU (of a replica, without one), in any currency.",
            metavar="N",
            unset="none",
        ),
    ] = None
    seed: Annotated[int, SEED] = 0
    pattern: PatternOptions


def plan(output: Output, arguments: PlanArguments) -> None:
    """Plan capacity: replicas, GPUs of each, room in the KV cache and cost, from a simulation of
    queue and batches.
    """
    from llmkit.bench.bench_metrics import parse_slo
    from llmkit.bench.bench_report import read_report
    from llmkit.deploy.capacity_planning import (
        Demand,
        cpu_engine,
        engines,
        measured_engine,
        plan_replicas,
        predict,
        ranked,
    )
    from llmkit.deploy.queue_simulation import Limits
    from llmkit.shard.shard_checkpoint import open_source

    _require_one_source_of_times(arguments)
    _check_pattern_options(arguments)
    demand = Demand(
        arguments.rate,
        arguments.input_tokens,
        arguments.output_tokens,
        parse_slo(arguments.slo) if arguments.slo else {},
        arguments.attained,
        arguments.burstiness,
        arguments.cached,
        arguments.seed,
    )
    limits = Limits(
        arguments.max_num_seqs,
        arguments.max_num_batched_tokens,
        arguments.kv_cache_tokens or NO_LIMIT,
    )
    if arguments.bench is not None:
        report = read_report(arguments.bench)
        candidates = [measured_engine(report, arguments.bench, limits, arguments.gpus)]
    else:
        assert arguments.model is not None and arguments.gpu is not None
        source = open_source(arguments.model)
        if arguments.gpu == "cpu":
            candidates = [cpu_engine(source, limits)]
        else:
            candidates = engines(source, arguments.gpu, list(arguments.tp), limits)
    if arguments.pattern.pre_scale:
        _pre_scale(output, arguments, candidates, demand)
        return
    if arguments.replicas is not None:
        plans = [predict(engine, demand, arguments.replicas) for engine in candidates]
    else:
        possible = [plan_replicas(engine, demand) for engine in candidates]
        plans = ranked([plan for plan in possible if plan is not None])
    rows = [plan.to_json(arguments.price_per_hour) for plan in plans]
    fit_error = getattr(candidates[0].step, "error", None)
    times_source = _times_source(arguments, fit_error)
    document = {
        "model": arguments.model,
        "gpu": arguments.gpu,
        "bench": arguments.bench,
        "rate": arguments.rate,
        "slo": arguments.slo,
        "plans": rows,
        "fit_error": fit_error,
    }
    output.result(document, lambda console: _show(console, rows, times_source))


def _times_source(arguments: PlanArguments, fit_error: float | None) -> str:
    """Where step times come from."""
    if fit_error is not None:
        return f"measured times, fitted within {fit_error:.0%}"
    if arguments.gpu == "cpu":
        return "estimated from this CPU's measured peaks: --bench of a replica is better"
    return (
        f"estimated from the data sheet of {arguments.gpu}: measure one replica and use "
        "--bench before you buy"
    )


def _check_pattern_options(arguments: PlanArguments) -> None:
    """Raises UsageError for options of a pattern without the others that they need."""
    pattern = arguments.pattern
    if not pattern.pre_scale:
        for option in changed_options(pattern):
            raise UsageError(f"{option} goes with --pre-scale", todo="Give --pre-scale, too")
        return
    if pattern.trace is None:
        raise UsageError("--pre-scale without --trace", "A recorded load was expected")
    if arguments.slo is None:
        raise UsageError(
            "--pre-scale without --slo",
            "Bounds that say how many replicas an hour needs",
            "Give some, such as --slo ttft:500ms,tpot:50ms",
        )
    if arguments.replicas is not None or arguments.rate != PlanArguments.rate:
        raise UsageError("--rate and --replicas do not go with --pre-scale, which plans them")
    if pattern.lead_time is None and arguments.bench is None:
        raise UsageError(
            "--pre-scale without --lead-time",
            "The time until a requested replica is ready, or a report with it (--bench)",
        )


def _pre_scale(
    output: Output, arguments: PlanArguments, candidates: list[Engine], demand: Demand
) -> None:
    """Plan the replicas of each hour, check them on the trace, and write the ScaledObject."""
    from zoneinfo import ZoneInfo

    from llmkit.bench.bench_report import read_report, require_single_target
    from llmkit.bench.report_files import write_files
    from llmkit.deploy.capacity_planning import plan_replicas, ranked
    from llmkit.deploy.load_pattern import hour_name, hourly_rates, read_load
    from llmkit.deploy.pre_scaling import plan_schedule, scaled_object
    from llmkit.deploy.schedule_replay import replay, replay_arrivals

    pattern = arguments.pattern
    assert pattern.trace is not None
    try:
        zone = ZoneInfo(pattern.time_zone)
    except (LookupError, ValueError, OSError) as error:
        raise UsageError(
            f"--time-zone: {pattern.time_zone!r} is not known on this machine",
            "A name of the IANA database, such as Europe/Berlin",
            "Check the name, or install the package tzdata",
        ) from error
    period: Period = "week" if pattern.period == "week" else "day"
    base, base_source = _base_scaled_object(pattern.scaled_object)
    load = read_load(pattern.trace, zone, pattern.trace_start)
    if load.requests:
        _require_default_lengths(arguments)
        demand = replace(demand, lengths=tuple(row[1:3] for row in load.requests))
    arrivals = replay_arrivals(load, demand)
    rates = hourly_rates(load.bins, zone, period, pattern.quantile)
    lead_s = pattern.lead_time
    if lead_s is None:
        assert arguments.bench is not None
        target = require_single_target(read_report(arguments.bench), arguments.bench)
        if "ready_s" not in target.metrics:
            raise UsageError(
                f"{arguments.bench} has no ready_s, as its replica was not started by bench",
                todo="Give --lead-time",
            )
        lead_s = target.metrics["ready_s"]
    engine = candidates[0]
    if len(candidates) > 1:
        most = replace(demand, rate=max(rates) or max(one.rate for one in load.bins))
        plans = [plan_replicas(candidate, most) for candidate in candidates]
        engine = ranked([plan for plan in plans if plan is not None])[0].engine
    schedule = plan_schedule(
        engine,
        demand,
        rates,
        period,
        pattern.time_zone,
        lead_s,
        pattern.min_replicas,
        output.progress(),
    )
    replays = replay(engine, demand, arrivals, schedule, zone)
    document = scaled_object(schedule, base, base_source)
    if pattern.output is not None:
        write_files({pattern.output: _scaled_object_text(document, pattern.trace)})
        output.message(f"written: {pattern.output}")
    by_schedule, always_most = replays[0], replays[1]
    replay_rows = [one.to_json() for one in replays]
    if arguments.price_per_hour is not None:
        per_replica = arguments.price_per_hour * (engine.gpus or 1)
        for one, row in zip(replays, replay_rows, strict=True):
            row["price_per_day"] = 24 * one.mean * per_replica
    result: dict[str, Any] = {
        "model": arguments.model,
        "gpu": arguments.gpu,
        "bench": arguments.bench,
        "trace": pattern.trace,
        "slo": arguments.slo,
        "engine": engine.name,
        "period": period,
        "time_zone": pattern.time_zone,
        "quantile": pattern.quantile,
        "lead_minutes": schedule.lead_minutes,
        "hours": [
            {"hour": hour_name(hour, period), "rate": rate, "replicas": schedule.hours[hour]}
            for hour, rate in enumerate(rates)
        ],
        "windows": [window._asdict() for window in schedule.windows()],
        "replay": replay_rows,
        "saved_share": 1 - by_schedule.mean / always_most.mean,
        "scaled_object": document,
    }
    times_source = _times_source(arguments, getattr(engine.step, "error", None))
    output.result(result, lambda console: _show_schedule(console, result, times_source))


def _require_default_lengths(arguments: PlanArguments) -> None:
    """Raises UsageError when lengths are given beside a trace that has its own."""
    if (arguments.input_tokens, arguments.output_tokens) != (
        PlanArguments.input_tokens,
        PlanArguments.output_tokens,
    ):
        raise UsageError(
            "--in and --out with a trace of requests, which has their lengths",
            todo="Leave them out",
        )


def _base_scaled_object(path: str | None) -> tuple[dict[str, Any], str]:
    """The ScaledObject that the triggers are added to, and where it comes from."""
    from importlib.resources import as_file, files

    from llmkit.common.yaml_file import YamlFile

    if path is not None:
        return YamlFile(path).content, path
    recipe = files("llmkit.recipes") / "kubernetes/components/keda/scaledobject.yaml"
    with as_file(recipe) as file:
        return YamlFile(file).content, recipe.name


def _scaled_object_text(document: dict[str, Any], trace: str) -> bytes:
    import yaml

    text = yaml.safe_dump(document, sort_keys=False, width=100)
    return (
        f"# Replicas ahead of the pattern of {Path(trace).name}, by llmkit plan.\n{text}".encode()
    )


def _require_one_source_of_times(arguments: PlanArguments) -> None:
    """Raises UsageError unless the step times come from a GPU's data sheet or from a report."""
    if arguments.bench and arguments.gpu:
        problem = "both --gpu and --bench given"
    elif arguments.gpu is not None and arguments.model is None:
        problem = "--gpu without MODEL given"
    elif arguments.gpu is None and arguments.bench is None:
        problem = "no --gpu, no --bench given"
    else:
        return
    raise UsageError(
        problem, "MODEL with --gpu, or a report with --bench, says where times come from"
    )


def _show(console: Console, rows: list[dict[str, Any]], times_source: str) -> None:
    from rich.table import Table

    table = Table()
    columns = [
        "replica",
        "replicas",
        "GPUs",
        "keep the bounds",
        "TTFT p50",
        "p99",
        "TPOT",
        "p99",
        "busy",
        "KV at most",
    ]
    has_price = "price_per_hour" in rows[0]
    if has_price:
        columns += ["per hour", "per 1M tokens"]
    for column in columns:
        table.add_column(column, justify="left" if column == "replica" else "right")
    for row in rows:
        times = [
            row.get(name) for name in ("ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p99_ms")
        ]
        cost = []
        if has_price:
            cost = [f"{row['price_per_hour']:,.2f}", f"{row['cost_per_million']:,.2f}"]
        table.add_row(
            row["engine"],
            str(row["replicas"]),
            str(row["gpus"] or "-"),
            f"{row['attained']:.1%}",
            *("-" if ms is None else milliseconds_text(ms) for ms in times),
            f"{row['busy']:.0%}",
            f"{row['kv_share']:.0%}" if row["kv_share"] > 1e-6 else "-",
            *cost,
        )
    console.print(table)
    console.print(f"Times are {times_source}.", highlight=False, soft_wrap=True)


def _show_schedule(console: Console, result: dict[str, Any], times_source: str) -> None:
    from rich.table import Table

    hours = Table(title="replicas by hour", title_justify="left")
    for column in ("from", "requests/s", "replicas"):
        hours.add_column(column, justify="left" if column == "from" else "right")
    # Hours in a row with the same number of replicas are one line.
    for replicas, group in groupby(result["hours"], key=lambda row: row["replicas"]):
        rows = list(group)
        hours.add_row(rows[0]["hour"], f"{max(row['rate'] for row in rows):.3g}", str(replicas))
    console.print(hours)
    replays = Table(title="the trace, simulated", title_justify="left")
    has_price = "price_per_day" in result["replay"][0]
    columns = ["replicas", "at least", "at most", "replica-hours a day", "keep the bounds"]
    columns += ["TTFT p99", *(["price a day"] if has_price else [])]
    for column in columns:
        replays.add_column(column, justify="left" if column == "replicas" else "right")
    for row in result["replay"]:
        replays.add_row(
            row["name"],
            str(row["fewest_replicas"]),
            str(row["most_replicas"]),
            f"{row['replica_hours_per_day']:,.1f}",
            f"{row['attained']:.2%}",
            milliseconds_text(row["ttft_p99_ms"]),
            *([f"{row['price_per_day']:,.2f}"] if has_price else []),
        )
    console.print(replays)
    console.print(
        f"{result['saved_share']:.0%} of the replica-hours of the largest number are saved."
        f" Replicas are requested {result['lead_minutes']} minutes ahead; hours are those of"
        f" {result['time_zone']}. Times are {times_source}.",
        highlight=False,
        soft_wrap=True,
    )
