"""Stop strings over text that arrives in pieces."""

from __future__ import annotations


class StopBuffer:
    """Passes text on, up to the first stop string, holding back what may turn out to be part of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, text: str, final: bool = False) -> str:
        """Take the next `text`; return what may be shown now.

        After a stop string `stopped` is True and nothing more comes out; the stop string itself is never shown.
        `final` says that no text follows, so that nothing needs to be held back.
        """
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = 0 if final else self._possible_start()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def _possible_start(self) -> int:
        """Characters at the end of the held text that may be the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
