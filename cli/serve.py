"""`llmkit serve`: an OpenAI-compatible server of one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.text import bytes_text
from llmkit.cli.command import DeviceOption, ModelArgument
from llmkit.cli.output import Output
from llmkit.cli.sizes import in_range, parse_count, parse_size
from llmkit.runtime.engine.types import EngineOptions

if TYPE_CHECKING:
    from rich.console import Console


def serve(
    output: Output,
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; any other than loopback needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0 takes a free one.")] = 8000,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            metavar="DTYPE",
            help="auto, float32, bfloat16 or float16; auto takes the model's own on CUDA and float32 on the CPU.",
        ),
    ] = "auto",
    max_model_len: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Most tokens of a request; auto takes what the model and memory allow."),
    ] = "auto",
    max_num_seqs: Annotated[int, typer.Option(metavar="N", help="Most requests in one step.")] = 256,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most tokens in one step.", show_default="8192, on the CPU 512"),
    ] = None,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the KV cache, like 2GiB.", show_default="from the free memory"),
    ] = None,
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"],
        typer.Option(
            metavar="DTYPE",
            help="auto, int8 or fp8: how keys and values are kept; auto: as the checkpoint's scales are for, else as "
            "the model computes.",
        ),
    ] = "auto",
    gpu_memory_utilization: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the GPU's memory that may be used.")
    ] = 0.9,
    cpu_offload: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Weights of a model larger than the GPU that stay in host memory.", show_default="none"
        ),
    ] = None,
    tp: Annotated[
        int,
        typer.Option(
            "--tp",
            "--tensor-parallel-size",
            metavar="N",
            help="Ranks that share every layer, a process each; a sharded MODEL has its own.",
        ),
    ] = 1,
    pp: Annotated[
        int, typer.Option("--pp", "--pipeline-parallel-size", metavar="N", help="Pipeline stages of layers.")
    ] = 1,
    ep: Annotated[
        int, typer.Option("--ep", metavar="N", help="Groups of ranks over which experts are divided, of --tp.")
    ] = 1,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in the API.", show_default="MODEL's last part")
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A file of keys, one a line; clients must send one of them.",
            show_default="LLMKIT_API_KEY, if set",
        ),
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long running requests may take after SIGTERM.")
    ] = 30.0,
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Do not keep what prompts begin with for later ones.")
    ] = False,
    speculate: Annotated[
        int, typer.Option(metavar="N", help="Guess N tokens ahead of each request and confirm them in one step.")
    ] = 0,
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A small model that guesses, 4 tokens or --speculate.", show_default="earlier text"
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A LoRA adapter, served as model NAME; repeat for more.", show_default="none"
        ),
    ] = None,
    dp: Annotated[
        int, typer.Option("--dp", metavar="N", help="Replicas of the model on this machine, behind the one port.")
    ] = 1,
    log_requests: Annotated[
        bool,
        typer.Option("--log-requests", help="Write a line of JSON to stderr for each request, without its text."),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show how memory would be divided and what fits, load nothing, and stop.")
    ] = False,
    device: DeviceOption = "auto",
) -> int:
    """Serve a checkpoint over the OpenAI API, with continuous batching. Ctrl-C or SIGTERM stops it gracefully."""
    in_range("--max-num-seqs", max_num_seqs, 1)
    if max_num_batched_tokens is not None:
        in_range("--max-num-batched-tokens", max_num_batched_tokens, 1)
    for option, size in (("--tp", tp), ("--pp", pp), ("--ep", ep)):
        in_range(option, size, 1)
    in_range("--speculate", speculate, 0, 64)
    in_range("--gpu-memory-utilization", gpu_memory_utilization, 0.05, 1)
    in_range("--drain-timeout", drain_timeout, 0)
    in_range("--dp", dp, 1, 64)
    sizes: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "max_model_len": parse_count("--max-model-len", max_model_len),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_memory": parse_size("--kv-cache-memory", kv_cache_memory),
        "kv_cache_dtype": kv_cache_dtype,
        "prefix_cache": not no_prefix_cache,
        "speculate": speculate or (4 if draft_model else 0),
        "draft_model": draft_model,
        "adapters": _adapters(lora or [], served_model_name or model),
        "gpu_memory_utilization": gpu_memory_utilization,
        "tp": tp,
        "pp": pp,
        "ep": ep,
        "cpu_offload": parse_size("--cpu-offload", cpu_offload) or 0,
        "dp": dp,
    }
    engine = EngineOptions(**sizes)
    if plan:
        return _plan(output, model, engine)
    from llmkit.runtime.server.age import process_age
    from llmkit.runtime.server.serve import ServeOptions, run_server

    return run_server(
        ServeOptions(
            model=model,
            host=host,
            port=port,
            served_model_name=served_model_name,
            api_key_file=None if api_key_file is None else Path(api_key_file),
            drain_timeout=drain_timeout,
            log_requests=log_requests,
            debug=output.debug,
            engine=engine,
        ),
        lambda text: output.message(f"llmkit serve: {text}"),
        lambda facts: _ready(output, facts),
        time.perf_counter() - process_age(),
    )


def _adapters(given: list[str], model: str) -> dict[str, str]:
    """--lora's adapters by name."""
    adapters: dict[str, str] = {}
    for one in given:
        name, _, directory = one.partition("=")
        if not name or not directory:
            raise UsageError(
                f"--lora {one!r} is no NAME=DIR", "A name and a directory with an equals sign between them"
            )
        if name in adapters or name == model:
            raise UsageError(f"--lora {one!r}: the name {name!r} is given twice", "A name of its own for each model")
        adapters[name] = directory
    return adapters


def _plan(output: Output, model: str, engine: EngineOptions) -> int:
    from llmkit.checkpoint.source import open_checkpoint
    from llmkit.model.families import model_spec
    from llmkit.model.loader import check_checkpoint
    from llmkit.runtime.load import plan_engine

    checkpoint = open_checkpoint(model)
    if checkpoint.layout is None:
        check_checkpoint(checkpoint, model_spec(checkpoint.config))
    document = {"model": model} | plan_engine(checkpoint, engine).as_dict()
    output.result(document, lambda console: _show_plan(console, document))
    return 0


def _ready(output: Output, facts: Mapping[str, Any]) -> None:
    """The start-up table, and the facts on stdout with --json."""
    output.result(facts, lambda console: None)
    if output.quiet:
        return
    from rich.table import Table

    table = Table("start-up", "seconds", "memory", "size", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = table.columns[3].justify = "right"
    stages = dict(facts["engine_seconds"])
    stages["the rest"] = max(0.0, facts["ready_s"] - sum(stages.values()))
    rows = [(stage, f"{spent:.2f}") for stage, spent in stages.items()] + [("ready", f"{facts['ready_s']:.2f}")]
    for (stage, spent), (name, size) in zip_longest(rows, _memory_rows(facts["memory"]), fillvalue=("", "")):
        table.add_row(stage, spent, name, size)
    output.notes.print(table)
    api = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in facts["api_seconds"].items())
    output.message(f"meanwhile in the API process: {api}")
    output.message("\n".join(facts["paths"]))


def _show_plan(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("memory", "size")
    table.columns[1].justify = "right"
    for name, size in [("on", f"{document['device']} in {document['dtype']}"), *_memory_rows(document)]:
        table.add_row(name, size)
    console.print(table)


def _memory_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("free", bytes_text(plan["free_bytes"])),
        ("weights", bytes_text(plan["weight_bytes"])),
        *([("weights in host memory", bytes_text(host))] if (host := plan.get("host_weight_bytes")) else []),
        ("workspace of a step, at most", bytes_text(plan["workspace_bytes"])),
        ("KV cache", bytes_text(plan["kv_cache_bytes"])),
        ("KV cache of a token", bytes_text(plan["kv_bytes_per_token"])),
        ("tokens in the KV cache", f"{plan['kv_cache_tokens']:,} ({plan['kv_blocks']:,} blocks)"),
        ("tokens of a request", f"{plan['max_model_len']:,} of the model's {plan['model_limit']:,}"),
    ]
    return rows + [(f"requests of {int(n):,} tokens at once", f"{count:,}") for n, count in plan["requests"].items()]
