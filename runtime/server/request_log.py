"""Logs one line of JSON for each request that ended, without any of its text."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import msgspec

from llmkit.runtime.server.choice import Choice


def log_request(
    model: str, choices: Sequence[Choice], outcome: str, client_name: str, request_id: str
) -> None:
    """Write the line of a request for `model` to stderr.

    `outcome` is "finished", "cancelled" or the code of its error. `client_name` is the name of its
    API key, or "". `request_id` is its `x-request-id`.
    """
    first = choices[0]
    times = first.times
    line = {
        "event": "request",
        "time": round(time.time(), 3),
        "id": first.request.request_id.rpartition("-")[0],
        "request_id": request_id,
        "model": model,
        **({"client": client_name} if client_name else {}),
        "ended": outcome,
        "finish_reasons": [choice.finish_reason for choice in choices],
        "prompt_tokens": sum(len(choice.request.prompt_token_ids) for choice in choices),
        "cached_tokens": sum(choice.cached_tokens for choice in choices),
        "completion_tokens": sum(choice.completion_tokens for choice in choices),
        "queue_s": round(times.queue_s, 6) if times.first_token else None,
        "ttft_s": round(times.ttft_s, 6) if times.first_token else None,
        "duration_s": round(time.perf_counter() - times.arrived, 6),
    }
    sys.stderr.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stderr.buffer.flush()
