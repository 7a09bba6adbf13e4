"""The token windows that models are calibrated and scored on.

Legend: `L` tokens of a window. Each window begins with the BOS token where the tokenizer begins texts with it.
"""

from __future__ import annotations

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.quant.text import BUILTIN, CalibrationText, load_text, split_builtin, windows

EVALUATION_TOKENS = 1024  # L of the evaluation's windows, whatever those of the calibration are


def calibration_windows(
    tokenizer: Tokenizer, text: CalibrationText, builtin: bool, count: int, length: int, seed: int
) -> torch.Tensor:
    """Up to `count` windows [n, L = length] of the text, chosen by `seed`; of the builtin text, from its first part.

    The documents are tokenized, concatenated and cut to full windows. Raises InputError when not one is full.
    """
    tokens = _tokens(tokenizer, text)
    if builtin:
        tokens, _ = split_builtin(tokens)
    return _cut(tokenizer, tokens, text.name, count, length, seed)


def evaluation_windows(
    tokenizer: Tokenizer, count: int, length: int = EVALUATION_TOKENS, seed: int = 0
) -> torch.Tensor:
    """Up to `count` windows [n, L = length] of the part of the builtin text that is never calibrated with."""
    text = load_text(BUILTIN)
    _, held_out = split_builtin(_tokens(tokenizer, text))
    return _cut(tokenizer, held_out, text.name, count, length, seed)


def _tokens(tokenizer: Tokenizer, text: CalibrationText) -> torch.Tensor:
    ids = [index for document in text.documents for index in tokenizer.encode(document, add_special_tokens=False)]
    return torch.tensor(ids, dtype=torch.int64)


def _cut(tokenizer: Tokenizer, tokens: torch.Tensor, name: str, count: int, length: int, seed: int) -> torch.Tensor:
    beginning = tokenizer.encode("")[:1]
    prefix = beginning if beginning and beginning[0] == tokenizer.bos_id else []
    needed = length - len(prefix)
    if needed < 1 or len(tokens) < needed:
        raise InputError(
            f"text {name} is too short: {len(tokens)} tokens, and one window needs {max(needed, 1)}",
            todo="Use a longer text or a smaller --seq-len",
        )
    cut = windows(tokens, count, needed, seed)
    return torch.cat([torch.full((len(cut), 1), prefix[0]), cut], dim=1) if prefix else cut
