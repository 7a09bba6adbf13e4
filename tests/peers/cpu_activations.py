"""What rounding the inputs of linear layers costs on a CPU, beside what quantization costs.

    python tests/peers/cpu_activations.py --reference BF16 MODEL ... [--windows 8]

For each MODEL it prints KL(REFERENCE || MODEL) with float32 inputs, and for each type of inputs
KL(MODEL with float32 inputs || MODEL with these inputs), in nats per token, as a Markdown table.
So for each type of the KV cache, with float32 inputs. `auto` with a bfloat16 cache is what a model
in bfloat16 gets on a processor that multiplies it.
The windows are those of `llmkit bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from llmkit.bench.model_quality import ServedModel, make_evaluation
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.options import CpuActivations
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES
from llmkit.model.weight_loader import load_model
from llmkit.quant.output_quality import Quality, score_logits


def logits(
    model: str, activations: CpuActivations, windows: torch.Tensor, kv_cache: str | None = None
) -> Iterator[torch.Tensor]:
    """The logits of a checkpoint on the windows [n, L], with these inputs and this KV cache."""
    loaded = load_model(
        open_checkpoint(model), torch.float32, packed=True, cpu_activations=activations
    )
    yield from ServedModel(loaded, kv_cache).logits(windows)


def row(model: str, inputs: str, quality: Quality) -> str:
    """A line of the table."""
    return (
        f"| {Path(model).name} | {inputs} | {quality.mean_kl:.3g} | {quality.p99_kl:.3g} "
        f"| {100 * (quality.top1 or 0):.2f} | {quality.perplexity:.4f} |"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    cpu_kernels.use_threads()
    tokenizer = load_tokenizer(open_checkpoint(arguments.reference))
    windows = make_evaluation(
        tokenizer, "builtin", arguments.windows, arguments.window_tokens, 0
    ).windows
    print(f"{tuple(windows.shape)} tokens, level {cpu_kernels.level()}\n")
    print("| model | inputs | mean KL | p99 KL | same first token, % | perplexity |")
    print("|---|---|---|---|---|---|", flush=True)
    for model in arguments.models:
        if model != arguments.reference:
            reference = logits(arguments.reference, "float32", windows)
            cost = score_logits(logits(model, "float32", windows), reference, windows)
            print(row(model, "float32, beside the reference", cost), flush=True)
        cases: list[tuple[CpuActivations, str | None]] = [
            (activations, None)
            for activations in get_args(CpuActivations)
            if activations != "float32"
        ]
        cases += [("float32", name) for name in KV_CACHE_DTYPES if name != "float32"]
        cases.append(("auto", "bfloat16"))
        for activations, kv_cache in cases:
            reference = logits(model, "float32", windows)
            rounded = logits(model, activations, windows, kv_cache)
            quality = score_logits(rounded, reference, windows)
            name = f"{activations}, {kv_cache} cache" if kv_cache else activations
            print(row(model, name, quality), flush=True)


if __name__ == "__main__":
    main()
