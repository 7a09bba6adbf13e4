"""The token windows that models are calibrated and scored on.

Legend: L tokens of a window. Each window begins with the BOS token if the tokenizer adds one.
"""

from __future__ import annotations

import torch

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import InputError
from llmkit.quant.calibration_text import (
    BUILTIN,
    CalibrationText,
    load_text,
    select_windows,
    split_builtin,
)

EVALUATION_TOKENS = 1024  # L of an evaluation window, also with other calibration windows


def calibration_windows(
    tokenizer: Tokenizer,
    text: CalibrationText,
    is_builtin: bool,
    count: int,
    length: int,
    seed: int,
) -> torch.Tensor:
    """Up to `count` windows [n, L = length] of the text, chosen by `seed`.

    The documents are tokenized, concatenated and cut to full windows. Of the builtin text only the
    calibration part is used. Raises InputError when there is not one full window.
    """
    tokens = _tokenize(tokenizer, text)
    if is_builtin:
        tokens, _ = split_builtin(tokens)
    return _cut_windows(tokenizer, tokens, text.name, count, length, seed)


def evaluation_windows(
    tokenizer: Tokenizer, count: int, length: int = EVALUATION_TOKENS, seed: int = 0
) -> torch.Tensor:
    """Up to `count` windows [n, L = length] of the held-out part of the builtin text."""
    text = load_text(BUILTIN)
    _, held_out = split_builtin(_tokenize(tokenizer, text))
    return _cut_windows(tokenizer, held_out, text.name, count, length, seed)


def _tokenize(tokenizer: Tokenizer, text: CalibrationText) -> torch.Tensor:
    token_ids: list[int] = []
    for document in text.documents:
        token_ids += tokenizer.encode(document, add_special_tokens=False)
    return torch.tensor(token_ids, dtype=torch.int64)


def _cut_windows(
    tokenizer: Tokenizer, tokens: torch.Tensor, name: str, count: int, length: int, seed: int
) -> torch.Tensor:
    start = tokenizer.encode("")[:1]
    bos = start if start and start[0] == tokenizer.bos_token_id else []
    needed = length - len(bos)
    if needed < 1 or len(tokens) < needed:
        raise InputError(
            f"text {name} is too short: {len(tokens)} tokens, "
            f"and one window needs {max(needed, 1)}",
            todo="Use a longer text or a smaller --seq-len",
        )
    windows = select_windows(tokens, count, needed, seed)
    if not bos:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos[0]), windows], dim=1)
