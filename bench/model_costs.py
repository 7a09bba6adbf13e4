"""The bytes and operations of a model's tokens, and their share of the measured peaks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmkit.bench.bench_metrics import RequestTimeline
from llmkit.bench.peak_performance import PeakPerformance
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.options import CpuActivations
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import InputType, PackedWeight
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.linear import held_dtype, keeps_weights_packed
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import embedding_tensor, parameters
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_plan import EnginePlan, plan_engine
from llmkit.runtime.memory_plan import weight_bytes

COMPRESSED_BYTES = 1.5  # of a value of `PackedWeight.compressed`


@dataclass(frozen=True)
class ModelCosts:
    """Bytes and operations of one model as it is served. A multiply-add is two operations."""

    dense_bytes: int  # weights that every step reads
    expert_bytes: int  # weights of all experts
    expert_share: float  # the share of the experts that one token uses
    token_flops: float  # linear layers without the LM head, and states, for each token
    head_flops: float  # the LM head, for each sampled token
    context_flops: float  # attention, for each token and each token that it attends to
    kv_bytes: int  # keys and values, for each token
    inputs: str = "float32"  # the dtype of the linear layers' inputs: whose peak the products have
    state_bytes: int = 0  # the recurrent states of a request

    def step_bytes(self, num_requests: float, context_tokens: float) -> float:
        """Bytes that a decode step moves. All experts are taken to be equally likely."""
        used_experts: float = 1 - (1 - self.expert_share) ** num_requests
        kv_bytes = num_requests * context_tokens * self.kv_bytes
        state_bytes = 2 * num_requests * self.state_bytes  # read and written
        return self.dense_bytes + self.expert_bytes * used_experts + kv_bytes + state_bytes

    def flops(self, start: int, stop: int) -> float:
        """Operations of a request's tokens [start, stop). Each attends to itself and all before."""
        attended = (stop * (stop + 1) - start * (start + 1)) / 2
        return (stop - start) * self.token_flops + attended * self.context_flops


def count_model_costs(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: str,
    device: str,
    cpu_activations: CpuActivations = "auto",
) -> ModelCosts:
    """The costs of a checkpoint that is served on "cpu" or "cuda".

    dtype, cpu_activations: as the engine's options.
    """
    plan = plan_engine(
        checkpoint, EngineOptions(device=device, dtype=dtype, cpu_activations=cpu_activations)
    )
    uses_cpu_kernels = plan.device.type == "cpu" and keeps_weights_packed()
    rows = parameters(spec)
    linear = [row for row in rows if row.is_linear and row.expert is None]
    experts = [row for row in rows if row.expert is not None]
    head = [row for row in rows if row.is_lm_head]

    def read_bytes(weights: Sequence[Parameter]) -> int:
        if uses_cpu_kernels:
            return _cpu_read_bytes(checkpoint, weights, plan)
        return weight_bytes(checkpoint, spec, plan.dtype, plan.device, weights)

    dense = read_bytes([*linear, *head])
    if spec.tie_word_embeddings:
        stored = checkpoint.tensors[embedding_tensor(spec)].torch_dtype
        value_bytes = float(plan.dtype.itemsize)
        if uses_cpu_kernels:
            value_bytes = _dense_value_bytes(held_dtype(stored, plan.weight_dtype), plan)
        dense += round(spec.vocab_size * spec.hidden_size * value_bytes)
    inputs = str(plan.dtype).removeprefix("torch.")
    if uses_cpu_kernels:
        inputs = _cpu_inputs(checkpoint, linear, plan)
    return ModelCosts(
        dense,
        read_bytes(experts),
        _expert_share(spec),
        token_flops(spec),
        2.0 * spec.vocab_size * spec.hidden_size,
        4.0 * sum(attention_elements(spec, index) for index in range(len(spec.layers))),
        plan.memory.bytes_per_block // plan.memory.block_size,
        inputs,
        spec.recurrent_bytes_per_sequence(plan.dtype.itemsize),
    )


def _cpu_inputs(checkpoint: Checkpoint, linear: Sequence[Parameter], plan: EnginePlan) -> str:
    """What the inputs of most linear weights are rounded to on a CPU."""
    elements: Counter[str] = Counter()
    for row in linear:
        for source in row.sources:
            stored, scheme = _cpu_weight_type(checkpoint, row, source.name, plan.weight_dtype)
            inputs: InputType = "float32"
            if scheme is not None and scheme.inputs != "none":  # rounded by the checkpoint's rule
                inputs = _multiplied_inputs(stored, scheme)
            else:
                inputs = _inputs_for(stored, plan.cpu_activations)
            elements[inputs] += math.prod(source.shape)
    return elements.most_common(1)[0][0] if elements else "float32"


def _multiplied_inputs(stored: torch.dtype, scheme: Scheme) -> InputType:
    """As what the compiled kernels multiply inputs that the checkpoint's scheme quantizes."""
    if scheme.input_type == "int8":
        is_w8a8 = stored == torch.int8 and scheme.inputs == "token"
        return "int8" if is_w8a8 else "float32"
    if scheme.input_type == "fp4":
        return "int8" if scheme.is_fp4 else "float32"
    return _inputs_for(stored, "bfloat16")


def _inputs_for(stored: torch.dtype, activations: CpuActivations) -> InputType:
    """`cpu_kernels.inputs_for` of weights that are held in this dtype."""
    return cpu_kernels.inputs_for(PackedWeight(torch.empty(0, dtype=stored), (0, 0)), activations)


def _cpu_weight_type(
    checkpoint: Checkpoint, row: Parameter, tensor: str, weight_dtype: torch.dtype
) -> tuple[torch.dtype, Scheme | None]:
    """The dtype in which the compiled kernels hold a weight, uint8 for 4 bits, and its scheme."""
    scheme = scheme_of(row, tensor, checkpoint.quantization)
    if scheme is None:
        return held_dtype(checkpoint.tensors[tensor].torch_dtype, weight_dtype), None
    if scheme.is_fp8:
        return torch.float8_e4m3fn, scheme
    return (torch.int8 if scheme.bits == 8 else torch.uint8), scheme


def _dense_value_bytes(held: torch.dtype, plan: EnginePlan) -> float:
    """Bytes that the compiled kernels read for a value that has no scale.

    Compressed weights have a little more than the 1.5 bytes: less than one unit in a hundred of a
    trained model is stored as it is.
    """
    if cpu_kernels.compresses(held, _inputs_for(held, plan.cpu_activations)):
        return COMPRESSED_BYTES
    return min(4.0, held.itemsize)


def _cpu_read_bytes(checkpoint: Checkpoint, rows: Sequence[Parameter], plan: EnginePlan) -> int:
    """Bytes that the compiled kernels read of these weights: values, scales and zero points.

    Both of the last are float32, one for each row and group. Scales of NVFP4, MXFP4 and MXFP8 have
    a byte, and each row a factor.
    """
    total = 0.0
    for row in rows:
        for source in row.sources:
            stored, scheme = _cpu_weight_type(checkpoint, row, source.name, plan.weight_dtype)
            num_rows, columns = math.prod(source.shape[:-1]), source.shape[-1]
            if scheme is None:
                value_bytes = _dense_value_bytes(stored, plan)
            else:
                value_bytes = 0.5 if scheme.bits <= 4 else 1.0  # 2 and 3 bits are held in 4
                scales = num_rows * scheme.groups(columns)
                if scheme.scale_format != "float":
                    total += scales + 4 * num_rows
                else:
                    total += 4 * scales * (1 if scheme.symmetric else 2)
            total += value_bytes * num_rows * columns
    return round(total)


def attention_elements(spec: ModelSpec, layer: int) -> int:
    """The elements of a token's queries in a layer; 0 without attention.

    With latent attention, of its queries and outputs on average: they attend to latents.
    """
    if spec.layers[layer].mixer == "mla":
        assert spec.mla is not None
        return spec.num_heads * (spec.mla.latent_dim + spec.mla.kv_lora_rank) // 2
    if spec.layers[layer].mixer != "attention":
        return 0
    own = spec.for_layer(layer)
    return own.num_heads * own.head_dim


def token_flops(spec: ModelSpec) -> float:
    """Operations of the linear layers and of recurrent states for one token, without the LM head.

    An element of a state has three multiply-adds: it is read for the key and for the query, and
    written.
    """
    rows = parameters(spec)
    elements = sum(math.prod(row.shape) for row in rows if row.is_linear and row.expert is None)
    elements += round(
        _expert_share(spec) * sum(math.prod(row.shape) for row in rows if row.expert is not None)
    )
    states = 0
    if spec.recurrent is not None:
        states = spec.num_recurrent_layers * math.prod(spec.recurrent.state_shape)
    return 2.0 * (elements + 3 * states)


def _expert_share(spec: ModelSpec) -> float:
    return spec.moe.num_experts_per_tok / spec.moe.num_experts if spec.moe else 0.0


def utilization(
    costs: ModelCosts, peaks: PeakPerformance, timelines: Sequence[RequestTimeline], wall_s: float
) -> dict[str, float]:
    """mbu and mfu of a run, as DEFINITIONS says. No mbu when all requests are for one token."""
    flops = sum(
        costs.flops(t.cached_tokens, t.prompt_tokens + t.output_tokens - 1)
        + t.output_tokens * costs.head_flops
        for t in timelines
    )
    metrics = {"mfu": flops / wall_s / peaks.flops_per_s}
    decoding = [t for t in timelines if t.tpot_s]
    if decoding:
        tpot_s = sum(t.tpot_s or 0.0 for t in decoding) / len(decoding)
        span_s = max(t.arrivals_s[-1] for t in decoding) - min(t.arrivals_s[0] for t in decoding)
        busy_s = sum(t.e2e_s - t.ttft_s for t in decoding)
        # The mean context, weighted by the time that each request decodes.
        weighted_context = sum(
            (t.prompt_tokens + t.output_tokens / 2) * (t.e2e_s - t.ttft_s) for t in decoding
        )
        context_tokens = weighted_context / busy_s
        step_bytes = costs.step_bytes(max(1.0, busy_s / span_s), context_tokens)
        metrics["mbu"] = step_bytes / tpot_s / peaks.bytes_per_s
    return metrics
