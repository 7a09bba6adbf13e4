"""Times of single steps of random-weight models in real shapes, beside the memory-bandwidth floor.

`make gpu` runs it as `python -m llmkit.bench.steps`; nothing is read from or written to a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmkit.kernels.attention import AttentionBatch
from llmkit.model.decoder import Decoder
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.model.spec import ModelSpec

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
}  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """One measured step. The floor is bytes that must be read (weights and KV) over the measured copy bandwidth."""

    model: str
    kind: str  # "decode" or "prefill"
    batch: int  # sequences
    tokens: int  # of this step
    context: int  # tokens per sequence
    step_ms: float
    floor_ms: float


def random_model(spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Decoder:
    """A decoder of this shape with small random weights, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(0.02)

    return Decoder(spec, {row.name: weights(row.shape) for row in parameters(spec)})


def measure(
    name: str, model: Decoder, sequences: int, new: int, context: int, bandwidth: float, repeats: int = 20
) -> StepTime:
    """Time a step in which `sequences` requests of `context` tokens each compute their last `new` tokens."""
    block_size, device = 16, model.device
    per = -(-context // block_size)
    tables = [range(s * per, (s + 1) * per) for s in range(sequences)]
    batch = AttentionBatch.build([new] * sequences, [context] * sequences, {None: tables}, block_size, device)
    caches = [model.new_cache(per * sequences, block_size) for _ in model.layers]
    tokens = torch.randint(0, model.spec.vocab, (sequences * new,), device=device)
    positions = torch.arange(context - new, context, device=device).repeat(sequences)
    last = torch.arange(1, sequences + 1, device=device) * new - 1

    @torch.inference_mode()
    def step() -> None:
        model.logits(model(tokens, positions, batch, caches)[last]).argmax(-1)

    weights = sum(t.numel() * t.element_size() for t in _tensors(model))
    kv = sequences * context * model.spec.kv_elements_per_token * caches[0].kv.element_size()
    floor_ms = (weights + kv) / bandwidth * 1e3
    kind = "decode" if new == 1 else "prefill"
    return StepTime(name, kind, sequences, sequences * new, context, time_ms(step, device, repeats), floor_ms)


def time_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median milliseconds of `run`, by CUDA events on a GPU and by the clock elsewhere."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(float(start.elapsed_time(stop)))
        else:
            before = time.perf_counter()
            run()
            times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size_bytes: int = 1 << 30) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / (time_ms(lambda: target.copy_(source), device, 10) / 1e3)


def _tensors(model: Decoder) -> list[torch.Tensor]:
    head = [] if model.head.weight is model.embedding else [model.head.weight]
    return head + [model.embedding] * model.spec.tied + [
        linear.weight for layer in model.layers for linear in layer.linears.values()
    ]  # fmt: skip


def main() -> int:
    """Measure every shape that was asked for; a table on stderr, JSON on stdout."""
    parser = argparse.ArgumentParser(prog="python -m llmkit.bench.steps", description=main.__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth(device)
    rows = []
    for name in arguments.models:
        model = random_model(model_spec(SHAPES[name]), dtype, device)
        shapes = [(batch, 1, 1024) for batch in (1, 8, 32, 128)] + [(1, 4096, 4096)]
        for sequences, new, context in shapes:
            row = measure(name, model, sequences, new, context, bandwidth)
            rows.append(row)
            rate = row.tokens / row.step_ms * 1e3
            sys.stderr.write(
                f"{name:14} {row.kind:8} batch {sequences:4} context {context:5}  "
                f"{row.step_ms:9.3f} ms  floor {row.floor_ms:7.3f} ms  {rate:10.0f} tokens/s\n"
            )
        del model
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_bandwidth_bytes_per_s": bandwidth,
        "steps": [asdict(row) for row in rows],
    }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
