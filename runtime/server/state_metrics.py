"""Prometheus metrics of the server's state: its LoRA adapters and caches."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmkit.runtime.prefix_folder import PAGE_SUFFIX, files_in
from llmkit.runtime.server.response_cache import ResponseCache
from llmkit.runtime.server.server_state import ServerState


class StateCollector(Collector):
    """Reports a server's adapters and caches when scraped."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        yield self._adapters_in_use()
        yield GaugeMetricFamily(
            "llmkit:lora_adapters",
            "LoRA adapters that are loaded.",
            len(self._state.adapter_paths),
        )
        cache = self._state.response_cache or ResponseCache(0)
        yield GaugeMetricFamily(
            "llmkit:response_cache_bytes", "Size of the cached answers.", cache.bytes
        )
        yield CounterMetricFamily(
            "llmkit:response_cache_queries",
            "Answers looked up in the response cache.",
            cache.queries,
        )
        yield CounterMetricFamily(
            "llmkit:response_cache_hits", "Answers found in the response cache.", cache.hits
        )
        yield from self._semantic_cache()
        yield from self._stored_responses()
        if not self._state.options.behind_router:  # which has the sockets
            yield GaugeMetricFamily(
                "llmkit:open_websockets",
                "WebSockets that are open.",
                self._state.open_sockets.count,
            )
        folder = self._state.options.prefix_cache_dir
        size = 0 if folder is None else sum(size for _, size, _ in files_in(folder, PAGE_SUFFIX))
        yield GaugeMetricFamily(
            "llmkit:prefix_store_bytes", "Size of the prefix cache on disk.", size
        )

    def _stored_responses(self) -> Iterable[Metric]:
        store = self._state.response_store
        if store is None:
            return
        count, size = store.usage
        yield GaugeMetricFamily("llmkit:stored_responses", "Responses that are stored.", count)
        yield GaugeMetricFamily(
            "llmkit:stored_responses_bytes", "Size of the stored responses.", size
        )
        yield GaugeMetricFamily(
            "llmkit:background_responses",
            "Background responses that run or wait.",
            self._state.num_background_responses,
        )

    def _semantic_cache(self) -> Iterable[Metric]:
        answers = self._state.semantic
        if answers is None:
            return
        cache = answers.cache
        yield GaugeMetricFamily(
            "llmkit:semantic_cache_bytes", "Size of the semantic cache.", cache.bytes
        )
        yield GaugeMetricFamily(
            "llmkit:semantic_cache_entries", "Answers in the semantic cache.", len(cache)
        )
        yield CounterMetricFamily(
            "llmkit:semantic_cache_queries",
            "Questions looked up in the semantic cache.",
            cache.queries,
        )
        yield CounterMetricFamily(
            "llmkit:semantic_cache_hits", "Questions answered by the semantic cache.", cache.hits
        )
        yield CounterMetricFamily(
            "llmkit:semantic_cache_rejected",
            "Similar questions that are not the same in their numbers, names or other facts.",
            cache.rejected,
        )

    def _adapters_in_use(self) -> Metric:
        """vLLM's metric: the labels list the adapters of running and of waiting requests."""
        running: set[str] = set()
        waiting: set[str] = set()
        for generation in list(self._state.generations):
            for choice in generation.choices:
                adapter = choice.request.adapter
                if adapter is None or choice.finish_reason is not None:
                    continue
                if choice.times.first_token:
                    running.add(adapter)
                else:
                    waiting.add(adapter)
        metric = GaugeMetricFamily(
            "llmkit:lora_requests_info",
            "The adapters of running requests, and of those without a token yet; "
            "the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [
            str(len(self._state.adapter_paths)),
            ",".join(sorted(running)),
            ",".join(sorted(waiting)),
        ]
        metric.add_metric(labels, time.time())
        return metric
