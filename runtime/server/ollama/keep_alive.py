"""`keep_alive` of Ollama's requests: how long a model stays loaded after the request."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import any_of_schema

MAX_CHARS = 64
_FOREVER_S = 2**63  # more than any float of seconds needs to tell apart
KeepAlive = Annotated[
    Any, any_of_schema({"type": "number"}, {"type": "string", "maxLength": MAX_CHARS})
]
# Seconds in each unit of Go's durations, such as 1h30m (https://pkg.go.dev/time#ParseDuration).
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(rf"([+-]?)((?:{_PART})+)")


def keep_alive_seconds(value: Any) -> float | None:
    """Return the seconds, inf for a negative value, or None for null: the server's own.

    value: a number of seconds, or a duration. Raises ApiError 400 for anything else.
    """
    if value is None:
        return None
    seconds = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        is_forever = value < 0 or value >= _FOREVER_S
        seconds = math.inf if is_forever else float(value)
    elif isinstance(value, str) and len(value) <= MAX_CHARS:
        seconds = _text_seconds(value)
    if seconds is None:
        raise invalid(
            "keep_alive",
            'keep_alive must be a number of seconds, or a duration such as "5m" or "1h30m". '
            "A negative one keeps the model loaded.",
        )
    return math.inf if seconds < 0 else seconds


def _text_seconds(text: str) -> float | None:
    if re.fullmatch(r"[+-]?\d{1,18}(\.\d{1,18})?", text):
        return float(text)
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    parts = re.findall(_PART, match[2])
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    return -seconds if match[1] == "-" else seconds
