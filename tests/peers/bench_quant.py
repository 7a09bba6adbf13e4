"""`make bench-quant`: llmkit beside llm-compressor, GPTQModel and AutoRound.

All quantize SmolLM2-135M-Instruct with the same calibration windows and group size, one after the
other, each in its own process. llmkit scores all outputs on text that was not used for calibration.

    python tests/peers/bench_quant.py [--windows 8] [--length 1024] [--only REGEX] [--work DIR]
    python tests/peers/bench_quant.py --layers 0-7 --iters 200 --only "ours: auto|AutoRound: int4"

CPU seconds, seconds and peak memory are of the whole process of each tool, imports and saving
included. With OMP_NUM_THREADS=1 in the environment all tools have one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import PEERS, measure, peer_python, real_model, table
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.families import checkpoint_spec
from llmkit.quant.calibration_text import load_text
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.output_quality import score_logits
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
    "auto, symmetric": ("--method", "auto"),
    "auto max, symmetric": ("--method", "auto", "--effort", "max"),
    "auto fast, symmetric": ("--method", "auto", "--effort", "fast"),
    "auto high, symmetric": ("--method", "auto", "--effort", "high"),
    "gptq max, symmetric": ("--method", "gptq", "--effort", "max"),
    "gptq max, asymmetric": ("--method", "gptq", "--format", "awq", "--effort", "max"),
    "int3 gptq, symmetric": ("--method", "gptq", "--bits", "3"),
    "int3 auto, symmetric": ("--method", "auto", "--bits", "3"),
    "int2 gptq, symmetric": ("--method", "gptq", "--bits", "2"),
    "int2 auto, symmetric": ("--method", "auto", "--bits", "2"),
    "int2 auto high, symmetric": ("--method", "auto", "--bits", "2", "--effort", "high"),
    "int8 weights": ("--method", "int8"),
    "int8 W8A8": ("--method", "int8", "--activations"),
    "int8 W8A8 auto": ("--method", "auto", "--scheme", "w8a8"),
    "fp8": ("--method", "fp8"),
    "fp8 max": ("--method", "fp8", "--effort", "max"),
    "fp8 gptq": ("--method", "gptq", "--scheme", "fp8"),
    "fp8 auto": ("--method", "auto", "--scheme", "fp8"),
    "fp8 blocks": ("--method", "rtn", "--scheme", "fp8-block"),
    "fp8 blocks gptq": ("--method", "gptq", "--scheme", "fp8-block"),
    "fp8 blocks auto": ("--method", "auto", "--scheme", "fp8-block"),
    "mxfp8": ("--method", "rtn", "--scheme", "mxfp8"),
    "mxfp8 gptq": ("--method", "gptq", "--scheme", "mxfp8"),
    "mxfp8 auto": ("--method", "auto", "--scheme", "mxfp8"),
    "nvfp4": ("--method", "rtn", "--scheme", "nvfp4"),
    "nvfp4 gptq": ("--method", "gptq", "--scheme", "nvfp4"),
    "nvfp4 auto": ("--method", "auto", "--scheme", "nvfp4"),
    "nvfp4 high": ("--method", "auto", "--scheme", "nvfp4", "--effort", "high"),
    "mxfp4 high": ("--method", "auto", "--scheme", "mxfp4", "--effort", "high"),
    "nvfp4 max": ("--method", "auto", "--scheme", "nvfp4", "--effort", "max"),
    "nvfp4a16": ("--method", "rtn", "--scheme", "nvfp4a16"),
    "nvfp4a16 gptq": ("--method", "gptq", "--scheme", "nvfp4a16"),
    "nvfp4a16 auto": ("--method", "auto", "--scheme", "nvfp4a16"),
    "nvfp4a16 max": ("--method", "auto", "--scheme", "nvfp4a16", "--effort", "max"),
    "mxfp4": ("--method", "rtn", "--scheme", "mxfp4"),
    "mxfp4 gptq": ("--method", "gptq", "--scheme", "mxfp4"),
    "mxfp4 auto": ("--method", "auto", "--scheme", "mxfp4"),
    "mxfp4a16": ("--method", "rtn", "--scheme", "mxfp4a16"),
    "mxfp4a16 gptq": ("--method", "gptq", "--scheme", "mxfp4a16"),
    "mxfp4a16 auto": ("--method", "auto", "--scheme", "mxfp4a16"),
    "mxfp4 max": ("--method", "auto", "--scheme", "mxfp4", "--effort", "max"),
    "mxfp4a16 max": ("--method", "auto", "--scheme", "mxfp4a16", "--effort", "max"),
    "w4afp8 gptq": ("--method", "gptq", "--scheme", "w4afp8"),
}
# Name, scheme of llmcompressor_quantize.py.
LLM_COMPRESSOR: dict[str, str] = {
    "rtn, symmetric": "rtn-sym",
    "rtn, asymmetric": "rtn-asym",
    "gptq, symmetric": "gptq-sym",
    "gptq mse, symmetric": "gptq-sym-mse",
    "gptq, asymmetric": "gptq-asym",
    "gptq mse, asymmetric": "gptq-asym-mse",
    "awq, asymmetric": "awq-asym",
    "awq, then gptq, symmetric": "awq-gptq-sym",
    "autoround, symmetric": "autoround-sym",
    "int3 gptq mse, symmetric": "int3-gptq-sym-mse",
    "int2 gptq mse, symmetric": "int2-gptq-sym-mse",
    "int8 W8A8": "w8a8-int8",
    "int8 W8A8, rtn": "w8a8-int8-rtn",
    "fp8": "fp8-dynamic",
    "fp8 gptq": "fp8-dynamic-gptq",
    "fp8 blocks": "fp8-block",
    "fp8 blocks gptq": "fp8-block-gptq",
    "mxfp8": "mxfp8",
    "mxfp8 gptq": "mxfp8-gptq",
    "nvfp4": "nvfp4",
    "nvfp4 gptq": "nvfp4-gptq",
    "nvfp4a16": "nvfp4a16",
    "nvfp4a16 gptq": "nvfp4a16-gptq",
    "mxfp4": "mxfp4",
    "mxfp4 gptq": "mxfp4-gptq",
    "mxfp4a16": "mxfp4a16",
    "mxfp4a16 gptq": "mxfp4a16-gptq",
}
# Name, bits.
GPTQMODEL = {"int4, symmetric": 4, "int3, symmetric": 3}
# Name, scheme of autoround_quantize.py.
AUTOROUND = {"int4, symmetric": "W4A16", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}
# The methods whose groups have the size GROUP, and the schemes that have none or their own.
GROUPED = ("rtn", "gptq", "awq", "auto")
OWN_GROUPS = ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8", "fp8", "fp8-block", "w8a8")


def run_llmkit(
    source: Path, options: Sequence[str], arguments: argparse.Namespace, out: Path
) -> dict[str, Any]:
    """Quantize with llmkit; what the whole process took, and the seconds of quantizing."""
    command: list[object] = [sys.executable, "-m", "llmkit.cli.main", "quantize", source, *options]
    if options[1] in GROUPED and not set(options) & set(OWN_GROUPS):
        command += ["--group-size", GROUP]
    if arguments.layers:
        command += ["--layers", arguments.layers]
    command += ["--samples", arguments.windows, "--seq-len", arguments.length]
    usage = measure(*command, "--no-eval", "--quiet", "--output", out)
    report = json.loads((out / "llmkit_report.json").read_text())
    return usage | {"quantize_s": report["seconds"]["quantize"]}


def run_rival(
    environment: str, script: str, source: Path, options: Sequence[object], out: Path
) -> dict[str, Any]:
    """Quantize with another tool; the same figures."""
    result = out.with_suffix(".json")
    command = (peer_python(environment), PEERS / script, "--model", source, *options)
    usage = measure(*command, "--out", out, "--result", result)
    return usage | {"quantize_s": json.loads(result.read_text())["quantize_s"]}


def logits(model: Path, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """The float32 logits of a checkpoint for each window of [n, L]."""
    checkpoint = open_checkpoint(model)
    stream = LayerStream.from_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    return stream.logits(windows)


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
    parser.add_argument(
        "--layers", default="", help="A-B: only these decoder layers, in llmkit and AutoRound"
    )
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps (default 200)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = real_model(arguments.work)
    tokenizer = load_tokenizer(open_checkpoint(source))
    chosen = calibration_windows(
        tokenizer, load_text("builtin"), True, arguments.windows, arguments.length, 0
    )
    tokens = arguments.work / "tokens.safetensors"
    save_file({"tokens": chosen}, tokens)
    held_out = evaluation_windows(tokenizer, 8)
    reference = list(logits(source, held_out))
    rows: list[tuple[str, Callable[[Path], dict[str, Any]]]] = []
    for name, options in OURS.items():
        rows.append((f"ours: {name}", partial(run_llmkit, source, options, arguments)))
    rivals = [
        ("llm-compressor", LLM_COMPRESSOR, "llmcompressor", "--scheme"),
        ("GPTQModel", GPTQMODEL, "transformers", "--bits"),
        ("AutoRound", AUTOROUND, "llmcompressor", "--scheme"),
    ]
    for rival, choices, environment, option in rivals:
        script = rival.lower().replace("-", "") + "_quantize.py"
        for name, choice in choices.items():
            given: list[object] = ["--tokens", tokens, "--group-size", GROUP, option, choice]
            if rival == "AutoRound":
                given += ["--iters", arguments.iters, "--layers", arguments.layers]
            run = partial(run_rival, environment, script, source, given)
            rows.append((f"{rival}: {name}", run))
    file = arguments.work / "results.json"
    results = json.loads(file.read_text()) if file.exists() and arguments.only else []
    for name, run in rows:
        if not re.search(arguments.only, name):
            continue
        if arguments.layers and not name.startswith(("ours", "AutoRound")):
            raise SystemExit(f"{name}: only llmkit and AutoRound take --layers")
        out = arguments.work / re.sub(r"[^\w]+", "-", name)
        shutil.rmtree(out, ignore_errors=True)
        figures = run(out)
        quality = dataclasses.asdict(score_logits(logits(out, held_out), reference, held_out))
        results = [result for result in results if result["name"] != name]
        results.append({"name": name, **figures, **quality})
        file.write_text(json.dumps(results, indent=2) + "\n")
        shutil.rmtree(out)
        scores = f"KL {quality['mean_kl']:.4f}, perplexity {quality['perplexity']:.3f}"
        print(f"{name}: {scores}, {figures['cpu_s']:.0f} CPU seconds", flush=True)
    head = ("", "mean KL", "99 % KL", "top-1", "perplexity", "CPU, s", "in all, s", "GiB")
    lines = [
        [
            one["name"],
            f"{one['mean_kl']:.4f}",
            f"{one['p99_kl']:.3f}",
            f"{one['top1']:.1%}",
            f"{one['perplexity']:.3f}",
            f"{one['cpu_s']:.0f}" if "cpu_s" in one else "",
            f"{one['wall_s']:.0f}",
            f"{one['peak_rss_bytes'] / (1 << 30):.1f}",
        ]
        for one in results
    ]
    print(table(head, lines))


if __name__ == "__main__":
    main()
