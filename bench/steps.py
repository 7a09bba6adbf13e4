"""Times of single steps of random-weight models in real shapes, beside the memory-bandwidth floor, and what an engine
that is full of requests gives.

`make gpu` runs it as `python -m llmkit.bench.steps`; nothing is read from or written to a checkpoint.
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

from llmkit.checkpoint.quantized import QuantizedWeight, Scheme
from llmkit.kernels.attention import AttentionBatch
from llmkit.kernels.experts import shelve
from llmkit.kernels.rounding import FP8
from llmkit.model.decoder import Decoder
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.model.linear import Linear, PackedLinear, Rounding, serving_linear
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.graphs import CudaGraph, Graph, Graphs
from llmkit.runtime.engine.types import EngineConfig, SamplingParams

BLOCK = 16  # tokens of a block of the KV cache

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(
    architecture: str, kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
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


SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _config(
        "LlamaForCausalLM", "llama", 576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True
    ),
    "Qwen3-0.6B": _config(
        "Qwen3ForCausalLM", "qwen3", 1024, 3072, 28, 16, 8, vocab_size=151936, head_dim=128, tie_word_embeddings=True
    ),
    "Qwen3-8B": _config(
        "Qwen3ForCausalLM", "qwen3", 4096, 12288, 36, 32, 8, vocab_size=151936, head_dim=128
    ),
    "Llama-3.1-8B": _config(
        "LlamaForCausalLM", "llama", 4096, 14336, 32, 32, 8, vocab_size=128256, rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
    ),
    "Qwen3-30B-A3B": _config(
        "Qwen3MoeForCausalLM", "qwen3_moe", 2048, 6144, 48, 32, 4, vocab_size=151936, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
}  # fmt: skip


WEIGHTS: dict[str, Scheme | None] = {
    "bf16": None,
    "fp8": Scheme(8, kind="float", inputs="token"),
    "int8": Scheme(8, inputs="token"),
    "int4": Scheme(4, 128),
}


@dataclass(frozen=True)
class StepTime:
    """One measured step. The floor is bytes that must be read (weights and KV) over the measured copy bandwidth.

    Of a mixture of experts they are those of as many experts as its tokens choose, when all are as likely.
    """

    model: str
    weights: str  # a key of WEIGHTS
    kind: str  # "decode" or "prefill"
    batch: int  # sequences
    tokens: int  # of this step
    context: int  # tokens per sequence
    step_ms: float
    floor_ms: float


def random_model(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, scheme: Scheme | None = None, seed: int = 0
) -> Decoder:
    """A decoder of this shape with small random weights, made on the device; linear layers as `scheme` stores them."""
    generator = torch.Generator(device).manual_seed(seed)

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(0.02)

    rows = parameters(spec)
    shelves: dict[str, list[torch.Tensor]] = {}
    linears: dict[str, Linear] = {}
    for row in rows if scheme else ():
        if row.linear and scheme and row.expert is None:
            rounding = None if scheme.inputs == "none" else Rounding(scheme.kind)
            linears[row.module] = serving_linear(
                [random_weight(row.shape, scheme, device)], None, rounding, dtype, device
            )
    made = {row.name: weights(row.shape) for row in rows if row.expert is None and row.module not in linears}
    for row in rows:
        if row.expert is not None and spec.experts is not None:
            made[row.name] = shelve(shelves, row.name, weights(row.shape), spec.experts.count)
    return Decoder(spec, made, None, linears)


def random_weight(shape: tuple[int, ...], scheme: Scheme, device: torch.device) -> QuantizedWeight:
    """Random codes [out, in] with small scales."""
    out, columns = shape
    bits = torch.randint(0, 1 << scheme.bits, (out, columns), device=device)
    codes = (bits % 120).to(torch.uint8).view(FP8) if scheme.kind == "float" else bits.to(torch.uint8)
    scales = torch.full((out, scheme.groups(columns)), 1e-3, device=device)
    return QuantizedWeight(
        codes, scales, torch.full(scales.shape, scheme.half, dtype=torch.uint8, device=device), scheme
    )


class Direct:
    """In the place of a CUDA graph where there is no GPU."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        run()


@torch.inference_mode()
def measure(
    name: str, weights: str, model: Decoder, sequences: int, new: int, context: int, bandwidth: float,
    kv_dtype: str | None = None, repeats: int = 20,
) -> StepTime:  # fmt: skip
    """Time a step in which `sequences` requests of `context` tokens each compute their last `new` tokens; decode steps
    as graphs, from token ids to the most probable ids."""
    device, per = model.device, -(-context // BLOCK)
    tables = [list(range(s * per, (s + 1) * per)) for s in range(sequences)]
    caches = [model.new_cache(per * sequences + 1, BLOCK, kv_dtype) for _ in model.layers]
    tokens = torch.randint(0, model.spec.vocab, (sequences * new,), device=device)
    if new == 1 and Graphs(model, caches, per, BLOCK, sequences).possible:
        graph = Graph(model, caches, sequences, per, BLOCK, CudaGraph if device.type == "cuda" else Direct)
        graph.set([context - 1] * sequences, [context] * sequences, {None: tables})
        taken = time_ms(lambda: graph.run(tokens), device, repeats)
    else:
        batch = AttentionBatch.build([new] * sequences, [context] * sequences, {None: tables}, BLOCK, device)
        positions = torch.arange(context - new, context, device=device).repeat(sequences)
        last = torch.arange(1, sequences + 1, device=device) * new - 1

        def step() -> None:
            model.logits(model(tokens, positions, batch, caches)[last]).argmax(-1)

        taken = time_ms(step, device, repeats)
    kv = sequences * context * model.spec.kv_elements_per_token * caches[0].kv.element_size()
    floor_ms = (_bytes_read(model, sequences * new) + kv) / bandwidth * 1e3
    kind = "decode" if new == 1 else "prefill"
    if kv_dtype:
        weights += f", {kv_dtype} KV"
    return StepTime(name, weights, kind, sequences, sequences * new, context, taken, floor_ms)


def saturated(model: Decoder, requests: int, prompt: int, output: int, kv_dtype: str | None = None) -> float:
    """Output tokens a second of an engine with so many requests at once, all of one length, once it is warm."""
    longest = prompt + output
    config = EngineConfig(
        longest, requests * -(-longest // BLOCK), model.device, model.dtype, max_num_seqs=requests, block_size=BLOCK,
        windows=tuple(model.spec.windows), kv_dtype=kv_dtype, prefix_cache=False, ahead=model.device.type == "cuda",
    )  # fmt: skip
    engine = Engine(model, config, ())
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    prompts = torch.randint(0, model.spec.vocab, (requests, prompt)).tolist()
    engine.generate(prompts, replace(sampling, max_tokens=2))  # compiles, and makes the graphs
    began = time.perf_counter()
    answers = engine.generate(prompts, sampling)
    return sum(map(len, answers)) / (time.perf_counter() - began)


def time_ms(
    run: Callable[[], object], device: torch.device, repeats: int, before: Callable[[], object] = lambda: None
) -> float:
    """The median milliseconds of `run`, each after `before`, by CUDA events on a GPU and by the clock elsewhere."""
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
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size_bytes: int = 1 << 30) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / (time_ms(lambda: target.copy_(source), device, 10) / 1e3)


def _bytes_read(model: Decoder, tokens: int) -> float:
    """Of all weights that a step of so many tokens multiplies with."""
    experts, chosen = model.spec.experts, 1.0
    if experts is not None:
        chosen -= (1 - experts.per_token / experts.count) ** tokens
    total = float(model.head.weight.nbytes)
    for layer in model.layers:
        for name, one in layer.linears.items():
            size = one.product.nbytes if isinstance(one, PackedLinear) else one.weight.nbytes
            total += size * chosen if ".experts." in name else size
    return total


def main() -> int:
    """Measure every shape that was asked for; a table on stderr, JSON on stdout. Exit code 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m llmkit.bench.steps", description=main.__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--weights", nargs="+", default=["bf16"], choices=list(WEIGHTS), help="default: bf16")
    parser.add_argument(
        "--saturate", nargs="+", default=[], metavar="NAME:WEIGHTS", help="also fill an engine of these"
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth(device)
    rows, rates, failed = [], [], list[str]()
    for name, weights in product(arguments.models, arguments.weights):
        if weights != "bf16" and "num_experts" in SHAPES[name]:  # experts stay dense
            continue
        model = random_model(model_spec(SHAPES[name]), dtype, device, WEIGHTS[weights])
        shapes: list[tuple[int, int, int, str | None]] = [(batch, 1, 1024, None) for batch in (1, 8, 32, 128)]
        shapes.append((1, 4096, 4096, None))
        if weights == "fp8":
            shapes.append((128, 1, 1024, "fp8"))
        for sequences, new, context, kv_dtype in shapes:
            try:
                row = measure(name, weights, model, sequences, new, context, bandwidth, kv_dtype)
            except Exception as error:  # the others are worth their time all the same
                failed.append(f"{name}, {weights}, {sequences} x {new} of {context}: {type(error).__name__}: {error}")
                sys.stderr.write(f"failed: {failed[-1]}\n")
                continue
            rows.append(row)
            rate = row.tokens / row.step_ms * 1e3
            sys.stderr.write(
                f"{name:14} {row.weights:12} {row.kind:8} batch {sequences:4} context {context:5}  "
                f"{row.step_ms:9.3f} ms  floor {row.floor_ms:7.3f} ms ({row.step_ms / row.floor_ms:5.2f} x)  "
                f"{rate:10.0f} tokens/s\n"
            )
        if f"{name}:{weights}" in arguments.saturate:
            try:
                rate = saturated(model, 256, 128, 2048, "fp8" if weights == "fp8" else None)
            except Exception as error:
                failed.append(f"{name}, {weights}, full engine: {type(error).__name__}: {error}")
                sys.stderr.write(f"failed: {failed[-1]}\n")
                continue
            rates.append({"model": name, "weights": weights, "requests": 256, "output_tps": rate})
            sys.stderr.write(f"{name:14} {weights:12} 256 requests, 128 tokens in, 2,048 out: {rate:10.0f} tokens/s\n")
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
