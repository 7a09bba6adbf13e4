"""`make bench-quant`: llmkit beside llm-compressor, with the same tokens and the same evaluation.

Both quantize SmolLM2-135M-Instruct with the same calibration windows and group size, one after the
other, each in its own process. llmkit scores both outputs on text that was not used for
calibration.

    python tests/peers/bench_quant.py [--windows 8] [--length 1024] [--only REGEX] [--work DIR]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import llmkit, real_model, run_peer, table
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.families import checkpoint_spec
from llmkit.quant.calibration_text import load_text
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.output_quality import Quality, score_logits
from llmkit.quant.token_windows import calibration_windows, evaluation_windows

GROUP = 64
CT = ("--format", "compressed-tensors")
# Name, options of `llmkit quantize`.
OURS: dict[str, tuple[str, ...]] = {
    "rtn, symmetric": ("--method", "rtn", "--symmetric"),
    "rtn, asymmetric": ("--method", "rtn", "--asymmetric"),
    "gptq, symmetric": ("--method", "gptq"),
    "gptq, asymmetric": ("--method", "gptq", "--format", "awq"),
    "awq, asymmetric": ("--method", "awq"),
    "awq, symmetric": ("--method", "awq", *CT, "--symmetric"),
    "gptq max, symmetric": ("--method", "gptq", "--effort", "max"),
    "gptq max, asymmetric": ("--method", "gptq", "--format", "awq", "--effort", "max"),
    "int8 weights": ("--method", "int8"),
    "int8 W8A8": ("--method", "int8", "--activations"),
    "fp8": ("--method", "fp8"),
    "fp8 max": ("--method", "fp8", "--effort", "max"),
}
# Name, scheme of llmcompressor_quantize.py.
THEIRS: dict[str, str] = {
    "rtn, symmetric": "rtn-sym",
    "rtn, asymmetric": "rtn-asym",
    "gptq, symmetric": "gptq-sym",
    "gptq mse, symmetric": "gptq-sym-mse",
    "gptq, asymmetric": "gptq-asym",
    "gptq mse, asymmetric": "gptq-asym-mse",
    "awq, asymmetric": "awq-asym",
    "int8 W8A8": "w8a8-int8",
    "int8 W8A8, rtn": "w8a8-int8-rtn",
    "fp8": "fp8-dynamic",
}
GROUPED = ("rtn", "gptq", "awq")


def run_llmkit(
    source: Path, out: Path, options: tuple[str, ...], windows: int, length: int
) -> dict[str, Any]:
    """Quantize with llmkit; seconds of the whole process and of quantizing alone."""
    group = ("--group-size", str(GROUP)) if options[1] in GROUPED else ()
    started = time.perf_counter()
    llmkit(
        "quantize",
        source,
        *options,
        *group,
        "--samples",
        windows,
        "--seq-len",
        length,
        "--no-eval",
        "--quiet",
        "--output",
        out,
    )
    wall = time.perf_counter() - started
    return {
        "wall_s": wall,
        "quantize_s": json.loads((out / "llmkit_report.json").read_text())["seconds"]["quantize"],
    }


def run_llmcompressor(source: Path, out: Path, scheme: str, tokens: Path) -> dict[str, Any]:
    """Quantize with llm-compressor; the same seconds."""
    result = out.with_suffix(".json")
    started = time.perf_counter()
    run_peer(
        "llmcompressor",
        "llmcompressor_quantize.py",
        "--model",
        source,
        "--tokens",
        tokens,
        "--scheme",
        scheme,
        "--group-size",
        GROUP,
        "--out",
        out,
        "--result",
        result,
    )
    wall = time.perf_counter() - started
    return {"wall_s": wall, "quantize_s": json.loads(result.read_text())["quantize_s"]}


def score(out: Path, source: Checkpoint, windows: torch.Tensor) -> Quality:
    """Score a checkpoint against the source, in float32."""
    checkpoint = open_checkpoint(out)
    streams = [
        LayerStream.from_checkpoint(one, checkpoint_spec(one)).logits(windows)
        for one in (checkpoint, source)
    ]
    return score_logits(streams[0], streams[1], windows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=8, help="calibration windows (default 8)")
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a window (default 1024)"
    )
    parser.add_argument(
        "--only", default="", help="a regular expression: rows to run, as 'ours: fp8'"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".bench-quant"), help="folder for checkpoints and results"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = real_model(arguments.work)
    opened = open_checkpoint(source)
    tokenizer = load_tokenizer(opened)
    chosen = calibration_windows(
        tokenizer, load_text("builtin"), True, arguments.windows, arguments.length, 0
    )
    tokens = arguments.work / "tokens.safetensors"
    save_file({"tokens": chosen}, tokens)
    held_out = evaluation_windows(tokenizer, 8)
    rows = [(f"ours: {name}", "ours", options) for name, options in OURS.items()]
    rows += [(f"llm-compressor: {name}", "theirs", (scheme,)) for name, scheme in THEIRS.items()]
    file = arguments.work / "results.json"
    results = json.loads(file.read_text()) if file.exists() and arguments.only else []
    for name, side, options in rows:
        if not re.search(arguments.only, name):
            continue
        out = arguments.work / re.sub(r"[^\w]+", "-", name)
        shutil.rmtree(out, ignore_errors=True)
        if side == "ours":
            timing = run_llmkit(source, out, options, arguments.windows, arguments.length)
        else:
            timing = run_llmcompressor(source, out, options[0], tokens)
        quality = dataclasses.asdict(score(out, opened, held_out))
        results = [result for result in results if result["name"] != name]
        results.append({"name": name, "options": options, **timing, **quality})
        file.write_text(json.dumps(results, indent=2) + "\n")
        shutil.rmtree(out)
        scores = f"KL {quality['mean_kl']:.4f}, perplexity {quality['perplexity']:.3f}"
        print(f"{name}: {scores}, {timing['wall_s']:.0f} s", flush=True)
    head = ("", "mean KL", "99 % KL", "top-1", "perplexity", "quantizing, s", "whole command, s")
    lines = [
        [
            one["name"],
            f"{one['mean_kl']:.4f}",
            f"{one['p99_kl']:.3f}",
            f"{one['top1']:.1%}",
            f"{one['perplexity']:.3f}",
            f"{one['quantize_s']:.0f}",
            f"{one['wall_s']:.0f}",
        ]
        for one in results
    ]
    print(table(head, lines))


if __name__ == "__main__":
    main()
