"""`make bench-gguf`: GGUF files of llmkit beside those of `llama-quantize`, scored by llama.cpp.

Both quantize SmolLM2-135M-Instruct, and both are calibrated on the same windows of the built-in
text: `llama-imatrix` gets them as a text. `llama-perplexity --kl-divergence` compares each file
with the bf16 GGUF on the held-out part of that text.

    python tests/peers/bench_gguf.py [--presets NAME ...] [--samples 128] [--length 256]
        [--windows 54] [--method gptq] [--work DIR] [--llamacpp DIR]

`--presets q8_0 --samples 8 --windows 4` shows in some minutes whether it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gguf

from common import ROOT, llmkit, real_model, table
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.quant.calibration_text import load_text
from llmkit.quant.token_windows import calibration_windows, evaluation_windows

PRESETS = ("q4_k_m", "q5_k_m", "q6_k", "q8_0")
PROGRAMS = ("llama-imatrix", "llama-perplexity", "llama-quantize")
CONTEXT = 512  # tokens that llama.cpp computes together; it scores the second half of them
MANY = 1 << 20  # windows: more than the held-out text has
MIB = 1 << 20
# The lines of `llama-perplexity --kl-divergence`, by the figure in them.
FIGURES = {
    "mean_kl": r"Mean\s+KLD:\s+([\d.]+)",
    "mean_kl_error": r"Mean\s+KLD:\s+[\d.]+ ± +([\d.]+)",
    "p99_kl": r"99\.0%\s+KLD:\s+([\d.]+)",
    "max_kl": r"Maximum KLD:\s+([\d.]+)",
    "top1": r"Same top p:\s+([\d.]+)",
    "perplexity": r"Mean PPL\(Q\)\s+:\s+([\d.]+)",
    "base_perplexity": r"Mean PPL\(base\)\s+:\s+([\d.]+)",
}


class LlamaCpp:
    """llama.cpp's programs, built where they are missing."""

    def __init__(self, folder: Path) -> None:
        """folder: with `build`, as `make .llamacpp/.ready` leaves it."""
        build = folder / "build"
        if not (build / "CMakeCache.txt").exists():
            raise SystemExit(f"{build} is missing; make {folder}/.ready makes it")
        self.programs = build / "bin"
        if not all((self.programs / name).exists() for name in PROGRAMS):
            command = ["cmake", "--build", build, "--parallel", "2", "--target", *PROGRAMS]
            subprocess.run(command, check=True)

    def run(self, program: str, *arguments: object) -> str:
        """What a program writes to stdout and stderr. Exits with its last lines when it fails."""
        command = [str(self.programs / program), *map(str, arguments)]
        process = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{process.stdout[-3000:]}")
        return process.stdout

    def divergence(self, file: Path, text: Path, logits: Path) -> dict[str, float]:
        """The FIGURES of a file, beside the logits of another that `save_logits` stored."""
        output = self.run(
            "llama-perplexity", "-m", file, *score_options(text, logits), "--kl-divergence"
        )
        return parse_figures(output)


def parse_figures(output: str) -> dict[str, float]:
    """The FIGURES in the output of `llama-perplexity --kl-divergence`. Exits without them."""
    found = {}
    for name, pattern in FIGURES.items():
        match = re.search(pattern, output)
        if match is None:
            raise SystemExit(f"llama-perplexity did not print {name}:\n{output[-3000:]}")
        found[name] = float(match[1])
    return found


def score_options(text: Path, logits: Path) -> tuple[object, ...]:
    """The options of llama-perplexity that all files are scored with."""
    return "-f", text, "-c", CONTEXT, "--kl-divergence-base", logits


def write_texts(
    tokenizer: Tokenizer, samples: int, length: int, num_windows: int, folder: Path
) -> tuple[Path, Path]:
    """The calibration windows [samples, length] and the windows that are scored, as files."""
    windows = {
        "calibration.txt": calibration_windows(
            tokenizer, load_text("builtin"), True, samples, length, 0
        ),
        "held-out.txt": evaluation_windows(tokenizer, num_windows, CONTEXT),
    }
    for name, tokens in windows.items():
        print(f"{name}: {tokens.shape[0]} windows of {tokens.shape[1]} tokens", flush=True)
        (folder / name).write_text(tokenizer.decode(tokens.flatten().tolist()), encoding="utf-8")
    return folder / "calibration.txt", folder / "held-out.txt"


def export(source: Path, out: Path, *options: object) -> Path:
    """The GGUF file that `llmkit quantize` writes."""
    if not out.exists():
        llmkit("quantize", source, "--format", "gguf", *options, "--no-eval", "-q", "-o", out)
    (file,) = out.glob("*.gguf")
    return file


def tensor_types(file: Path) -> dict[str, str]:
    """The type of each tensor of a GGUF file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def row(name: str, preset: str, figures: dict[str, float]) -> list[str]:
    """A line of the table."""
    return [
        preset.upper(),
        name,
        f"{figures['mean_kl']:.4f} ± {figures['mean_kl_error']:.4f}",
        f"{figures['p99_kl']:.3f}",
        f"{figures['max_kl']:.2f}",
        f"{figures['top1']:.1f} %",
        f"{figures['perplexity']:.3f}",
        f"{figures['bytes'] / MIB:.1f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument(
        "--windows", type=int, default=MANY, help=f"of {CONTEXT} tokens to score (default: all)"
    )
    parser.add_argument("--method", default="gptq", help="of llmkit quantize")
    parser.add_argument("--work", type=Path, default=Path(".bench-gguf"))
    parser.add_argument("--llamacpp", type=Path, default=ROOT / ".llamacpp")
    options = parser.parse_args(arguments)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    llamacpp = LlamaCpp(options.llamacpp)
    source = real_model(work)
    tokenizer = load_tokenizer(open_checkpoint(source))
    calibration, held_out = write_texts(
        tokenizer, options.samples, options.length, options.windows, work
    )
    dense = export(source, work / "bf16", "--method", "bf16")
    matrix, logits = work / "imatrix.gguf", work / "logits.kld"
    llamacpp.run("llama-imatrix", "-m", dense, "-f", calibration, "-c", CONTEXT, "-o", matrix)
    llamacpp.run("llama-perplexity", "-m", dense, *score_options(held_out, logits))
    results: dict[str, dict[str, float]] = {}
    lines = []
    for preset in options.presets:
        theirs = work / f"theirs-{preset}.gguf"
        llamacpp.run("llama-quantize", "--imatrix", matrix, dense, theirs, preset.upper())
        calibrated = ("--samples", options.samples, "--seq-len", options.length)
        method = ("--method", options.method, "--scheme", preset)
        if options.method == "rtn":
            calibrated = ()
        started = time.perf_counter()
        ours = export(source, work / f"ours-{preset}", *method, *calibrated)
        print(f"{preset}: llmkit took {time.perf_counter() - started:.0f} s", flush=True)
        types = tensor_types(ours), tensor_types(theirs)
        different = [name for name, found in types[0].items() if found != types[1].get(name)]
        counts = Counter(types[0].values())
        print(f"{preset}: {dict(counts)}; other types in {different or 'no tensor'}", flush=True)
        for name, file in (("llama-quantize", theirs), (f"llmkit, {options.method}", ours)):
            figures = llamacpp.divergence(file, held_out, logits)
            figures["bytes"] = file.stat().st_size
            results[f"{preset}, {name}"] = figures
            (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            lines.append(row(name, preset, figures))
            print(" | ".join(lines[-1]), flush=True)
    logits.unlink()
    head = ("", "", "mean KL", "99 % KL", "largest KL", "same top token", "perplexity", "MiB")
    print(table(head, lines))


if __name__ == "__main__":
    main()
