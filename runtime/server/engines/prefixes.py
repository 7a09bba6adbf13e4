"""What a replica was sent lately: requests go where the beginnings of their prompts are known."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

AHEAD = 4  # a replica with over so many requests more than the least busy one gets none for its prefixes


class Sent:
    """The names of the beginnings of prompts, those sent last, as many as the replica can keep."""

    def __init__(self) -> None:
        self._names: OrderedDict[int, None] = OrderedDict()

    def known(self, names: Sequence[int]) -> int:
        """How many of the first `names` it was sent."""
        return sum(1 for _ in takewhile(self._names.__contains__, names))

    def note(self, names: Sequence[int], most: int) -> None:
        """It is being sent these, and keeps `most`. The ends of prompts are forgotten first, as the engine does."""
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > most:
            self._names.popitem(last=False)
