"""Spans, as a real collector's HTTP endpoint gets them."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support.engine_requests import engine_request
from support.server_process import LlmkitServer, serving, wait_for
from support.tiny_models import tiny_checkpoint

from llmkit.common.errors import ShortageError, UsageError
from llmkit.runtime.engine.engine_outputs import EngineStats
from llmkit.runtime.server import tracing
from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.run_server import run_server
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_metrics import ServerMetrics

SECRET = "nobody else may read this"
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": SECRET,
    "temperature": 0,
    "max_tokens": 6,
    "ignore_eos": True,
}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes OTLP's trace requests, and keeps what they say."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.paths: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list[tuple[Any, dict[str, Any]]]:
        """Each span with its attributes."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        attributes = [ExportTraceServiceRequest.FromString(body) for body in list(self.raw)]
        found = [
            s
            for one in attributes
            for group in one.resource_spans
            for scope in group.scope_spans
            for s in scope.spans
        ]
        return [(span, {one.key: _value(one.value) for one in span.attributes}) for span in found]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        packed = self.headers.get("content-encoding") == "gzip"
        assert isinstance(self.server, Collector)
        self.server.paths.append(self.path)
        self.server.raw.append(gzip.decompress(body) if packed else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return (
        [_value(one) for one in value.array_value.values]
        if kind == "array_value"
        else getattr(value, kind)
    )


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.shutdown()


@pytest.fixture(scope="module")
def traced_server(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("tracing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # ms
        model = tiny_checkpoint(folder / "model", max_position_embeddings=4096)
        options = {
            "served_model_name": "tiny",
            "otlp_traces_endpoint": collector.url,
            "kv_cache_memory": 1 << 23,
        }
        with serving(folder / "log", model, **options) as running:
            yield running


def spans_of(collector: Collector, count: int) -> list[tuple[Any, dict[str, Any]]]:
    """The next spans."""
    wait_for(lambda: len(collector.spans()) >= count)
    spans = collector.spans()
    collector.raw.clear()
    assert len(spans) == count
    return spans


def test_tracing_span_has_vllms_attributes_and_the_clients_parent(
    traced_server: LlmkitServer, collector: Collector
) -> None:
    began = time.time_ns()
    with traced_server.client() as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"}
        answer = client.post("/v1/completions", json=BODY | {"n": 2}, headers=headers).json()
    ((span, attributes),) = spans_of(collector, 1)
    assert (span.name, span.kind) == ("llm_request", span.SPAN_KIND_SERVER)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert began < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(
        attributes["gen_ai.latency.e2e"], abs=1e-3
    )
    assert attributes["gen_ai.request.id"] == attributes["gen_ai.response.id"] == answer["id"]
    assert attributes["http.request.header.x-request-id"] == ["mine-1"]
    assert attributes["gen_ai.request.model"] == attributes["gen_ai.response.model"] == "tiny"
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert (
        attributes["gen_ai.request.n"],
        attributes["gen_ai.request.max_tokens"],
        attributes["gen_ai.request.temperature"],
    ) == (
        2,
        6,
        0,
    )
    assert (
        attributes["gen_ai.usage.completion_tokens"]
        == attributes["gen_ai.usage.output_tokens"]
        == 12
    )
    assert attributes["gen_ai.usage.prompt_tokens"] == 2 * answer["usage"]["prompt_tokens"]
    assert attributes["gen_ai.response.finish_reasons"] == ["length", "length"]
    times = [
        attributes[f"gen_ai.latency.time_{name}"]
        for name in ("in_queue", "in_model_prefill", "in_model_decode")
    ]
    assert all(0 < one < attributes["gen_ai.latency.e2e"] for one in times)
    assert (
        times[0] + times[1]
        < attributes["gen_ai.latency.time_to_first_token"]
        <= attributes["gen_ai.latency.e2e"]
    )
    assert span.status.code == span.status.STATUS_CODE_UNSET
    assert collector.paths[-1] == "/v1/traces"


def test_tracing_covers_chats_streams_and_disconnects(
    traced_server: LlmkitServer, collector: Collector
) -> None:
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 4,
        "stream": True,
    }
    with traced_server.client() as client:
        client.post("/v1/chat/completions", json=chat).read()
        with client.stream(
            "POST", "/v1/completions", json=BODY | {"max_tokens": 4000, "stream": True}
        ) as stream:
            next(stream.iter_lines())
    (first, second) = sorted(spans_of(collector, 2), key=lambda one: one[0].start_time_unix_nano)
    assert (first[1]["gen_ai.operation.name"], first[1]["url.path"]) == (
        "chat",
        "/v1/chat/completions",
    )
    assert not first[0].parent_span_id
    assert first[0].trace_id != second[0].trace_id
    assert second[1]["gen_ai.response.finish_reasons"] == ["cancelled"]


def test_tracing_reports_errors_without_text(
    traced_server: LlmkitServer, collector: Collector
) -> None:
    with traced_server.client() as client:
        refused = client.post("/v1/completions", json=BODY | {"max_tokens": 3000, "timeout": 0.05})
        assert refused.status_code == 504
    wait_for(lambda: len(collector.spans()) == 1)
    everything = b"".join(collector.raw)
    ((span, attributes),) = spans_of(collector, 1)
    assert (attributes["error.type"], span.status.code) == (
        "timeout",
        span.status.STATUS_CODE_ERROR,
    )
    assert SECRET.encode() not in everything
    assert b"nobody" not in everything


def test_tracing_respects_the_clients_sampling_flag(
    traced_server: LlmkitServer, collector: Collector
) -> None:
    with traced_server.client() as client:
        for flag in ("00", "01"):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flag}"}
            client.post("/v1/completions", json=BODY, headers=headers).raise_for_status()
        client.post(
            "/v1/completions", json=BODY, headers={"traceparent": "nonsense"}
        ).raise_for_status()
    spans = spans_of(collector, 2)
    assert sorted(bool(span.parent_span_id) for span, _ in spans) == [False, True]


def test_tracing_sends_remaining_spans_at_the_end(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    sent = tracing.Tracing(f"{collector.url}/elsewhere")
    choice = Choice(engine_request("cmpl-1-0", [1, 2, 3], 5), 0, None)  # type: ignore[arg-type]
    never_started = Generation(None, ServerMetrics(EngineStats, gpus=False), [choice], (), 0.0)
    scope = {
        "llmkit.arrival_time": time.perf_counter(),
        "llmkit.request_id": "id-1",
        "headers": [],
        "path": "/v1/completions",
    }
    sent.record(scope, "tiny", never_started)
    assert collector.raw == []
    sent.close()
    ((_, attributes),) = spans_of(collector, 1)
    assert attributes["gen_ai.usage.prompt_tokens"] == 3
    assert "gen_ai.latency.time_to_first_token" not in attributes
    assert collector.paths[-1] == "/elsewhere"


def test_tracing_reports_wrong_endpoint_and_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for endpoint in ("localhost:4317", "grpc://localhost:4317", "http://"):
        with pytest.raises(UsageError, match="is not the URL of a collector"):
            run_server(ServeOptions(model="none", otlp_traces_endpoint=endpoint))
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ShortageError, match=r"not installed. pip install 'llmkit\[otel\]'"):
        run_server(ServeOptions(model="none", otlp_traces_endpoint="http://localhost:4318"))
