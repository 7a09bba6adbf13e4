"""A parser of server-sent events, as the WHATWG HTML standard defines them."""

from __future__ import annotations


class EventParser:
    """Collects the `data` of events.

    A read may end anywhere: inside a line, between CR and LF, or inside a UTF-8 character.
    """

    def __init__(self) -> None:
        self._partial_line = b""
        self._data_lines: list[str] = []  # of the event that is not complete yet

    def feed(self, read: bytes) -> list[str]:
        """The data of each event that this read completes."""
        lines = (self._partial_line + read).splitlines(keepends=True)
        self._partial_line = b""
        # A line that ends in CR may be incomplete too: the next read may begin with its LF.
        if lines and not lines[-1].endswith(b"\n"):
            self._partial_line = lines.pop()
        return self._parse_lines(lines)

    def close(self) -> list[str]:
        """The data of an event that the end of the stream completes.

        The standard drops such an event. Some servers leave out the last blank line, so it counts.
        """
        lines = [self._partial_line] if self._partial_line else []
        self._partial_line = b""
        return self._parse_lines([*lines, b"\n"])

    def _parse_lines(self, lines: list[bytes]) -> list[str]:
        """Parse complete lines. Returns the data of each event that they complete."""
        events = []
        for raw_line in lines:
            line = raw_line.rstrip(b"\r\n").decode("utf-8", "replace")
            if line:
                name, _, value = line.partition(":")
                if name == "data":
                    self._data_lines.append(value.removeprefix(" "))
            elif self._data_lines:
                events.append("\n".join(self._data_lines))
                self._data_lines = []
        return events
