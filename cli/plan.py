"""`llmkit plan`: how many replicas, on how many GPUs, a load needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.output import Output
from llmkit.common.errors import UsageError
from llmkit.common.formatting import milliseconds_text
from llmkit.common.option_values import INTEGERS, RATE, TOKEN_RANGE, within
from llmkit.common.options import SEED, Argument, Option

if TYPE_CHECKING:
    from rich.console import Console

# The tokens of a KV cache without a limit.
NO_LIMIT = 1 << 60


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
    if arguments.replicas is not None:
        plans = [predict(engine, demand, arguments.replicas) for engine in candidates]
    else:
        possible = [plan_replicas(engine, demand) for engine in candidates]
        plans = ranked([plan for plan in possible if plan is not None])
    rows = [plan.to_json(arguments.price_per_hour) for plan in plans]
    fit_error = getattr(candidates[0].step, "error", None)
    document = {
        "model": arguments.model,
        "gpu": arguments.gpu,
        "bench": arguments.bench,
        "rate": arguments.rate,
        "slo": arguments.slo,
        "plans": rows,
        "fit_error": fit_error,
    }
    if fit_error is not None:
        times_source = f"measured times, fitted within {fit_error:.0%}"
    elif arguments.gpu == "cpu":
        times_source = "estimated from this CPU's measured peaks: --bench of a replica is better"
    else:
        times_source = (
            f"estimated from the data sheet of {arguments.gpu}: measure one replica and use "
            "--bench before you buy"
        )
    output.result(document, lambda console: _show(console, rows, times_source))


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
