"""Guessing tokens ahead, so that one step of the model confirms several.

A guess is confirmed when it is what the model itself chooses at that place with the sequence's own seed: whatever is
guessed, the answer is the one that would come without guessing, sampled or greedy.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens of context that are looked up


class NgramIndex:
    """Where each run of tokens was last seen in a sequence: prompt lookup (Saxena, 2023) at constant cost a token."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], int] = {}  # a run of tokens -> the position after it
        self._size = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the last occurrence of what `tokens` end with."""
        for end in range(self._size + 1, len(tokens)):  # runs that end before the last token
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._seen[tuple(tokens[end - length : end])] = end
        self._size = max(self._size, len(tokens) - 1)
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            if (after := self._seen.get(tuple(tokens[-length:]))) is not None:
                return list(tokens[after : after + count])
        return []


def confirmed(guesses: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """What the model chose up to and including the first place where it differs from the guesses.

    `chosen` has one token more than `guesses`: the one after the last guess.
    """
    agreed = 0
    while agreed < len(guesses) and guesses[agreed] == chosen[agreed]:
        agreed += 1
    return list(chosen[: agreed + 1])
