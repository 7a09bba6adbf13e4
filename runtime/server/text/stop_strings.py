"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def partial_match_length(text: str, marks: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = max(map(len, marks), default=0)
    first_characters = {mark[:1] for mark in marks}
    for size in range(min(longest - 1, len(text)), 0, -1):
        if text[-size] not in first_characters:
            continue
        tail = text[-size:]
        if any(mark.startswith(tail) for mark in marks):
            return size
    return 0


class StopStringBuffer:
    """Passes text on up to the first stop string, and holds back a possible beginning of one."""

    def __init__(self, stop_strings: tuple[str, ...], include_match: bool = False) -> None:
        """Create a buffer. `include_match`: the text that is shown ends with the stop string."""
        self.matched: str | None = None  # the stop string that was found
        self._include_match = include_match
        self._stop_strings = stop_strings
        self._buffer = ""  # text that is held back

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.matched is not None

    def feed(self, text: str, final: bool = False) -> str:
        """Add the next `text`; return what can be shown now.

        Nothing after the stop string is ever shown. `final` says that no text follows, so that
        nothing needs to be held back.
        """
        if self.stopped:
            return ""
        if not self._stop_strings:
            return text
        self._buffer += text
        matches = []
        for stop_string in self._stop_strings:
            position = self._buffer.find(stop_string)
            if position >= 0:
                matches.append((position, stop_string))
        if matches:
            position, self.matched = min(matches)
            end = position + (len(self.matched) if self._include_match else 0)
            shown = self._buffer[:end]
            self._buffer = ""
            return shown
        held_back = 0 if final else partial_match_length(self._buffer, self._stop_strings)
        end = len(self._buffer) - held_back
        shown = self._buffer[:end]
        self._buffer = self._buffer[end:]
        return shown
