"""Bitmasks of grammars: one bit a token, from the matchers to the logits."""

from __future__ import annotations

import math

import pytest
import torch

from llmkit.kernels.token_bitmask import apply_token_bitmask, num_bitmask_words
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.grammar_bitmasks import grammar_bitmasks
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sequence import Sequence

CPU = torch.device("cpu")


class FixedMatcher:
    """A grammar that allows the same tokens at every place. It knows 70 tokens."""

    def __init__(self, *allowed: int) -> None:
        self.words = [0, 0, 0]
        for token in allowed:
            self.words[token // 32] |= 1 << token % 32

    def fill_bitmask(self, bitmask: torch.Tensor) -> None:
        words = torch.tensor(self.words, dtype=torch.int64).int()[: len(bitmask)]
        bitmask.zero_()[: len(words)] = words

    def accept_token(self, token_id: int) -> None: ...

    def is_terminated(self) -> bool:
        return False


def new_sequence(*allowed: int) -> Sequence:
    matcher = FixedMatcher(*allowed) if allowed else None
    request = EngineRequest("a", [5], SamplingParams())
    return Sequence(request, seed=0, grammar_matcher=matcher)


def unpacked(words: list[int], first: int, size: int) -> list[bool]:
    """The bits of the tokens from `first` on, in plain arithmetic; none behind the words."""
    number = sum((word % 2**32) << 32 * index for index, word in enumerate(words))
    return [bool(number >> token & 1) for token in range(first, first + size)]


@pytest.mark.parametrize(
    ("start", "size"), [(0, 70), (0, 64), (0, 31), (0, 130), (32, 38), (35, 35), (63, 2), (95, 40)]
)
def test_apply_token_bitmask_masks_the_columns_of_each_rank(start: int, size: int) -> None:
    """A rank may begin within a word, and tokens behind the words are not allowed."""
    draw = torch.Generator().manual_seed(0)
    bitmask = torch.randint(-(1 << 31), 1 << 31, (2, 3), generator=draw).int()
    logits = torch.randn(4, size, generator=draw)
    expected = logits.clone()
    apply_token_bitmask(logits, bitmask, torch.tensor([-1, 1, -1, 0], dtype=torch.int32), start)
    for row, mask_row in ((1, 1), (3, 0)):
        allowed = torch.tensor(unpacked(bitmask[mask_row].tolist(), start, size))
        expected[row, ~allowed] = -math.inf
    assert torch.equal(logits, expected)


def test_grammar_bitmasks_are_of_rows_that_sample_with_a_grammar() -> None:
    """As in a step that verifies drafts: two rows have one sequence."""
    plain = new_sequence()
    drafted = new_sequence(1, 31, 32)
    last = new_sequence(63, 69)
    sequences = [plain, drafted, drafted, plain, drafted, last]
    samples = [True, True, True, True, False, True]
    found = grammar_bitmasks(sequences, samples, 70, CPU)
    assert found is not None
    assert found.bitmask_rows.tolist() == [-1, 0, 1, -1, -1, 2]
    assert found.bitmask_rows.dtype == found.bitmask.dtype == torch.int32
    first = [2 - (1 << 31), 1, 0]
    assert found.bitmask.tolist() == [first, first, [0, -(1 << 31), 32]]


def test_grammar_bitmasks_are_none_without_a_grammar() -> None:
    """Then nothing is copied and nothing is read."""
    assert grammar_bitmasks([new_sequence()], [True], 70, CPU) is None
    assert grammar_bitmasks([new_sequence(1)], [False], 70, CPU) is None


def test_bitmasks_cover_the_tokens_of_a_padded_vocabulary() -> None:
    assert [num_bitmask_words(size) for size in (1, 32, 33, 128_256)] == [1, 1, 2, 4008]
    found = grammar_bitmasks([new_sequence(69)], [True], 128, CPU)
    assert found is not None
    assert found.bitmask.tolist() == [[0, 0, 32, 0]]
