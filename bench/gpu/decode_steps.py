"""Times of decode and prefill steps beside their memory-bandwidth floor, and engine throughput.

The models have random weights in real shapes: no checkpoint is read or written. `make gpu` runs it
as `python -m llmkit.bench.gpu.decode_steps`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.fused_experts import copy_to_expert_stack
from llmkit.model.decoder import Decoder
from llmkit.model.families import model_spec
from llmkit.model.linear import ActivationQuant, Linear, PackedLinear, serving_linear
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.cuda_graphs import CudaGraph, CudaGraphRunner, DecodeGraph
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.sampling_params import SamplingParams

BLOCK_SIZE = 16  # tokens of a block of the KV cache

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(
    architecture: str,
    kind: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        **more,
    }


MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _config(
        "LlamaForCausalLM", "llama", 576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True
    ),
    "Qwen3-0.6B": _config(
        "Qwen3ForCausalLM",
        "qwen3",
        1024,
        3072,
        28,
        16,
        8,
        vocab_size=151936,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Qwen3-8B": _config(
        "Qwen3ForCausalLM", "qwen3", 4096, 12288, 36, 32, 8, vocab_size=151936, head_dim=128
    ),
    "Llama-3.1-8B": _config(
        "LlamaForCausalLM",
        "llama",
        4096,
        14336,
        32,
        32,
        8,
        vocab_size=128256,
        rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
    ),
    "Qwen3-30B-A3B": _config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        2048,
        6144,
        48,
        32,
        4,
        vocab_size=151936,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}


WEIGHT_SCHEMES: dict[str, Scheme | None] = {
    "bf16": None,
    "fp8": Scheme(8, kind="float", inputs="token"),
    "int8": Scheme(8, inputs="token"),
    "int4": Scheme(4, 128),
}


@dataclass(frozen=True)
class StepTime:
    """One measured step, and the time to read its bytes at the measured copy bandwidth (the floor).

    The bytes are the weights and the KV cache. Of a mixture of experts, they are those of the
    experts that the tokens choose when all experts are equally likely.
    """

    model: str
    weights: str  # a key of WEIGHT_SCHEMES
    kind: str  # "decode" or "prefill"
    batch: int  # number of sequences
    tokens: int  # computed in this step
    context: int  # tokens of each sequence
    step_ms: float
    floor_ms: float


def random_model(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme | None = None,
    seed: int = 0,
) -> Decoder:
    """A decoder with small random weights, made on the device.

    scheme: quantizes the linear layers, experts excepted; None: no quantization.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(0.02)

    rows = parameters(spec)
    expert_stacks: dict[str, list[torch.Tensor]] = {}
    linears: dict[str, Linear] = {}
    for row in rows:
        if scheme and row.is_linear and row.expert is None:
            activation_quant = None if scheme.inputs == "none" else ActivationQuant(scheme.kind)
            linears[row.module] = serving_linear(
                [random_weight(row.shape, scheme, device)], None, activation_quant, dtype, device
            )
    tensors = {
        row.name: weights(row.shape)
        for row in rows
        if row.expert is None and row.module not in linears
    }
    for row in rows:
        if row.expert is not None and spec.moe is not None:
            tensors[row.name] = copy_to_expert_stack(
                expert_stacks, row.name, weights(row.shape), spec.moe.num_experts
            )
    return Decoder(spec, tensors, None, linears)


def random_weight(shape: tuple[int, ...], scheme: Scheme, device: torch.device) -> QuantizedWeight:
    """A random quantized weight [out, in] with small scales."""
    out_features, in_features = shape
    q = torch.randint(0, 1 << scheme.bits, (out_features, in_features), device=device)
    # FP8 bit patterns below 120 are finite.
    q = (q % 120).to(torch.uint8).view(FP8) if scheme.kind == "float" else q.to(torch.uint8)
    scales = torch.full((out_features, scheme.groups(in_features)), 1e-3, device=device)
    zeros = torch.full(scales.shape, scheme.half, dtype=torch.uint8, device=device)
    return QuantizedWeight(q, scales, zeros, scheme)


class EagerGraph:
    """Stands in for a CUDA graph without a GPU: it runs the function again."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        run()


@torch.inference_mode()
def measure_step(
    name: str,
    weights: str,
    model: Decoder,
    num_sequences: int,
    query_len: int,
    context: int,
    bandwidth: float,
    kv_cache_dtype: str | None = None,
    repeats: int = 20,
) -> StepTime:
    """Time a step, from token ids to the most probable next tokens.

    It computes the last `query_len` of each request's `context` tokens. Decode steps (`query_len`
    1) run as CUDA graphs.
    """
    device = model.device
    blocks = -(-context // BLOCK_SIZE)  # of a sequence
    block_tables = [list(range(s * blocks, (s + 1) * blocks)) for s in range(num_sequences)]
    caches = [
        model.new_kv_cache(blocks * num_sequences + 1, BLOCK_SIZE, kv_cache_dtype)
        for _ in model.layers
    ]
    tokens = torch.randint(0, model.spec.vocab_size, (num_sequences * query_len,), device=device)
    if query_len == 1 and CudaGraphRunner(model, caches, blocks, BLOCK_SIZE, num_sequences).enabled:
        graph_type = CudaGraph if device.type == "cuda" else EagerGraph
        graph = DecodeGraph(model, caches, num_sequences, blocks, BLOCK_SIZE, graph_type)
        graph.fill([context - 1] * num_sequences, [context] * num_sequences, {None: block_tables})
        step_ms = time_ms(lambda: graph.run(tokens), device, repeats)
    else:
        batch = AttentionBatch.build(
            [query_len] * num_sequences,
            [context] * num_sequences,
            {None: block_tables},
            BLOCK_SIZE,
            device,
        )
        positions = torch.arange(context - query_len, context, device=device).repeat(num_sequences)
        last_rows = torch.arange(1, num_sequences + 1, device=device) * query_len - 1

        def step() -> None:
            model.logits(model(tokens, positions, batch, caches)[last_rows]).argmax(-1)

        step_ms = time_ms(step, device, repeats)
    kv_bytes = (
        num_sequences * context * model.spec.kv_elements_per_token * caches[0].kv.element_size()
    )
    floor_ms = (_bytes_read(model, num_sequences * query_len) + kv_bytes) / bandwidth * 1e3
    kind = "decode" if query_len == 1 else "prefill"
    if kv_cache_dtype:
        weights += f", {kv_cache_dtype} KV"
    return StepTime(
        name, weights, kind, num_sequences, num_sequences * query_len, context, step_ms, floor_ms
    )


def full_engine_tps(
    model: Decoder, requests: int, prompt: int, output: int, kv_cache_dtype: str | None = None
) -> float:
    """Output tokens per second of a warm engine that runs `requests` requests at once.

    prompt, output: tokens of each request.
    """
    max_model_len = prompt + output
    config = EngineConfig(
        max_model_len,
        requests * -(-max_model_len // BLOCK_SIZE),
        model.device,
        model.dtype,
        max_num_seqs=requests,
        block_size=BLOCK_SIZE,
        sliding_windows=tuple(model.spec.sliding_windows),
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=False,
        async_scheduling=model.device.type == "cuda",
    )
    engine = Engine(model, config, ())
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    prompts = torch.randint(0, model.spec.vocab_size, (requests, prompt)).tolist()
    engine.generate(prompts, replace(sampling, max_tokens=2))  # warm-up: kernels and graphs
    start_s = time.perf_counter()
    outputs = engine.generate(prompts, sampling)
    return sum(map(len, outputs)) / (time.perf_counter() - start_s)


def time_ms(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> float:
    """The median time of `run` in milliseconds, measured by CUDA events on a GPU.

    before: runs before each repeat and is not measured.
    """
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        before()
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(float(start.elapsed_time(stop)))
        else:
            start_s = time.perf_counter()
            run()
            times.append((time.perf_counter() - start_s) * 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size_bytes: int = 1 << 30) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / (time_ms(lambda: target.copy_(source), device, 10) / 1e3)


def _bytes_read(model: Decoder, tokens: int) -> float:
    """Bytes of the weights that a step with this many tokens reads."""
    experts = model.spec.moe
    expert_share = 1.0  # of all experts, those that some token chooses
    if experts is not None:
        expert_share -= (1 - experts.num_experts_per_tok / experts.num_experts) ** tokens
    total = float(model.head.weight.nbytes)
    for layer in model.layers:
        for name, linear in layer.linears.items():
            size = (
                linear.kernel.nbytes if isinstance(linear, PackedLinear) else linear.weight.nbytes
            )
            total += size * expert_share if ".experts." in name else size
    return total


def main() -> int:
    """Measure the chosen models: a table on stderr, JSON on stdout. Exit code 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.decode_steps", description=main.__doc__
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODEL_CONFIGS),
        choices=list(MODEL_CONFIGS),
        metavar="NAME",
    )
    parser.add_argument(
        "--weights", nargs="+", default=["bf16"], choices=list(WEIGHT_SCHEMES), help="default: bf16"
    )
    parser.add_argument(
        "--saturate",
        nargs="+",
        default=[],
        metavar="NAME:WEIGHTS",
        help="also measure a full engine of these",
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth(device)
    rows = []
    rates = []
    failed: list[str] = []
    for name, weights in product(arguments.models, arguments.weights):
        if weights != "bf16" and "num_experts" in MODEL_CONFIGS[name]:  # experts are not quantized
            continue
        model = random_model(
            model_spec(MODEL_CONFIGS[name]), dtype, device, WEIGHT_SCHEMES[weights]
        )
        shapes: list[tuple[int, int, int, str | None]] = [
            (batch, 1, 1024, None) for batch in (1, 8, 32, 128)
        ]
        shapes.append((1, 4096, 4096, None))
        if weights == "fp8":
            shapes.append((128, 1, 1024, "fp8"))
        for num_sequences, query_len, context, kv_cache_dtype in shapes:
            try:
                row = measure_step(
                    name,
                    weights,
                    model,
                    num_sequences,
                    query_len,
                    context,
                    bandwidth,
                    kv_cache_dtype,
                )
            except Exception as error:  # the other measurements go on
                step = f"{name}, {weights}, {num_sequences} x {query_len} of {context}"
                failed.append(f"{step}: {type(error).__name__}: {error}")
                sys.stderr.write(f"failed: {failed[-1]}\n")
                continue
            rows.append(row)
            rate = row.tokens / row.step_ms * 1e3
            sys.stderr.write(
                f"{name:14} {row.weights:12} {row.kind:8} batch {num_sequences:4}"
                f" context {context:5}  {row.step_ms:9.3f} ms"
                f"  floor {row.floor_ms:7.3f} ms ({row.step_ms / row.floor_ms:5.2f} x)  "
                f"{rate:10.0f} tokens/s\n"
            )
        if f"{name}:{weights}" in arguments.saturate:
            try:
                rate = full_engine_tps(model, 256, 128, 2048, "fp8" if weights == "fp8" else None)
            except Exception as error:
                failed.append(f"{name}, {weights}, full engine: {type(error).__name__}: {error}")
                sys.stderr.write(f"failed: {failed[-1]}\n")
                continue
            rates.append({"model": name, "weights": weights, "requests": 256, "output_tps": rate})
            sys.stderr.write(
                f"{name:14} {weights:12} 256 requests, 128 tokens in, 2,048 out:"
                f" {rate:10.0f} tokens/s\n"
            )
        del model
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_bandwidth_bytes_per_s": bandwidth,
        "steps": [asdict(row) for row in rows],
        "saturated": rates,
        "failed": failed,
    }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
