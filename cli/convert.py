"""`llmkit convert`: writes a quantized checkpoint in another format, with equal values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from llmkit.cli.command import MODEL, OUTPUT_DIRECTORY
from llmkit.cli.output import Output
from llmkit.common.formatting import bytes_text, count_text
from llmkit.common.options import Option

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """What `llmkit convert` takes."""

    model: Annotated[str, MODEL]
    format: Annotated[
        Literal["gptq", "gptq_v2", "awq", "compressed-tensors", "modelopt", "fp8", "gguf"],
        Option("How the quantized weights are stored in the output."),
    ]
    output: Annotated[str, replace(OUTPUT_DIRECTORY, follows="format")]
    dry_run: Annotated[bool, Option("Check every weight and write nothing.", in_recipes=False)] = (
        False
    )


def convert(output: Output, arguments: ConvertArguments) -> None:
    """Store a quantized checkpoint in another format without changing a value, or say what does
    not carry over.
    """
    from llmkit.quant import convert_checkpoint

    report = convert_checkpoint.convert(
        arguments.model,
        arguments.output,
        arguments.format,
        dry_run=arguments.dry_run,
        progress=output.progress(),
    )
    output.result(report, lambda console: _show(console, report, arguments.output))


def _show(console: Console, report: dict[str, Any], out: str) -> None:
    labels = "; ".join(scheme["label"] for scheme in report["schemes"])
    note = "" if report["output"] else " (nothing written)"
    lines = [
        f"{report['source']} ({report['from']}) -> {out} ({report['format']}){note}",
        f"{count_text(report['weights'], 'weights')}: {labels}",
        f"{bytes_text(report['source_bytes'])} before, {bytes_text(report['bytes'])} after",
    ]
    if report["float32_tensors"]:
        tensors = count_text(len(report["float32_tensors"]), "tensors")
        lines.append(f"{tensors} in float32, which 16 bits would round: the source has blocks")
    if report["verified"]:
        values = report["verified"]["values"]
        lines.append(f"read again: all {values:,} values equal the source's, bit for bit")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
