"""Quantize a checkpoint with llm-compressor, from given calibration tokens.

This is the baseline of the quantization benchmark. It gets the windows of tokens that llmkit
calibrates on, and the same code scores its output. It runs in its own environment
(`llmcompressor.txt`) and imports nothing of llmkit. The recipes follow llm-compressor's own
examples; a comment explains every difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llmcompressor", "compressed-tensors", "auto-round", "transformers", "torch")


class Numbers(NamedTuple):
    """What is stored: integer weights in groups, or one of compressed-tensors' presets.

    A preset has groups of its own size.
    """

    preset: str | None = None
    symmetric: bool = True
    bits: int = 4
    observer: Literal["memoryless_minmax", "mse"] = "memoryless_minmax"

    def config(self, group_size: int) -> dict[str, QuantizationScheme]:
        """The `config_groups` of a modifier: every linear layer alike."""
        if self.preset:
            return {"group_0": preset_name_to_scheme(self.preset, ["Linear"])}
        weights = QuantizationArgs(
            num_bits=self.bits,
            type="int",
            strategy="group",
            group_size=group_size,
            symmetric=self.symmetric,
            dynamic=False,
            observer=self.observer,
        )
        return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


Method = Callable[[dict[str, QuantizationScheme]], list[Modifier]]


def rtn(groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """Round to nearest."""
    return [QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def gptq(groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """GPTQ with the defaults: static act-order, blocks of 128 columns, 1 % dampening, quantized
    outputs fed forward.
    """
    return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]


def awq(groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """AWQ as its example has it: 10 ratios from activations alone and 10 from both, then round to
    nearest.
    """
    if not torch.accelerator.is_available():
        # 0.14 pins cached activations for a faster copy to the GPU without asking whether there is
        # one, and fails. Where nothing is copied there is nothing to pin: no number changes.
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    return [AWQModifier(duo_scaling="both"), *rtn(groups)]


def smoothquant_gptq(groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """The documented W8A8 recipe."""
    return [SmoothQuantModifier(smoothing_strength=0.8), *gptq(groups)]


def autoround(groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """AutoRound with 200 steps per layer. Its default compiled loop needs a C++ compiler."""
    compiled = shutil.which("c++") is not None or shutil.which("g++") is not None
    return [
        AutoRoundModifier(
            config_groups=groups, ignore=["lm_head"], iters=200, enable_torch_compile=compiled
        )
    ]


def rtn_with_inputs(groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """Round to nearest, with scales of the inputs from the calibration text (NVFP4)."""
    return rtn(groups)


def awq_gptq(groups: dict[str, QuantizationScheme]) -> list[Modifier]:
    """AWQ's scales, then GPTQ."""
    return [*awq(groups)[:-1], *gptq(groups)]


DATA_FREE = (rtn,)
SCHEMES: dict[str, tuple[Method, Numbers]] = {
    "rtn-sym": (rtn, Numbers()),
    "rtn-asym": (rtn, Numbers(symmetric=False)),
    "gptq-sym": (gptq, Numbers()),
    "gptq-sym-mse": (gptq, Numbers(observer="mse")),
    "gptq-asym": (gptq, Numbers(symmetric=False)),
    "gptq-asym-mse": (gptq, Numbers(symmetric=False, observer="mse")),
    "awq-sym": (awq, Numbers()),
    "awq-asym": (awq, Numbers(symmetric=False)),
    "autoround-sym": (autoround, Numbers()),
    "awq-gptq-sym": (awq_gptq, Numbers()),
    "int3-gptq-sym-mse": (gptq, Numbers(bits=3, observer="mse")),
    "int2-gptq-sym-mse": (gptq, Numbers(bits=2, observer="mse")),
    "w8a8-int8": (smoothquant_gptq, Numbers("W8A8")),
    "w8a8-int8-rtn": (rtn, Numbers("W8A8")),
    "fp8-dynamic": (rtn, Numbers("FP8_DYNAMIC")),
    "fp8-dynamic-gptq": (gptq, Numbers("FP8_DYNAMIC")),
    "fp8-block": (rtn, Numbers("FP8_BLOCK")),
    "fp8-block-gptq": (gptq, Numbers("FP8_BLOCK")),
    "mxfp8": (rtn, Numbers("MXFP8")),
    "mxfp8-gptq": (gptq, Numbers("MXFP8")),
    "nvfp4": (rtn_with_inputs, Numbers("NVFP4")),
    "nvfp4-gptq": (gptq, Numbers("NVFP4")),
    "nvfp4a16": (rtn, Numbers("NVFP4A16")),
    "nvfp4a16-gptq": (gptq, Numbers("NVFP4A16")),
    "nvfp4a16-autoround": (autoround, Numbers("NVFP4A16")),
    "mxfp4": (rtn, Numbers("MXFP4")),
    "mxfp4-gptq": (gptq, Numbers("MXFP4")),
    "mxfp4a16": (rtn, Numbers("MXFP4A16")),
    "mxfp4a16-gptq": (gptq, Numbers("MXFP4A16")),
    "mxfp4a16-autoround": (autoround, Numbers("MXFP4A16")),
}


def calibration(tokens_file: Path) -> Dataset:
    """The windows of `tokens_file` (int64 tensor `tokens`, [windows, length]): all of them, uncut
    and unpadded.
    """
    tokens = load_file(tokens_file)["tokens"]
    return Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )


def peak_rss_bytes() -> int:
    """Most memory this process ever held; `ru_maxrss` counts KiB on Linux and bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def quantize(
    model_dir: Path, tokens_file: Path, scheme: str, group_size: int, out: Path
) -> dict[str, object]:
    """Quantize `model_dir` into `out` and return what it took; the clocks leave imports and the
    tokens' reading out.
    """
    method, numbers = SCHEMES[scheme]
    recipe = method(numbers.config(group_size))
    data = {}
    if method not in DATA_FREE:
        dataset = calibration(tokens_file)
        # The defaults would take 512 windows at most and shuffle them.
        data = {
            "dataset": dataset,
            "num_calibration_samples": len(dataset),
            "shuffle_calibration_samples": False,
        }

    started = time.perf_counter()
    # float32: a CPU without bfloat16 instructions is many times slower in it.
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    loaded = time.perf_counter()
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **data)
    quantized = time.perf_counter()
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    saved = time.perf_counter()

    return {
        "scheme": scheme,
        "group_size": None if numbers.preset else group_size,
        "windows": len(data["dataset"]) if data else 0,
        "threads": torch.get_num_threads(),
        "load_s": loaded - started,
        "quantize_s": quantized - loaded,
        "save_s": saved - quantized,
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def main() -> None:
    """Read the command line, quantize, write the result file."""
    parser = argparse.ArgumentParser(description="Quantize a checkpoint with llm-compressor.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument(
        "--tokens",
        type=Path,
        required=True,
        help='safetensors file, int64 tensor "tokens" [n, length]',
    )
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument(
        "--group-size", type=int, default=64, help="of the int4 schemes; the others are per channel"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the quantized checkpoint"
    )
    parser.add_argument(
        "--result", type=Path, required=True, help="JSON file: seconds, peak memory, versions"
    )
    args = parser.parse_args()
    result = quantize(args.model, args.tokens, args.scheme, args.group_size, args.out)
    args.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
