"""Sizes and counts as people write them on a command line."""

from __future__ import annotations

import re

from llmkit.checkpoint.errors import UsageError

_UNITS = {"": 1, "b": 1} | {
    letter + tail: base**power
    for power, letter in enumerate("kmgt", start=1)
    for tail, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_size(option: str, text: str | None) -> int | None:
    """Bytes of "2GiB", "500MB", "2g" (1,024s) or "1073741824"; None for None. Raises: UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{option}: {text!r} is not a size", "Write it like 2GiB, 500MB or 1073741824")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_count(option: str, text: str, also: tuple[int, ...] = ()) -> int | None:
    """A positive number or one of `also`, None for "auto". Raises: UsageError."""
    if text == "auto":
        return None
    if not re.fullmatch(r"-?[0-9]+", text) or (int(text) < 1 and int(text) not in also):
        raise UsageError(f"{option}: {text!r} is neither a positive number nor 'auto'")
    return int(text)


def in_range(option: str, value: float, low: float, high: float | None = None) -> None:
    """Raises UsageError unless low <= value <= high; None: no upper end."""
    if value < low or (high is not None and value > high):
        wanted = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise UsageError(f"{option}: {value:g} is out of range", f"A number {wanted} was expected")


def parse_numbers(option: str, text: str | None, whole: bool = False) -> tuple[float, ...]:
    """The numbers of "1,2,4" or "0.5,2"; none for None. Raises: UsageError."""
    form = r"[0-9]+" if whole else r"[0-9]+(\.[0-9]+)?"
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(re.fullmatch(form, part) for part in parts):
        raise UsageError(f"{option}: {text!r} is no list of numbers", "Write it like 1,2,4")
    return tuple(map(float, parts))


def parse_range(option: str, text: str) -> tuple[int, int]:
    """The bounds of "64-512", or of "128" twice. Raises: UsageError."""
    match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UsageError(f"{option}: {text!r} is no range of tokens", "Write it like 128 or 64-512")
    return low, high


def parse_share(option: str, text: str) -> float:
    """A share of a whole as "1%", between 0% and 100%. Raises: UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None or not 0 < float(match[1]) < 100:
        raise UsageError(f"{option}: {text!r} is no share", "Write it like 1%, above 0% and below 100%")
    return float(match[1]) / 100
