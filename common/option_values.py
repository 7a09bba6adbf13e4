"""Values as people write them on a command line or in YAML: sizes, counts, ranges, shares."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from llmkit.common.errors import UsageError
from llmkit.common.options import PERFORMANCE_PANEL, Option, ValueFormat

_UNITS = {"": 1, "b": 1} | {
    letter + tail: base**power
    for power, letter in enumerate("kmgt", start=1)
    for tail, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_size(option: str, text: str | None) -> int | None:
    """The bytes of a size such as "2GiB", "500MB", "2g" (= 2GiB) or "1073741824"; None for None.

    Raises UsageError.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise UsageError(
            f"{option}: {text!r} is not a size", "Write it like 2GiB, 500MB or 1073741824"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def parse_count(option: str, text: str, also: tuple[int, ...] = ()) -> int | None:
    """A positive number or one of `also`; None for "auto". Raises UsageError."""
    if text == "auto":
        return None
    if not re.fullmatch(r"-?[0-9]+", text) or (int(text) < 1 and int(text) not in also):
        raise UsageError(f"{option}: {text!r} is neither a positive number nor 'auto'")
    return int(text)


def within(low: float, high: float | None = None) -> Callable[[str, float], None]:
    """An option's check that low <= value <= high; None: no upper limit."""

    def check(option: str, value: float) -> None:
        if value < low or (high is not None and value > high):
            wanted = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
            raise UsageError(
                f"{option}: {value:g} is out of range", f"A number {wanted} was expected"
            )

    return check


def zero_or_at_least(low: float) -> Callable[[str, float], None]:
    """An option's check for a number that turns something off when it is 0."""

    def check(option: str, value: float) -> None:
        if value != 0:
            within(low)(option, value)

    return check


def require_url(option: str, value: str) -> None:
    """An option's check that a value is a server's URL, not a host name. Raises UsageError."""
    if not value.lower().startswith(("http://", "https://")):
        raise UsageError(
            f"{option} {value} is not a URL", "Addresses begin with http:// or https://"
        )


def parse_numbers(option: str, text: str | None, whole: bool = False) -> tuple[float, ...]:
    """The numbers in "1,2,4" or "0.5,2"; () for None. Raises UsageError."""
    form = r"[0-9]+" if whole else r"[0-9]+(\.[0-9]+)?"
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(re.fullmatch(form, part) for part in parts):
        raise UsageError(f"{option}: {text!r} is not a list of numbers", "Write it like 1,2,4")
    return tuple(map(float, parts))


def parse_range(option: str, text: str) -> tuple[int, int]:
    """The bounds of "64-512"; a single number, "128", is both bounds. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+)(?:\s*-\s*([0-9]+))?\s*", text)
    low = 0
    high = 0
    if match is not None:
        low = int(match[1])
        high = int(match[2] or match[1])
    if not 1 <= low <= high:
        raise UsageError(
            f"{option}: {text!r} is not a range of tokens", "Write it like 128 or 64-512"
        )
    return low, high


def parse_share(option: str, text: str) -> float:
    """The fraction for a percentage like "1%", above 0% and below 100%. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None or not 0 < float(match[1]) < 100:
        raise UsageError(
            f"{option}: {text!r} is not a share", "Write it like 1%, above 0% and below 100%"
        )
    return float(match[1]) / 100


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_duration(option: str, text: str) -> float:
    """The seconds of "90s", "5m", "1h" or "90". Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smh]?)\s*", text)
    if match is None:
        raise UsageError(f"{option}: {text!r} is not a duration", "Write it like 90s, 5m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def parse_rate(option: str, text: str) -> float:
    """The requests per second in "50/s". Raises UsageError."""
    numbers = parse_numbers(option, text.removesuffix("/s"))
    if len(numbers) != 1 or not numbers[0]:
        raise UsageError(f"{option} {text} is not understood", "Something like 50/s was expected")
    return numbers[0]


def parse_layer_counts(option: str, text: str) -> tuple[int, ...]:
    """The number of layers of each pipeline stage, "8,9,9,6". Raises UsageError."""
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option}: {text!r} are not numbers", "Layers of each stage, like 8,9,9,6"
        ) from None


def format_size(size: int) -> str:
    """The inverse of `parse_size`: 10 << 30 is "10GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)


def _format_number(number: float) -> str:
    """All digits, never an exponent: 0.5, 2000000."""
    return f"{number:.10f}".rstrip("0").removesuffix(".")


def _format_numbers(numbers: tuple[float, ...]) -> str:
    return ",".join(map(_format_number, numbers))


def _format_range(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"


def _parse_integers(option: str, text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in parse_numbers(option, text, whole=True))


def count_or_auto(*also: int) -> ValueFormat:
    """A positive number, one of `also`, or auto, which is None."""
    return ValueFormat(
        lambda option, text: parse_count(option, text, also),
        yaml_type=int | Literal["auto"],
        none="auto",
    )


def _parse_dtype(_option: str, name: str) -> str:
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)


def _negate(_option: str, value: bool) -> bool:
    return not value


# A size in bytes: 2GiB, 500MB.
SIZE = ValueFormat(parse_size, format_size, yaml_type=int | str)
# Numbers of tokens: 128, or 64-512.
TOKEN_RANGE = ValueFormat(parse_range, _format_range)
# 1,2,4
INTEGERS = ValueFormat(_parse_integers, _format_numbers)
# 0.5,2
NUMBERS = ValueFormat(parse_numbers, _format_numbers)
# Requests per second: 50/s.
RATE = ValueFormat(parse_rate, lambda rate: f"{_format_number(rate)}/s")
# A time: 90s, 5m.
DURATION = ValueFormat(parse_duration, lambda seconds: f"{_format_number(seconds)}s")
# A percentage: 1%.
SHARE = ValueFormat(parse_share, lambda share: f"{_format_number(100 * share)}%")
# Layers of each pipeline stage: 8,9,9,6.
LAYER_COUNTS = ValueFormat(parse_layer_counts, _format_numbers)
# Threads that compute on a CPU.
THREADS = Option(
    "Threads that compute on a CPU; auto: as many as the CPU affinity, the cgroup's CPU quota and "
    "OMP_NUM_THREADS allow.",
    metavar="N|auto",
    format=count_or_auto(),
    panel=PERFORMANCE_PANEL,
)
# A flag that turns off a default: --no-prefix-cache. The field has the opposite value of the flag.
NEGATED = ValueFormat(_negate, lambda value: not value, written_type=bool)
# A floating-point dtype, or auto. The short names are read, and the long ones shown.
DTYPE = ValueFormat(
    _parse_dtype,
    written_type=Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"],
)
