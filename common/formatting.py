"""Formats numbers for text and JSON, and suggests the nearest known word."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_DECIMALS = 6


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


def milliseconds_text(milliseconds: float) -> str:
    """A time for people that is not rounded to 0: "340 µs", "2.5 ms", "1,250 ms"."""
    if 0 < milliseconds < 1:
        return f"{max(1, milliseconds * 1000):.0f} µs"
    return f"{milliseconds:.1f} ms" if 0 < milliseconds < 10 else f"{milliseconds:,.0f} ms"


def shortened(text: str, max_length: int) -> str:
    """The first sentences of a text, on one line; a text without one ends after a word."""
    line = " ".join(text.split())
    if len(line) <= max_length:
        return line
    start = line[: max_length + 1]
    end = start.rfind(". ")
    return start[:end] if end > 0 else f"{start[: start.rfind(' ')]} ..."


def same_decimals(values: Sequence[float]) -> list[str]:
    """Numbers that stand beside each other, with the same number of decimals.

    The largest has four significant digits, the smallest at least two. Whole numbers stay whole,
    and numbers from a thousand on have no decimals.
    """
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    decimals = 0
    if sizes and not all(size.is_integer() for size in map(float, sizes)):
        largest = math.floor(math.log10(max(sizes)))
        smallest = math.floor(math.log10(min(sizes)))
        decimals = min(max(3 - largest, 1 - smallest, 0), MAX_DECIMALS)
    return [_fixed_text(value, decimals) for value in values]


def _fixed_text(value: float, decimals: int) -> str:
    if 0 < abs(value) < 10.0**-decimals:
        return f"{value:.2g}"  # it must not look like zero
    return f"{value:,.{0 if abs(value) >= 1000 else decimals}f}"


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
