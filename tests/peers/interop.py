"""`make interop`: what llmkit writes is run by vLLM and transformers; what other packages write is read by llmkit.

    python tests/peers/interop.py [--only REGEX] [--work DIR]

Every format of SmolLM2-135M-Instruct answers ten prompts with sixteen greedy tokens in llmkit, vLLM (CPU) and
transformers. Formats that round the inputs of their layers (W8A8) are compared by the tokens before the first
difference only: a change in the last digit of an input flips roundings. auto-gptq, autoawq and llm-compressor pack
weights that llmkit must read bit for bit. Exit code 1 when something that should hold does not.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_quant import THEIRS, run_theirs
from common import llmkit, real_model, run_peer, table
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.formats import FORMATS
from llmkit.checkpoint.quantized import Scheme
from llmkit.checkpoint.source import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.model.loader import read_parameter
from llmkit.quant.samples import PROMPTS, prompt_ids
from llmkit.quant.text import load_text
from llmkit.quant.tokens import calibration_windows
from llmkit.runtime.engine.generate import generate

TOKENS = 16
CT = ("--format", "compressed-tensors")
CALIBRATION = ("--samples", "2", "--seq-len", "256")
# Name: options of `llmkit quantize`, what vLLM and transformers are to do: "same" tokens, "run" or "refuse"; None: it
# is not tried.
WRITTEN: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "bf16": (("--method", "bf16"), "same", "same"),
    "rtn, compressed-tensors": (("--method", "rtn"), "same", "same"),
    "rtn asymmetric, compressed-tensors": (("--method", "rtn", "--asymmetric"), "same", "refuse"),
    "int8": (("--method", "int8"), "same", "same"),
    "gptq": (("--method", "gptq"), "same", "same"),
    "awq": (("--method", "awq"), "same", None),
    "mixed 4 and 8 bits": (("--method", "gptq", "--target-bits", "5.5"), "same", "same"),
    "int8 W8A8": (("--method", "int8", "--activations"), "run", "run"),
    "fp8": (("--method", "fp8"), "run", "run"),
    "fp8 static": (("--method", "fp8", "--static"), "refuse", "run"),
    "bf16 with fp8 KV cache": (("--method", "bf16", "--kv", "fp8"), "refuse", "run"),
}


def answers(name: str, model: Path, prompts: Path, out: Path) -> list[list[int]] | str:
    """The greedy tokens of another engine, or the error that stopped it."""
    run_peer(
        name,
        f"{name}_generate.py",
        "--model",
        model,
        "--prompts",
        prompts,
        "--tokens",
        TOKENS,
        "--out",
        out,
        check=False,
    )
    if not out.exists():
        return "it wrote nothing"
    found: dict[str, Any] = json.loads(out.read_text())
    return str(found["error"]) if "error" in found else found["tokens"]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]] | str) -> tuple[str, str]:
    """What happened ("same", "run" or "refuse"), and in words."""
    if isinstance(theirs, str):
        return "refuse", theirs[:90]
    same = sum(list(one) == list(two) for one, two in zip(ours, theirs, strict=True))
    return ("same" if same == len(ours) else "run"), f"{same} of {len(ours)} answers alike"


def written(work: Path, only: str) -> tuple[list[list[str]], list[str]]:
    """Run every format through every engine: rows of a table, and what did not hold."""
    source = real_model(work)
    tokenizer = load_tokenizer(open_checkpoint(source))
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    file = work / "prompts.json"
    file.write_text(json.dumps(prompts))
    rows, wrong = [], []
    for name, (options, *expected) in WRITTEN.items():
        if not re.search(only, name):
            continue
        model = work / re.sub(r"\W+", "-", name)
        if not model.exists():
            llmkit("quantize", source, *options, *CALIBRATION, "--no-eval", "--quiet", "--output", model)
        ours = generate(open_checkpoint(model), prompts, TOKENS, 0.0, 0, device="cpu", stop_at_eos=False)
        row = [name]
        for engine, wanted in zip(("vllm", "transformers"), expected, strict=True):
            if wanted is None:
                row.append("not tried: minutes a token on a CPU")
                continue
            happened, words = agreement(ours, answers(engine, model, file, work / f"{model.name}.{engine}.json"))
            row.append(words)
            # More than expected is as good: another machine's build may have the kernel that this one lacks.
            if ["refuse", "run", "same"].index(happened) < ["refuse", "run", "same"].index(wanted):
                wrong.append(f"{name} in {engine}: {words}")
        rows.append(row)
        print(" | ".join(row), flush=True)
    return rows, wrong


def packed(work: Path) -> tuple[list[list[str]], list[str]]:
    """Read what auto-gptq and autoawq packed."""
    rows, wrong = [], []
    for name, form in (("autogptq", "gptq"), ("autoawq", "awq")):
        file = work / f"{name}.safetensors"
        run_peer(name, f"{name}_pack.py", "--out", file)
        alike = cases = 0
        with safe_open(file, "pt") as handle:
            described = handle.metadata()
        tensors = load_file(file)
        for index in range(int(described["cases"])):
            case = json.loads(described[f"case{index}"])
            if case.get("desc_act"):
                continue
            parts = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"case{index}.")}
            dense = parts.pop("dense")
            scheme = Scheme(case["bits"], case["group_size"], case["sym"])
            cases += 1
            alike += torch.equal(FORMATS[form].unpack(scheme, parts).dequantize(), dense)
        rows.append([described["packer"], f"{alike} of {cases} weights bit for bit"])
        if alike < cases:
            wrong.append(f"{name}: {cases - alike} weights differ")
    return rows, wrong


def compressed(work: Path) -> tuple[list[list[str]], list[str]]:
    """Read what llm-compressor wrote."""
    source = real_model(work)
    tokenizer = load_tokenizer(open_checkpoint(source))
    tokens = work / "tokens.safetensors"
    save_file({"tokens": calibration_windows(tokenizer, load_text("builtin"), True, 1, 128, 0)}, tokens)
    rows, wrong = [], []
    for scheme in THEIRS.values():
        out = work / f"llm-compressor-{scheme}"
        if not out.exists():
            run_theirs(source, out, scheme, tokens)
        file = out.with_suffix(".safetensors")
        run_peer("llmcompressor", "llmcompressor_dense.py", "--model", out, "--out", file)
        dense, checkpoint = load_file(file), open_checkpoint(out)
        linears = [row for row in parameters(model_spec(checkpoint.config)) if row.linear]
        alike = sum(
            torch.equal(
                read_parameter(checkpoint, row, torch.float32),
                torch.cat([dense[part.tensor][part.row : part.row + part.shape[0]] for part in row.parts]),
            )
            for row in linears
        )
        rows.append([f"llm-compressor {scheme}", f"{alike} of {len(linears)} linears bit for bit"])
        if alike < len(linears):
            wrong.append(f"llm-compressor {scheme}: {len(linears) - alike} linears differ")
        print(" | ".join(rows[-1]), flush=True)
    return rows, wrong


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression: formats to try")
    parser.add_argument("--skip-llmcompressor", action="store_true", help="its AWQ takes many minutes on a CPU")
    parser.add_argument("--work", type=Path, default=Path(".interop"), help="folder for checkpoints and results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    read, wrong = packed(arguments.work)
    if not arguments.skip_llmcompressor:
        more, problems = compressed(arguments.work)
        read, wrong = read + more, wrong + problems
    rows, problems = written(arguments.work, arguments.only)
    wrong += problems
    print(table(("written by llmkit", "vLLM, CPU", "transformers"), rows))
    print(table(("read by llmkit", ""), read))
    if wrong:
        raise SystemExit("interop failed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
