"""Figures as text and as JSON, and words for messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def finite(value: Any) -> Any:
    """The same document with NaN and infinities as null: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [finite(item) for item in value]
    return value


def bytes_text(count: float) -> str:
    """A size for people, in binary units: 98.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """`The nearest is X`, or `otherwise` followed by everything known when nothing is near."""
    words = {one: one.lstrip("-") for one in known}  # the dashes of options are no likeness
    bare = word.lstrip("-")
    close = difflib.get_close_matches(bare, words.values(), n=1, cutoff=0.6)
    close = close or [one for one in words.values() if len(bare) > 2 and one.startswith(bare)]
    if close:
        return f"The nearest is {next(one for one in words if words[one] == close[0])}"
    return f"{otherwise} {', '.join(words)}" if otherwise else ""
