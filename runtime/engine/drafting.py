"""Speculative decoding: draft tokens that one step of the model verifies together.

A draft token is accepted when the model itself samples it at that position with the sequence's own
seed. The output is therefore the same as without drafts, sampled or greedy.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from llmkit.runtime.engine.sequence import Sequence

MAX_NGRAM = 4  # tokens of context that are looked up
MIN_NGRAM = 2


class DraftProposer(Protocol):
    """Proposes the tokens that may follow a sequence."""

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """At most `max_tokens` draft tokens."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is stored for a sequence that has finished."""


class NgramProposer:
    """Proposes what followed the last occurrence of the sequence's last tokens."""

    def __init__(self) -> None:
        self._indexes: dict[Sequence, NgramIndex] = {}

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """See `DraftProposer.propose`."""
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = NgramIndex()
        return index.find_continuation(sequence.token_ids, max_tokens)

    def forget(self, sequence: Sequence) -> None:
        """See `DraftProposer.forget`."""
        self._indexes.pop(sequence, None)


class NgramIndex:
    """Where each n-gram last occurred in a sequence.

    Prompt lookup (Saxena, 2023) at constant cost per token.
    """

    def __init__(self) -> None:
        self._position_after: dict[tuple[int, ...], int] = {}  # n-gram -> the position after it
        self._num_indexed = 0

    def find_continuation(self, token_ids: SequenceOf[int], max_tokens: int) -> list[int]:
        """What followed the last occurrence of the n-gram at the end of `token_ids`.

        Returns at most `max_tokens` tokens.
        """
        # Index every n-gram that ends before the last token.
        for end in range(self._num_indexed + 1, len(token_ids)):
            for length in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._position_after[tuple(token_ids[end - length : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)
        for length in range(min(MAX_NGRAM, len(token_ids)), MIN_NGRAM - 1, -1):
            position = self._position_after.get(tuple(token_ids[-length:]))
            if position is not None:
                return list(token_ids[position : position + max_tokens])
        return []


def accepted_tokens(draft_token_ids: SequenceOf[int], sampled: SequenceOf[int]) -> list[int]:
    """The sampled tokens up to and including the first that differs from the drafts.

    `sampled` has one token more than `draft_token_ids`: the one after the last draft token.
    """
    num_accepted = 0
    while (
        num_accepted < len(draft_token_ids)
        and draft_token_ids[num_accepted] == sampled[num_accepted]
    ):
        num_accepted += 1
    return list(sampled[: num_accepted + 1])
