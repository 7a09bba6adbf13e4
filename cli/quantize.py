"""`llmkit quantize`: a checkpoint in, a smaller one out, with a report of what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmkit.checkpoint.errors import LlmkitError, UsageError
from llmkit.checkpoint.text import bytes_text
from llmkit.cli.command import DeviceOption, ModelArgument, SeedOption
from llmkit.cli.output import Output, seconds_text
from llmkit.cli.sizes import parse_count

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.quant.plan import QuantizeOptions


def quantize(
    output: Output,
    model: ModelArgument,
    method: Annotated[
        Literal["bf16", "fp16", "int8", "fp8", "gptq", "awq", "rtn"],
        typer.Option(
            metavar="METHOD",
            help="bf16, fp16 cast; int8, fp8, rtn round to the nearest code; gptq, awq calibrate 4 (gptq: or 8) bits.",
        ),
    ],
    out: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it must be absent or empty.")
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="With --ray: more checkpoints, side by side.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(metavar="N", help="Bits of a quantized weight.", show_default="4, 8 with int8 and fp8"),
    ] = None,
    group_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto", help="Weights that share a scale, -1: a row; auto: the largest of 128, 64, 32 that fits."
        ),
    ] = "auto",
    form: Annotated[
        Literal["gptq", "awq", "compressed-tensors"] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="gptq, awq or compressed-tensors on disk.",
            show_default="the method's own",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Codes around zero, or with zero points.",
            show_default="asymmetric in the awq format and with --method awq",
        ),
    ] = None,
    activations: Annotated[
        bool, typer.Option("--activations", help="int8: round the inputs of linear layers too (W8A8, SmoothQuant).")
    ] = False,
    static_activations: Annotated[
        bool, typer.Option("--static", help="fp8: one fixed scale for a layer's inputs, not one a token.")
    ] = False,
    kv: Annotated[
        Literal["fp8", "int8"] | None,
        typer.Option(metavar="fp8|int8", help="Calibrate an 8-bit KV cache too.", show_default="16-bit KV cache"),
    ] = None,
    effort: Annotated[
        Literal["fast", "normal", "max"],
        typer.Option(
            metavar="fast|normal|max", help="fast: no range search; max: learned rounding on top, much slower."
        ),
    ] = "normal",
    target_kl: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Mix 4, 8 and 16 bits: the smallest checkpoint of at most this mean KL.",
            show_default="off",
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="B",
            help="Mix 4, 8 and 16 bits: the best checkpoint of at most B bits a weight.",
            show_default="off",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Linear layers to leave unquantized, by name.", show_default="none"),
    ] = None,
    lm_head: Annotated[
        int | None,
        typer.Option(
            "--lm-head", metavar="N", help="Quantize the output projection too, to N bits.", show_default="as it is"
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="A-B", help="Decoder layers to quantize; others stay.", show_default="all"),
    ] = None,
    engine: Annotated[
        Literal["vllm", "sglang", "transformers"] | None,
        typer.Option("--for", metavar="ENGINE", help="Refuse what this engine cannot load.", show_default="any engine"),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="FILE|ID|builtin|self",
            help="Calibration text: a .txt, .jsonl or .parquet file, a dataset of the hub, CPython's own reference, or"
            " text that the model writes itself.",
        ),
    ] = "builtin",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of calibration text.")] = 128,
    seq_len: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a window, at most the model's positions.")
    ] = 2048,
    damp: Annotated[
        float, typer.Option(metavar="SHARE", help="GPTQ's damping, as a share of the Hessian's diagonal.")
    ] = 0.01,
    offload: Annotated[
        Literal["auto", "disk", "memory"],
        typer.Option(
            metavar="auto|disk|memory", help="Where the calibration text's hidden states lie; auto: as they fit."
        ),
    ] = "auto",
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure the quality before and after on held-out text.")
    ] = True,
    max_kl: Annotated[
        float | None, typer.Option(metavar="X", help="Exit with 1 if the mean KL is above X.", show_default="off")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Exit with 1 if the perplexity grows by more than this factor.", show_default="off"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up an interrupted run, which also happens without.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done and write nothing.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Use the nodes of a Ray cluster, or auto for this node's: for a layer's experts, or for many MODELs,"
            " each written to DIR/NAME.",
            show_default="this machine",
        ),
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Write a checkpoint in another precision, with a report of its quality, size and time."""
    from llmkit.model.device import resolve_device
    from llmkit.quant.pipeline import solve_here
    from llmkit.quant.plan import QuantizeOptions
    from llmkit.quant.quantize import check_gates
    from llmkit.quant.quantize import quantize as run

    options = QuantizeOptions(
        method=method,
        bits=bits,
        group_size=parse_count("--group-size", group_size, also=(-1,)),
        format=form,
        symmetric=symmetric,
        activations=activations,
        static_activations=static_activations,
        kv=kv or "",
        keep=keep,
        lm_head=lm_head,
        layers=layers,
        engine=engine,
        effort=effort,
        target_kl=target_kl,
        target_bits=target_bits,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        damp=damp,
        offload=offload,
        evaluate=evaluate,
        max_kl=max_kl,
        max_ppl_ratio=max_ppl_ratio,
        resume=resume,
        dry_run=dry_run,
        device=device,
        seed=seed,
    )
    if more:
        _quantize_all(output, [model, *more], out, options, ray)
        return
    solve = solve_here
    if ray is not None:
        from llmkit.deploy.ray_quantize import RaySolve

        solve = RaySolve(ray, resolve_device(device))
    report = run(model, out, options, output.progress(), _generate, solve)
    output.result(report, lambda console: _show(console, report))
    check_gates(report, options)


def _quantize_all(output: Output, models: list[str], out: str, options: QuantizeOptions, ray: str | None) -> None:
    """Many models on a cluster; what became of each is told, and the first error raised once all have ended."""
    from llmkit.deploy.ray_quantize import quantize_all
    from llmkit.quant.quantize import check_gates
    from llmkit.runtime.server.options import default_name

    if ray is None:
        raise UsageError(f"{len(models)} models are quantized side by side on a Ray cluster", todo="Add --ray auto")
    outputs = [str((Path(out) / default_name(model).rpartition("/")[2]).resolve()) for model in models]
    if len(set(outputs)) < len(outputs):
        raise UsageError("two of the models have the same name", "Each is written to DIR/NAME")
    sources = [str(Path(model).resolve()) if Path(model).exists() else model for model in models]
    found = quantize_all(list(zip(sources, outputs, strict=True)), options, ray, output.progress())
    failed = {model: one for model, one in zip(models, found, strict=True) if isinstance(one, LlmkitError)}
    reports = [one for one in found if not isinstance(one, LlmkitError)]
    document = {"reports": reports, "failed": {model: str(error) for model, error in failed.items()}}

    def show(console: Console) -> None:
        for report in reports:
            _show(console, report)

    output.result(document, show)
    for model, error in failed.items():
        raise type(error)(f"{model}: {error.what}", error.expected, error.todo)
    for report in reports:
        check_gates(report, options)


def _generate(*arguments: Any, **options: Any) -> list[list[int]]:
    """The engine's answers, for calibration text that the model writes: few runs need an engine."""
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
        notes.append(f"rounded to the nearest instead: {', '.join(report['fallbacks'])}")
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
        f" ({bytes_text(plan['memory_available_bytes'])} free) and {bytes_text(plan['disk_bytes'])} of disk,"
        f" and about {seconds_text(plan['seconds'])}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _stored(report: dict[str, Any]) -> str:
    """How the weights are stored: "INT4 in groups of 64, gptq format"."""
    if report["format"] is None:
        return str(report["dtype"])
    labels = [scheme["label"] for scheme in report["schemes"]]
    if len(labels) > 1:
        total = sum(scheme["weights"] for scheme in report["schemes"])
        labels = [f"{scheme['weights'] / total:.0%} {scheme['label']}" for scheme in report["schemes"]]
    kv = [f"{report['kv'].upper()} KV cache"] if report["kv"] else []
    return f"{'; '.join(labels + kv)}; {report['format']} format"
