"""Stop strings over text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def possible_start(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of one of `marks`."""
    longest = max(map(len, marks), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-size:]
        if any(mark.startswith(tail) for mark in marks):
            return size
    return 0


class StopBuffer:
    """Passes text on, up to the first stop string, holding back what may turn out to be part of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None  # the stop string that was found

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.matched is not None

    def feed(self, text: str, final: bool = False) -> str:
        """Take the next `text`; return what may be shown now.

        After a stop string `stopped` is True and nothing more comes out; the stop string itself is never shown.
        `final` says that no text follows, so that nothing needs to be held back.
        """
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = [(position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            position, self.matched = min(found)
            shown, self._held = self._held[:position], ""
            return shown
        keep = 0 if final else possible_start(self._held, self._stops)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown
