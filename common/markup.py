"""Text for HTML and SVG."""

from __future__ import annotations

import re
from html import escape

_UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\U0010ffff]")


def printable(value: object) -> str:
    """`value` as text. Characters that HTML and XML cannot hold become U+FFFD."""
    # A tokenizer may return half of a surrogate pair, which UTF-8 cannot encode.
    text = str(value).encode("utf-8", "replace").decode()
    return _UNPRINTABLE.sub("\ufffd", text)


def escaped(value: object) -> str:
    """`value` as text for elements and quoted attributes."""
    return escape(printable(value))
