"""`llmkit serve`: an OpenAI-compatible server of one checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.text import bytes_text
from llmkit.cli.command import DeviceOption
from llmkit.cli.output import Output
from llmkit.cli.registry import local_copies
from llmkit.cli.sizes import in_range, parse_count, parse_size
from llmkit.runtime.engine.types import EngineOptions
from llmkit.runtime.server.options import ServeOptions, default_name

if TYPE_CHECKING:
    from rich.console import Console


def serve(
    output: Output,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint: a directory, a hub id or a .gguf file; NAME=MODEL loads it when a request names it.",
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL", help="More models behind the same port, each loaded when a request names it."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; any other than loopback needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Port of the Open Inference Protocol over gRPC; 0 takes a free one.", show_default="off"
        ),
    ] = None,
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
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The model's name in the API; repeat for more, the first is the main one.",
            show_default="MODEL's last part",
        ),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A file of keys, one a line, with limits if wanted; clients must send one of them.",
            show_default="LLMKIT_API_KEY, if set",
        ),
    ] = None,
    ssl_certfile: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Speak HTTPS with this certificate and chain (PEM).", show_default="HTTP"),
    ] = None,
    ssl_keyfile: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The certificate's key (PEM).", show_default="in --ssl-certfile"),
    ] = None,
    ssl_ca_certs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Clients must show a certificate that one of these has signed (PEM).",
            show_default="none asked for",
        ),
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Let /metrics be read without a key, by those who cannot send one.")
    ] = False,
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long running requests may take after SIGTERM.")
    ] = 30.0,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a request may take; its own `timeout` may be shorter.",
            show_default="any time",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", help="Requests that may wait beyond --max-num-seqs; more get 429.")
    ] = 1024,
    max_waiting_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that prompts without an answer may have together; 0: any number.")
    ] = 1 << 20,
    engine_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Silence after which an engine with requests counts as hung, 5 times that while it computes; 0: none.",
        ),
    ] = 60.0,
    restart: Annotated[
        int, typer.Option(metavar="N", help="Start an engine that died or hung again, up to N times in an hour.")
    ] = 0,
    pooling: Annotated[
        Literal["last", "mean"] | None,
        typer.Option(
            metavar="KIND",
            help="last or mean: what embeddings are made of, the last token's hidden state or the mean of all.",
            show_default="the checkpoint's, else last",
        ),
    ] = None,
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Do not keep what prompts begin with for later ones.")
    ] = False,
    prefix_cache_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep long prefixes that requests share in this private folder, for after a restart too.",
            show_default="memory only",
        ),
    ] = None,
    prefix_cache_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes in --prefix-cache-dir; those used last stay.")
    ] = "10GiB",
    response_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for answers to deterministic requests, which the same request then gets at once.",
            show_default="none",
        ),
    ] = None,
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
    lora_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Let clients load and unload the LoRA adapters of this folder while the server runs.",
            show_default="none",
        ),
    ] = None,
    dp: Annotated[
        int, typer.Option("--dp", metavar="N", help="Replicas of the model on this machine, behind the one port.")
    ] = 1,
    max_loaded: Annotated[
        int, typer.Option(metavar="N", help="Of several models: so many may be loaded at a time.")
    ] = 1,
    idle_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Of several models: unload one that was not asked so long; 0: never."),
    ] = 0.0,
    log_requests: Annotated[
        bool,
        typer.Option("--log-requests", help="Write a line of JSON to stderr for each request, without its text."),
    ] = False,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send a span for each request to this collector of OpenTelemetry, by OTLP over HTTP.",
            show_default="none",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show how memory would be divided and what fits, load nothing, and stop.")
    ] = False,
    device: DeviceOption = "auto",
) -> int:
    """Serve checkpoints over the OpenAI API, with continuous batching. Ctrl-C or SIGTERM stops it gracefully."""
    model, more, served_model_name = local_copies(output, model, more, served_model_name)
    given = locals()
    in_range("--max-loaded", max_loaded, 1)
    in_range("--idle-timeout", idle_timeout, 0)
    models = named_models(model, more or [])
    if models:
        single = {"--lora": lora, "--lora-dir": lora_dir, "--served-model-name": served_model_name, "--plan": plan}
        single["--grpc-port"] = grpc_port is not None
        for option in (option for option, wanted in single.items() if wanted):
            raise UsageError(f"{option} is for one model, and there are several", todo="Write NAME=MODEL for a name")
    options = server_options(given, output.debug)
    if plan:
        return _plan(output, model, options.engine)
    from llmkit.runtime.server.age import process_age
    from llmkit.runtime.server.serve import run_server

    began = time.perf_counter() - process_age()
    if models:
        from llmkit.runtime.server.router.serve import run_models

        return run_models(
            options,
            models,
            max_loaded,
            idle_timeout,
            lambda text: output.message(f"llmkit serve: {text}"),
            lambda facts: output.result(facts, lambda console: None),
            began,
        )
    return run_server(
        options,
        lambda text: output.message(f"llmkit serve: {text}"),
        lambda facts: _ready(output, facts),
        began,
    )


def server_options(given: Mapping[str, Any], debug: bool = False) -> ServeOptions:
    """What `serve`'s parameters come to. Raises UsageError, InputError."""
    names = list(dict.fromkeys(given["served_model_name"] or []))
    for name, least in (("drain_timeout", 0), ("max_waiting", 0), ("max_waiting_tokens", 0), ("restart", 0)):
        in_range(f"--{name.replace('_', '-')}", given[name], least)
    if given["request_timeout"] is not None:
        in_range("--request-timeout", given["request_timeout"], 0.001, 86_400)
    in_range("--engine-timeout", given["engine_timeout"] or 1, 1)
    if given["lora_dir"] is not None and not Path(given["lora_dir"]).is_dir():
        raise InputError(f"--lora-dir {given['lora_dir']} is no directory", "A directory of adapters was expected")
    as_given = (
        "model", "host", "port", "drain_timeout", "request_timeout", "max_waiting", "max_waiting_tokens",
        "engine_timeout", "restart", "log_requests", "open_metrics", "otlp_traces_endpoint", "grpc_port", "pooling",
    )  # fmt: skip
    return ServeOptions(
        **{name: given[name] for name in as_given},
        lora_dir=_path(given["lora_dir"]),
        prefix_cache_dir=_path(given["prefix_cache_dir"]),
        prefix_cache_size=parse_size("--prefix-cache-size", given["prefix_cache_size"]) or 0,
        response_cache=parse_size("--response-cache", given["response_cache"]) or 0,
        api_key_file=_path(given["api_key_file"]),
        ssl_certfile=_path(given["ssl_certfile"]),
        ssl_keyfile=_path(given["ssl_keyfile"]),
        ssl_ca_certs=_path(given["ssl_ca_certs"]),
        served_model_name=names[0] if names else None,
        aliases=tuple(names[1:]),
        debug=debug,
        engine=engine_options(given, names or [given["model"]]),
    )


def serve_options(model: str, name: str, words: list[str], api_key_file: str | None) -> ServeOptions:
    """What `llmkit serve MODEL WORDS` would serve, under another name. Raises what the command line would."""
    from llmkit.cli.main import app

    command: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given = command.make_context("serve", [model, *words]).params
    return server_options(given | {"served_model_name": [name], "api_key_file": api_key_file})


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def engine_options(given: Mapping[str, Any], names: list[str]) -> EngineOptions:
    """The engine's options from `serve`'s parameters. names: of the model itself. Raises: UsageError."""
    in_range("--max-num-seqs", given["max_num_seqs"], 1)
    if given["max_num_batched_tokens"] is not None:
        in_range("--max-num-batched-tokens", given["max_num_batched_tokens"], 1)
    for name in ("tp", "pp", "ep"):
        in_range(f"--{name}", given[name], 1)
    in_range("--speculate", given["speculate"], 0, 64)
    in_range("--gpu-memory-utilization", given["gpu_memory_utilization"], 0.05, 1)
    in_range("--dp", given["dp"], 1, 64)
    as_given = ("dtype", "device", "max_num_seqs", "max_num_batched_tokens", "kv_cache_dtype", "gpu_memory_utilization")
    return EngineOptions(
        **{name: given[name] for name in (*as_given, "draft_model", "tp", "pp", "ep", "dp")},
        max_model_len=parse_count("--max-model-len", given["max_model_len"]),
        kv_cache_memory=parse_size("--kv-cache-memory", given["kv_cache_memory"]),
        cpu_offload=parse_size("--cpu-offload", given["cpu_offload"]) or 0,
        prefix_cache=not given["no_prefix_cache"],
        speculate=given["speculate"] or (4 if given["draft_model"] else 0),
        adapters=_adapters(given["lora"] or [], names),
    )


def named_models(model: str, more: list[str]) -> dict[str, str]:
    """The models of `serve [NAME=]MODEL ...` by name; none when there is one without a name. Raises: UsageError."""
    if not more and ("=" not in model or Path(model).exists()):
        return {}
    models: dict[str, str] = {}
    for one in (model, *more):
        name, equals, reference = one.partition("=")
        if not equals or Path(one).exists():
            name, reference = default_name(one), one
        if not name or not reference:
            raise UsageError(f"{one!r} is no NAME=MODEL", "A name and a model with an equals sign between them")
        if name in models:
            raise UsageError(f"two models have the name {name!r}", todo=f"Write OTHER={reference}")
        models[name] = reference
    return models


def _adapters(given: list[str], names: list[str]) -> dict[str, str]:
    """--lora's adapters by name."""
    adapters: dict[str, str] = {}
    for one in given:
        name, _, directory = one.partition("=")
        if not name or not directory:
            raise UsageError(
                f"--lora {one!r} is no NAME=DIR", "A name and a directory with an equals sign between them"
            )
        if name in adapters or name in names:
            raise UsageError(f"--lora {one!r}: the name {name!r} is given twice", "A name of its own for each model")
        if not Path(directory).is_dir():
            raise InputError(f"--lora {one}: {directory} is no directory", "An adapter as peft saves it was expected")
        adapters[name] = directory
    return adapters


def _plan(output: Output, model: str, engine: EngineOptions) -> int:
    from llmkit.checkpoint.source import open_checkpoint
    from llmkit.runtime.load import plan_engine

    document = {"model": model} | plan_engine(open_checkpoint(model), engine).as_dict()
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
