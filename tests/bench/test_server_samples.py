"""What bench reads at a server's /metrics: its queue, and its gauges while a run lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llmkit.bench import server_samples
from llmkit.bench.server_samples import (
    GaugeSampler,
    QueueCounts,
    parse_gauges,
    parse_queue_counts,
)

TEXT = """\
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3"} 4.0
vllm:request_queue_time_seconds_count{engine="0"} 4.0
vllm:request_queue_time_seconds_sum{engine="0"} 1.5
vllm:request_queue_time_seconds_count{engine="1"} 1.0
vllm:request_queue_time_seconds_sum{engine="1"} 5e-01
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:num_requests_waiting{engine="0"} 2.0
vllm:num_requests_waiting{engine="1"} 3.0
"""


def test_queue_and_gauges_are_read_from_vllm_and_llmkit() -> None:
    for text in (TEXT, TEXT.replace("vllm:", "llmkit:")):
        assert parse_queue_counts(text) == QueueCounts(2.0, 5.0)
        assert parse_gauges(text) == {"kv_cache_usage_perc": 0.75, "num_requests_waiting": 5.0}
    assert parse_queue_counts("") == QueueCounts()
    assert parse_gauges("") == {}
    assert QueueCounts(5.0, 9.0).since(QueueCounts(2.0, 5.0)) == QueueCounts(3.0, 4.0)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server whose KV cache fills up with each request, and the keys that it got."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization", ""))
            body = b"llmkit:kv_cache_usage_perc %.1f\n" % (len(keys) / 10)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", keys
    running.shutdown()
    running.server_close()


def test_sampler_keeps_the_largest_value_and_sends_the_key(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, keys = server
    monkeypatch.setenv("LLMKIT_API_KEY", "secret")
    monkeypatch.setattr(server_samples, "SAMPLE_INTERVAL_S", 0.01)
    with GaugeSampler(url) as sampler:
        while len(keys) < 4:
            threading.Event().wait(0.01)
    assert sampler.metrics() == {"kv_cache_usage_max": pytest.approx(len(keys) / 10)}
    assert set(keys) == {"Bearer secret"}


def test_sampler_of_a_server_that_does_not_answer_has_nothing() -> None:
    with GaugeSampler("http://127.0.0.1:9") as sampler:
        threading.Event().wait(0.2)
    assert sampler.metrics() == {}
