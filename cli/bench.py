"""`llmkit bench`: measures speed and quality, prints a table, writes reports and checks gates."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmkit.bench.agentic.trace_options import TraceOptions
from llmkit.bench.bench_options import (
    LOAD_PANEL,
    BenchOptions,
    EvalTaskOptions,
    LoadOptions,
    ReportOutputs,
    ToolCaseOptions,
)
from llmkit.bench.prometheus_names import check_job
from llmkit.bench.routing.route_options import RouteBenchOptions
from llmkit.bench.slo.slo_options import SLO, SloOptions
from llmkit.cli.output import Output
from llmkit.common.errors import UsageError
from llmkit.common.option_values import require_url
from llmkit.common.options import DEVICE, Argument, ExcludeFields, Option, changed_options
from llmkit.runtime.engine.sampling_params import Pooling

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport

REPORT = Argument("A report that `llmkit bench --json` or `--output` wrote.", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """What `llmkit bench` takes."""

    models: Annotated[
        tuple[str, ...],
        Argument(
            "Checkpoints: directories, hub ids or .gguf files.", metavar="MODEL", is_model=True
        ),
    ] = ()
    url: Annotated[
        tuple[str, ...],
        Option(
            "A running OpenAI-compatible server; may be repeated.",
            metavar="URL",
            unset="none",
            check=require_url,
        ),
    ] = ()
    mode: Annotated[
        str | None,
        Option(
            "A load instead of scenarios: serve (--concurrency or --rate), latency (batches of "
            "--concurrency), throughput (all at once; implies --offline for checkpoints), sweep "
            "(until saturated), startup (from the command to the first token, --repeats times), "
            "agentic (the sessions of --trace), slo (the most load under --slo).",
            choices=("serve", "latency", "throughput", "sweep", "startup", "agentic", "slo"),
            metavar="MODE",
            unset="scenarios",
            panel=LOAD_PANEL,
        ),
    ] = None
    load: LoadOptions
    slo_search: SloOptions
    tasks: EvalTaskOptions
    tool_cases: ToolCaseOptions
    outputs: ReportOutputs
    options: BenchOptions


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """What `llmkit bench compare` takes."""

    a: Annotated[str, REPORT]
    b: Annotated[str, REPORT]
    outputs: Annotated[ReportOutputs, ExcludeFields(("json", "junit"))]


@dataclass(frozen=True, kw_only=True)
class ShowArguments:
    """What `llmkit bench show` takes."""

    file: Annotated[str, REPORT]
    outputs: Annotated[ReportOutputs, ExcludeFields(("json",))]


@dataclass(frozen=True, kw_only=True)
class TraceArguments:
    """What `llmkit bench trace` takes."""

    options: TraceOptions


@dataclass(frozen=True, kw_only=True)
class RouteArguments:
    """What `llmkit bench route` takes."""

    tiers: Annotated[
        tuple[str, ...],
        Argument(
            "Two tiers, the cheap one first: checkpoints, or URLs of OpenAI-compatible servers.",
            metavar="NAME=MODEL",
            completes_models=True,
        ),
    ] = ()
    outputs: Annotated[ReportOutputs, ExcludeFields(("csv", "charts", "png", "junit", "summary"))]
    options: RouteBenchOptions


@dataclass(frozen=True, kw_only=True)
class SemanticCacheArguments:
    """What `llmkit bench semantic-cache` takes."""

    model: Annotated[
        str,
        Argument(
            "The checkpoint that embeds the questions.", metavar="MODEL", completes_models=True
        ),
    ]
    pairs: Annotated[
        str,
        Option(
            'Your pairs of questions: JSONL of {"first", "second", "same"}, or JSON with "pairs"; '
            "builtin: 270 pairs in English.",
            metavar="FILE|builtin",
        ),
    ] = "builtin"
    pooling: Annotated[Pooling, Option("last or mean, as serve's --pooling.", metavar="KIND")] = (
        "last"
    )
    device: Annotated[str, DEVICE] = "auto"
    chart: Annotated[
        Path | None,
        Option("Write the curve of right and wrong hits as SVG.", metavar="FILE", unset="none"),
    ] = None
    outputs: Annotated[
        ReportOutputs,
        ExcludeFields(("csv", "charts", "png", "junit", "summary", "html")),
    ]


@dataclass(frozen=True, kw_only=True)
class AlertsArguments:
    """What `llmkit bench alerts` takes."""

    file: Annotated[str, REPORT]
    load: Annotated[
        str | None,
        Option(
            "The load whose repetitions make the bounds, such as c8.",
            metavar="NAME",
            unset="the only one",
        ),
    ] = None
    job: Annotated[
        str, Option("The server's job in Prometheus.", metavar="NAME", check=check_job)
    ] = "llmkit"
    output: Annotated[
        Path | None,
        Option(
            "Write the rules, for rule_files of Prometheus.",
            flags=("--output", "-o"),
            metavar="FILE",
            unset="none",
        ),
    ] = None


def bench(output: Output, arguments: BenchArguments) -> None:
    """Measure speed and quality of checkpoints and servers, side by side."""
    from llmkit.bench import run_bench
    from llmkit.bench.backends import is_url
    from llmkit.bench.report_files import check_outputs, write_report
    from llmkit.bench.unfinished_report import read_unfinished
    from llmkit.quant.calibration_text import BUILTIN, records

    options = arguments.options
    models, sweep_words = _split_sweep_words(arguments)
    if options.quality and options.text != BUILTIN:
        records(options.text)  # fails before anything is measured
    has_servers = arguments.url or (options.baseline is not None and is_url(options.baseline))
    if arguments.mode == "throughput" and not has_servers:
        options = replace(options, offline=True)
    for given, group in (
        (arguments.tasks.names, arguments.tasks),
        (arguments.tool_cases.sources, arguments.tool_cases),
    ):
        for label in () if given else changed_options(group):
            needed = "--tasks" if group is arguments.tasks else "--tool-cases"
            raise UsageError(f"{label} needs {needed}", "Nothing else uses it")
    options = replace(
        options,
        load=_load(arguments),
        slo_search=_slo_search(arguments),
        sweep_options=(*options.sweep_options, *sweep_words),
        tasks=arguments.tasks if arguments.tasks.names else None,
        tool_cases=arguments.tool_cases if arguments.tool_cases.sources else None,
    )
    check_outputs(arguments.outputs)
    unfinished = None if arguments.outputs.json is None else read_unfinished(arguments.outputs.json)

    def save(report: BenchReport) -> None:
        """Keep what has been measured so far, so that the same command can continue."""
        if arguments.outputs.json:
            write_report(report, ReportOutputs(json=arguments.outputs.json))

    report = run_bench.bench(
        [*models, *arguments.url], options, output.progress(), save, unfinished
    )
    _print(output, report, arguments.outputs)
    report.require_gates()


def compare(output: Output, arguments: CompareArguments) -> None:
    """Show two reports side by side, the first as the baseline, with the differences that may be
    chance and the metrics that cannot be compared.
    """
    from llmkit.bench.bench_report import compare_reports, read_report

    report = compare_reports(read_report(arguments.a), read_report(arguments.b))
    _print(output, report, arguments.outputs)


def show(output: Output, arguments: ShowArguments) -> None:
    """Show a report."""
    from llmkit.bench.bench_report import read_report

    _print(output, read_report(arguments.file), arguments.outputs)


def route(output: Output, arguments: RouteArguments) -> None:
    """Calibrate a route of two tiers on your prompts, and draw its cost against the agreement with
    the large tier's answers.
    """
    from llmkit.bench.report_files import check_outputs, write_files
    from llmkit.bench.routing import route_report
    from llmkit.bench.routing.calibrate_route import calibrate_route, parse_tiers, write_route

    outputs = arguments.outputs
    options = arguments.options
    check_outputs(outputs)
    tiers = parse_tiers(arguments.tiers)
    report, content = calibrate_route(tiers, options, output.progress())
    files = {}
    if outputs.json:
        files[Path(outputs.json)] = route_report.json_text(report)
    if outputs.html:
        files[Path(outputs.html)] = route_report.report_page(report)
    write_files(files)
    written = [*files]
    if options.route_file is not None:
        write_route(options.route_file, content, report)
        written.append(options.route_file)
    for path in written:
        output.message(f"written: {path}")
    output.result(
        report.to_json(), lambda console: console.print(route_report.render_report(report))
    )
    report.require_gates()


def semantic_cache(output: Output, arguments: SemanticCacheArguments) -> None:
    """Count right and wrong hits of serve's --semantic-cache at each threshold, on pairs of
    questions that have the same answer or not.
    """
    from llmkit.bench.report_files import check_outputs, write_files
    from llmkit.bench.semantic import cache_report

    outputs = arguments.outputs
    check_outputs(outputs)
    report = cache_report.semantic_report(
        arguments.model, arguments.pairs, arguments.pooling, arguments.device
    )
    files = {}
    if outputs.json:
        files[Path(outputs.json)] = f"{json.dumps(report.to_json(), indent=1)}\n".encode()
    if arguments.chart is not None:
        files[arguments.chart] = cache_report.chart(report).encode()
    write_files(files)
    for path in files:
        output.message(f"written: {path}")
    output.result(
        report.to_json(), lambda console: console.print(cache_report.render_report(report))
    )


def trace(output: Output, arguments: TraceArguments) -> None:
    """Make a trace of agents' sessions for --mode agentic: turns, tools, think time, sub-agents."""
    from llmkit.bench.agentic.generate_trace import generate_trace
    from llmkit.bench.report_files import write_files

    options = arguments.options
    made = generate_trace(options)
    write_files({options.output: made.to_jsonl()})
    document = {
        "file": str(options.output),
        "sessions": made.num_sessions,
        "branches": made.num_branches,
        "requests": made.num_turns,
        "output_tokens": made.output_tokens,
    }
    output.result(
        document,
        lambda console: console.print(
            f"{options.output}: {made.num_sessions:,} sessions, {made.num_branches:,} branches,"
            f" {made.num_turns:,} requests, {made.output_tokens:,} output tokens",
            markup=False,
            highlight=False,
            soft_wrap=True,
        ),
    )


def alerts(output: Output, arguments: AlertsArguments) -> None:
    """Make alert rules for Prometheus from a report with repetitions: a server that gets slower, or
    hits and accepts less, than what the repetitions differ by.
    """
    from llmkit.bench.alert_report import render_rules, rules_text
    from llmkit.bench.alert_rules import choose_load, make_alert_rules
    from llmkit.bench.bench_report import read_report, require_single_target
    from llmkit.bench.report_files import write_files

    target = require_single_target(read_report(arguments.file), arguments.file)
    rules = make_alert_rules(target, choose_load(target, arguments.load), arguments.job)
    if arguments.output is not None:
        write_files({arguments.output: rules_text(rules, arguments.job, arguments.file)})
        output.message(f"written: {arguments.output}")
    document = rules.to_json() | {"rules_file": rules.document(arguments.job)}
    output.result(document, lambda console: console.print(render_rules(rules)))


def _split_sweep_words(arguments: BenchArguments) -> tuple[list[str], list[str]]:
    """The models, and the words after them that are more of --sweep-options."""
    if not arguments.options.sweep_options:
        return list(arguments.models), []
    from llmkit.bench.slo.sweep_options import is_sweep_word

    words = [word for word in arguments.models if is_sweep_word(word)]
    return [model for model in arguments.models if model not in words], words


def _slo_search(arguments: BenchArguments) -> SloOptions | None:
    """How --mode slo searches; None for another mode. Raises UsageError."""
    if arguments.mode == SLO:
        return arguments.slo_search
    for label in changed_options(arguments.slo_search):
        raise UsageError(
            f"{label} belongs to --mode {SLO}", "A search for the most load under an SLO"
        )
    return None


def _load(arguments: BenchArguments) -> LoadOptions | None:
    """The load that replaces the scenarios, if an option chooses one. Raises UsageError."""
    load = arguments.load
    if arguments.mode is None and not changed_options(load):
        return None
    if arguments.options.scenarios != BenchOptions.scenarios:
        raise UsageError(
            "--scenario does not go with --mode and its options", "One kind of load was expected"
        )
    return replace(load, mode=arguments.mode or load.mode)


def _print(output: Output, report: BenchReport, outputs: ReportOutputs) -> None:
    from llmkit.bench.report_files import write_report
    from llmkit.bench.report_tables import render_report

    for path in write_report(report, outputs):
        output.message(f"written: {path}")
    output.result(report.to_json(), lambda console: console.print(render_report(report)))
