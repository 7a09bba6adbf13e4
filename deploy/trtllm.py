"""`llmkit deploy trtllm`: files that start TensorRT-LLM, for checkpoints that it reads.

The options are those of `TorchLlmArgs` in tensorrt_llm/llmapi/llm_args.py, which refuses a field
that it does not know. Names that several versions have were taken (tests/data/trtllm.yaml).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any, Literal

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized_weight import PRE_QUANT_SCALE, Scheme
from llmkit.common.errors import InputError, UsageError
from llmkit.common.yaml_text import yaml_text
from llmkit.deploy.loadable_checkpoints import (
    DEQUANTIZE,
    Engine,
    LoadableFormat,
    check_loads,
    scheme_name,
)
from llmkit.model.checkpoint_tensors import packed_name, scheme_of
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.quant.target_engines import GENERATIONS
from llmkit.shard.layout_capacity import (
    GPUS,
    UTILIZATION,
    gpu_bytes,
    gpu_name,
    smallest_layout,
)
from llmkit.shard.shard_checkpoint import validated_spec
from llmkit.shard.shard_source import ShardSource

IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
# Servers listen on loopback only, because they need no key.
HOST = "127.0.0.1"
TrtllmForm = Literal["options", "command", "container", "kubernetes"]
KvCacheDtype = Literal["auto", "fp8"]
_SOURCE = "TensorRT-LLM 1.2 and later"
# docs/source/models/supported-models.md: those of the PyTorch backend. Others, which its AutoDeploy
# backend has, are not here.
ARCHITECTURES = frozenset(
    {
        "Cohere2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Exaone4ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Glm4MoeForCausalLM",
        "GptOssForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Mistral3ForConditionalGeneration",
        "MixtralForCausalLM",
        "NemotronHForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
    }
)
_FP8_BLOCKS = LoadableFormat("fp8", ("fp8-block",))
_MXFP4 = LoadableFormat("mxfp4", ("mxfp4a16",))
_MXFP4_FP8 = "mxfp4afp8"  # W4A8_MXFP4_FP8
_NVFP4 = "--method gptq --scheme nvfp4 --format modelopt"
_FP8 = "--method rtn --scheme fp8-static --format modelopt"
_INT4 = "--method awq --format modelopt"
# The sizes that its fine-grained mixed GEMM accepts (fpA_intB_gemm_template.h).
_INT4_GROUPS = (64, 128)
# What its kernels run on each generation: the matrix of docs/source/features/quantization.md, and
# for MXFP4 `get_mxfp4_quant_algo` of _torch/model_config.py. Its INT4 is W4A16_AWQ; it knows
# neither AutoAWQ's nor GPTQ's files. Of Model-Optimizer's MXFP4 its linears take W4A8_MXFP4_FP8
# (`get_quant_method` of linear.py; W4A16_MXFP4 is of experts alone), whose product is compiled for
# compute capability 10.0 and 10.3 (`dispatchToArch` of fp4_gemm_template.h). What it reads of
# compressed-tensors differs between versions, and INT8 it takes as FP8; `llmkit convert` makes the
# modelopt format of the same values.
_FORMATS: dict[str, tuple[LoadableFormat, ...]] = {
    "ampere": (LoadableFormat("modelopt", ("w4a16",), group_sizes=_INT4_GROUPS),),
    "ada": (LoadableFormat("modelopt", ("fp8-static", "w4a16"), group_sizes=_INT4_GROUPS),),
    "hopper": (
        LoadableFormat(
            "modelopt", ("fp8-static", "fp8", "fp8-block", "w4a16"), group_sizes=_INT4_GROUPS
        ),
        _FP8_BLOCKS,
        _MXFP4,
    ),
    "blackwell": (
        LoadableFormat("modelopt", ("nvfp4", "fp8-static", "fp8-block", _MXFP4_FP8)),
        _FP8_BLOCKS,
        _MXFP4,
    ),
    "consumer blackwell": (LoadableFormat("modelopt", ("nvfp4", "fp8-static")), _MXFP4),
}
_REMEDIES = {
    "ampere": _INT4,
    "ada": _FP8,
    "hopper": _FP8,
    "blackwell": _NVFP4,
    "consumer blackwell": _NVFP4,
}
# Blackwell GPUs of compute capability 12.0, whose kernels differ from those of 10.0.
_CONSUMER_BLACKWELL = ("rtx5090",)
_BLOCK = 128  # the only size of FP8 blocks that it has


@dataclass(frozen=True, kw_only=True)
class TrtllmDeployment:
    """A model, and how TensorRT-LLM serves it."""

    name: str
    model: str  # an absolute path, or a hub id
    tp: int
    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    kv_cache_dtype: KvCacheDtype
    quantization: str  # for people
    replicas: int = 1
    port: int = 8000
    image: str = IMAGE

    def options(self) -> dict[str, Any]:
        """The fields of `TorchLlmArgs`; the quantization is read from the checkpoint."""
        return {
            "tensor_parallel_size": self.tp,
            "max_batch_size": self.max_batch_size,
            "max_num_tokens": self.max_num_tokens,
            "max_seq_len": self.max_seq_len,
            "enable_chunked_prefill": True,
            "kv_cache_config": {
                "dtype": self.kv_cache_dtype,
                "enable_block_reuse": True,
                "free_gpu_memory_fraction": UTILIZATION,
            },
            "cuda_graph_config": {
                "enable_padding": True,
                "max_batch_size": self.max_batch_size,
            },
        }

    @property
    def is_local(self) -> bool:
        """Whether the model is a path."""
        return self.model.startswith("/")

    def command(self, model: str, options: str, host: str) -> list[str]:
        """The command of the server. model, options: where they are."""
        address = ["--host", host, "--port", str(self.port)]
        return ["trtllm-serve", model, *address, "--extra_llm_api_options", options]


def engine_on(gpu: str) -> Engine:
    """TensorRT-LLM on a GPU, by its name or the beginning of it.

    Raises UsageError for a size, an unknown GPU, and one that is too old.
    """
    if gpu[:1].isdigit():
        raise UsageError(
            f"--gpu {gpu}: which checkpoints TensorRT-LLM reads depends on the GPU",
            f"One of {', '.join(GPUS)} was expected",
        )
    name = gpu_name(gpu).partition("-")[0]
    generation = GENERATIONS.get(name, "")
    if name in _CONSUMER_BLACKWELL:
        generation = "consumer blackwell"
    if generation not in _FORMATS:
        raise UsageError(
            f"--gpu {gpu}: TensorRT-LLM has no kernels for it", "Ampere or later was expected"
        )
    return Engine(
        f"TensorRT-LLM on {name}",
        _FORMATS[generation],
        _REMEDIES[generation],
        ARCHITECTURES,
        _SOURCE,
    )


def smallest_tp(source: ShardSource, gpu: str, gpus_per_node: int, tokens: int) -> int:
    """The smallest TP on one node that holds the weights and a KV cache of `tokens` tokens.

    Raises InputError when no size does.
    """
    tp, pp = smallest_layout(source, gpu_bytes(gpu), gpus_per_node, tokens)
    if pp > 1:
        raise InputError(
            f"{tokens:,} tokens and the weights do not fit on one node of {gpus_per_node} {gpu}",
            "`llmkit deploy trtllm` starts TensorRT-LLM on one node",
            "Name a larger GPU, more of them, or fewer --tokens; `llmkit deploy vllm` writes what"
            " starts vLLM on several nodes",
        )
    return tp


def check_checkpoint_loads(engine: Engine, model: str, source: ShardSource) -> None:
    """Raises InputError, with a way out, for a checkpoint that TensorRT-LLM does not read.

    It concatenates q, k and v, and gate and up, and wants them quantized in the same way.
    """
    checkpoint = source.checkpoint
    if check_loads(engine, model, checkpoint) is None:
        return
    quantization = checkpoint.quantization
    remedy = f"Run `llmkit quantize {shlex.quote(model)} {engine.remedy} -o DIR`"
    for parameter in parameters(validated_spec(source)):
        names = parameter.source_names
        schemes = [scheme_of(parameter, name, quantization) for name in names]
        for name, scheme in zip(names, schemes, strict=True):
            sizes = (scheme.block_rows, scheme.group_size) if scheme else ()
            if scheme and scheme_name(scheme) == _MXFP4_FP8 and parameter.expert is not None:
                raise InputError(
                    f"{name} is an expert in {scheme.label}",
                    f"Only how linears of {engine.name} load it is known",
                    remedy,
                )
            if scheme and scheme.kind == "int":
                _check_int4(engine, checkpoint, parameter, name, scheme, model)
            if scheme and scheme.block_rows > 1 and sizes != (_BLOCK, _BLOCK):
                raise InputError(
                    f"{name} has blocks of {scheme.block_rows} x {scheme.group_size}",
                    f"{engine.name} has blocks of {_BLOCK} x {_BLOCK} only",
                    remedy,
                )
        if len(set(schemes)) > 1:
            labels = [scheme.label if scheme else "16 bits" for scheme in schemes]
            raise InputError(
                f"{names[0]} has {labels[0]}, and others that are one with it in {engine.name}"
                f" have {' and '.join(sorted(set(labels[1:]) - {labels[0]}))}",
                "The same for all of them was expected",
                remedy,
            )
        if schemes[0] is None or schemes[0].scale_format != "e4m3":
            continue
        for suffix in ("weight_scale_2", "input_scale"):
            scales = {
                name: float(checkpoint.read(f"{name.removesuffix('.weight')}.{suffix}"))
                for name in names
            }
            if len(set(scales.values())) > 1:
                found = ", ".join(f"{name}: {value:.6g}" for name, value in scales.items())
                raise InputError(
                    f"The {suffix} of linears that are one in {engine.name} differ ({found})",
                    "The same for all of them was expected",
                    remedy,
                )


def _check_int4(
    engine: Engine,
    checkpoint: Checkpoint,
    parameter: Parameter,
    name: str,
    scheme: Scheme,
    model: str,
) -> None:
    """Raises InputError for an INT4 weight that TensorRT-LLM would not load, or load wrongly.

    It reads the pre_quant_scale of a linear that it loads alone, which must be there. It ignores
    that of q, k and v, and of gate and up.
    """
    command = f"Run `llmkit quantize {shlex.quote(model)}"
    if parameter.expert is not None:
        raise InputError(
            f"{name} is INT4, and {engine.name} has no INT4 experts with inputs in 16 bits",
            "Experts in FP8 or 16 bits were expected",
            f"{command} {DEQUANTIZE if engine.remedy == _INT4 else engine.remedy} -o DIR`",
        )
    if scheme.group_size not in _INT4_GROUPS:
        sizes = " or ".join(map(str, _INT4_GROUPS))
        raise InputError(
            f"{name} has groups of {scheme.group_size}",
            f"{engine.name} has INT4 in groups of {sizes}",
            f"{command} {_INT4} --group-size {_INT4_GROUPS[0]} -o DIR`",
        )
    scale = packed_name(name, PRE_QUANT_SCALE)
    is_stored = scale in checkpoint.tensors
    if len(parameter.sources) == 1 and not is_stored:
        raise InputError(
            f"{checkpoint.reference} lacks {scale}",
            f"{engine.name} needs it for linears that it does not fuse with others",
            f"{command} {_INT4} -o DIR`, with the original model if there is one",
        )
    if len(parameter.sources) > 1 and is_stored and bool((checkpoint.read(scale) != 1).any()):
        raise InputError(
            f"{scale} is not 1, and {engine.name} ignores it in linears that it fuses",
            "Scales that are in the norm before were expected, as Model-Optimizer exports them",
            f"{command} {_INT4} -o DIR`, with the original model if there is one",
        )


def render_deployment(deployment: TrtllmDeployment, form: TrtllmForm) -> str:
    """The text of a file: options, a shell script, or Kubernetes objects."""
    renderers = {
        "options": _options,
        "command": _script,
        "container": _container_script,
        "kubernetes": _kubernetes_objects,
    }
    return renderers[form](deployment)


def _options(deployment: TrtllmDeployment) -> str:
    body = yaml_text([deployment.options()])
    return (
        f"# {deployment.name}, {deployment.quantization}: trtllm-serve reads the quantization from "
        f"the checkpoint.\n{body}"
    )


def _write_options(deployment: TrtllmDeployment) -> str:
    """The beginning of a shell script: it writes the options to a file."""
    return (
        "#!/bin/sh\nset -e\noptions=$(mktemp)\ncat >\"$options\" <<'END'\n"
        f"{_options(deployment)}END\n"
    )


def _script(deployment: TrtllmDeployment) -> str:
    serve = deployment.command(deployment.model, "$options", HOST)
    return f"{_write_options(deployment)}exec {_join(serve)}\n"


def _container_script(deployment: TrtllmDeployment) -> str:
    """A container that can be reached on this machine only."""
    model = f"/models/{deployment.name}" if deployment.is_local else deployment.model
    weights = "$HOME/.cache/huggingface:/root/.cache/huggingface"
    if deployment.is_local:
        weights = f"{deployment.model}:{model}:ro"
    port = deployment.port
    # The shared memory, locked memory and stack that NVIDIA's guide gives the container.
    limits = ["--ipc", "host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
    run = [
        *("docker", "run", "--rm", "--gpus", str(deployment.tp), *limits),
        *("-p", f"{HOST}:{port}:{port}"),
        *("-v", "$options:/options.yaml:ro", "-v", weights),
        deployment.image,
        *deployment.command(model, "/options.yaml", "0.0.0.0"),  # noqa: S104 # in the container
    ]
    return f"{_write_options(deployment)}exec {_join(run)}\n"


def _join(words: list[str]) -> str:
    """A command line. A word that begins with a variable keeps it."""
    return " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in words)


def _kubernetes_objects(deployment: TrtllmDeployment) -> str:
    """The options, a Deployment, and a Service inside the cluster."""
    labels = {"app": deployment.name}
    # The last part of the path is the model's name in the API.
    model = f"/models/{deployment.name}" if deployment.is_local else deployment.model
    probe = {"httpGet": {"path": "/health", "port": deployment.port}}
    mounts = [
        {"name": "options", "mountPath": "/etc/trtllm", "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "options", "configMap": {"name": deployment.name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ]
    if deployment.is_local:
        mounts.append({"name": "models", "mountPath": model, "readOnly": True})
        claim = {"claimName": deployment.name, "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
    container = {
        "name": "trtllm",
        "image": deployment.image,
        "command": deployment.command(
            model,
            "/etc/trtllm/options.yaml",
            "0.0.0.0",  # noqa: S104 # probes and the Service come from other addresses
        ),
        "ports": [{"containerPort": deployment.port}],
        "resources": {"limits": {"nvidia.com/gpu": str(deployment.tp)}},
        # Loading, autotuning and CUDA graphs may take half an hour.
        "startupProbe": probe | {"periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": probe | {"periodSeconds": 10},
        "volumeMounts": mounts,
    }
    template = {
        "metadata": {"labels": labels},
        "spec": {"containers": [container], "volumes": volumes},
    }
    spec = {
        "replicas": deployment.replicas,
        "selector": {"matchLabels": labels},
        # A new pod would wait for the GPUs of the old one.
        "strategy": {"type": "Recreate"},
        "template": template,
    }
    port = {"name": "http", "port": deployment.port, "targetPort": deployment.port}
    metadata = {"name": deployment.name}
    objects = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"options.yaml": _options(deployment)},
        },
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [port]},
        },
    ]
    return yaml_text(objects)
