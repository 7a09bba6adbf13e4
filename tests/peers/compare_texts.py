"""KL divergence of checkpoints from their source, on held-out text of two kinds.

Prose is the held-out part of CPython's language reference, code is `argparse.py`. Both have the
same number of windows of 1,024 tokens.

    python tests/peers/compare_texts.py SOURCE CHECKPOINT ... [--windows 2]
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch

from common import table
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmkit.model.families import checkpoint_spec
from llmkit.quant.layer_stream import LayerStream
from llmkit.quant.output_quality import score_logits
from llmkit.quant.token_windows import EVALUATION_TOKENS, evaluation_windows

MIB = 1 << 20
CODE_START = 30_000  # the first character of argparse.py that is scored


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
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint")
    parser.add_argument("--windows", type=int, default=2, help="of each text (default 2)")
    arguments = parser.parse_args()
    windows = texts(load_tokenizer(open_checkpoint(arguments.source)), arguments.windows)
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
