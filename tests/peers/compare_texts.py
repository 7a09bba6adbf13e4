"""KL divergence of checkpoints from their source, on held-out text of two kinds.

Prose is the held-out part of CPython's language reference, code is `argparse.py`. Both have the
same number of windows of 1,024 tokens.

    python tests/peers/compare_texts.py SOURCE CHECKPOINT ... [--windows 2]

With `--write-calibration FILE.jsonl` it writes a calibration text of both kinds instead, of which
nothing is scored: half is the rest of the language reference, half other modules of the library.
"""

from __future__ import annotations

import argparse
import ast
import asyncio.base_events
import email.message
import inspect
import json
import pathlib
import tarfile
import textwrap
from pathlib import Path

import torch

from common import table
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.model.families import checkpoint_spec
from llmkit.quant.calibration_text import BUILTIN, load_text, split_builtin
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.output_quality import score_logits
from llmkit.quant.token_windows import EVALUATION_TOKENS, evaluation_windows

MIB = 1 << 20
CODE_START = 30_000  # the first character of argparse.py that is scored
CALIBRATION_CODE = (ast, asyncio.base_events, email.message, pathlib, tarfile, textwrap)


def texts(tokenizer: Tokenizer, count: int) -> dict[str, torch.Tensor]:
    """The windows [count, 1024] of each text, by its kind."""
    code = tokenizer.encode(inspect.getsource(argparse)[CODE_START:], add_special_tokens=False)
    needed = count * EVALUATION_TOKENS
    if len(code) < needed:
        raise SystemExit(f"argparse.py has {len(code)} tokens for {count} windows")
    return {
        "prose": evaluation_windows(tokenizer, count),
        "code": torch.tensor(code[:needed]).view(count, EVALUATION_TOKENS),
    }


def write_calibration(tokenizer: Tokenizer, file: Path) -> None:
    """Write a text of both kinds, half and half in tokens."""
    code = "\n".join(inspect.getsource(module) for module in CALIBRATION_CODE)
    count = len(tokenizer.encode(code, add_special_tokens=False))
    (builtin,) = load_text(BUILTIN).documents
    tokens = torch.tensor(tokenizer.encode(builtin, add_special_tokens=False))
    prose = tokenizer.decode(split_builtin(tokens)[0][:count].tolist())
    with file.open("w") as stream:
        for text in (prose, code):
            stream.write(json.dumps({"text": text}) + "\n")


def logits(model: str, windows: torch.Tensor) -> list[torch.Tensor]:
    """The float32 logits of a checkpoint for each window of [n, L]."""
    checkpoint = open_checkpoint(model)
    stream = LayerStream.from_checkpoint(checkpoint, checkpoint_spec(checkpoint))
    return list(stream.logits(windows))


def weights_bytes(model: str) -> int:
    """The bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def main() -> None:
    """Print a row for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("checkpoints", nargs="*", metavar="checkpoint")
    parser.add_argument("--windows", type=int, default=2, help="of each text (default 2)")
    parser.add_argument("--write-calibration", type=Path, help="write a calibration text, a .jsonl")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(open_checkpoint(arguments.source))
    if arguments.write_calibration is not None:
        write_calibration(tokenizer, arguments.write_calibration)
        return
    windows = texts(tokenizer, arguments.windows)
    reference = {kind: logits(arguments.source, tokens) for kind, tokens in windows.items()}
    rows = []
    for model in arguments.checkpoints:
        row = [Path(model).name, f"{weights_bytes(model) / MIB:.1f}"]
        for kind, tokens in windows.items():
            quality = score_logits(logits(model, tokens), reference[kind], tokens)
            row += [f"{quality.mean_kl:.4f}", f"{quality.p99_kl:.3f}", f"{quality.top1:.1%}"]
        rows.append(row)
    head = ["checkpoint", "weights, MiB"]
    for kind in windows:
        head += [f"KL, {kind}", f"99 % KL, {kind}", f"top-1, {kind}"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
