"""Prometheus metrics, named as vLLM names its own but under `llmkit:`.

Gauges and token counters are the engine's; latencies are measured where a client would, in the API process, but for
the time in the queue, which the engine process tells with a request's first tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmkit.runtime.prefix_files import PAGE, files_in
from llmkit.runtime.server.engines.messages import Stats
from llmkit.runtime.server.response_cache import ResponseCache
from llmkit.runtime.server.usage import GPU_FIGURES, Gpus, memory_bytes

if TYPE_CHECKING:
    from llmkit.runtime.server.state import State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "cancelled", "error")
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.75, 1, 2.5, 5, 10)
_LONG_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass
class Times:
    """When what happened to one answer: perf_counter seconds, 0 before it."""

    arrived: float = 0.0
    sent: float = 0.0  # to the engine process
    first: float = 0.0  # tokens
    last: float = 0.0
    queued_s: float = 0.0
    tokens: int = 0


class Metrics:
    """The server's metrics in a registry of their own. gpus: report on them, where there are some."""

    def __init__(self, stats: Callable[[], Stats], gpus: bool = True) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self._registry.register(_UsageCollector(Gpus() if gpus else None))
        success = Counter(
            "llmkit:request_success",
            "Requests that ended, by the reason they ended.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._finished = {reason: success.labels(reason) for reason in FINISH_REASONS}
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to first token.", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _ITL_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "A request's mean time between two tokens.", _ITL_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to last token.", _LONG_S)
        self._queue = self._histogram(
            "request_queue_time_seconds", "Between the engine's queue and first step.", _TTFT_S
        )
        self._prefill = self._histogram("request_prefill_time_seconds", "From first step to first token.", _TTFT_S)
        self._decode = self._histogram("request_decode_time_seconds", "From first to last token.", _LONG_S)
        self._steps = self._histogram(
            "iteration_tokens_total", "Tokens of an engine step; a prompt's count in its last one.", _STEP_TOKENS
        )

    def came(self, times: Times, tokens: int, queued_s: float | None) -> None:
        """New tokens of a request have come. queued_s: how long it waited for its first step, told once."""
        now = time.perf_counter()
        times.tokens += tokens
        if times.first:
            gap = (now - times.last) / max(1, tokens)
            for _ in range(tokens):
                self._itl.observe(gap)
        else:
            times.first, times.queued_s = now, queued_s or 0.0
            self._ttft.observe(now - times.arrived)
            self._queue.observe(times.queued_s)
            self._prefill.observe(max(0.0, now - times.sent - times.queued_s))
        times.last = now

    def finished(self, reason: str, times: Times | None = None) -> None:
        """Count a request that ended for `reason`, one of FINISH_REASONS; `times` of one that was answered."""
        self._finished[reason].inc()
        if times is not None:
            self._e2e.observe(times.last - times.arrived)
            self._decode.observe(times.last - times.first)
            if times.tokens > 1:
                self._tpot.observe((times.last - times.first) / (times.tokens - 1))

    def stepped(self, before: Stats, after: Stats) -> None:
        """An engine has made a step; its figures before and after it."""
        tokens = after.prompt_tokens_total - before.prompt_tokens_total
        tokens += after.generation_tokens_total - before.generation_tokens_total
        if tokens > 0:
            self._steps.observe(tokens)

    def watch(self, state: State) -> None:
        """Tell of a server's adapters and caches, too."""
        self._registry.register(_StateCollector(state))

    def render(self) -> bytes:
        """The exposition text. Takes some ms: it asks the system about processes and GPUs."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"llmkit:{name}", text, registry=self._registry, buckets=buckets)


class _EngineCollector(Collector):
    """Reads the engine's latest figures when scraped."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        usage = now.kv_used_blocks / now.kv_total_blocks if now.kv_total_blocks else 0.0
        yield GaugeMetricFamily("llmkit:num_requests_running", "Requests in the running batch.", now.running)
        yield GaugeMetricFamily("llmkit:num_requests_waiting", "Requests that wait to be run.", now.waiting)
        yield GaugeMetricFamily("llmkit:kv_cache_usage_perc", "KV cache in use; 1 is all of it.", usage)
        yield GaugeMetricFamily(
            "llmkit:prefix_cache_blocks", "Blocks kept for their prefixes that no request uses.", now.kv_cached_blocks
        )
        yield CounterMetricFamily("llmkit:prompt_tokens", "Prompt tokens processed.", now.prompt_tokens_total)
        yield CounterMetricFamily("llmkit:generation_tokens", "Tokens generated.", now.generation_tokens_total)
        yield CounterMetricFamily("llmkit:num_preemptions", "Requests preempted.", now.preemptions_total)
        yield CounterMetricFamily(
            "llmkit:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", now.prefix_queries_total
        )
        yield CounterMetricFamily(
            "llmkit:prefix_cache_hits", "Prompt tokens found in the prefix cache.", now.prefix_hits_total
        )
        yield CounterMetricFamily(
            "llmkit:external_prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache on disk: whole pages that memory did not have.",
            now.store_queries_total,
        )
        yield CounterMetricFamily("llmkit:external_prefix_cache_hits", "Of them found and read.", now.store_hits_total)
        yield CounterMetricFamily(
            "llmkit:prefix_store_damaged",
            "Files of the prefix cache on disk that were damaged.",
            now.store_damaged_total,
        )
        yield CounterMetricFamily("llmkit:spec_decode_num_draft_tokens", "Tokens guessed.", now.drafted_total)
        yield CounterMetricFamily("llmkit:spec_decode_num_accepted_tokens", "Guesses confirmed.", now.accepted_total)


class _StateCollector(Collector):
    """Looks at the server's adapters and caches when scraped."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        state = self._state
        names: dict[bool, set[str]] = {True: set(), False: set()}  # of adapters by whether a request has tokens
        for generation in list(state.generations):
            for choice in generation.choices:
                if (adapter := choice.request.adapter) is not None and choice.finish_reason is None:
                    names[bool(choice.times.first)].add(adapter)
        adapters = GaugeMetricFamily(
            "llmkit:lora_requests_info",
            "The adapters that requests use, those without a token yet as waiting; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = (",".join(sorted(names[has_tokens])) for has_tokens in (True, False))
        adapters.add_metric([str(len(state.roots)), running, waiting], time.time())
        yield adapters
        yield GaugeMetricFamily("llmkit:lora_adapters", "LoRA adapters that are loaded.", len(state.roots))
        cache = state.responses or ResponseCache(0)
        yield GaugeMetricFamily("llmkit:response_cache_bytes", "Size of the answers that are kept.", cache.bytes)
        yield CounterMetricFamily("llmkit:response_cache_queries", "Answers looked up.", cache.queries)
        yield CounterMetricFamily("llmkit:response_cache_hits", "Of them found.", cache.hits)
        folder = state.options.prefix_cache_dir
        size = 0 if folder is None else sum(size for _, size, _ in files_in(folder, PAGE))
        yield GaugeMetricFamily("llmkit:prefix_store_bytes", "Size of the prefix cache on disk.", size)


class _UsageCollector(Collector):
    """Asks the system about processes and GPUs when scraped."""

    def __init__(self, gpus: Gpus | None) -> None:
        self._gpus = gpus

    def collect(self) -> Iterable[Metric]:
        memory = GaugeMetricFamily(
            "llmkit:process_resident_memory_bytes",
            "Resident memory of the API process, and of the engine's processes together.",
            labels=["process"],
        )
        for process, size in memory_bytes().items():
            memory.add_metric([process], size)
        yield memory
        readings = self._gpus.read() if self._gpus else {}
        for figure, text in GPU_FIGURES.items():
            metric = GaugeMetricFamily(f"llmkit:{figure}", text, labels=["gpu"])
            for gpu, reading in readings.items():
                if figure in reading:
                    metric.add_metric([gpu], reading[figure])
            yield metric
