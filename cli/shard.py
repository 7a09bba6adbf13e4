"""`llmkit shard`: from a checkpoint to any tensor- and pipeline-parallel layout, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llmkit.cli.command import MODEL, OUTPUT_DIRECTORY
from llmkit.cli.output import Output
from llmkit.common.formatting import bytes_text, count_text
from llmkit.common.option_values import LAYER_COUNTS, parse_size
from llmkit.common.options import Argument, Option

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.checkpoint.manifest import Difference
    from llmkit.shard.verify import VerifyResult

# The problems of at most this many files are printed; the rest are counted.
MAX_PRINTED_FILES = 20

LAYOUT = Argument("A folder that `llmkit shard` wrote.", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """The ranks that a checkpoint is divided over."""

    tp: Annotated[
        int,
        Option("Tensor-parallel ranks: each layer is split over them.", metavar="N", min=1),
    ]
    pp: Annotated[
        int, Option("Pipeline stages: the layers are divided among them.", metavar="N", min=1)
    ] = 1
    ep: Annotated[
        int,
        Option(
            "Groups of the TP ranks that experts are divided over; divides --tp.",
            metavar="N",
            min=1,
        ),
    ] = 1
    pp_layers: Annotated[
        tuple[int, ...],
        Option(
            "Layers of each stage.",
            metavar="N,N,...",
            format=LAYER_COUNTS,
            unset="as equal as they can be",
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class ShardArguments:
    """What `llmkit shard` takes."""

    model: Annotated[str, MODEL]
    layout: LayoutOptions
    output: Annotated[str, replace(OUTPUT_DIRECTORY, follows="tp")]
    format: Annotated[
        Literal["llmkit", "vllm"],
        Option("vllm: the files of vLLM's --load-format sharded_state."),
    ] = "llmkit"
    dry_run: Annotated[bool, Option("Show the plan and write nothing.", in_recipes=False)] = False


@dataclass(frozen=True, kw_only=True)
class ShardPlanArguments:
    """What `llmkit shard plan` takes."""

    model: Annotated[str, MODEL]
    layout: LayoutOptions
    gpu: Annotated[
        str | None,
        Option(
            "Show the tokens that fit on each rank's GPU: h100-80, l4-24 ..., or a size like "
            "48GiB.",
            metavar="NAME",
            unset="none",
        ),
    ] = None
    gpus_per_node: Annotated[
        int,
        Option(
            "With --gpu: GPUs of a node; shows when one node is not enough.", metavar="N", min=1
        ),
    ] = 8


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """What `llmkit shard verify` takes."""

    layout: Annotated[str, LAYOUT]


@dataclass(frozen=True, kw_only=True)
class MergeArguments:
    """What `llmkit shard merge` takes."""

    layout: Annotated[str, LAYOUT]
    output: Annotated[str, OUTPUT_DIRECTORY]


def shard(output: Output, arguments: ShardArguments) -> None:
    """Split a checkpoint over ranks, one file each, without a GPU and without loading the model.

    A sharded checkpoint is sharded again, with the same result as from its source.
    """
    from llmkit.shard import shard_checkpoint

    model = arguments.model
    layout = arguments.layout
    plan = shard_checkpoint.shard(
        model,
        arguments.output,
        layout.tp,
        layout.pp,
        layout.ep,
        layout.pp_layers,
        output_format=arguments.format,
        dry_run=arguments.dry_run,
        progress=output.progress(),
    ).to_json()
    document = {"source": model, "output": None if arguments.dry_run else arguments.output, **plan}
    note = " (nothing written)" if arguments.dry_run else ""
    title = f"{model} -> {arguments.output}{note}"
    output.result(document, lambda console: _show_plan(console, title, plan))


def plan(output: Output, arguments: ShardPlanArguments) -> None:
    """Show what each rank would hold, what does not divide and which sizes work, and write
    nothing.
    """
    from llmkit.shard.layout_capacity import nodes_report, plan_report
    from llmkit.shard.shard_checkpoint import open_source

    layout = arguments.layout
    gpu = arguments.gpu
    memory = None if gpu is None else gpu_memory(gpu)
    source = open_source(arguments.model)
    report = plan_report(source, layout.tp, layout.pp, layout.ep, layout.pp_layers, memory)
    if memory is not None:
        report |= nodes_report(source, memory, arguments.gpus_per_node)
    output.result(
        {"source": arguments.model, "gpu": gpu, **report},
        lambda console: _show_report(console, arguments.model, gpu, report),
    )


def verify(output: Output, arguments: VerifyArguments) -> None:
    """Check a sharded folder: every file and tensor by its SHA-256, replicas, padding and
    completeness.
    """
    from llmkit.checkpoint.manifest import differences_error
    from llmkit.shard import verify as verify_layout

    layout = arguments.layout
    result = verify_layout.verify(layout)
    document = result.to_json()
    output.result(document, lambda console: _show_verified(console, layout, result))
    if not result.ok:
        raise differences_error(Path(layout), result.differences)


def merge(output: Output, arguments: MergeArguments) -> None:
    """Put a sharded folder together again: every tensor gets the bytes it had before it was
    split.
    """
    from llmkit.shard import merge as merge_layout

    files = merge_layout.merge(arguments.layout, arguments.output, output.progress())
    rows = [
        {"file": file, "tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors)}
        for file, tensors in files.items()
    ]
    output.result(
        {"source": arguments.layout, "output": arguments.output, "files": rows},
        lambda console: _show_merged(console, arguments.output, rows),
    )


def gpu_memory(text: str) -> int:
    """The memory in bytes of a GPU's name, or of a size like 48GiB. Raises UsageError."""
    from llmkit.shard.layout_capacity import gpu_bytes

    return (parse_size("--gpu", text) or 0) if text[:1].isdigit() else gpu_bytes(text)


def _show_plan(console: Console, title: str, report: dict[str, Any]) -> None:
    from rich.table import Table

    expert = f", EP {report['ep']}" if report["ep"] > 1 else ""
    table = Table(
        title=f"{title}: TP {report['tp']}, PP {report['pp']}{expert}", title_justify="left"
    )
    table.add_column("file")
    columns = ["layers"]
    if expert:
        columns.append("experts")
    columns += ["tensors", "size", "also elsewhere", "padding", "KV a token"]
    has_states = any(rank["state_bytes_per_request"] for rank in report["ranks"])
    if has_states:
        columns.append("state a request")
    if "tokens" in report:
        columns.append("tokens that fit")
    for column in columns:
        table.add_column(column, justify="right")
    for rank in report["ranks"]:
        table.add_row(
            rank["file"],
            _span(rank["layers"]),
            *([_span(report["experts"][rank["ep"]])] if expert else []),
            str(rank["tensors"]),
            bytes_text(rank["bytes"]),
            bytes_text(rank["replicated_bytes"]),
            bytes_text(rank["padding_bytes"]),
            bytes_text(rank["kv_bytes_per_token"]),
            *([bytes_text(rank["state_bytes_per_request"])] if has_states else []),
            *([f"{rank['tokens']:,}"] if "tokens" in report else []),
        )
    console.print(table)
    num_files = len(report["ranks"]) + (report["carried"]["tensors"] > 0)
    files = "1 file" if num_files == 1 else f"{num_files} files"
    console.print(f"{bytes_text(report['bytes'])} in {files}", highlight=False)
    carried = report["carried"]
    if carried["tensors"]:
        console.print(
            f"{bytes_text(carried['bytes'])} of it in {carried['file']}, which no rank loads:"
            f" {carried['tensors']:,} tensors of parts that do not run",
            highlight=False,
        )


def _show_report(console: Console, model: str, gpu: str | None, report: dict[str, Any]) -> None:
    lines = []
    if report["refusal"]:
        lines.append(f"{model}: {report['refusal']}")
    else:
        _show_plan(console, model, report)
    if "tokens" in report:
        lines.append(
            f"{report['tokens']:,} tokens of KV cache fit in {report['utilization']:.0%} of {gpu}"
            f" ({bytes_text(report['memory_bytes'])}) beside the weights; what activations take is "
            "less of them"
        )
    if "node" in report:
        lines.append(_node_line(model, gpu, report["node"]))
    sizes = []
    for size in report["works"]:
        experts = f" (EP {', '.join(map(str, size['ep']))})" if size["ep"] != [1] else ""
        sizes.append(f"{size['tp']}{experts}")
    lines.append(f"TP that works: {', '.join(sizes)}; PP from 1 to {report['max_pp']}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _node_line(model: str, gpu: str | None, node: dict[str, Any]) -> str:
    condition = f"with {node['tokens']:,} tokens of KV cache it"
    if node["nodes"] == 0:
        return f"{condition} does not fit on any number of nodes of {node['gpus']} x {gpu}"
    if node["nodes"] == 1:
        return f"{condition} fits on one node of {node['gpus']} x {gpu}, with --tp {node['tp']}"
    return (
        f"{condition} does not fit on a node of {node['gpus']} x {gpu}:"
        f" {node['nodes']} nodes with TP {node['tp']}, PP {node['pp']} hold it;"
        f" `llmkit deploy vllm {model} --gpu {gpu}` writes what starts it there"
    )


def show_problems(console: Console, differences: Sequence[Difference]) -> None:
    """Print a line for each file with problems, at most MAX_PRINTED_FILES, and count the rest."""
    from llmkit.checkpoint.manifest import lines_by_file  # keeps torch off the start path

    lines = lines_by_file(differences)
    for line in lines[:MAX_PRINTED_FILES]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    more = len(lines) - MAX_PRINTED_FILES
    if more > 0:
        console.print(f"and problems of {count_text(more, 'more files')}", highlight=False)
    if len(differences) > min(len(lines), MAX_PRINTED_FILES):
        console.print("--json lists every problem", highlight=False)


def _show_verified(console: Console, layout: str, verified: VerifyResult) -> None:
    result = verified.to_json()
    show_problems(console, verified.differences)
    if verified.ok:
        console.print(
            f"{layout} verifies: TP {result['tp']}, PP {result['pp']}, EP {result['ep']}, "
            f"{result['tensors']} tensors"
            f" ({bytes_text(result['bytes'])}) in {result['files']} files, every digest right,"
            f" {result['replica_groups']} replicated slices equal",
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
