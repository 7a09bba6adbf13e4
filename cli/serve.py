"""`llmkit serve`: an OpenAI-compatible server of one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmkit.cli.command import DeviceOption, ModelArgument
from llmkit.cli.output import Output
from llmkit.cli.sizes import in_range, parse_count, parse_size


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
    max_num_batched_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens in one step.")] = 8192,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the KV cache, like 2GiB.", show_default="from the free memory"),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the GPU's memory that may be used.")
    ] = 0.9,
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
    device: DeviceOption = "auto",
) -> int:
    """Serve a checkpoint over the OpenAI API, with continuous batching. Ctrl-C or SIGTERM stops it gracefully."""
    from llmkit.runtime.server.serve import ServeOptions, run_server

    in_range("--max-num-seqs", max_num_seqs, 1)
    in_range("--max-num-batched-tokens", max_num_batched_tokens, 1)
    in_range("--gpu-memory-utilization", gpu_memory_utilization, 0.05, 1)
    in_range("--drain-timeout", drain_timeout, 0)
    return run_server(
        ServeOptions(
            model=model,
            host=host,
            port=port,
            dtype=dtype,
            device=device,
            max_model_len=parse_count("--max-model-len", max_model_len),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=parse_size("--kv-cache-memory", kv_cache_memory),
            gpu_memory_utilization=gpu_memory_utilization,
            served_model_name=served_model_name,
            api_key_file=None if api_key_file is None else Path(api_key_file),
            drain_timeout=drain_timeout,
            debug=output.debug,
        ),
        lambda text: output.message(f"llmkit serve: {text}"),
        lambda facts: output.result(facts, lambda console: None),
    )
