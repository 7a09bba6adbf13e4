"""`llmkit shard`: from a checkpoint to any tensor- and pipeline-parallel layout, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.checkpoint.text import bytes_text
from llmkit.cli.command import ModelArgument
from llmkit.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

MOST_PROBLEMS = 20  # of a layout that does not verify, shown; the count is told as well

TpOption = Annotated[
    int, typer.Option("--tp", min=1, metavar="N", help="Tensor-parallel ranks: each layer is split over them.")
]
PpOption = Annotated[
    int, typer.Option("--pp", min=1, metavar="N", help="Pipeline stages: the layers are divided among them.")
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
) -> None:
    """Split a checkpoint over ranks, one file each, without a GPU and without loading the model."""
    from llmkit.shard.shard import shard as run

    made = run(model, out, tp, pp, dry_run, output.progress()).to_json()
    document = {"source": model, "output": None if dry_run else out, **made}
    title = f"{model} -> {out}{' (nothing written)' if dry_run else ''}"
    output.result(document, lambda console: _show_plan(console, title, made))


def plan(output: Output, model: ModelArgument, tp: TpOption, pp: PpOption = 1) -> None:
    """Show what each rank would hold, and write nothing."""
    from llmkit.shard.shard import open_source, plan_checkpoint

    made = plan_checkpoint(open_source(model), tp, pp).to_json()
    output.result({"source": model, **made}, lambda console: _show_plan(console, model, made))


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


def _show_plan(console: Console, title: str, made: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{title}: TP {made['tp']}, PP {made['pp']}", title_justify="left")
    table.add_column("file")
    for column in ("layers", "tensors", "size", "also elsewhere", "padding", "KV a token"):
        table.add_column(column, justify="right")
    for rank in made["ranks"]:
        table.add_row(
            rank["file"],
            _span(rank["layers"]),
            str(rank["tensors"]),
            bytes_text(rank["bytes"]),
            bytes_text(rank["replicated_bytes"]),
            bytes_text(rank["padding_bytes"]),
            bytes_text(rank["kv_bytes_per_token"]),
        )
    console.print(table)
    console.print(f"{bytes_text(made['bytes'])} in {len(made['ranks'])} files", highlight=False)


def _show_verified(console: Console, layout: str, found: dict[str, Any]) -> None:
    problems = found["problems"]
    for problem in problems[:MOST_PROBLEMS]:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    if len(problems) > MOST_PROBLEMS:
        console.print(f"and {len(problems) - MOST_PROBLEMS} more", highlight=False)
    if not problems:
        console.print(
            f"{layout} verifies: TP {found['tp']}, PP {found['pp']}, {found['tensors']} tensors"
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
