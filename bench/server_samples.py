"""What a server's /metrics says of a run: time in its queue, and the fullest its KV cache was."""

from __future__ import annotations

import http.client
import os
import re
import threading
import urllib.request
from types import TracebackType
from typing import NamedTuple, Self

FIRST_SAMPLE_S = 0.1  # after the begin of a run, so that short runs have a sample
SAMPLE_INTERVAL_S = 1.0
_TIMEOUT_S = 10.0
_MAX_BYTES = 8 << 20  # of an answer
# Of llmkit and of vLLM. A server may have several of each, by labels.
_QUEUE = re.compile(
    r"^(?:llmkit|vllm):request_queue_time_seconds_(sum|count)(?:\{.*\})? ([0-9.e+-]+)$",
    re.MULTILINE,
)
_GAUGE = re.compile(
    r"^(?:llmkit|vllm):(kv_cache_usage_perc|num_requests_waiting)(?:\{.*\})? ([0-9.e+-]+)$",
    re.MULTILINE,
)


class QueueCounts(NamedTuple):
    """The time that requests waited for their first step, and the number of requests."""

    seconds: float = 0.0
    requests: float = 0.0

    def since(self, before: QueueCounts) -> QueueCounts:
        """What was counted since `before`."""
        return QueueCounts(self.seconds - before.seconds, self.requests - before.requests)


def parse_queue_counts(text: str) -> QueueCounts:
    """The sums of the counters in an answer of /metrics."""
    sums = {"sum": 0.0, "count": 0.0}
    for name, value in _QUEUE.findall(text):
        sums[name] += float(value)
    return QueueCounts(sums["sum"], sums["count"])


def parse_gauges(text: str) -> dict[str, float]:
    """The fullest KV cache and all waiting requests in an answer of /metrics."""
    found: dict[str, float] = {}
    for name, value in _GAUGE.findall(text):
        if name == "kv_cache_usage_perc":
            found[name] = max(found.get(name, 0.0), float(value))
        else:
            found[name] = found.get(name, 0.0) + float(value)
    return found


class GaugeSampler:
    """Reads a server's gauges each second, in a thread, while its context is open."""

    def __init__(self, url: str) -> None:
        """url: the server's address, without /metrics."""
        # Benchmarks of a GPU import this module on machines without msgspec.
        from llmkit.runtime.process_channel import API_KEY_VARIABLE

        self._request = urllib.request.Request(f"{url}/metrics")  # noqa: S310
        key = os.environ.get(API_KEY_VARIABLE)
        if key:
            self._request.add_header("Authorization", f"Bearer {key}")
        # A redirect or a proxy would send the key to another address.
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
        self._samples: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauge-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def metrics(self) -> dict[str, float]:
        """The largest samples, as SPEED_METRICS; {} without any."""
        names = {
            "kv_cache_usage_perc": "kv_cache_usage_max",
            "num_requests_waiting": "requests_waiting_max",
        }
        return {
            metric: max(sample[gauge] for sample in self._samples if gauge in sample)
            for gauge, metric in names.items()
            if any(gauge in sample for sample in self._samples)
        }

    def _run(self) -> None:
        pause_s = FIRST_SAMPLE_S
        while not self._stop.wait(pause_s):
            self._sample()
            pause_s = SAMPLE_INTERVAL_S

    def _sample(self) -> None:
        try:
            with self._opener.open(self._request, timeout=_TIMEOUT_S) as response:
                text = response.read(_MAX_BYTES).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):  # a server may be too busy to answer
            return
        self._samples.append(parse_gauges(text))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_arguments: object) -> None:
        return None
