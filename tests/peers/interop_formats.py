"""`make interop-formats`: other readers load the formats of llmkit on a CPU, weight by weight.

    python tests/peers/interop_formats.py [--only REGEX] [--readers NAME,...] [--work DIR]

A tiny random Llama is quantized to each format. Each reader loads it by its own code, and the dense
weights of its linears are compared with those that llmkit reads:

- `decompressor`: the compressors of the library compressed-tensors
- `transformers`: the model in bfloat16 after a forward pass
- `dequantized`: the same in float32, loaded with `dequantize=True`
- `mlx-lm`: MLX's build for CPUs
- `vllm`: its CPU build generates two tokens; weights are not compared, and no result is wrong

A cell says what happened: "alike" with the number of weights that are alike, "differs", "runs"
(weights stay packed, so that only logits are compared) or "refused" with the reader's error. KL
compares logits, in nats; not where inputs are quantized, which most of these readers leave out.
Exit code 1 if something has another result than EXPECTED says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from support.tiny_models import VOCAB, tiny_checkpoint

from common import run_peer, table
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_parameter
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

# Groups and blocks of 128 divide every linear.
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
CALIBRATION = {"samples": 2, "seq_len": 128, "evaluate": False}
TOKENS = 24
SHOWN = 240  # characters of an error in a cell
# The largest difference of a weight, as a share of the largest weight, that is only the reader's
# own rounding to bfloat16: of the scale, and of the product.
ROUNDING = 2**-7


def options(method: str, scheme: str | None = None, **more: Any) -> QuantizeOptions:
    """What a case is quantized with."""
    return QuantizeOptions(method=method, scheme=scheme, **CALIBRATION, **more)


CASES = {
    "bf16": options("bf16"),
    "awq, groups of 32": options("awq", group_size=32),
    "awq, groups of 64": options("awq", group_size=64),
    "awq, groups of 128": options("awq", group_size=128),
    "awq format by gptq": options("gptq", format="awq", group_size=64),
    "awq, some kept": options("awq", group_size=64, keep=r"model\.layers\.0\.mlp"),
    "gptq": options("gptq", group_size=64),
    "pack-quantized, 2 bits": options("rtn", "w2a16", group_size=32),
    "pack-quantized, 3 bits": options("rtn", "w3a16", group_size=32),
    "pack-quantized, 4 bits, groups of 32": options("rtn", group_size=32),
    "pack-quantized, 4 bits, groups of 64": options("rtn", group_size=64),
    "w4afp8": options("rtn", "w4afp8"),
    "fp8": options("rtn", "fp8"),
    "fp8-block": options("rtn", "fp8-block"),
    "fp8-block, fp8": options("rtn", "fp8-block", format="fp8"),
    "nvfp4": options("rtn", "nvfp4"),
    "nvfp4a16": options("rtn", "nvfp4a16"),
    "mxfp4": options("rtn", "mxfp4"),
    "mxfp4a16": options("rtn", "mxfp4a16"),
    "mxfp8": options("rtn", "mxfp8"),
    "modelopt fp8": options("rtn", "fp8", format="modelopt"),
    "modelopt fp8-static": options("rtn", "fp8-static", format="modelopt"),
    "modelopt fp8-block": options("rtn", "fp8-block", format="modelopt"),
    "modelopt nvfp4": options("rtn", "nvfp4", format="modelopt"),
    "modelopt nvfp4a16": options("rtn", "nvfp4a16", format="modelopt"),
    "modelopt mxfp4a16": options("rtn", "mxfp4a16", format="modelopt"),
    "modelopt mxfp4afp8": options("rtn", "mxfp4afp8", format="modelopt"),
    "modelopt mxfp8": options("rtn", "mxfp8", format="modelopt"),
    "modelopt w4a16": options("rtn", "w4a16", format="modelopt", group_size=64),
}
# What is known to happen: (regular expression of cases, reader, grade). Others are "alike".
EXPECTED = (
    # transformers ignores a config of Model-Optimizer. Values of 8 bits fit the dense weights, and
    # are taken without their scales; packed ones of 4 bits do not fit.
    (r"modelopt (fp8|mxfp8)", "transformers", "differs"),
    (r"modelopt", "transformers", "refused"),
    (r"(?!bf16|awq)", "mlx-lm", "refused"),
)


@dataclass(frozen=True)
class Reader:
    """A script of this folder that loads checkpoints."""

    environment: str  # the name of its virtual environment
    script: str
    cases: str  # a regular expression: those that it is tried with


READERS = {
    "decompressor": Reader(
        "transformers", "decompressed_weights.py", r"pack|w4afp8|fp8$|fp8-block$|nvfp4|mxfp"
    ),
    "transformers": Reader("transformers", "transformers_weights.py", r"(?!bf16|gptq|awq)"),
    "dequantized": Reader("transformers", "transformers_weights.py", r"(?!bf16|gptq|awq|modelopt)"),
    "mlx-lm": Reader("mlx", "mlx_weights.py", ""),
    "vllm": Reader("vllm", "vllm_generate.py", r"(?!bf16|gptq|awq)"),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what llmkit reads of it."""

    path: Path
    dense: Mapping[str, torch.Tensor]  # its linears' weights, float32, by checkpoint name
    logits: torch.Tensor | None  # [T, vocab]; None: inputs are quantized


def dense_weights(model: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights of a Llama's linear layers as llmkit reads them, float32, by checkpoint name."""
    weights = {}
    for row in parameters(checkpoint_spec(model)):
        if row.is_linear:
            sizes = [part.shape[0] for part in row.sources]
            whole = read_parameter(model, row, torch.float32)
            for part, rows in zip(row.sources, whole.split(sizes), strict=True):
                weights[part.name] = rows.contiguous()
    return weights


def prepared(case: str, work: Path, ids: torch.Tensor) -> Case:
    """Quantize a case, unless an earlier run has, and read it."""
    path = work / re.sub(r"[^a-z0-9]+", "-", case)
    if not path.exists():
        quantize(str(work / "source"), str(path), CASES[case], SilentProgress())
    model = open_checkpoint(path)
    scheme = model.quantization and model.quantization.scheme
    logits = None
    if scheme is None or scheme.inputs == "none":
        stream = LayerStream.from_checkpoint(model, checkpoint_spec(model))
        logits = next(iter(stream.logits(ids[None])))
    return Case(path, dense_weights(model), logits)


def logits_kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The mean KL divergence of their distributions from ours, in nats. Both [T, vocab]."""
    own = ours.double().log_softmax(-1)
    return float((own.exp() * (own - theirs.double().log_softmax(-1))).sum(-1).mean())


def compared(case: Case, theirs: Mapping[str, torch.Tensor]) -> str:
    """The grade and the words of a reader's weights, and its logits if it has any."""
    kl = ""
    if case.logits is not None and "logits" in theirs:
        kl = f"; KL {logits_kl(case.logits, theirs['logits']):.1e}"
    count = len(case.dense)
    packed = len(set(case.dense) - set(theirs))
    if packed:
        return f"runs: {packed} of {count} weights are packed{kl}"
    pairs = [(weight, theirs[name]) for name, weight in case.dense.items()]
    if any(one.shape != two.shape for one, two in pairs):
        return "differs: shapes"
    exact = sum(torch.equal(one, two) for one, two in pairs)
    rounded = sum(torch.equal(one.bfloat16().float(), two) for one, two in pairs)
    gap = max(float((one - two).abs().max() / one.abs().max()) for one, two in pairs)
    words = f"{exact} of {count} weights bit for bit"
    if exact < count and rounded == count:
        words = f"{count} of {count} weights bit for bit in bfloat16"
    elif exact < count:
        words += f", largest difference {gap:.1e} of the largest weight"
    return f"{'alike' if gap <= ROUNDING else 'differs'}: {words}{kl}"


def read_by_vllm(case: Case, tokens: list[int]) -> str:
    """What vLLM says when it generates with a checkpoint."""
    prompts = case.path.with_name("prompts.json")
    prompts.write_text(json.dumps([tokens]))
    out = case.path.with_suffix(".vllm.json")
    out.unlink(missing_ok=True)
    words = ("--model", case.path, "--prompts", prompts, "--tokens", 2, "--out", out)
    run_peer("vllm", READERS["vllm"].script, *words, check=False)
    answer = json.loads(out.read_text()) if out.exists() else {"error": "it wrote nothing"}
    return f"refused: {answer['error']}"[:SHOWN] if "error" in answer else "runs"


def read_all(name: str, cases: Mapping[str, Case], tokens: list[int]) -> dict[str, str]:
    """What a reader made of each case that it is tried with."""
    reader = READERS[name]
    tried = {label: case for label, case in cases.items() if re.match(reader.cases, label)}
    if name == "vllm":
        return {label: read_by_vllm(case, tokens) for label, case in tried.items()}
    outs = {label: case.path.with_suffix(f".{name}") for label, case in tried.items()}
    errors = {label: Path(f"{out}.error") for label, out in outs.items()}
    for file in (*outs.values(), *errors.values()):
        file.unlink(missing_ok=True)
    described = [
        {"model": str(case.path.resolve()), "out": str(outs[label].resolve())}
        for label, case in tried.items()
    ]
    if not tried:
        return {}
    jobs = next(iter(tried.values())).path.with_name(f"{name}.json")
    jobs.write_text(json.dumps({"tokens": tokens, "jobs": described}))
    run_peer(reader.environment, reader.script, "--jobs", jobs)
    return {
        label: compared(case, load_file(outs[label]))
        if outs[label].exists()
        else f"refused: {errors[label].read_text()}"[:SHOWN]
        for label, case in tried.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression: the cases to try")
    parser.add_argument("--readers", default=",".join(READERS), help="those to try")
    parser.add_argument(
        "--work", type=Path, default=Path(".interop/formats"), help="folder for checkpoints"
    )
    arguments = parser.parse_args()
    work: Path = arguments.work
    if not (work / "source").exists():
        tiny_checkpoint(work / "source", **SIZES)
    ids = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))
    cases = {case: prepared(case, work, ids) for case in CASES if re.search(arguments.only, case)}
    found = {}
    wrong = []
    for name in arguments.readers.split(","):
        found[name] = read_all(name, cases, ids.tolist())
        for case, words in found[name].items():
            print(f"{case} | {name} | {words}", flush=True)
            expected = next((g for c, r, g in EXPECTED if r == name and re.match(c, case)), "alike")
            if name != "vllm" and words.partition(":")[0] != expected:
                wrong.append(f"{case} in {name}: {words} (expected: {expected})")
    rows = [[case, *(answers.get(case, "") for answers in found.values())] for case in cases]
    print(table(("", *found), rows))
    if wrong:
        raise SystemExit("interop-formats failed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
