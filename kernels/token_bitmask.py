"""Bitmasks of the tokens that may come next, one bit a token.

Bit b of word w is that of token 32 w + b, as grammar libraries give them (llguidance, XGrammar).
Legend: n rows, V vocabulary columns of this rank, W words.
"""

from __future__ import annotations

import torch

BITS = 32  # tokens of a word


def num_bitmask_words(vocab_size: int) -> int:
    """The int32 words of a bitmask of so many tokens."""
    return -(-vocab_size // BITS)


def apply_token_bitmask(
    logits: torch.Tensor, bitmask: torch.Tensor, bitmask_rows: torch.Tensor, vocab_start: int = 0
) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    logits: float [n, V]. bitmask: int32 [m, W]. bitmask_rows: int32 [n], the row of `bitmask` of
    each of m rows; -1 for the others, which keep their logits. vocab_start: the token of the first
    column; a tensor parallel rank has only some columns. Tokens behind the words are not allowed.
    """
    first_word, first_bit = divmod(vocab_start, BITS)
    last_word = num_bitmask_words(vocab_start + logits.shape[1])
    # The size is known, so that the host does not wait for the device.
    rows = (bitmask_rows >= 0).nonzero_static(size=len(bitmask))[:, 0]
    words = bitmask[bitmask_rows[rows].long(), first_word:last_word].contiguous()
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = (words.view(torch.uint8)[:, :, None] >> shifts).bitwise_and_(1).flatten(1).bool()
    allowed = bits.new_zeros(len(rows), logits.shape[1])
    here = bits[:, first_bit : first_bit + logits.shape[1]]
    allowed[:, : here.shape[1]] = here
    logits[rows] = logits[rows].masked_fill_(~allowed, float("-inf"))
