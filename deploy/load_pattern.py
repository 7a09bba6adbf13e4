"""The rate of requests over time, from a trace or from measured rates, and its daily pattern."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

from llmkit.bench.bench_metrics import percentile
from llmkit.bench.load_modes import TraceRow, read_trace_rows
from llmkit.common.errors import InputError, UsageError

Period = Literal["day", "week"]
HOURS: dict[Period, int] = {"day": 24, "week": 168}
HOUR_S = 3600
BIN_S = 300  # in which the requests of a trace are counted
# A file without dates begins here by default: at the start of a week.
FIRST_MONDAY = "1970-01-05T00:00"
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_RATE_COLUMNS = ["hour", "rate"]
FORMATS = (
    "A trace as `llmkit bench --trace` reads, Prometheus' JSON of a range query of request rates,"
    " or CSV with the columns hour and rate"
)


class RateBin(NamedTuple):
    """The mean rate of requests in a span of time."""

    start_s: float  # since 1970
    seconds: float
    rate: float  # requests a second


@dataclass(frozen=True)
class RecordedLoad:
    """A load over time: its rates, and its requests where they are known."""

    bins: list[RateBin]
    requests: list[TraceRow]  # times are seconds since 1970; [] for a file of rates


def read_load(path: str, zone: ZoneInfo, begin: str = FIRST_MONDAY) -> RecordedLoad:
    """Read a load from any of FORMATS.

    begin: for files without dates, the local time of their begin. Raises InputError for another
    file, and UsageError for a begin that is no time.
    """
    try:
        start = datetime.fromisoformat(begin)
    except ValueError as error:
        raise UsageError(
            f"--trace-start: {begin!r} is not a time", "Something like 2026-03-02T00:00"
        ) from error
    start_s = (start if start.tzinfo else start.replace(tzinfo=zone)).timestamp()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason})", FORMATS) from error
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, Mapping) and "data" in document:
        return RecordedLoad(_prometheus_bins(path, document), [])
    first_line = text.lstrip().partition("\n")[0]
    if [column.strip() for column in first_line.split(",")] == _RATE_COLUMNS:
        return RecordedLoad(_csv_bins(path, text, start_s, zone), [])
    rows = read_trace_rows(path)
    if not rows[0].is_dated:
        offset_s = start_s - rows[0].time_s
        rows = [row._replace(time_s=row.time_s + offset_s) for row in rows]
    return RecordedLoad(_count_requests(rows), rows)


def _count_requests(rows: Sequence[TraceRow]) -> list[RateBin]:
    """The rates of a trace in bins of BIN_S."""
    first = math.floor(rows[0].time_s / BIN_S)
    counts = [0] * (math.floor(rows[-1].time_s / BIN_S) - first + 1)
    for row in rows:
        counts[math.floor(row.time_s / BIN_S) - first] += 1
    return [
        RateBin((first + index) * BIN_S, BIN_S, count / BIN_S) for index, count in enumerate(counts)
    ]


def _prometheus_bins(path: str, document: Mapping[str, Any]) -> list[RateBin]:
    """The sum of all series of a range query's result."""
    rates: dict[float, float] = {}
    try:
        for series in document["data"]["result"]:
            for time_s, value in series["values"]:
                rate = float(value)
                if math.isnan(rate):  # Prometheus writes it where it divides by 0
                    rate = 0.0
                rates[float(time_s)] = rates.get(float(time_s), 0.0) + rate
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no result of a range query ({type(error).__name__}: {error})",
            'Prometheus\' JSON with "data": {"result": [{"values": [[time, "rate"], ...]}]}',
            "Ask /api/v1/query_range for sum(rate(llmkit:request_success_total[5m]))",
        ) from error
    return _spaced_bins(path, sorted(rates.items()))


def _csv_bins(path: str, text: str, start_s: float, zone: ZoneInfo) -> list[RateBin]:
    """The rates of hours: dates in the zone, or numbers of hours after the begin."""
    rates = []
    try:
        for row in csv.DictReader(text.lstrip().splitlines(), skipinitialspace=True):
            hour = row["hour"].strip()
            if hour.isdecimal():
                time_s = start_s + int(hour) * HOUR_S
            else:
                date = datetime.fromisoformat(hour)
                time_s = (date if date.tzinfo else date.replace(tzinfo=zone)).timestamp()
            rates.append((time_s, float(row["rate"])))
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path} has a row without an hour or a rate ({type(error).__name__}: {error})",
            "Hours are dates such as 2026-03-02T14:00, or whole numbers; rates are requests a"
            " second",
        ) from error
    return [RateBin(time_s, HOUR_S, rate) for time_s, rate in _checked(path, sorted(rates))]


def _spaced_bins(path: str, rates: Sequence[tuple[float, float]]) -> list[RateBin]:
    """Bins between the times of samples. Raises InputError for samples further than an hour."""
    checked = _checked(path, rates)
    step_s = min((after - before for (before, _), (after, _) in pairwise(checked)), default=HOUR_S)
    if step_s > HOUR_S:
        raise InputError(
            f"{path} has a rate each {step_s / HOUR_S:.3g} hours", "One an hour, or more often"
        )
    return [RateBin(time_s, step_s, rate) for time_s, rate in checked]


def _checked(path: str, rates: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    if not rates or any(not 0 <= rate < math.inf for _, rate in rates):
        raise InputError(
            f"{path} is empty, or has a rate that is none", "Requests a second, 0 or more"
        )
    return rates


def hourly_rates(
    bins: Iterable[RateBin], zone: ZoneInfo, period: Period, quantile: float
) -> list[float]:
    """The rate of each local hour of the day, or of the week from Monday 0:00.

    It is this quantile of the rates of all bins that begin in the hour, over all days.
    Raises InputError for an hour of the period that no bin is in.
    """
    rates: list[list[float]] = [[] for _ in range(HOURS[period])]
    for one in bins:
        rates[local_minute(one.start_s, zone, period) // 60].append(one.rate)
    missing = [hour for hour, values in enumerate(rates) if not values]
    if missing:
        raise InputError(
            f"the trace has nothing for {len(missing)} of the {len(rates)} hours of a {period}"
            f" (the first is {hour_name(missing[0], period)})",
            f"All hours of at least one {period}",
            "Give a longer trace" + ("" if period == "day" else ", or --period day"),
        )
    return [percentile(values, 100 * quantile) for values in rates]


def local_minute(time_s: float, zone: ZoneInfo, period: Period) -> int:
    """The minute of the local day, or of the local week from Monday 0:00."""
    local = datetime.fromtimestamp(time_s, UTC).astimezone(zone)
    day = local.weekday() if period == "week" else 0
    return (day * 24 + local.hour) * 60 + local.minute


def hour_name(hour: int, period: Period) -> str:
    """ "14:00", or "Monday 14:00"."""
    name = f"{hour % 24:02d}:00"
    return name if period == "day" else f"{_DAYS[hour // 24]} {name}"
