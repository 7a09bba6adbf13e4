"""The budget of thinking tokens: a thought that reaches it is closed by force.

The scheduler follows each output and says which of its next tokens is forced; the runner puts that
token in place of the sampled one. A forced token is never a guess: the scheduler lets a step sample
a token only while it is certain that the token is free, so the budget is exact with draft tokens
and with steps in flight, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

UNLIMITED = 1 << 62  # more tokens than any request has
# Where no thinking token is free, a thought must begin within so many tokens to be closed. After
# them the output has its answer, and steps no longer wait for the last token.
MAX_TOKENS_BEFORE = 16


@dataclass(frozen=True)
class ThinkingBudget:
    """How many tokens the thoughts of an output may have, and which tokens enclose a thought."""

    max_tokens: int  # of all thoughts of the output, without the marks; 0: a thought ends at once
    start_token_ids: tuple[int, ...]  # consecutive tokens that open a thought
    end_token_id: int  # closes a thought
    # What is forced at the budget. It ends with `end_token_id`, or with what a model writes after
    # that token before its answer.
    forced_token_ids: tuple[int, ...]
    starts_open: bool = False  # whether the prompt ends inside a thought
    # What is forced where a further thought begins after the budget; (): no further one is watched.
    forced_again_token_ids: tuple[int, ...] = ()


class ThinkingState:
    """Follows one output through its thoughts. `append` takes each known token in turn."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._num_left = budget.max_tokens  # thinking tokens that are free
        self._is_open = budget.starts_open
        self._is_over = False  # no later token is forced
        self._closing = budget.forced_token_ids  # what is forced at the budget
        self._num_forced = 0  # tokens of `_closing` in the output
        self._num_outside = 0  # tokens outside of thoughts
        self._last_token_ids: list[int] = []  # as many as the opening mark has

    @property
    def num_free_tokens(self) -> int:
        """How many of the next tokens are certainly not forced."""
        if self._is_over:
            return UNLIMITED
        if self._is_open:
            return self._num_left
        # The next token may be the last one of an opening mark.
        return self._num_left + 1

    @property
    def forced_token_id(self) -> int | None:
        """The next token, where it is forced."""
        if self.num_free_tokens:
            return None
        return self._closing[self._num_forced]

    def append(self, token_id: int) -> None:
        """Record the next token of the output."""
        if self._is_over:
            return
        if self.forced_token_id is not None:
            self._num_forced += 1
            if self._num_forced == len(self._closing):
                self._close()
        elif not self._is_open:
            self._find_start(token_id)
        elif token_id == self._budget.end_token_id:
            self._close()
        else:
            self._num_left -= 1

    def _close(self) -> None:
        """Record the end of a thought."""
        self._is_open = False
        if self._num_left:
            return
        self._closing = self._budget.forced_again_token_ids
        self._is_over = not self._closing
        self._num_forced = 0
        self._num_outside = 0

    def _find_start(self, token_id: int) -> None:
        """Open a thought where the opening mark is complete."""
        self._num_outside += 1
        if not self._num_left and self._num_outside >= MAX_TOKENS_BEFORE:
            self._is_over = True
            return
        start = self._budget.start_token_ids
        self._last_token_ids = [*self._last_token_ids, token_id][-len(start) :]
        if tuple(self._last_token_ids) == start:
            self._is_open = True
            self._last_token_ids = []


def forced_rows(
    rows_and_tokens: Iterable[tuple[int, int | None]],
) -> tuple[list[int], list[int]]:
    """From the number of rows and the forced token of each request: the rows, and their tokens.

    A request with a forced token has one row.
    """
    rows: list[int] = []
    token_ids: list[int] = []
    row = 0
    for num_rows, token_id in rows_and_tokens:
        if token_id is not None:
            assert num_rows == 1, "a forced token is not sampled together with drafts"
            rows.append(row)
            token_ids.append(token_id)
        row += num_rows
    return rows, token_ids
