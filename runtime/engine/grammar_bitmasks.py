"""The grammars' bitmasks of a step's rows."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from llmkit.kernels.device_copy import to_device
from llmkit.kernels.token_bitmask import num_bitmask_words
from llmkit.runtime.engine.sequence import Sequence


class GrammarBitmasks(NamedTuple):
    """The tokens that grammars allow, as `kernels.token_bitmask` has them."""

    bitmask: torch.Tensor  # int32 [m, W], of the rows that have a grammar
    bitmask_rows: torch.Tensor  # int32 [n], the row of `bitmask` of each row; -1: no grammar


def grammar_bitmasks(
    sequences: SequenceOf[Sequence],
    samples: SequenceOf[bool],
    num_tokens: int,
    device: torch.device,
) -> GrammarBitmasks | None:
    """The bitmasks of the tokens below `num_tokens`, on the device; None: no row has a grammar.

    sequences: that of each row of logits. samples: whether a row's token will be used; the others
    have no bitmask.
    """
    rows = [
        row
        for row, sequence in enumerate(sequences)
        if samples[row] and sequence.grammar_matcher is not None
    ]
    if not rows:
        return None
    shape = (len(rows), num_bitmask_words(num_tokens))
    bitmask = torch.empty(shape, dtype=torch.int32)
    for index, row in enumerate(rows):
        matcher = sequences[row].grammar_matcher
        if matcher is not None:
            matcher.fill_bitmask(bitmask[index])
    bitmask_rows = torch.full((len(sequences),), -1, dtype=torch.int32)
    bitmask_rows[rows] = torch.arange(len(rows), dtype=torch.int32)
    return GrammarBitmasks(to_device(bitmask, device), to_device(bitmask_rows, device))
