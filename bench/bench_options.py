"""The options of `llmkit bench`. Nothing heavy is imported: the command line imports them."""

import math
from dataclasses import dataclass
from typing import Annotated

from llmkit.bench.slo.slo_options import SLO_PANEL, SloOptions
from llmkit.common.errors import UsageError
from llmkit.common.option_values import (
    DTYPE,
    INTEGERS,
    NUMBERS,
    THREADS,
    TOKEN_RANGE,
    count_or_auto,
    within,
)
from llmkit.common.options import (
    CPU_ACTIVATIONS,
    DEVICE,
    REQUIRE_NATIVE,
    SEED,
    CpuActivations,
    Option,
    ValueFormat,
)
from llmkit.runtime.engine.speculation import SPECULATION, check_speculation

LOAD_PANEL = "Load"
QUALITY_PANEL = "Quality"
RESULTS_PANEL = "Results"
SPECULATION_PANEL = "Speculation"
MEASURED = "measured"  # of --power
AGENTIC = "agentic"  # the mode


def _parse_power(option: str, text: str) -> float | str:
    if text == MEASURED:
        return MEASURED
    try:
        watts = float(text)
    except ValueError:
        watts = math.nan
    if not 0 < watts < math.inf:
        raise UsageError(
            f"{option}: {text!r} is not a power", f"Watts above 0, or {MEASURED}, were expected"
        )
    return watts


# Watts, or `measured`.
POWER = ValueFormat(_parse_power, yaml_type=float | str)


@dataclass(frozen=True)
class LoadOptions:
    """A load that replaces the scenarios. Lengths are tokens, lowest and highest."""

    # The command line sets it from --mode.
    mode: str = "serve"
    concurrency: Annotated[
        tuple[int, ...],
        Option(
            "Clients, each waiting for its response.",
            metavar="N,...",
            format=INTEGERS,
            unset="8",
            panel=LOAD_PANEL,
        ),
    ] = ()
    rates: Annotated[
        tuple[float, ...],
        Option(
            "Requests a second, sent without waiting for responses.",
            flags=("--rate",),
            metavar="R,...",
            format=NUMBERS,
            unset="none",
            panel=LOAD_PANEL,
        ),
    ] = ()
    burstiness: Annotated[
        float,
        Option(
            "Shape of the gamma distribution of gaps; 1: Poisson, less: bursts.",
            metavar="B",
            panel=LOAD_PANEL,
        ),
    ] = 1.0
    requests: Annotated[
        int | None,
        Option(
            "Requests, or conversations, of each load.",
            metavar="N",
            min=1,
            unset="depends on the mode",
            panel=LOAD_PANEL,
        ),
    ] = None
    input_tokens: Annotated[
        tuple[int, int],
        Option("Tokens of a prompt.", metavar="N|LOW-HIGH", format=TOKEN_RANGE, panel=LOAD_PANEL),
    ] = (64, 512)
    output_tokens: Annotated[
        tuple[int, int],
        Option("Tokens of an answer.", metavar="N|LOW-HIGH", format=TOKEN_RANGE, panel=LOAD_PANEL),
    ] = (32, 256)
    prefix_tokens: Annotated[
        int,
        Option(
            "Tokens of a prefix that all prompts share, in addition.",
            metavar="N",
            min=0,
            panel=LOAD_PANEL,
        ),
    ] = 0
    turns: Annotated[
        int,
        Option("Requests of a conversation, at most.", metavar="N", min=1, panel=LOAD_PANEL),
    ] = 1
    trace: Annotated[
        str | None,
        Option(
            "Replay the times and lengths of a trace (JSONL or CSV); with --mode agentic: its "
            "sessions (JSONL).",
            metavar="FILE",
            unset="none",
            panel=LOAD_PANEL,
        ),
    ] = None
    history: Annotated[
        str,
        Option(
            "Answers in the prompts of later turns of --mode agentic: the server's own, or the "
            "trace's.",
            choices=("server", "trace"),
            metavar="server|trace",
            panel=LOAD_PANEL,
        ),
    ] = "server"
    hash_block_tokens: Annotated[
        int,
        Option(
            "Tokens of a block of hash_ids, of --mode agentic.",
            metavar="N",
            min=1,
            panel=LOAD_PANEL,
        ),
    ] = 512


@dataclass(frozen=True)
class EvalTaskOptions:
    """The questions of lm-evaluation-harness that a server is asked."""

    names: Annotated[
        tuple[str, ...],
        Option(
            "Ask the server the questions of lm-evaluation-harness (the extra tasks): a task, a "
            "group, or a task's YAML file; may be repeated.",
            flags=("--tasks",),
            metavar="NAME|FILE",
            unset="none",
            panel=QUALITY_PANEL,
        ),
    ] = ()
    limit: Annotated[
        int | None,
        Option(
            "Questions of each task, at most.",
            flags=("--tasks-limit",),
            metavar="N",
            min=1,
            unset="all",
            panel=QUALITY_PANEL,
        ),
    ] = None
    shots: Annotated[
        int | None,
        Option(
            "Examples before each question.",
            flags=("--tasks-shots",),
            metavar="N",
            min=0,
            unset="the task's own",
            panel=QUALITY_PANEL,
        ),
    ] = None
    chat: Annotated[
        bool,
        Option(
            "Ask as chats, for tasks with generated answers.",
            flags=("--tasks-chat",),
            panel=QUALITY_PANEL,
        ),
    ] = False


@dataclass(frozen=True)
class ToolCaseOptions:
    """The cases with tools that a server is asked, and whose calls are checked."""

    sources: Annotated[
        tuple[str, ...],
        Option(
            "Ask cases with tools, and check the calls in the answers: builtin, or a file in our "
            "format or BFCL's; may be repeated.",
            flags=("--tool-cases",),
            metavar="builtin|FILE",
            unset="none",
            panel=QUALITY_PANEL,
        ),
    ] = ()
    limit: Annotated[
        int | None,
        Option(
            "Tool cases, at most, as many of each category as possible.",
            flags=("--tool-limit",),
            metavar="N",
            min=1,
            unset="all",
            panel=QUALITY_PANEL,
        ),
    ] = None
    max_tokens: Annotated[
        int,
        Option(
            "Tokens of an answer to a tool case, thoughts included, at most.",
            flags=("--tool-max-tokens",),
            metavar="N",
            min=1,
            panel=QUALITY_PANEL,
        ),
    ] = 1024


@dataclass(frozen=True)
class ReportOutputs:
    """The files that a report is written to, besides the terminal; None: not written."""

    json: Annotated[
        str | None,
        Option(
            "Write the JSON report, too.",
            flags=("--output", "-o"),
            metavar="FILE",
            unset="none",
            panel=RESULTS_PANEL,
            in_recipes=False,
        ),
    ] = None
    html: Annotated[
        str | None,
        Option(
            "Write the report as one self-contained HTML page, too.",
            metavar="FILE",
            unset="none",
            panel=RESULTS_PANEL,
            in_recipes=False,
        ),
    ] = None
    csv: Annotated[
        str | None,
        Option(
            "Write all figures as CSV, too.",
            metavar="FILE",
            unset="none",
            panel=RESULTS_PANEL,
            in_recipes=False,
        ),
    ] = None
    charts: Annotated[
        str | None,
        Option(
            "Write every chart as an SVG file, too.",
            metavar="DIR",
            unset="none",
            panel=RESULTS_PANEL,
            in_recipes=False,
        ),
    ] = None
    png: Annotated[
        bool,
        Option(
            "Write a PNG beside each SVG file (the extra png).",
            panel=RESULTS_PANEL,
            in_recipes=False,
        ),
    ] = False
    junit: Annotated[
        str | None,
        Option(
            "Write the gates as JUnit XML, too.",
            metavar="FILE",
            unset="none",
            panel=RESULTS_PANEL,
            in_recipes=False,
        ),
    ] = None
    summary: Annotated[
        str | None,
        Option(
            "Write a Markdown summary, too.",
            metavar="FILE",
            unset="none",
            panel=RESULTS_PANEL,
            in_recipes=False,
        ),
    ] = None


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, and how."""

    scenarios: Annotated[
        tuple[str, ...],
        Option(
            "quick, single, batch, online or prefix; may be repeated.",
            flags=("--scenario",),
            metavar="NAME",
        ),
    ] = ("quick",)
    # Replaces the scenarios.
    load: LoadOptions | None = None
    rounds: Annotated[
        int,
        Option(
            "Repetitions, for medians and intervals.",
            flags=("--repeats", "--rounds"),
            metavar="N",
            min=1,
        ),
    ] = 1
    limit: Annotated[
        int | None,
        Option("Requests of each scenario, at most.", metavar="N", min=1, unset="all"),
    ] = None
    data: Annotated[
        str,
        Option(
            "Source of the prompts: a text, ShareGPT or other conversations, or a data set.",
            metavar="builtin|random|FILE|ID",
            panel=LOAD_PANEL,
        ),
    ] = "builtin"
    slo: Annotated[
        str | None,
        Option(
            "Bounds for goodput: ttft:200ms,tpot:50ms,e2e:2s.",
            metavar="BOUNDS",
            unset="none",
            panel=LOAD_PANEL,
        ),
    ] = None
    price_per_hour: Annotated[
        float | None,
        Option(
            "Price of the machine, for the cost of a million tokens.",
            metavar="PRICE",
            unset="none",
            panel=LOAD_PANEL,
        ),
    ] = None
    utilization: Annotated[
        float,
        Option(
            "Share of the paid hours in which the machine has this load, for the cost.",
            metavar="SHARE",
            check=within(0.001, 1),
            panel=LOAD_PANEL,
        ),
    ] = 1.0
    power: Annotated[
        float | str | None,
        Option(
            "Watts of the machine under this load, or measured: by the counters of GPUs and "
            "processors; for the energy of a million tokens.",
            metavar="WATTS|measured",
            format=POWER,
            unset="none",
            panel=LOAD_PANEL,
        ),
    ] = None
    price_per_kwh: Annotated[
        float | None,
        Option(
            "Price of a kWh, added to the cost with --power.",
            metavar="PRICE",
            unset="none",
            panel=LOAD_PANEL,
        ),
    ] = None
    server_metrics: Annotated[
        bool,
        Option(
            "Read the KV cache use and the waiting requests at a server's /metrics each second.",
            panel=LOAD_PANEL,
        ),
    ] = False
    warmup: Annotated[
        bool,
        Option("Send a few requests first that do not count.", flags=("--warmup/--no-warmup",)),
    ] = True
    speed: Annotated[bool, Option("Measure speed.", flags=("--speed/--no-speed",))] = True
    page_cache: Annotated[
        str,
        Option(
            "Before each start of --mode startup: weights in the page cache (warm) or out of it "
            "(cold).",
            choices=("warm", "cold"),
            metavar="STATE",
            panel=LOAD_PANEL,
        ),
    ] = "warm"
    quality: Annotated[
        bool,
        Option(
            "Measure perplexity and KL divergence, of checkpoints and of servers that return "
            "prompt logprobs.",
            flags=("--quality/--no-quality",),
        ),
    ] = True
    tasks: EvalTaskOptions | None = None
    tool_cases: ToolCaseOptions | None = None
    # Set for `--mode slo`.
    slo_search: SloOptions | None = None
    sweep_options: Annotated[
        tuple[str, ...],
        Option(
            "Serve checkpoints with every combination of these options of `llmkit serve`, like "
            '"max_num_seqs=8,16 kv_cache_dtype=auto,int8"; may be repeated.',
            metavar="NAME=V,...",
            unset="none",
            panel=SLO_PANEL,
        ),
    ] = ()
    offline: Annotated[
        bool, Option("Run checkpoints in this process instead of behind `llmkit serve`.")
    ] = False
    require_native: Annotated[bool, REQUIRE_NATIVE] = False
    baseline: Annotated[
        str | None,
        Option(
            "What to compare with: a model or a running server, measured in the same run, or a "
            "report.",
            metavar="MODEL|URL|FILE",
            unset="first",
            completes_models=True,
        ),
    ] = None
    gates: Annotated[
        tuple[str, ...],
        Option(
            'Exit with 1 unless it holds: "mean_kl<=0.16" or "output_tps >= 0.9 * baseline"; may '
            "be repeated.",
            flags=("--gate",),
            metavar="GATE",
            unset="none",
            in_recipes=False,
        ),
    ] = ()
    text: Annotated[
        str,
        Option(
            "Text that quality is measured on, as for `llmkit quantize`.",
            metavar="FILE|ID|builtin",
            panel=QUALITY_PANEL,
        ),
    ] = "builtin"
    windows: Annotated[
        int, Option("Windows of that text, at most.", metavar="N", min=1, panel=QUALITY_PANEL)
    ] = 8
    window_tokens: Annotated[
        int, Option("Tokens of a window, at most.", metavar="N", min=2, panel=QUALITY_PANEL)
    ] = 1024
    dtype: Annotated[
        str,
        Option(
            "auto, float32, bfloat16 or float16; auto: bfloat16 on CUDA, float32 on CPU.",
            metavar="DTYPE",
            format=DTYPE,
        ),
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        Option(
            "Maximum tokens of a request, for checkpoints.",
            metavar="N|auto",
            format=count_or_auto(),
        ),
    ] = None
    speculate: Annotated[
        int | str,
        Option(
            "How checkpoints draft tokens, as --speculate of `llmkit serve`.",
            metavar="N|METHOD[:N]",
            format=SPECULATION,
            check=check_speculation,
        ),
    ] = 0
    draft_model: Annotated[
        str | None,
        Option(
            "The draft model or EAGLE-3 head of checkpoints, as --draft-model of `llmkit serve`.",
            metavar="MODEL",
            unset="none",
        ),
    ] = None
    synthetic_acceptance_rates: Annotated[
        tuple[float, ...],
        Option(
            "Shares of draft tokens that checkpoints accept by a draw, as "
            "--synthetic-accept-rates of `llmkit serve`.",
            flags=("--synthetic-accept-rates",),
            metavar="SHARE,...",
            format=NUMBERS,
            unset="the model accepts",
            panel=SPECULATION_PANEL,
        ),
    ] = ()
    synthetic_acceptance_length: Annotated[
        float | None,
        Option(
            "Mean tokens of their steps with drafts, as --synthetic-accept-length of `llmkit "
            "serve`.",
            flags=("--synthetic-accept-length",),
            metavar="TOKENS",
            unset="the model accepts",
            panel=SPECULATION_PANEL,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Option(
            "Checkpoint whose tokenizer makes the prompts.",
            metavar="MODEL",
            unset="the first checkpoint's",
        ),
    ] = None
    model: Annotated[
        str | None,
        Option(
            "Name of the model in requests to servers.",
            flags=("--served-model-name",),
            metavar="NAME",
            unset="their first",
        ),
    ] = None
    threads: Annotated[int | None, THREADS] = None
    cpu_activations: Annotated[CpuActivations, CPU_ACTIVATIONS] = "auto"
    device: Annotated[str, DEVICE] = "auto"
    seed: Annotated[int, SEED] = 0
