"""`llmkit plan`: how many replicas, on how many GPUs, a load needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.checkpoint.errors import UsageError
from llmkit.cli.command import SeedOption
from llmkit.cli.output import Output
from llmkit.cli.sizes import in_range, parse_numbers, parse_range

if TYPE_CHECKING:
    from rich.console import Console


def plan(
    output: Output,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A checkpoint; not needed with --bench.")] = None,
    rate: Annotated[str, typer.Option(metavar="N/s", help="Requests a second.")] = "1/s",
    input_tokens: Annotated[
        str, typer.Option("--in", metavar="N|LOW-HIGH", help="Tokens of a prompt, spread evenly.")
    ] = "1000",
    output_tokens: Annotated[
        str, typer.Option("--out", metavar="N|LOW-HIGH", help="Tokens of an answer, spread evenly.")
    ] = "300",
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="BOUNDS",
            help="What a request must keep: ttft:500ms,tpot:50ms.",
            show_default="a queue that does not grow",
        ),
    ] = None,
    attained: Annotated[float, typer.Option(metavar="SHARE", help="Of the requests that must keep it.")] = 0.99,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="h200, l4 ...: estimate from its data sheet.", show_default="none"),
    ] = None,
    tp: Annotated[str, typer.Option(metavar="N,N,...", help="Tensor-parallel sizes to try with --gpu.")] = "1,2,4,8",
    bench: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A report of `llmkit bench` of one replica: take its times.", show_default="none"
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of the replica that --bench measured.")] = 0,
    max_num_seqs: Annotated[int, typer.Option(metavar="N", help="Of each replica, see `llmkit serve`.")] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(metavar="N", help="Of each replica, see `llmkit serve`; 512 on a CPU.")
    ] = 8192,
    kv_cache_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="That a replica of --bench can hold, see `serve --plan`.", show_default="no limit"
        ),
    ] = None,
    cached: Annotated[
        float, typer.Option(metavar="SHARE", help="Of prompts' tokens, found in the prefix cache.")
    ] = 0.0,
    burstiness: Annotated[float, typer.Option(metavar="SHAPE", help="As of `llmkit bench`; 1 is Poisson.")] = 1.0,
    replicas: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tell what so many would do, instead of how many it takes.", show_default="none"
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(metavar="N", help="Of a GPU (of a replica, without one), in any currency.", show_default="none"),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Plan capacity: replicas, GPUs of each, room in the KV cache and cost, from a simulation of queue and batches."""
    from llmkit.bench.metrics import parse_slo
    from llmkit.bench.report import read_report
    from llmkit.deploy.capacity import Demand, engines, measured_engine, need, predict, ranked
    from llmkit.deploy.simulate import Limits
    from llmkit.shard.shard import open_source

    if (bench is None) == (gpu is None) or (gpu is not None and model is None):
        said = "both --gpu and --bench" if bench and gpu else "--gpu without MODEL" if gpu else "no --gpu, no --bench"
        raise UsageError(f"{said} given", "MODEL with --gpu, or a report with --bench, says where times come from")
    per_second = parse_numbers("--rate", rate.removesuffix("/s"))
    if len(per_second) != 1 or not per_second[0]:
        raise UsageError(f"--rate {rate} is not understood", "Something like 50/s was expected")
    in_range("--attained", attained, 0.01, 1)
    in_range("--cached", cached, 0, 1)
    in_range("--max-num-seqs", max_num_seqs, 1)
    in_range("--max-num-batched-tokens", max_num_batched_tokens, 1)
    in_range("--burstiness", burstiness, 0.01)
    if replicas is not None:
        in_range("--replicas", replicas, 1)
    lengths = parse_range("--in", input_tokens), parse_range("--out", output_tokens)
    demand = Demand(per_second[0], *lengths, parse_slo(slo) if slo else {}, attained, burstiness, cached, seed)
    limits = Limits(max_num_seqs, max_num_batched_tokens, kv_cache_tokens or 1 << 60)
    if bench is not None:
        found = [measured_engine(read_report(bench), bench, limits, gpus)]
    else:
        assert model is not None and gpu is not None
        found = engines(open_source(model), gpu, [int(size) for size in parse_numbers("--tp", tp, whole=True)], limits)
    if replicas is not None:
        needs = [predict(engine, demand, replicas) for engine in found]
    else:
        needs = ranked([made for engine in found if (made := need(engine, demand))])
    rows = [one.to_json(price_per_hour) for one in needs]
    document = {"model": model, "gpu": gpu, "bench": bench, "rate": per_second[0], "slo": slo, "plans": rows}
    error = getattr(found[0].step, "error", None)
    told = (
        f"measured times, fitted within {error:.0%}"
        if error is not None
        else f"estimated from the data sheet of {gpu}: measure one replica and use --bench before you buy"
    )
    output.result(document | {"fit_error": error}, lambda console: _show(console, rows, told))


def _show(console: Console, rows: list[dict[str, Any]], told: str) -> None:
    from rich.table import Table

    table = Table()
    columns = ["replica", "replicas", "GPUs", "keep the bounds", "TTFT p50", "p99", "TPOT", "p99", "busy", "KV at most"]
    for column in columns + ["per hour", "per 1M tokens"] * ("price_per_hour" in rows[0]):
        table.add_column(column, justify="left" if column == "replica" else "right")
    for row in rows:
        times = [row.get(name) for name in ("ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p99_ms")]
        table.add_row(
            row["engine"],
            str(row["replicas"]),
            str(row["gpus"] or "-"),
            f"{row['attained']:.1%}",
            *("-" if ms is None else f"{ms:,.0f} ms" for ms in times),
            f"{row['busy']:.0%}",
            f"{row['kv_share']:.0%}" if row["kv_share"] > 1e-6 else "-",
            *([f"{row['price_per_hour']:,.2f}", f"{row['cost_per_million']:,.2f}"] if "price_per_hour" in row else []),
        )
    console.print(table)
    console.print(f"Times are {told}.", highlight=False, soft_wrap=True)
