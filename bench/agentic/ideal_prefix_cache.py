"""How many prompt tokens a prefix cache that never forgets would have found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class SentRequest(NamedTuple):
    """A request that was answered. Times are seconds of one clock."""

    sent_s: float
    answered_s: float
    prompt: Sequence[int]  # token ids
    answer: Sequence[int]


class InfinitePrefixCache:
    """The blocks of everything that was computed, found by all tokens up to their end."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # A block is known by the number of the block before it and its own tokens. 0 is the start.
        self._numbers: dict[tuple[int, tuple[int, ...]], int] = {}

    def match(self, prompt: Sequence[int]) -> int:
        """The prompt tokens that are cached. The last token is always computed, for its logits."""
        num_found = 0
        number: int | None = 0
        for block in self._blocks(prompt[:-1]):
            assert number is not None
            number = self._numbers.get((number, block))
            if number is None:
                break
            num_found += self._block_size
        return num_found

    def add(self, tokens: Sequence[int]) -> None:
        """Cache the full blocks of tokens that were computed."""
        number = 0
        for block in self._blocks(tokens):
            number = self._numbers.setdefault((number, block), len(self._numbers) + 1)

    def _blocks(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self._block_size
        for end in range(size, len(tokens) + 1, size):
            yield tuple(tokens[end - size : end])


def ideal_cached_tokens(requests: Iterable[SentRequest], block_size: int) -> int:
    """The prompt tokens that an infinite cache would have had when each request was sent.

    A prompt is in the cache from its sending on, because requests that arrive together can share
    what one of them computes. An answer is in it when it has ended, without its last token, which
    no step computes.
    """
    events: list[tuple[float, int, SentRequest]] = []
    for request in requests:
        events.append((request.sent_s, 1, request))
        events.append((request.answered_s, 0, request))
    # At one time, answers come first: the next turn is sent after the answer before it.
    events.sort(key=lambda event: event[:2])
    cache = InfinitePrefixCache(block_size)
    num_found = 0
    for _, is_sending, request in events:
        if is_sending:
            num_found += cache.match(request.prompt)
            cache.add(request.prompt)
        else:
            cache.add([*request.prompt, *request.answer[:-1]])
    return num_found
