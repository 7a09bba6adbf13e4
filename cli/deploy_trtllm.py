"""`llmkit deploy trtllm`: a checkpoint on TensorRT-LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from llmkit.cli.deploy import (
    KV_CACHE_TOKENS,
    MAX_MODEL_LEN,
    OUTPUT_FILE,
    SERVER_PORT,
    absolute_model,
    object_name,
    show_file,
)
from llmkit.cli.output import Output
from llmkit.common.options import Argument, Option
from llmkit.runtime.server.serve_options import default_name


@dataclass(frozen=True, kw_only=True)
class TrtllmArguments:
    """What `llmkit deploy trtllm` takes."""

    model: Annotated[
        str,
        Argument(
            "A checkpoint, at a path that the server has, or a hub id.",
            metavar="MODEL",
            is_model=True,
        ),
    ]
    gpu: Annotated[str, Option("The GPUs: h100, b200, l40s ...", metavar="NAME")]
    gpus_per_node: Annotated[
        int, Option("GPUs of the node: the largest TP.", metavar="N", min=1)
    ] = 8
    form: Annotated[
        Literal["options", "command", "container", "kubernetes"],
        Option(
            "options: the YAML file of trtllm-serve's --extra_llm_api_options; command: a shell "
            "script; container: one that runs NVIDIA's image; kubernetes: ConfigMap, Deployment "
            "and Service.",
            metavar="FORM",
        ),
    ] = "options"
    output: Annotated[str | None, OUTPUT_FILE] = None
    name: Annotated[
        str | None,
        Option("The name of objects.", metavar="NAME", unset="MODEL's last part"),
    ] = None
    tokens: Annotated[int, KV_CACHE_TOKENS] = 65_536
    max_model_len: Annotated[int | None, MAX_MODEL_LEN] = None
    max_num_seqs: Annotated[
        int, Option("Largest number of requests in a batch.", metavar="N", min=1)
    ] = 256
    max_num_batched_tokens: Annotated[
        int, Option("Largest number of tokens in a step.", metavar="N", min=1)
    ] = 8192
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        Option("auto: that of the checkpoint, else 16 bits.", choices=("auto", "fp8")),
    ] = "auto"
    image: Annotated[
        str | None, Option("Container image.", metavar="NAME", unset="NVIDIA's release")
    ] = None
    replicas: Annotated[int, Option("Pods of the Deployment.", metavar="N", min=1)] = 1
    port: Annotated[int, SERVER_PORT] = 8000


def trtllm(output: Output, arguments: TrtllmArguments) -> None:
    """Write what starts TensorRT-LLM (trtllm-serve) on one node: its options, and the command,
    container or Kubernetes objects around them.

    It reads 16 bits and, depending on the GPU, what `llmkit quantize --format modelopt` writes;
    other checkpoints are refused with the command that makes one that it reads.
    """
    from llmkit.deploy.trtllm import (
        IMAGE,
        TrtllmDeployment,
        check_checkpoint_loads,
        engine_on,
        render_deployment,
        smallest_tp,
    )
    from llmkit.shard.shard_checkpoint import open_source, validated_spec

    model = arguments.model
    engine = engine_on(arguments.gpu)
    source = open_source(model)
    check_checkpoint_loads(engine, model, source)
    tp = smallest_tp(source, arguments.gpu, arguments.gpus_per_node, arguments.tokens)
    max_model_len = arguments.max_model_len
    if not max_model_len:
        max_model_len = min(arguments.tokens, validated_spec(source).max_position_embeddings)
    quantization = source.checkpoint.quantization
    schemes = quantization.schemes if quantization else ()
    deployment = TrtllmDeployment(
        name=object_name(arguments.name or default_name(model)),
        model=absolute_model(model),
        tp=tp,
        max_seq_len=max_model_len,
        max_batch_size=arguments.max_num_seqs,
        max_num_tokens=arguments.max_num_batched_tokens,
        kv_cache_dtype=arguments.kv_cache_dtype,
        quantization="; ".join(scheme.label for scheme in schemes) or "16 bits",
        replicas=arguments.replicas,
        port=arguments.port,
        image=arguments.image or IMAGE,
    )
    document = {
        "tp": tp,
        "max_model_len": max_model_len,
        "options": deployment.options(),
        "form": arguments.form,
        "output": arguments.output,
        "text": render_deployment(deployment, arguments.form),
    }
    show_file(output, document, f"TP {tp} on {arguments.gpu}")
