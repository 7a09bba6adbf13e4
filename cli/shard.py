"""`llmkit shard`: from a checkpoint to any tensor- and pipeline-parallel layout, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.text import bytes_text
from llmkit.cli.command import ModelArgument
from llmkit.cli.output import Output
from llmkit.cli.sizes import parse_size

if TYPE_CHECKING:
    from rich.console import Console

MOST_PROBLEMS = 20  # of a layout that does not verify, shown; the count is told as well

TpOption = Annotated[
    int, typer.Option("--tp", min=1, metavar="N", help="Tensor-parallel ranks: each layer is split over them.")
]
PpOption = Annotated[
    int, typer.Option("--pp", min=1, metavar="N", help="Pipeline stages: the layers are divided among them.")
]
EpOption = Annotated[
    int,
    typer.Option(
        "--ep", min=1, metavar="N", help="Groups of the TP ranks that experts are divided over; divides --tp."
    ),
]
PpLayersOption = Annotated[
    str | None,
    typer.Option(
        "--pp-layers", metavar="N,N,...", help="Layers of each stage.", show_default="as equal as they can be"
    ),
]
OutputOption = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it must be absent or empty.")
]
LayoutArgument = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `llmkit shard` wrote.")]


def shard(
    output: Output,
    model: ModelArgument,
    tp: TpOption,
    out: OutputOption,
    pp: PpOption = 1,
    ep: EpOption = 1,
    pp_layers: PpLayersOption = None,
    form: Annotated[
        Literal["llmkit", "vllm"],
        typer.Option("--format", help="vllm: the files of vLLM's --load-format sharded_state."),
    ] = "llmkit",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
) -> None:
    """Split a checkpoint over ranks, one file each, without a GPU and without loading the model.

    What is sharded already is sharded anew, with the same result as from its source.
    """
    from llmkit.shard.shard import shard as run

    layers = _stage_layers(pp_layers)
    made = run(model, out, tp, pp, ep, layers, form=form, dry_run=dry_run, progress=output.progress()).to_json()
    document = {"source": model, "output": None if dry_run else out, **made}
    title = f"{model} -> {out}{' (nothing written)' if dry_run else ''}"
    output.result(document, lambda console: _show_plan(console, title, made))


def plan(
    output: Output,
    model: ModelArgument,
    tp: TpOption,
    pp: PpOption = 1,
    ep: EpOption = 1,
    pp_layers: PpLayersOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            show_default="none",
            help="Tokens that fit on each rank's GPU: h100-80, l4-24 ..., or a size as 48GiB.",
        ),
    ] = None,
    gpus_per_node: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --gpu: how many a node has; tells when one is not enough.")
    ] = 8,
) -> None:
    """Show what each rank would hold, what does not divide and which sizes work, and write nothing."""
    from llmkit.shard.capacity import nodes_report, plan_report
    from llmkit.shard.shard import open_source

    layers, memory = _stage_layers(pp_layers), None if gpu is None else gpu_memory(gpu)
    source = open_source(model)
    made = plan_report(source, tp, pp, ep, layers, memory)
    if memory is not None:
        made |= nodes_report(source, memory, gpus_per_node)
    output.result({"source": model, "gpu": gpu, **made}, lambda console: _show_report(console, model, gpu, made))


def verify(output: Output, layout: LayoutArgument) -> None:
    """Check a sharded folder: every file and tensor by its SHA-256, replicas, padding and completeness."""
    from llmkit.checkpoint.errors import InputError
    from llmkit.shard.verify import verify as run

    result = run(layout)
    found = result.to_json()
    output.result(found, lambda console: _show_verified(console, layout, found))
    if not result.ok:
        count = len(result.problems)
        raise InputError(
            f"{layout} does not verify ({count} problem{'s' * (count > 1)}, the first: {result.problems[0]})"
        )


def merge(output: Output, layout: LayoutArgument, out: OutputOption) -> None:
    """Put a sharded folder together again: every tensor gets the bytes it had before it was split."""
    from llmkit.shard.merge import merge as run

    files = run(layout, out, output.progress())
    rows = [
        {"file": file, "tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors)}
        for file, tensors in files.items()
    ]
    output.result({"source": layout, "output": out, "files": rows}, lambda console: _show_merged(console, out, rows))


def gpu_memory(text: str) -> int:
    """Bytes of a GPU that is named, or of a size like 48GiB. Raises: UsageError."""
    from llmkit.shard.capacity import gpu_bytes

    return (parse_size("--gpu", text) or 0) if text[:1].isdigit() else gpu_bytes(text)


def _stage_layers(text: str | None) -> tuple[int, ...]:
    """`--pp-layers` as numbers; () when it is not given. Raises: UsageError."""
    try:
        return tuple(map(int, text.split(","))) if text is not None else ()
    except ValueError:
        raise UsageError(f"--pp-layers: {text!r} are not numbers", "Layers of each stage, like 8,9,9,6") from None


def _show_plan(console: Console, title: str, made: dict[str, Any]) -> None:
    from rich.table import Table

    expert = f", EP {made['ep']}" if made["ep"] > 1 else ""
    table = Table(title=f"{title}: TP {made['tp']}, PP {made['pp']}{expert}", title_justify="left")
    table.add_column("file")
    columns = ["layers", *(["experts"] if expert else []), "tensors", "size", "also elsewhere", "padding", "KV a token"]
    for column in columns + ["tokens that fit"] * ("tokens" in made):
        table.add_column(column, justify="right")
    for rank in made["ranks"]:
        table.add_row(
            rank["file"],
            _span(rank["layers"]),
            *([_span(made["experts"][rank["ep"]])] if expert else []),
            str(rank["tensors"]),
            bytes_text(rank["bytes"]),
            bytes_text(rank["replicated_bytes"]),
            bytes_text(rank["padding_bytes"]),
            bytes_text(rank["kv_bytes_per_token"]),
            *([f"{rank['tokens']:,}"] if "tokens" in made else []),
        )
    console.print(table)
    files = "1 file" if len(made["ranks"]) == 1 else f"{len(made['ranks'])} files"
    console.print(f"{bytes_text(made['bytes'])} in {files}", highlight=False)


def _show_report(console: Console, model: str, gpu: str | None, made: dict[str, Any]) -> None:
    lines = []
    if made["refusal"]:
        lines.append(f"{model}: {made['refusal']}")
    else:
        _show_plan(console, model, made)
    if "tokens" in made:
        lines.append(
            f"{made['tokens']:,} tokens of KV cache fit in {made['utilization']:.0%} of {gpu}"
            f" ({bytes_text(made['memory_bytes'])}) beside the weights; what activations take is less of them"
        )
    if "node" in made:
        lines.append(_node_line(model, gpu, made["node"]))
    sizes = (
        f"{works['tp']}" + (f" (EP {', '.join(map(str, works['ep']))})" if works["ep"] != [1] else "")
        for works in made["works"]
    )
    lines.append(f"TP that works: {', '.join(sizes)}; PP from 1 to {made['max_pp']}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _node_line(model: str, gpu: str | None, node: dict[str, Any]) -> str:
    wanted = f"with {node['tokens']:,} tokens of KV cache it"
    if node["nodes"] == 0:
        return f"{wanted} does not fit on any number of nodes of {node['gpus']} x {gpu}"
    if node["nodes"] == 1:
        return f"{wanted} fits on one node of {node['gpus']} x {gpu}, with --tp {node['tp']}"
    return (
        f"{wanted} does not fit on a node of {node['gpus']} x {gpu}: {node['nodes']} nodes with TP {node['tp']}, PP"
        f" {node['pp']} hold it; `llmkit deploy vllm {model} --gpu {gpu}` writes what starts it there"
    )


def _show_verified(console: Console, layout: str, found: dict[str, Any]) -> None:
    problems = found["problems"]
    for problem in problems[:MOST_PROBLEMS]:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    if len(problems) > MOST_PROBLEMS:
        console.print(f"and {len(problems) - MOST_PROBLEMS} more", highlight=False)
    if not problems:
        console.print(
            f"{layout} verifies: TP {found['tp']}, PP {found['pp']}, EP {found['ep']}, {found['tensors']} tensors"
            f" ({bytes_text(found['bytes'])}) in {found['files']} files, every digest right,"
            f" {found['replica_groups']} replicated slices equal",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _show_merged(console: Console, out: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        line = f"{out}/{row['file']}: {row['tensors']} tensors, {bytes_text(row['bytes'])}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _span(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else ", ".join(map(str, layers))
