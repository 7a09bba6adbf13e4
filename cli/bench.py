"""`llmkit bench`: speed and quality of checkpoints and servers, as a table, a JSON report and a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmkit.cli.command import DeviceOption, SeedOption
from llmkit.cli.output import Output
from llmkit.cli.sizes import parse_count

if TYPE_CHECKING:
    from llmkit.bench.report import BenchReport

ReportArgument = Annotated[str, typer.Argument(metavar="FILE", help="A report that `llmkit bench --json` wrote.")]


def bench(
    output: Output,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...", help="Checkpoints: directories, hub ids or .gguf files.", show_default=False
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A running OpenAI-compatible server; may be repeated.", show_default="none"),
    ] = None,
    scenario: Annotated[
        list[str], typer.Option(metavar="NAME", help="quick, single, batch, online or prefix; may be repeated.")
    ] = ["quick"],  # noqa: B006 (Typer copies it)
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Repetitions; figures are their medians.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Requests of each scenario, at most.", show_default="all")
    ] = None,
    warmup: Annotated[
        bool, typer.Option("--warmup/--no-warmup", help="Send a few requests first that do not count.")
    ] = True,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed.")] = True,
    quality: Annotated[
        bool, typer.Option("--quality/--no-quality", help="Measure perplexity and KL divergence of checkpoints.")
    ] = True,
    offline: Annotated[
        bool, typer.Option("--offline", help="Run checkpoints in this process instead of behind `llmkit serve`.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL|FILE", help="What to compare with: a target or a report.", show_default="first"),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GATE",
            help='Exit with 1 unless it holds: "mean_kl<=0.16" or "output_tps >= 0.9 * baseline"; may be repeated.',
            show_default="none",
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="FILE|ID|builtin", help="Text that quality is measured on, as for `llmkit quantize`.")
    ] = "builtin",
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of that text, at most.")] = 8,
    window_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a window, at most.")] = 1024,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            metavar="DTYPE", help="auto, float32, bfloat16 or float16; auto: bfloat16 on CUDA, float32 on CPU."
        ),
    ] = "auto",
    max_model_len: Annotated[
        str, typer.Option(metavar="N|auto", help="Most tokens of a request, for checkpoints.")
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Whose tokenizer makes the prompts.", show_default="the first checkpoint's"),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model to ask servers for.", show_default="their first")
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Measure speed and quality of checkpoints and servers, side by side."""
    from llmkit.bench.bench import BenchOptions
    from llmkit.bench.bench import bench as run

    options = BenchOptions(
        scenarios=tuple(scenario),
        rounds=rounds,
        limit=limit,
        warmup=warmup,
        speed=speed,
        quality=quality,
        offline=offline,
        baseline=baseline,
        gates=tuple(gate or ()),
        text=text,
        windows=windows,
        window_tokens=window_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        max_model_len=parse_count("--max-model-len", max_model_len),
        tokenizer=tokenizer,
        model=served_model_name,
    )
    report = run([*(models or ()), *(url or ())], options, output.progress())
    _print(output, report)
    report.require_gates()


def compare(output: Output, a: ReportArgument, b: ReportArgument) -> None:
    """Show two reports side by side, the first as the baseline, and say what does not compare."""
    from llmkit.bench.report import compare_reports, read_report

    _print(output, compare_reports(read_report(a), read_report(b)))


def show(output: Output, file: ReportArgument) -> None:
    """Show a report."""
    from llmkit.bench.report import read_report

    _print(output, read_report(file))


def _print(output: Output, report: BenchReport) -> None:
    output.result(report.to_json(), lambda console: console.print(report.renderable()))
