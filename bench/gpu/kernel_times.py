"""Times of single GPU kernels, beside a lower bound from their bytes and operations.

The shapes are those of Llama-3.1-8B. `make gpu` runs it as
`python -m llmkit.bench.gpu.kernel_times`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from llmkit.bench.gpu.decode_steps import (
    BLOCK_SIZE,
    WEIGHT_SCHEMES,
    copy_bandwidth,
    random_weight,
    time_ms,
)
from llmkit.kernels.attention import paged_attention, rope_and_cache
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.elementwise import act_and_mul, add_rms_norm
from llmkit.kernels.fused_experts import FusedExperts
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES, KVCache
from llmkit.model.linear import ActivationQuant, Linear, serving_linear
from llmkit.runtime.engine.cuda_graphs import CudaGraph

HEADS = 32
KV_HEADS = 8
DIM = 128
CACHE_BYTES = 256 << 20  # larger than the GPU's caches: writing it clears them
# [out, in] of the linear layers.
LINEAR_SHAPES = {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


# Name, bytes, operations and the launch.
KernelCase = tuple[str, int, int, Callable[[], object]]


@dataclass(frozen=True)
class KernelTime:
    """One measured launch, with cleared caches.

    The floor is the larger of two times: its bytes at the measured copy bandwidth, and its
    operations at the measured rate of a large matrix product.
    """

    kernel: str
    bytes: int
    flops: int
    ms: float
    floor_ms: float


def attention_cases(device: torch.device, scale: int) -> Iterator[KernelCase]:
    """Decode steps and a prefill. scale: divides the sizes."""
    for num_sequences, query_len, context, kv_cache_dtype in (
        (1, 1, 4096, None),
        (32, 1, 4096, None),
        (128, 1, 1024, None),
        (128, 1, 1024, "fp8"),
        (1, 4096, 4096, None),
    ):
        query_len = min(query_len, context // scale)
        context = context // scale
        blocks = -(-context // BLOCK_SIZE)
        block_tables = [range(s * blocks, (s + 1) * blocks) for s in range(num_sequences)]
        batch = AttentionBatch.build(
            [query_len] * num_sequences,
            [context] * num_sequences,
            {None: block_tables},
            BLOCK_SIZE,
            device,
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (2 * KV_HEADS, blocks * num_sequences, BLOCK_SIZE)
        kv = torch.randn(*shape, DIM, device=device, dtype=dtype)
        scales = torch.full((*shape, 1), 0.01, device=device) if kv_cache_dtype else None
        cache = KVCache(kv.to(KV_CACHE_DTYPES[kv_cache_dtype]) if kv_cache_dtype else kv, scales)
        q = torch.randn(num_sequences * query_len, HEADS, DIM, device=device, dtype=dtype)
        num_bytes = num_sequences * context * 2 * KV_HEADS * DIM * cache.kv.element_size()
        attended = query_len * context - query_len * (query_len - 1) // 2  # token pairs
        flops = 4 * num_sequences * HEADS * DIM * attended
        name = f"attention, {num_sequences} x {query_len} queries, context {context}"
        if kv_cache_dtype:
            name += f", {kv_cache_dtype}"
        run = partial(paged_attention, q, cache, batch.metadata(None), DIM**-0.5)
        yield name, num_bytes, flops, run


def linear_cases(device: torch.device, scale: int) -> Iterator[KernelCase]:
    """Linear layers with every scheme of weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape_name, (full_out_features, full_in_features) in LINEAR_SHAPES.items():
        out_features = full_out_features // scale
        in_features = full_in_features // scale
        for weights, scheme in WEIGHT_SCHEMES.items():
            if scheme is None:
                layer = Linear(torch.randn(out_features, in_features, device=device, dtype=dtype))
                weight_bytes = layer.weight.nbytes
            else:
                weight = random_weight((out_features, in_features), scheme, device)
                activation_quant = None if scheme.inputs == "none" else ActivationQuant(scheme.kind)
                layer = serving_linear([weight], None, activation_quant, dtype, device)
                weight_bytes = out_features * in_features * scheme.bits // 8 + weight.scales.nbytes
            for rows in sorted({1, 16, 64, 256, 4096 // scale}):
                x = torch.randn(rows, in_features, device=device, dtype=dtype)
                num_bytes = weight_bytes + (x.numel() + rows * out_features) * x.element_size()
                name = f"{shape_name} [{out_features}, {in_features}], {weights}, {rows} rows"
                yield name, num_bytes, 2 * rows * out_features * in_features, partial(layer, x)


def elementwise_cases(device: torch.device, scale: int) -> Iterator[KernelCase]:
    """The kernels between the linear layers. Operations count as one for each element."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = 4096 // scale
    intermediate = 14336 // scale
    weight = torch.ones(hidden, dtype=dtype, device=device)
    rotation = torch.ones(4096, 1, DIM, device=device)
    for rows in sorted({1, 64, 4096 // scale}):
        x, update, gate_up, qkv = (
            torch.randn(rows, size, device=device, dtype=dtype)
            for size in (hidden, hidden, 2 * intermediate, (HEADS + 2 * KV_HEADS) * DIM)
        )
        blocks = -(-rows // BLOCK_SIZE)
        slots = torch.arange(rows, device=device)
        cache = KVCache(
            torch.zeros(2 * KV_HEADS, blocks, BLOCK_SIZE, DIM, device=device, dtype=dtype)
        )
        cos_sin = (rotation[:rows],) * 2
        heads = qkv.view(rows, -1, DIM)
        runs: dict[str, tuple[int, Callable[[], object]]] = {
            "residual sum and norm": (
                4 * x.nbytes,
                partial(add_rms_norm, x, update, 1.0, weight, 1e-5),
            ),
            "gated activation": (gate_up.nbytes * 3 // 2, partial(act_and_mul, gate_up, "silu")),
            "rotation and cache": (
                2 * qkv.nbytes,
                partial(rope_and_cache, heads, HEADS, None, 1e-5, cos_sin, cache, slots),
            ),
        }
        for name, (size, run) in runs.items():
            yield f"{name}, {rows} rows", size, size // x.element_size(), run


def expert_cases(device: torch.device, scale: int) -> Iterator[KernelCase]:
    """The experts of a layer of Qwen3-30B-A3B, all equally likely. They need a GPU."""
    if device.type != "cuda":
        return
    num_experts = 128
    num_experts_per_token = 8
    hidden = 2048
    intermediate = 768
    dtype = torch.bfloat16
    up = torch.randn(num_experts, 2 * intermediate, hidden, device=device, dtype=dtype)
    down = torch.randn(num_experts, hidden, intermediate, device=device, dtype=dtype)
    experts = FusedExperts(up, down, 0, num_experts, gelu=False)
    for tokens in (1, 8, 32, 128, 4096 // scale):
        weights, expert_ids = torch.rand(tokens, num_experts, device=device).topk(
            num_experts_per_token
        )
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        size = (
            len(expert_ids.unique()) * 3 * hidden * intermediate * x.element_size() + 2 * x.nbytes
        )
        yield (
            f"experts, {tokens} tokens",
            size,
            6 * tokens * num_experts_per_token * hidden * intermediate,
            partial(experts, x, expert_ids, weights),
        )


@torch.inference_mode()
def measure(
    device: torch.device, scale: int = 1, repeats: int = 20
) -> tuple[list[KernelTime], dict[str, str]]:
    """Measure every case. Returns the times, and the errors of failed cases by name.

    scale: divides the sizes, to try it on a CPU. On a GPU every case runs as a CUDA graph, because
    many kernels are faster than their launch by Python.
    """
    bandwidth = copy_bandwidth(device, (1 << 30) // scale**2)
    side = 8192 // scale
    square = torch.randn(
        side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    rate = 2 * side**3 / (time_ms(partial(torch.mm, square, square), device, 10) / 1e3)
    cache_filler = torch.empty(CACHE_BYTES // scale**2, dtype=torch.uint8, device=device)
    rows = []
    failed = {}
    for cases in (attention_cases, linear_cases, elementwise_cases, expert_cases):
        for name, size, flops, run in cases(device, scale):
            floor = max(size / bandwidth, flops / rate) * 1e3
            try:
                ms = time_ms(
                    CudaGraph(run).replay if device.type == "cuda" else run,
                    device,
                    repeats,
                    cache_filler.zero_,
                )
            except Exception as error:  # the other measurements go on
                failed[name] = f"{type(error).__name__}: {error}"
                sys.stderr.write(f"{name:56} failed: {failed[name]}\n")
                continue
            rows.append(KernelTime(name, size, flops, ms, floor))
            sys.stderr.write(
                f"{name:56} {ms:9.4f} ms  floor {floor:9.4f} ms  {floor / ms:5.0%} of it\n"
            )
    return rows, failed


def main() -> int:
    """Measure all kernels; a table on stderr, JSON on stdout. Exit code 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.kernel_times", description=main.__doc__
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--scale", type=int, default=1, help="divides all sizes, to try it on a CPU (default: 1)"
    )
    arguments = parser.parse_args()
    rows, failed = measure(torch.device(arguments.device), arguments.scale)
    figures = {
        "torch": torch.__version__,
        "kernels": [asdict(row) for row in rows],
        "failed": failed,
    }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
