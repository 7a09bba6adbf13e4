"""Formats numbers for text and JSON, and suggests the nearest known word."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def finite(value: Any) -> Any:
    """The same document with null for NaN and infinity, which JSON cannot express."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [finite(item) for item in value]
    return value


def bytes_text(count: float) -> str:
    """A size in bytes for people, in binary units: "98.3 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def count_text(count: int, unit: str) -> str:
    """A number of things for people: "1 run", "2 runs". unit: the plural."""
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """`The nearest is X`. When no known word is similar: `otherwise` and all known words, or ""."""
    # Leading dashes are ignored: with them, all options would look similar.
    bare_words = {known_word: known_word.lstrip("-") for known_word in known}
    bare = word.lstrip("-")
    matches = difflib.get_close_matches(bare, bare_words.values(), n=1, cutoff=0.6)
    if not matches and len(bare) > 2:
        matches = [candidate for candidate in bare_words.values() if candidate.startswith(bare)]
    if matches:
        nearest_word = next(key for key, value in bare_words.items() if value == matches[0])
        return f"The nearest is {nearest_word}"
    return f"{otherwise} {', '.join(bare_words)}" if otherwise else ""
