"""llama.cpp's own program, where it was built (`make .llamacpp/.ready bench-gguf`)."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import torch

PROGRAM = Path(__file__).parents[2] / ".llamacpp" / "build" / "bin" / "llama-perplexity"
CONTEXT = 32  # tokens of a window
_HEADER_BYTES = 20  # "_logits_", and the numbers of tokens of a window, of the vocabulary, windows


def llama_cpp_log_probs(file: Path, text: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What llama.cpp computes of a GGUF file on a text.

    Returns the tokens [windows, CONTEXT], and the log probabilities [windows, n, vocab] after those
    of the second half of each window but the last token, as `windowed` takes them. They are stored
    in 16 bits, with a step of 1/65535 of the range of a row.
    """
    stored = text.with_suffix(".kld")
    options = ["-c", CONTEXT, "-b", CONTEXT, "-t", 1, "--no-warmup"]
    command = [PROGRAM, "-m", file, "-f", text, *options, "--kl-divergence-base", stored]
    process = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    raw = stored.read_bytes()
    length, vocab, windows = struct.unpack("<iii", raw[8:_HEADER_BYTES])
    tokens = np.frombuffer(raw, np.int32, windows * length, _HEADER_BYTES)
    rows = np.frombuffer(raw, np.uint16, offset=_HEADER_BYTES + tokens.nbytes)
    # A row is the float32 step and minimum, and a number for each token of an even vocabulary.
    rows = rows.reshape(windows, -1, 4 + vocab + vocab % 2)
    step, minimum = np.moveaxis(rows[..., :4].copy().view(np.float32), -1, 0)
    values = step[..., None] * rows[..., 4 : 4 + vocab] + minimum[..., None]
    return (
        torch.from_numpy(tokens.reshape(windows, length).astype(np.int64)),
        torch.from_numpy(values),
    )


def windowed(logits: torch.Tensor) -> torch.Tensor:
    """The log probabilities that `llama_cpp_log_probs` has, of logits [CONTEXT, vocab]."""
    return torch.log_softmax(logits.float(), dim=-1)[CONTEXT // 2 : CONTEXT - 1]
