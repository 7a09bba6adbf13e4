"""`llmkit quantize`: a checkpoint in, a smaller one out, with a report of what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmkit.cli.command import DeviceOption, ModelArgument, SeedOption
from llmkit.cli.output import Output, bytes_text, seconds_text
from llmkit.cli.sizes import parse_count

if TYPE_CHECKING:
    from rich.console import Console


def quantize(
    output: Output,
    model: ModelArgument,
    method: Annotated[
        Literal["bf16", "fp16", "int8", "gptq", "rtn"],
        typer.Option(
            metavar="METHOD", help="bf16 or fp16 cast, int8 or rtn round to the nearest code, gptq calibrates."
        ),
    ],
    out: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it must be absent or empty.")
    ],
    bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Bits of a quantized weight.", show_default="4, 8 with --method int8"),
    ] = None,
    group_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto", help="Weights that share a scale, -1: a row; auto: the largest of 128, 64, 32 that fits."
        ),
    ] = "auto",
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE|ID|builtin",
            help="Calibration text: a .txt, .jsonl or .parquet file, a dataset of the hub, or CPython's own reference.",
        ),
    ] = "builtin",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of calibration text.")] = 128,
    seq_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a window, at most the model's positions.")
    ] = 2048,
    damp: Annotated[
        float, typer.Option(metavar="SHARE", help="GPTQ's damping, as a share of the Hessian's diagonal.")
    ] = 0.01,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure the quality before and after on held-out text.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist on taking up an interrupted run, which also happens without.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done and write nothing.")] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Write a checkpoint in another precision, with a report of its quality, size and time."""
    from llmkit.quant.quantize import QuantizeOptions
    from llmkit.quant.quantize import quantize as run

    options = QuantizeOptions(
        method=method,
        bits=bits,
        group_size=parse_count("--group-size", group_size, also=(-1,)),
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        damp=damp,
        evaluate=evaluate,
        resume=resume,
        dry_run=dry_run,
        device=device,
        seed=seed,
    )
    report = run(model, out, options, output.progress())
    output.result(report, lambda console: _show(console, report))


def _show(console: Console, report: dict[str, Any]) -> None:
    if "plan" in report:
        _show_plan(console, report)
        return
    from rich.table import Table

    table = Table(title=f"{report['source']} -> {report['output']}", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    sizes, quality = report["sizes"], report["quality"]
    table.add_row("weights", "", _stored(report))
    table.add_row(
        "size", bytes_text(sizes["source_bytes"]), f"{bytes_text(sizes['checkpoint_bytes'])} ({sizes['ratio']:.0%})"
    )
    if quality is not None:
        table.add_row("perplexity", f"{quality['reference_perplexity']:.3f}", f"{quality['perplexity']:.3f}")
        table.add_row("KL divergence, mean", "", f"{quality['mean_kl']:.4f} nats a token")
        table.add_row("KL divergence, 99th percentile", "", f"{quality['p99_kl']:.4f}")
        table.add_row("same most likely token", "", f"{quality['top1']:.1%}")
    table.add_row("time", "", seconds_text(sum(report["seconds"].values())))
    console.print(table)
    notes = []
    if report["calibration"]:
        calibration = report["calibration"]
        shape = f"{calibration['windows']} windows of {calibration['window_tokens']:,} tokens"
        notes.append(f"calibrated on {calibration['source']} ({calibration['name']}), {shape}")
    if quality is not None:
        notes.append(f"scored on {quality['text']}, {quality['tokens']:,} tokens")
    if report["fallbacks"]:
        notes.append(f"rounded to the nearest, as GPTQ failed: {', '.join(report['fallbacks'])}")
    console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)


def _show_plan(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table

    plan = report["plan"]
    table = Table(title=f"{report['source']} -> {report['output']} (nothing written)", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for file, size in plan["files"].items():
        table.add_row(file, bytes_text(size))
    console.print(table)
    console.print(
        f"{_stored(report)}; {plan['tensors']} tensors; needs {bytes_text(plan['memory_bytes'])} of memory"
        f" ({bytes_text(plan['memory_available_bytes'])} free) and {bytes_text(plan['disk_bytes'])} of disk",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _stored(report: dict[str, Any]) -> str:
    """How the weights are stored: "4 bits in groups of 64, gptq format"."""
    if report["format"] is None:
        return str(report["dtype"])
    groups = "one scale a row" if report["group_size"] == -1 else f"groups of {report['group_size']}"
    return f"{report['bits']} bits, {groups}, {report['format']} format"
