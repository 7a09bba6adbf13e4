"""`llmkit quantize`: writes a quantized checkpoint, with a report of its quality, size and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmkit.cli.command import MODEL, OUTPUT_DIRECTORY
from llmkit.cli.output import Output, carried_text, seconds_text
from llmkit.common.errors import LlmkitError, UsageError
from llmkit.common.formatting import bytes_text
from llmkit.common.options import Argument, Option
from llmkit.quant.quantize_options import OUTPUT_PANEL, QuantizeOptions

if TYPE_CHECKING:
    from rich.console import Console

LONG_SECONDS = 60  # a dry run offers cheaper settings for a run that takes longer


@dataclass(frozen=True, kw_only=True)
class QuantizeArguments:
    """What `llmkit quantize` takes."""

    model: Annotated[str, MODEL]
    more: Annotated[
        tuple[str, ...],
        Argument("With --ray: more checkpoints, side by side.", metavar="MODEL", in_recipes=False),
    ] = ()
    output: Annotated[str, replace(OUTPUT_DIRECTORY, follows="method")]
    options: QuantizeOptions
    ray: Annotated[
        str | None,
        Option(
            "Use the nodes of a Ray cluster, or auto for this node's: for a layer's experts, or "
            "for many MODELs, each written to DIR/NAME.",
            metavar="ADDRESS",
            unset="this machine",
            in_recipes=False,
            panel=OUTPUT_PANEL,
        ),
    ] = None


def quantize(output: Output, arguments: QuantizeArguments) -> None:
    """Write a checkpoint in another precision, with a report of its quality, size and time."""
    from llmkit.kernels.cpu import cpu_kernels
    from llmkit.model.device import resolve_device
    from llmkit.quant import quantize_checkpoint
    from llmkit.quant.quantize_linear import solve_locally

    options = arguments.options
    cpu_kernels.use_threads(options.threads)
    if arguments.more:
        _quantize_all(output, arguments)
        return
    solve = solve_locally
    if arguments.ray is not None:
        from llmkit.deploy.ray_quantize import RaySolver

        solve = RaySolver(arguments.ray, resolve_device(options.device))
    report = quantize_checkpoint.quantize(
        arguments.model, arguments.output, options, output.progress(), _generate, solve
    )
    output.result(report, lambda console: _show(console, report))
    quantize_checkpoint.check_gates(report, options)


def _quantize_all(output: Output, arguments: QuantizeArguments) -> None:
    """Quantizes many models on a cluster. The first error is raised when all have ended."""
    from llmkit.deploy.ray_quantize import quantize_all
    from llmkit.quant.quantize_checkpoint import check_gates
    from llmkit.runtime.server.serve_options import default_name

    models = [arguments.model, *arguments.more]
    if arguments.ray is None:
        raise UsageError(
            f"{len(models)} models are quantized side by side on a Ray cluster",
            todo="Add --ray auto",
        )
    sources = [str(Path(model).resolve()) if Path(model).exists() else model for model in models]
    outputs = []
    for model in models:
        name = default_name(model).rpartition("/")[2]
        outputs.append(str((Path(arguments.output) / name).resolve()))
    if len(set(outputs)) < len(outputs):
        raise UsageError("two of the models have the same name", "Each is written to DIR/NAME")
    results = quantize_all(
        list(zip(sources, outputs, strict=True)),
        arguments.options,
        arguments.ray,
        output.progress(),
    )
    reports = []
    failed = {}
    for model, result in zip(models, results, strict=True):
        if isinstance(result, LlmkitError):
            failed[model] = result
        else:
            reports.append(result)
    document = {
        "reports": reports,
        "failed": {model: str(error) for model, error in failed.items()},
    }

    def show(console: Console) -> None:
        for report in reports:
            _show(console, report)

    output.result(document, show)
    for model, error in failed.items():
        raise type(error)(f"{model}: {error.what}", error.expected, error.todo)
    for report in reports:
        check_gates(report, arguments.options)


def _generate(*arguments: Any, **options: Any) -> list[list[int]]:
    """Generate text with the engine, which is imported here because few runs need it."""
    from llmkit.runtime.generate import generate

    return generate(*arguments, **options)


def _show(console: Console, report: dict[str, Any]) -> None:
    if "plan" in report:
        _show_plan(console, report)
        return
    from rich.table import Table

    table = Table(title=f"{report['source']} -> {report['output']}", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    sizes = report["sizes"]
    quality = report["quality"]
    table.add_row("weights", "", _stored(report))
    table.add_row(
        "size",
        bytes_text(sizes["source_bytes"]),
        f"{bytes_text(sizes['checkpoint_bytes'])} ({sizes['ratio']:.0%})",
    )
    if quality is not None:
        table.add_row(
            "perplexity", f"{quality['reference_perplexity']:.3f}", f"{quality['perplexity']:.3f}"
        )
        table.add_row("KL divergence, mean", "", f"{quality['mean_kl']:.4f} nats a token")
        table.add_row("KL divergence, 99th percentile", "", f"{quality['p99_kl']:.4f}")
        table.add_row("same most likely token", "", f"{quality['top1']:.1%}")
        if "acceptance" in quality:
            table.add_row(
                "drafts of the MTP head accepted",
                f"{quality['reference_acceptance']:.1%}",
                f"{quality['acceptance']:.1%}",
            )
    earlier = report["seconds"].get("earlier runs")
    note = f" ({seconds_text(earlier)} of it in interrupted runs)" if earlier else ""
    table.add_row("time", "", seconds_text(sum(report["seconds"].values())) + note)
    console.print(table)
    notes = []
    if report["calibration"]:
        calibration = report["calibration"]
        shape = f"{calibration['windows']} windows of {calibration['window_tokens']:,} tokens"
        notes.append(f"calibrated on {calibration['source']} ({calibration['name']}), {shape}")
    if quality is not None:
        notes.append(f"scored on {quality['text']}, {quality['tokens']:,} tokens")
    if report["carried"]:
        notes.append(f"copied as they were: {carried_text(report['carried'])}")
    if report["pruned_experts"]:
        notes.append(_pruned(report["pruned_experts"]))
    if report["fallbacks"]:
        notes.append(f"rounded to the nearest instead: {', '.join(report['fallbacks'])}")
    console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)


def _pruned(layers: list[dict[str, Any]]) -> str:
    """What dropped experts gave: "4 of 16 experts of each layer dropped: ..."."""
    first = layers[0]
    dropped = len(first["dropped"])
    shares = [layer["dropped_share"] for layer in layers]
    return (
        f"{dropped} of {dropped + len(first['kept'])} experts of each layer dropped: they gave"
        f" {min(shares):.1%} to {max(shares):.1%} of what a layer's experts add"
    )


def _show_plan(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table

    plan = report["plan"]
    table = Table(
        title=f"{report['source']} -> {report['output']} (nothing written)", title_justify="left"
    )
    table.add_column("file")
    table.add_column("size", justify="right")
    for file, size in plan["files"].items():
        table.add_row(file, bytes_text(size))
    console.print(table)
    console.print(
        f"{_stored(report)}; {plan['tensors']} tensors; needs {bytes_text(plan['memory_bytes'])} "
        f"of memory ({bytes_text(plan['memory_available_bytes'])} free) and "
        f"{bytes_text(plan['disk_bytes'])} of disk, and about {seconds_text(plan['seconds'])}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    lines = []
    if plan["samples"] is not None:
        lines.append(
            f"calibrates on {plan['samples']} windows of {plan['seq_len']:,} tokens "
            f"(--samples {plan['samples']} --seq-len {plan['seq_len']})"
        )
    if plan["seconds"] >= LONG_SECONDS:
        lines += [
            f"{entry['options']}: about {seconds_text(entry['seconds'])} instead"
            for entry in plan["cheaper"]
        ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _stored(report: dict[str, Any]) -> str:
    """How the weights are stored: "INT4 in groups of 64, gptq format"."""
    if report["format"] is None:
        return str(report["dtype"])
    labels = [scheme["label"] for scheme in report["schemes"]]
    if len(labels) > 1:
        total = sum(scheme["weights"] for scheme in report["schemes"])
        labels = [
            f"{scheme['weights'] / total:.0%} {scheme['label']}" for scheme in report["schemes"]
        ]
    kv = [f"{report['kv'].upper()} KV cache"] if report["kv"] else []
    return f"{'; '.join(labels + kv)}; {report['format']} format"
