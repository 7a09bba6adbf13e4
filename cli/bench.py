"""`llmkit bench`: speed and quality of checkpoints and servers, as a table, a JSON report and a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmkit.checkpoint.errors import UsageError
from llmkit.cli.command import DeviceOption, SeedOption
from llmkit.cli.output import Output
from llmkit.cli.sizes import parse_count, parse_numbers, parse_range

if TYPE_CHECKING:
    from llmkit.bench.outputs import Outputs
    from llmkit.bench.report import BenchReport

ReportArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A report that `llmkit bench --json` or `--output` wrote.")
]
LOAD, QUALITY, RESULTS = "Load", "Quality", "Results"


def _file(flag: str, metavar: str, help: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=help, show_default="none", rich_help_panel=RESULTS)


HtmlOption = Annotated[str | None, _file("--html", "FILE", "Write the report as one self-contained HTML page, too.")]
CsvOption = Annotated[str | None, _file("--csv", "FILE", "Write all figures as CSV, too.")]
ChartsOption = Annotated[str | None, _file("--charts", "DIR", "Write every chart as an SVG file, too.")]
PngOption = Annotated[
    bool, typer.Option("--png", help="Beside each SVG file a PNG (the extra png).", rich_help_panel=RESULTS)
]
JunitOption = Annotated[str | None, _file("--junit", "FILE", "Write the gates as JUnit XML, too.")]
SummaryOption = Annotated[str | None, _file("--summary", "FILE", "Write a Markdown summary, too.")]


def bench(
    output: Output,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Checkpoints: directories, hub ids or .gguf files.", show_default=False),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A running OpenAI-compatible server; may be repeated.", show_default="none"),
    ] = None,
    scenario: Annotated[
        list[str], typer.Option(metavar="NAME", help="quick, single, batch, online or prefix; may be repeated.")
    ] = ["quick"],  # noqa: B006 (Typer copies it)
    repeats: Annotated[
        int,
        typer.Option("--repeats", "--rounds", min=1, metavar="N", help="Repetitions, for medians and intervals."),
    ] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Requests of each scenario, at most.", show_default="all")
    ] = None,
    mode: Annotated[
        Literal["serve", "latency", "throughput", "sweep", "startup"] | None,
        typer.Option(
            metavar="MODE",
            help="A load instead of scenarios: serve (--concurrency or --rate), latency (batches of --concurrency),"
            " throughput (all at once; implies --offline for checkpoints), sweep (until saturated), startup (from the"
            " command to the first token, --repeats times).",
            show_default="scenarios",
            rich_help_panel=LOAD,
        ),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Clients, each waiting for its answer.", show_default="8", rich_help_panel=LOAD
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R,...",
            help="Requests a second, sent whatever is answered.",
            show_default="none",
            rich_help_panel=LOAD,
        ),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            metavar="B",
            help="Shape of the gamma distribution of gaps; 1: Poisson, less: bursts.",
            rich_help_panel=LOAD,
        ),
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Requests, or conversations, of each load.",
            show_default="as suits it",
            rich_help_panel=LOAD,
        ),
    ] = None,
    input_tokens: Annotated[
        str, typer.Option(metavar="N|LOW-HIGH", help="Tokens of a prompt.", rich_help_panel=LOAD)
    ] = "64-512",
    output_tokens: Annotated[
        str, typer.Option(metavar="N|LOW-HIGH", help="Tokens of an answer.", rich_help_panel=LOAD)
    ] = "32-256",
    prefix_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens that all prompts begin with, besides.", rich_help_panel=LOAD)
    ] = 0,
    turns: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests of a conversation, at most.", rich_help_panel=LOAD)
    ] = 1,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Replay the times and lengths of a trace (JSONL or CSV).",
            show_default="none",
            rich_help_panel=LOAD,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="builtin|random|FILE|ID",
            help="What prompts are made of: a text, ShareGPT or other conversations, or a data set.",
            rich_help_panel=LOAD,
        ),
    ] = "builtin",
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="BOUNDS",
            help="Bounds for goodput: ttft:200ms,tpot:50ms,e2e:2s.",
            show_default="none",
            rich_help_panel=LOAD,
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            metavar="PRICE",
            help="Of the machine, for the cost of a million tokens.",
            show_default="none",
            rich_help_panel=LOAD,
        ),
    ] = None,
    warmup: Annotated[
        bool, typer.Option("--warmup/--no-warmup", help="Send a few requests first that do not count.")
    ] = True,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed.")] = True,
    page_cache: Annotated[
        Literal["warm", "cold"],
        typer.Option(
            metavar="STATE",
            help="Before each start of --mode startup: weights in the page cache (warm) or out of it (cold).",
            rich_help_panel=LOAD,
        ),
    ] = "warm",
    quality: Annotated[
        bool,
        typer.Option(
            "--quality/--no-quality",
            help="Measure perplexity and KL divergence, of checkpoints and of servers that tell of prompts' tokens.",
        ),
    ] = True,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Ask the server the questions of lm-evaluation-harness (the extra tasks): a task, a group, or a task's"
            " YAML file; may be repeated.",
            show_default="none",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    tasks_limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Questions of each task, at most.", show_default="all", rich_help_panel=QUALITY
        ),
    ] = None,
    tasks_shots: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Examples before each question.",
            show_default="the task's own",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    tasks_chat: Annotated[
        bool,
        typer.Option(
            "--tasks-chat", help="Ask as chats, for tasks whose answers are generated.", rich_help_panel=QUALITY
        ),
    ] = False,
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
        str,
        typer.Option(
            metavar="FILE|ID|builtin",
            help="Text that quality is measured on, as for `llmkit quantize`.",
            rich_help_panel=QUALITY,
        ),
    ] = "builtin",
    windows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Windows of that text, at most.", rich_help_panel=QUALITY)
    ] = 8,
    window_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens of a window, at most.", rich_help_panel=QUALITY)
    ] = 1024,
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
    file: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the JSON report, too.",
            show_default="none",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    html: HtmlOption = None,
    csv: CsvOption = None,
    charts: ChartsOption = None,
    png: PngOption = False,
    junit: JunitOption = None,
    summary: SummaryOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Measure speed and quality of checkpoints and servers, side by side."""
    from llmkit.bench.bench import BenchOptions
    from llmkit.bench.bench import bench as run
    from llmkit.bench.loads import Load
    from llmkit.bench.outputs import Outputs
    from llmkit.bench.tasks import TaskOptions
    from llmkit.quant.text import BUILTIN, records

    for one in url or ():
        if "://" not in one:
            raise UsageError(f"--url {one} is no address", "Addresses begin with http:// or https://")
    if quality and text != BUILTIN:
        records(text)  # that it is there, before anything is measured
    load = None
    wanted = [concurrency, rate, trace, requests]
    if mode is not None or any(option is not None for option in wanted) or turns > 1 or prefix_tokens:
        if scenario != ["quick"]:
            raise UsageError("--scenario does not go with --mode and its options", "One kind of load was expected")
        load = Load(
            mode or "serve",
            tuple(int(n) for n in parse_numbers("--concurrency", concurrency, whole=True)),
            parse_numbers("--rate", rate),
            burstiness,
            requests,
            parse_range("--input-tokens", input_tokens),
            parse_range("--output-tokens", output_tokens),
            prefix_tokens,
            turns,
            trace,
        )
    options = BenchOptions(
        scenarios=tuple(scenario),
        load=load,
        data=data,
        slo=slo,
        price_per_hour=price_per_hour,
        rounds=repeats,
        limit=limit,
        warmup=warmup,
        speed=speed,
        quality=quality,
        offline=offline or (mode == "throughput" and not url),
        baseline=baseline,
        gates=tuple(gate or ()),
        tasks=TaskOptions(tuple(tasks), tasks_limit, tasks_shots, tasks_chat) if tasks else None,
        page_cache=page_cache,
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
    outputs = Outputs(file, html, csv, charts, png, junit, summary)
    outputs.check()
    report = run([*(models or ()), *(url or ())], options, output.progress())
    _print(output, report, outputs)
    report.require_gates()


def compare(
    output: Output,
    a: ReportArgument,
    b: ReportArgument,
    html: HtmlOption = None,
    csv: CsvOption = None,
    charts: ChartsOption = None,
    png: PngOption = False,
    summary: SummaryOption = None,
) -> None:
    """Show two reports side by side, the first as the baseline, and say what is chance and what does not compare."""
    from llmkit.bench.outputs import Outputs
    from llmkit.bench.report import compare_reports, read_report

    report = compare_reports(read_report(a), read_report(b))
    _print(output, report, Outputs(html=html, csv=csv, charts=charts, png=png, summary=summary))


def show(
    output: Output,
    file: ReportArgument,
    html: HtmlOption = None,
    csv: CsvOption = None,
    charts: ChartsOption = None,
    png: PngOption = False,
    junit: JunitOption = None,
    summary: SummaryOption = None,
) -> None:
    """Show a report."""
    from llmkit.bench.outputs import Outputs
    from llmkit.bench.report import read_report

    report = read_report(file)
    _print(output, report, Outputs(html=html, csv=csv, charts=charts, png=png, junit=junit, summary=summary))


def _print(output: Output, report: BenchReport, outputs: Outputs) -> None:
    for path in outputs.write(report):
        output.message(f"written: {path}")
    output.result(report.to_json(), lambda console: console.print(report.renderable()))
