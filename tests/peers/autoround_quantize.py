"""Quantize a checkpoint with AutoRound, from given calibration tokens.

A rival of the quantization benchmark. It runs in the environment of `llmcompressor.txt`, which has
auto-round, and imports nothing of llmkit. The options are those of its README; a comment explains
every difference.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Name of the scheme, and the format it is exported in.
SCHEMES = {
    "W4A16": "llm_compressor",
    "W3A16": "auto_gptq",
    "W2A16": "auto_gptq",
    "NVFP4": "llm_compressor",
    "MXFP4": "llm_compressor",
}


def quantize(args: argparse.Namespace) -> dict[str, object]:
    """Quantize a checkpoint and return what it took; imports are left out."""
    tokens = load_file(args.tokens)["tokens"]
    started = time.perf_counter()
    # float32: a CPU without bfloat16 instructions is many times slower in it.
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    options: dict[str, object] = {}
    if args.scheme.endswith("A16"):
        options["group_size"] = args.group_size
    if args.layers:
        first, last = map(int, args.layers.split("-"))
        chosen = "|".join(map(str, range(first, last + 1)))
        options["to_quant_block_names"] = rf"model\.layers\.({chosen})$"
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=args.scheme,
        iters=args.iters,
        # The windows that the others calibrate on; its own data set is on a hub.
        dataset=[{"input_ids": window[None]} for window in tokens],
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=min(8, len(tokens)),
        # Its default compiled loop needs a C++ compiler.
        enable_torch_compile=shutil.which("g++") is not None,
        device_map="cpu",
        **options,
    )
    loaded = time.perf_counter()
    rounder.quantize_and_save(str(args.out), format=SCHEMES[args.scheme])
    saved = time.perf_counter()
    # It writes into a folder that it names after the model and the scheme.
    if not (args.out / "config.json").exists():
        (config,) = args.out.glob("*/config.json")
        for file in list(config.parent.iterdir()):
            file.rename(args.out / file.name)
        config.parent.rmdir()
    if args.layers:
        _ignore_other_layers(args.out / "config.json", range(first, last + 1))
    return {
        "load_s": loaded - started,
        "quantize_s": saved - loaded,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("auto-round", "transformers", "torch")},
    }


def _ignore_other_layers(file: Path, quantized: range) -> None:
    """Name the layers that were not quantized, which AutoRound leaves out with FP4."""
    config = json.loads(file.read_text())
    quantization = config["quantization_config"]
    others = set(range(config["num_hidden_layers"])) - set(quantized)
    names = [rf"re:.*layers\.{layer}\..*" for layer in sorted(others)]
    quantization["ignore"] = [*quantization.get("ignore", []), *names]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line, quantize, write the result file."""
    parser = argparse.ArgumentParser(description="Quantize a checkpoint with AutoRound.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file: tokens")
    parser.add_argument("--scheme", choices=SCHEMES, default="W4A16")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200, help="steps a layer (default 200)")
    parser.add_argument("--layers", default="", help="A-B: only these decoder layers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    result = quantize(args)
    args.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
