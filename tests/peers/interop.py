"""`make interop`: vLLM and transformers run llmkit's formats, and llmkit reads those of others.

    python tests/peers/interop.py [--only REGEX] [--engines vllm,transformers] [--work DIR]

Every format of SmolLM2-135M-Instruct answers ten prompts with sixteen greedy tokens in
`llmkit serve`, vLLM (CPU) and transformers; so do tiny random models of other families, in fewer
formats. Answers agree when their tokens are equal, or when the
first different tokens are a near tie: both about as probable. Formats that quantize the inputs of
their layers (W8A8, FP8) only have to run, because the last digit of an input can change a rounding.
Weights that auto-gptq, autoawq and llm-compressor pack must be read bit for bit. Exit code 1 when a
check fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_quant import THEIRS, run_llmcompressor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.server_process import serving
from support.tiny_models import VOCAB
from support.tiny_quantized import PIECES, piece_checkpoint
from support.tiny_wrappers import MROPE, save_wrapper, tiny_wrapper

from common import llmkit, real_model, run_peer, table
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import load_model, read_parameter
from llmkit.quant.calibration_text import load_text
from llmkit.quant.generated_text import PROMPTS, prompt_ids
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.token_windows import calibration_windows
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.sampling_params import SamplingParams

TOKENS = 16
TIE = 0.05  # nats between two tokens of which either may be taken for the likelier one
CALIBRATION = ("--samples", "2", "--seq-len", "256")
FAMILY_CALIBRATION = ("--samples", "8", "--seq-len", "128")
GRADES = ("refuse", "run", "same")


@dataclass(frozen=True)
class Case:
    """A checkpoint to write, and what the engines are to do with it: "same" answers, "run",
    "refuse"; None: nothing is tried."""

    options: tuple[str, ...]  # of `llmkit quantize`
    vllm: str | None
    transformers: str | None
    more: dict[str, list[str]]  # arguments of an engine's script


def case(
    options: str,
    vllm: str | None,
    transformers: str | None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Case:
    """A `Case` from words."""
    return Case(
        tuple(options.split()),
        vllm,
        transformers,
        {name: text.split() for name, text in more.items()},
    )


FEW = r"--keep model\.layers\.(0|7)\.(self_attn|mlp\.down_proj)"  # linears that stay in 16 bits
CT = "--format compressed-tensors"
WRITTEN = {
    "bf16": case("--method bf16", "same", "same"),
    "fp16": case("--method fp16", "same", "same"),
    "gptq, 4 bits": case("--method gptq", "same", "same"),
    "gptq, 8 bits": case("--method gptq --bits 8", "same", "same"),
    "gptq, some kept": case(f"--method gptq {FEW}", "same", "same"),
    "awq": case("--method awq", "same", "same"),
    "awq, some kept": case(f"--method awq {FEW}", "same", "same"),
    "pack-quantized, 4 bits": case("--method rtn", "same", "same"),
    "pack-quantized, 4 bits, some kept": case(f"--method rtn {FEW}", "same", "same"),
    "pack-quantized, 4 bits asymmetric": case(f"--method gptq {CT} --asymmetric", "same", "refuse"),
    "the same, dequantized": case(
        f"--method gptq {CT} --asymmetric", None, "same", {"transformers": "--dequantize"}
    ),
    "pack-quantized, 8 bits": case("--method int8", "same", "same"),
    "mixed 4 and 8 bits": case("--method gptq --target-bits 5.5", "same", "same"),
    "mixed 4, 8 and 16 bits": case("--method rtn --target-bits 9", "same", "same"),
    "gptq, 4 bits, lm_head too": case("--method gptq --lm-head 4", "same", "run"),
    "pack-quantized, 4 bits, lm_head 8": case("--method rtn --lm-head 8", "same", "same"),
    "pack-quantized, 8 bits, lm_head too": case("--method int8 --lm-head 8", "same", "same"),
    "int-quantized (W8A8)": case("--method int8 --activations", "run", "run"),
    "float-quantized (FP8), inputs per token": case("--method fp8", "run", "run"),
    "float-quantized (FP8), fixed scale": case("--method fp8 --static", "refuse", "run"),
    "bf16, FP8 KV cache": case("--method bf16 --kv fp8", "refuse", "run"),
    "bf16, FP8 KV scales, 16-bit cache": case(
        "--method bf16 --kv fp8",
        "run",
        None,
        {"vllm": '--dtype bfloat16 --engine {"kv_cache_dtype":"bfloat16"}'},
    ),
    "pack-quantized, FP8 KV scales, 16-bit cache": case(
        f"--method gptq {CT} --kv fp8",
        "run",
        "run",
        {"vllm": '--engine {"kv_cache_dtype":"bfloat16"}'},
    ),
    "bf16, INT8 KV cache": case("--method bf16 --kv int8", "refuse", "run"),
}


FAMILY_FORMATS = {
    "gptq": case("--method gptq", "same", "same"),
    "awq": case("--method awq", "same", "same"),
    "pack-quantized, 4 bits": case("--method rtn", "same", "same"),
    "int-quantized (W8A8)": case("--method int8 --activations", "run", "run"),
    "float-quantized (FP8)": case("--method fp8", "run", "run"),
}
# What is known to differ, by the beginning of the case and the engine.
FAMILY_GRADES = (
    # Few of its CPU kernels take experts; and it reads a field that transformers does not write.
    (r"(afmoe|\w+_moe): ", "vllm", "refuse"),
    # It looks for modules that the checkpoint does not have; `--for vllm` refuses both.
    (r"(glm4|gemma4_text): gptq", "vllm", "refuse"),
    (r"starcoder2: int", "vllm", "refuse"),  # its backend of transformers' modeling code
    (r"apertus: (gptq|awq)", "vllm", "run"),  # xIELU in float16
    # It reads FP8 and packed experts only; `--for transformers` refuses these.
    (r"(afmoe|\w+_moe): int", "transformers", "refuse"),
)
# More arguments of vllm_generate.py for formats that vLLM accepts in half precision only.
HALF_PRECISION = {
    "glm4": ("--dtype", "bfloat16"),  # vLLM refuses float16
    "gemma3": ("--dtype", "bfloat16"),
    "apertus": ("--reference",),  # its xIELU computes float32, which the 4-bit product refuses
}
# What differs from tiny_quantized: the sizes for which vLLM's CPU kernels exist.
FAMILY_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "global_head_dim": 64,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
# Multimodal models of support.tiny_wrappers: fields of the text_config that kernels need.
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {},
    "mistral3": {"head_dim": 32},
    "qwen2.5-vl": {"rope_parameters": MROPE | {"mrope_section": [8, 4, 4]}},
    "qwen3-vl": {},
}
FAMILY_FIELDS = {
    # vLLM reads them, and transformers does not write them.
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    # In vLLM a window of Cohere 2 has one token more than in transformers. No prompt is as long.
    "cohere2": {"sliding_window": 64},
}


def served(model: Path, prompts: Sequence[Sequence[int]], log: Path) -> list[list[int]]:
    """The greedy tokens that `llmkit serve` answers with."""
    body = {
        "prompt": prompts,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with serving(log, model) as server, server.client() as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        answer = (
            client.post("/v1/completions", json={"model": name, **body}, timeout=600)
            .raise_for_status()
            .json()
        )
    return [choice["token_ids"] for choice in answer["choices"]]


def generated(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The greedy tokens of llmkit's engine, without a server."""
    config = EngineConfig(64, num_blocks=64, device=torch.device("cpu"), dtype=torch.float32)
    engine = Engine(load_model(open_checkpoint(model), torch.float32), config)
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return engine.generate([list(prompt) for prompt in prompts], greedy)


def answered(
    name: str, model: Path, prompts: Path, out: Path, more: Sequence[str]
) -> dict[str, Any]:
    """What another engine's script wrote: `tokens` among others, or the `error` that stopped it."""
    out.unlink(missing_ok=True)
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
        *more,
        check=False,
    )
    found: dict[str, Any] = (
        json.loads(out.read_text()) if out.exists() else {"error": "it wrote nothing"}
    )
    return found


def log_probabilities(
    model: Checkpoint, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """llmkit's own of every token at every step of its answers, [TOKENS, vocab] each."""
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, texts))
    windows = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    stream = LayerStream.from_checkpoint(model, checkpoint_spec(model)).logits(windows)
    return [
        logits[len(prompt) - 1 :][:TOKENS].log_softmax(-1)
        for prompt, logits in zip(prompts, stream, strict=True)
    ]


def agreement(
    model: Checkpoint,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: dict[str, Any],
) -> tuple[str, str]:
    """What happened ("same", "run" or "refuse"), and in words.

    Answers that differ are a tie when at the first token that does neither engine finds its own
    likelier by more than TIE. Up to there the log probabilities of the other engine's tokens are
    compared."""
    if "error" in theirs:
        return "refuse", f"refused: {theirs['error']}"
    ties = []
    gaps = []
    for one, two, own, top in zip(
        ours,
        theirs["tokens"],
        log_probabilities(model, prompts, ours),
        theirs["top_logprobs"],
        strict=True,
    ):
        parted = next((step for step in range(TOKENS) if one[step] != two[step]), None)
        if parted is not None:
            other = top[parted][str(two[parted])] - top[parted].get(str(one[parted]), -math.inf)
            ties.append(max(float(own[parted, one[parted]] - own[parted, two[parted]]), other))
        steps = range(TOKENS if parted is None else parted + 1)
        gaps += [abs(float(own[step, two[step]]) - top[step][str(two[step])]) for step in steps]
    words = f"{len(ours) - len(ties)} of {len(ours)} alike"
    if ties:
        words += f", the others part at ties within {min(ties):.3f} to {max(ties):.3f} nats"
    words += f"; log probabilities differ by {sum(gaps) / len(gaps):.4f}"
    if theirs.get("reference_ops"):
        words += f" ({', '.join(theirs['reference_ops'])} computed in torch)"
    if "kv_scales" in theirs:
        stored = {
            name: model.read(name).item()
            for name in model.tensors
            if name.endswith(("k_scale", "v_scale"))
        }
        alike = sum(theirs["kv_scales"].get(name) == value for name, value in stored.items())
        words += f"; {alike} of {len(stored)} KV scales taken as stored"
    return ("same" if all(one <= TIE for one in ties) else "run"), words


def compared(
    name: str, what: Case, model: Path, ours: list[list[int]], prompts: Path, engines: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Run a checkpoint in the other engines: a row of the table, and what did not hold.

    ours: llmkit's answers to the prompts in the file `prompts`.
    """
    opened = open_checkpoint(model)
    ids = json.loads(prompts.read_text())
    row = [name]
    wrong = []
    for engine, wanted in (("vllm", what.vllm), ("transformers", what.transformers)):
        if wanted is None or engine not in engines:
            row.append("")
            continue
        out = prompts.parent / f"{_file_name(name)}.{engine}.json"
        theirs = answered(engine, model, prompts, out, what.more.get(engine, ()))
        happened, words = agreement(opened, ids, ours, theirs)
        row.append(f"{happened}: {words}" if happened != "refuse" else words)
        # More than expected is as good: another machine's build may have the kernel that this one
        # lacks.
        if GRADES.index(happened) < GRADES.index(wanted):
            wrong.append(f"{name} in {engine}: {words}")
    print(" | ".join(row), flush=True)
    return row, wrong


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def written(work: Path, only: str, engines: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Run every format through every engine: rows of a table, and what did not hold."""
    cases = {name: what for name, what in WRITTEN.items() if re.search(only, name)}
    if not cases:
        return [], []
    source = real_model(work)
    tokenizer = load_tokenizer(open_checkpoint(source))
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    file = work / "prompts.json"
    file.write_text(json.dumps(prompts))
    rows = []
    wrong = []
    for name, what in cases.items():
        model = work / hashlib.sha256(" ".join(what.options).encode()).hexdigest()[:12]
        quantized(source, model, what, CALIBRATION)
        ours = served(model, prompts, work / "serve.log")
        row, problems = compared(name, what, model, ours, file, engines)
        rows.append(row)
        wrong += problems
    return rows, wrong


def quantized(source: Path, model: Path, what: Case, calibration: Sequence[str]) -> None:
    """Write the checkpoint of a case, unless an earlier run has."""
    if not model.exists():
        llmkit(
            "quantize",
            source,
            *what.options,
            *calibration,
            "--no-eval",
            "--quiet",
            "--output",
            model,
        )


def families(work: Path, only: str, engines: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Run tiny models of other families: rows of a table, and what did not hold."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        for length in (1, 5, 17, 30)
    ]
    file = work / "family-prompts.json"
    file.write_text(json.dumps(prompts))
    rows = []
    wrong = []
    for piece, (kind, differences) in PIECES.items():
        for name, what in FAMILY_FORMATS.items():
            label = f"{kind}: {name}"
            if not re.search(only, label):
                continue
            source = work / kind
            if not source.exists():
                changed = {"hidden_size", "intermediate_size", "head_dim", *differences}
                sizes = {key: size for key, size in FAMILY_SIZES.items() if key in changed}
                piece_checkpoint(piece, source, **sizes, **FAMILY_FIELDS.get(kind, {}))
            model = work / _file_name(label)
            quantized(source, model, what, FAMILY_CALIBRATION)
            if name in ("gptq", "awq") and kind in HALF_PRECISION:
                what = replace(what, more={"vllm": list(HALF_PRECISION[kind])})
            for pattern, engine, grade in FAMILY_GRADES:
                if re.match(pattern, label) and engine == "vllm":
                    what = replace(what, vllm=grade)
                elif re.match(pattern, label):
                    what = replace(what, transformers=grade)
            row, problems = compared(label, what, model, generated(model, prompts), file, engines)
            rows.append(row)
            wrong += problems
    return rows, wrong


def wrappers(work: Path, only: str, engines: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Run tiny multimodal models: rows of a table, and what did not hold.

    Their tensors have the names of the hub's files, which transformers renames when it loads them.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 5, 17, 24)
    ]
    file = work / "wrapper-prompts.json"
    file.write_text(json.dumps(prompts))
    rows = []
    wrong = []
    for wrapper, fields in WRAPPERS.items():
        for name, what in FAMILY_FORMATS.items():
            label = f"wrapper {wrapper}: {name}"
            if not re.search(only, label):
                continue
            source = work / f"wrapper-{wrapper}"
            if not source.exists():
                oracle = tiny_wrapper(
                    wrapper, **(fields | {"hidden_size": 128, "intermediate_size": 256})
                )
                save_wrapper(oracle, source, hub_names=True)
            model = work / _file_name(label)
            quantized(source, model, what, FAMILY_CALIBRATION)
            arguments = ["--engine", '{"limit_mm_per_prompt": {"image": 0}}']  # text only
            if name in ("gptq", "awq"):
                arguments += HALF_PRECISION.get(wrapper, ())
            # vLLM's multimodal classes import torchvision, which vllm.txt does not install.
            what = replace(what, vllm="refuse", more={"vllm": arguments})
            row, problems = compared(label, what, model, generated(model, prompts), file, engines)
            rows.append(row)
            wrong += problems
    return rows, wrong


def packed(work: Path) -> tuple[list[list[str]], list[str]]:
    """Read what auto-gptq and autoawq packed."""
    rows = []
    wrong = []
    for name, form in (("autogptq", "gptq"), ("autoawq", "awq")):
        file = work / f"{name}.safetensors"
        run_peer(name, f"{name}_pack.py", "--out", file)
        alike = cases = 0
        with safe_open(file, "pt") as handle:
            described = handle.metadata()
        tensors = load_file(file)
        for index in range(int(described["cases"])):
            one = json.loads(described[f"case{index}"])
            if one.get("desc_act"):
                continue
            parts = {
                k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"case{index}.")
            }
            dense = parts.pop("dense")
            scheme = Scheme(one["bits"], one["group_size"], one["sym"])
            cases += 1
            alike += torch.equal(FORMATS[form].unpack(scheme, parts).dequantize(), dense)
        rows.append([described["packer"], f"{alike} of {cases} weights bit for bit"])
        print(" | ".join(rows[-1]), flush=True)
        if alike < cases:
            wrong.append(f"{name}: {cases - alike} weights differ")
    return rows, wrong


def compressed(work: Path, only: str) -> tuple[list[list[str]], list[str]]:
    """Read what llm-compressor wrote."""
    source = real_model(work)
    tokenizer = load_tokenizer(open_checkpoint(source))
    tokens = work / "tokens.safetensors"
    save_file(
        {"tokens": calibration_windows(tokenizer, load_text("builtin"), True, 1, 128, 0)}, tokens
    )
    rows = []
    wrong = []
    for scheme in (*THEIRS.values(), "autoround-sym"):
        if not re.search(only, f"llm-compressor {scheme}"):
            continue
        out = work / f"llm-compressor-{scheme}"
        if not out.exists():
            run_llmcompressor(source, out, scheme, tokens)
        file = out.with_suffix(".safetensors")
        run_peer("llmcompressor", "llmcompressor_dense.py", "--model", out, "--out", file)
        dense = load_file(file)
        checkpoint = open_checkpoint(out)
        linears = [row for row in parameters(checkpoint_spec(checkpoint)) if row.is_linear]
        alike = sum(
            torch.equal(
                read_parameter(checkpoint, row, torch.float32),
                torch.cat([part.rows_of(dense[part.name]) for part in row.sources]),
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
    parser.add_argument(
        "--only", default="", help="a regular expression: formats and schemes to try"
    )
    parser.add_argument(
        "--skip-llmcompressor", action="store_true", help="its AWQ takes many minutes on a CPU"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".interop"), help="folder for checkpoints and results"
    )
    parser.add_argument(
        "--engines", default="vllm,transformers", help="the engines that run llmkit's checkpoints"
    )
    parser.add_argument(
        "--skip-packed", action="store_true", help="without the weights of auto-gptq and autoawq"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    engines = arguments.engines.split(",")
    read: list[list[str]] = []
    wrong: list[str] = []
    if not arguments.skip_packed:
        read, wrong = packed(arguments.work)
    if not arguments.skip_llmcompressor:
        more, problems = compressed(arguments.work, arguments.only)
        read = read + more
        wrong = wrong + problems
    rows, problems = written(arguments.work, arguments.only, engines)
    wrong += problems
    for checked in (families, wrappers):
        more, problems = checked(arguments.work, arguments.only, engines)
        rows += more
        wrong += problems
    print(table(("written by llmkit", "vLLM, CPU", "transformers"), rows))
    print(table(("read by llmkit", ""), read))
    if wrong:
        raise SystemExit("interop failed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
