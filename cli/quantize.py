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
        typer.Option(help="bf16 and fp16 cast, int8 and rtn round to the nearest code, gptq calibrates."),
    ],
    out: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it must be absent or empty.")
    ],
    bits: Annotated[
        int | None, typer.Option(help="Bits of a quantized weight.", show_default="4, 8 with --method int8")
    ] = None,
    group_size: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Weights that share a scale; auto: the largest of 128, 64, 32 that fits."),
    ] = "auto",
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE|ID|builtin",
            help="Calibration text: a .txt, .jsonl or .parquet file, a dataset of the hub, or CPython's own reference.",
        ),
    ] = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 2048,
    damp: Annotated[float, typer.Option(min=0.0, help="GPTQ's damping, as a share of the Hessian's diagonal.")] = 0.01,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure the quality before and after on held-out text.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Take up an interrupted run of the same command.")] = False,
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
        group_size=parse_count("--group-size", group_size),
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
    raise SystemExit
