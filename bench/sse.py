"""Server-sent events as the WHATWG HTML standard defines them, from reads that may end anywhere."""

from __future__ import annotations


class EventParser:
    """Collects the `data` of events. A read may end in the middle of a line, of a CR LF or of a UTF-8 character."""

    def __init__(self) -> None:
        self._rest = b""  # an unfinished line
        self._data: list[str] = []  # the lines of an unfinished event

    def feed(self, read: bytes) -> list[str]:
        """The data of each event that this read completes."""
        lines = (self._rest + read).splitlines(keepends=True)
        # A line that ends in CR is unfinished too: the next read may begin with its LF.
        self._rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        return [data for line in lines if (data := self._line(line)) is not None]

    def close(self) -> list[str]:
        """The data of an event that the end of the stream completes.

        The standard drops it; servers that forget the last blank line are common enough to be forgiven.
        """
        last = self._line(self._rest) if self._rest else None
        self._rest = b""
        unfinished = self._line(b"\n")
        return [data for data in (last, unfinished) if data is not None]

    def _line(self, raw: bytes) -> str | None:
        """The event's data when this line, the blank one, ends an event that has any."""
        line = raw.rstrip(b"\r\n").decode("utf-8", "replace")
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        return None
