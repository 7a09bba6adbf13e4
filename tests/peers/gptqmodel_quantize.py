"""Quantize a checkpoint with GPTQModel, from given calibration tokens.

A rival of the quantization benchmark. It runs in the environment of `transformers.txt`, to which
GPTQModel is added without its dependencies, and imports nothing of llmkit. The options are those of
its README; a comment explains every difference.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch

# 7.7 wants one worker more than it takes by default on a machine with two cores, and fails.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def quantize(
    model_dir: Path, tokens_file: Path, bits: int, group_size: int, out: Path
) -> dict[str, object]:
    """Quantize `model_dir` into `out` and return what it took; imports are left out."""
    tokens = load_file(tokens_file)["tokens"]
    calibration = [
        {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
        for window in tokens
    ]
    started = time.perf_counter()
    # Its default keeps modules in files; memory is enough here, and faster.
    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=True, offload_to_disk=False, device="cpu"
    )
    model = GPTQModel.load(str(model_dir), config)
    loaded = time.perf_counter()
    # Nothing runs the quantized model here: the slow path in torch is enough to pack it.
    model.quantize(calibration, batch_size=1, backend=BACKEND.TORCH)
    quantized = time.perf_counter()
    model.save(str(out))
    saved = time.perf_counter()
    return {
        "load_s": loaded - started,
        "quantize_s": quantized - loaded,
        "save_s": saved - quantized,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("gptqmodel", "transformers", "torch")},
    }


def main() -> None:
    """Read the command line, quantize, write the result file."""
    parser = argparse.ArgumentParser(description="Quantize a checkpoint with GPTQModel.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file: tokens")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    model, tokens, out = (path.resolve() for path in (args.model, args.tokens, args.out))
    result_file = args.result.resolve()
    os.chdir(out.parent)  # it writes a folder of logs
    result = quantize(model, tokens, args.bits, args.group_size, out)
    result_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
