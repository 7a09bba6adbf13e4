"""The fields of a request that have no effect, and how its client and the log learn of them.

Such a field is unknown, or it controls something that the model does not have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from urllib.parse import quote

from llmkit.runtime.server.http.http_errors import invalid

HEADER = "x-llmkit-ignored"
MAX_HEADER_CHARS = 1024
_MAX_PATHS = 256  # that are kept of one request
_MAX_NAME_CHARS = 64  # of one name in a path
_MAX_LOGGED = 1000  # names in the log; a client can invent any number of them

# Where a field is: names of objects' fields, and positions in lists.
FieldPath = tuple[str | int, ...]


class IgnoredFields:
    """The ignored fields of one request, in the order in which they are found."""

    def __init__(self) -> None:
        self.strict = True  # whether an unknown field is an error
        self._paths: dict[FieldPath, None] = {}  # a set that keeps the order
        self._num_dropped = 0  # that are not in `_paths`

    def add_unknown(self, path: FieldPath) -> None:
        """Add a field that llmkit does not know. Raises ApiError 400 in strict requests."""
        if self.strict:
            param = ".".join(map(str, path))
            raise invalid(param, f"Unknown field: {param}.", "unknown_parameter")
        self.add(path)

    def add(self, path: FieldPath) -> None:
        """Add a field that has no effect."""
        if path in self._paths:
            return
        if len(self._paths) < _MAX_PATHS:
            self._paths[path] = None
        else:
            self._num_dropped += 1

    @property
    def header(self) -> str:
        """The value of the response's header: paths such as `messages.0.foo`; "" without any.

        It has at most MAX_HEADER_CHARS characters. What does not fit is counted at its end.
        """
        shown: list[str] = []
        free = MAX_HEADER_CHARS - len(", and 1000000000 more")
        for path in self._paths:
            text = ".".join(map(_printable, path))
            free -= len(text) + len(", ")
            if free < 0:
                break
            shown.append(text)
        num_left = len(self._paths) - len(shown) + self._num_dropped
        if num_left:
            shown.append(f"and {num_left} more")
        return ", ".join(shown)

    def names(self) -> Iterator[str]:
        """Yield the paths with `*` for each position in a list."""
        for path in self._paths:
            yield ".".join("*" if isinstance(part, int) else _printable(part) for part in path)


class IgnoredFieldsLog:
    """Writes each name of an ignored field to stderr once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def record(self, ignored: IgnoredFields, url_path: str) -> None:
        """Log the fields of a request to `url_path` that are not in the log yet."""
        for name in ignored.names():
            if name in self._logged or len(self._logged) > _MAX_LOGGED:
                continue
            self._logged.add(name)
            if len(self._logged) > _MAX_LOGGED:
                _log("more than 1,000 field names were ignored; others are not logged")
            else:
                _log(f"the field {name} in a request to {url_path} is ignored")


def _log(text: str) -> None:
    sys.stderr.write(f"llmkit serve: {text}\n")
    sys.stderr.flush()


def _printable(part: str | int) -> str:
    """Return a part of a path for a header or a log line: short, ASCII, without spaces."""
    text = str(part)
    if not text:
        return '""'
    shortened = text[:_MAX_NAME_CHARS]
    suffix = "" if shortened == text else "..."
    # A lone surrogate cannot be encoded.
    return quote(shortened, safe="$@[]", errors="replace") + suffix
