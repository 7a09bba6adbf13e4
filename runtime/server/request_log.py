"""One line of JSON for each request that has ended, without a word of its text."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from llmkit.runtime.server.generation import Choice


def log_request(model: str, choices: Sequence[Choice], ended: str, client: str) -> None:
    """Write the line of a request for `model` to stderr. ended: "finished", "cancelled" or the code of its error.

    client: the name of its key, if it has one.
    """
    first = choices[0]
    now = time.perf_counter()
    times = first.times
    line = {
        "event": "request",
        "time": round(time.time(), 3),
        "id": first.request.id.rpartition("-")[0],
        "model": model,
        **({"client": client} if client else {}),
        "ended": ended,
        "finish_reasons": [choice.finish_reason for choice in choices],
        "prompt_tokens": sum(len(choice.request.prompt) for choice in choices),
        "cached_tokens": sum(choice.cached_tokens for choice in choices),
        "completion_tokens": sum(choice.completion_tokens for choice in choices),
        "queue_s": round(times.queued_s, 6) if times.first else None,
        "ttft_s": round(times.first - times.arrived, 6) if times.first else None,
        "duration_s": round(now - times.arrived, 6),
    }
    sys.stderr.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stderr.buffer.flush()
