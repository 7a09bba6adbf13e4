"""Times of single GPU kernels beside what their bytes and operations take at least: `python -m llmkit.bench.kernels`.

`make gpu` runs it. Shapes are those of Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from llmkit.bench.steps import BLOCK, WEIGHTS, copy_bandwidth, random_weight, time_ms
from llmkit.kernels.attention import CODES, AttentionBatch, KvCache, paged_attention, place
from llmkit.kernels.elementwise import add_norm, gated
from llmkit.kernels.experts import Experts
from llmkit.model.linear import Linear, Rounding, serving_linear
from llmkit.runtime.engine.graphs import CudaGraph

HEADS, KV_HEADS, DIM = 32, 8, 128
CACHE = 256 << 20  # bytes that push everything else out of the caches
SHAPES = {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # outputs, inputs


@dataclass(frozen=True)
class KernelTime:
    """One measured launch, with nothing in the device's caches. The floor is the larger of its bytes over the measured
    copy bandwidth and its operations over the measured rate of a large product."""

    kernel: str
    bytes: int
    flops: int
    ms: float
    floor_ms: float


def attention_cases(device: torch.device, scale: int) -> Iterator[tuple[str, int, int, Callable[[], object]]]:
    """Name, bytes, operations and the launch, for decode steps and a prefill; scale: divides the sizes."""
    for sequences, new, context, kind in (
        (1, 1, 4096, None), (32, 1, 4096, None), (128, 1, 1024, None), (128, 1, 1024, "fp8"), (1, 4096, 4096, None),
    ):  # fmt: skip
        new, context = min(new, context // scale), context // scale
        per = -(-context // BLOCK)
        tables = [range(s * per, (s + 1) * per) for s in range(sequences)]
        batch = AttentionBatch.build([new] * sequences, [context] * sequences, {None: tables}, BLOCK, device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (2 * KV_HEADS, per * sequences, BLOCK)
        kv = torch.randn(*shape, DIM, device=device, dtype=dtype)
        scales = torch.full((*shape, 1), 0.01, device=device) if kind else None
        cache = KvCache(kv.to(CODES[kind]) if kind else kv, scales)
        q = torch.randn(sequences * new, HEADS, DIM, device=device, dtype=dtype)
        size = sequences * context * 2 * KV_HEADS * DIM * cache.kv.element_size()
        flops = 4 * sequences * HEADS * DIM * (new * context - new * (new - 1) // 2)
        name = f"attention, {sequences} x {new} queries, context {context}{', ' + kind if kind else ''}"
        yield name, size, flops, partial(paged_attention, q, cache, batch.of(None), DIM**-0.5)


def linear_cases(device: torch.device, scale: int) -> Iterator[tuple[str, int, int, Callable[[], object]]]:
    """The same for linear layers of every kind of weight."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape_name, (full_out, full_columns) in SHAPES.items():
        out, columns = full_out // scale, full_columns // scale
        for kind, scheme in WEIGHTS.items():
            if scheme is None:
                layer = Linear(torch.randn(out, columns, device=device, dtype=dtype))
                size = layer.weight.nbytes
            else:
                stored = random_weight((out, columns), scheme, device)
                rounding = None if scheme.inputs == "none" else Rounding(scheme.kind)
                layer = serving_linear([stored], None, rounding, dtype, device)
                size = out * columns * scheme.bits // 8 + stored.scales.nbytes
            for rows in sorted({1, 16, 64, 256, 4096 // scale}):
                x = torch.randn(rows, columns, device=device, dtype=dtype)
                moved = size + (x.numel() + rows * out) * x.element_size()
                name = f"{shape_name} [{out}, {columns}], {kind}, {rows} rows"
                yield name, moved, 2 * rows * out * columns, partial(layer, x)


def between_cases(device: torch.device, scale: int) -> Iterator[tuple[str, int, int, Callable[[], object]]]:
    """The same for what lies between the products. Operations are not counted: one an element."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, inner = 4096 // scale, 14336 // scale
    weight, rotation = torch.ones(hidden, dtype=dtype, device=device), torch.ones(4096, 1, DIM, device=device)
    for rows in sorted({1, 64, 4096 // scale}):
        x, update, both, qkv = (
            torch.randn(rows, size, device=device, dtype=dtype)
            for size in (hidden, hidden, 2 * inner, (HEADS + 2 * KV_HEADS) * DIM)
        )
        blocks, slots = -(-rows // BLOCK), torch.arange(rows, device=device)
        cache = KvCache(torch.zeros(2 * KV_HEADS, blocks, BLOCK, DIM, device=device, dtype=dtype))
        turn, heads = (rotation[:rows],) * 2, qkv.view(rows, -1, DIM)
        runs: dict[str, tuple[int, Callable[[], object]]] = {
            "residual sum and norm": (4 * x.nbytes, partial(add_norm, x, update, 1.0, weight, 1e-5)),
            "gated activation": (both.nbytes * 3 // 2, partial(gated, both, "silu")),
            "rotation and cache": (2 * qkv.nbytes, partial(place, heads, HEADS, None, 1e-5, turn, cache, slots)),
        }
        for name, (size, run) in runs.items():
            yield f"{name}, {rows} rows", size, size // x.element_size(), run


def expert_cases(device: torch.device, scale: int) -> Iterator[tuple[str, int, int, Callable[[], object]]]:
    """The same for a layer's experts of Qwen3-30B-A3B, all as likely. They need a GPU."""
    if device.type != "cuda":
        return
    count, per, hidden, inner, dtype = 128, 8, 2048, 768, torch.bfloat16
    up = torch.randn(count, 2 * inner, hidden, device=device, dtype=dtype)
    down = torch.randn(count, hidden, inner, device=device, dtype=dtype)
    experts = Experts(up, down, 0, count, gelu=False)
    for tokens in (1, 8, 32, 128, 4096 // scale):
        weights, chosen = torch.rand(tokens, count, device=device).topk(per)
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        size = len(chosen.unique()) * 3 * hidden * inner * x.element_size() + 2 * x.nbytes
        yield f"experts, {tokens} tokens", size, 6 * tokens * per * hidden * inner, partial(experts, x, chosen, weights)


@torch.inference_mode()
def measure(device: torch.device, scale: int = 1, repeats: int = 20) -> tuple[list[KernelTime], dict[str, str]]:
    """Every case, and why some failed; scale: divides the sizes, for a try on a CPU. On a GPU each is a graph: a launch
    by Python takes longer than many a kernel."""
    bandwidth = copy_bandwidth(device, (1 << 30) // scale**2)
    side = 8192 // scale
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    rate = 2 * side**3 / (time_ms(partial(torch.mm, square, square), device, 10) / 1e3)
    other = torch.empty(CACHE // scale**2, dtype=torch.uint8, device=device)
    rows, failed = [], {}
    for cases in (attention_cases, linear_cases, between_cases, expert_cases):
        for name, size, flops, run in cases(device, scale):
            floor = max(size / bandwidth, flops / rate) * 1e3
            try:
                ms = time_ms(CudaGraph(run).replay if device.type == "cuda" else run, device, repeats, other.zero_)
            except Exception as error:  # the others are worth their time all the same
                failed[name] = f"{type(error).__name__}: {error}"
                sys.stderr.write(f"{name:56} failed: {failed[name]}\n")
                continue
            rows.append(KernelTime(name, size, flops, ms, floor))
            sys.stderr.write(f"{name:56} {ms:9.4f} ms  floor {floor:9.4f} ms  {floor / ms:5.0%} of it\n")
    return rows, failed


def main() -> int:
    """Measure all kernels; a table on stderr, JSON on stdout. Exit code 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m llmkit.bench.kernels", description=main.__doc__)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides all sizes, for a try on a CPU (default: 1)")
    arguments = parser.parse_args()
    rows, failed = measure(torch.device(arguments.device), arguments.scale)
    figures = {"torch": torch.__version__, "kernels": [asdict(row) for row in rows], "failed": failed}
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
