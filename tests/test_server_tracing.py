"""Spans, as a real collector's HTTP endpoint gets them."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint

from llmkit.checkpoint.errors import ShortageError, UsageError
from llmkit.runtime.server import tracing
from llmkit.runtime.server.engines.messages import Add, Stats
from llmkit.runtime.server.generation import Choice, Generation
from llmkit.runtime.server.metrics import Metrics
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.serve import run_server

SECRET = "nobody else may read this"
BODY: dict[str, Any] = {"model": "tiny", "prompt": SECRET, "temperature": 0, "max_tokens": 6, "ignore_eos": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


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
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        told = [ExportTraceServiceRequest.FromString(body) for body in list(self.raw)]
        found = [s for one in told for group in one.resource_spans for scope in group.scope_spans for s in scope.spans]
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
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.shutdown()


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("tracing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # ms
        model = tiny_checkpoint(folder / "model", max_position_embeddings=4096)
        options = {"served_model_name": "tiny", "otlp_traces_endpoint": collector.url, "kv_cache_memory": 1 << 23}
        with serving(folder / "log", model, **options) as running:
            yield running


def spans_of(collector: Collector, count: int) -> list[tuple[Any, dict[str, Any]]]:
    """The next spans."""
    wait_for(lambda: len(collector.spans()) >= count)
    spans = collector.spans()
    collector.raw.clear()
    assert len(spans) == count
    return spans


def test_a_span_has_vllms_attributes_and_the_clients_span_for_a_parent(
    server: ServerProcess, collector: Collector
) -> None:
    began = time.time_ns()
    with server.client() as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = client.post("/v1/completions", json=BODY | {"n": 2}, headers=headers).json()
    ((span, told),) = spans_of(collector, 1)
    assert (span.name, span.kind) == ("llm_request", span.SPAN_KIND_SERVER)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert began < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 == pytest.approx(
        told["gen_ai.latency.e2e"], abs=1e-3
    )
    assert told["gen_ai.request.id"] == told["gen_ai.response.id"] == answer["id"]
    assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "tiny"
    assert told["gen_ai.operation.name"] == "text_completion"
    assert (told["gen_ai.request.n"], told["gen_ai.request.max_tokens"], told["gen_ai.request.temperature"]) == (
        2,
        6,
        0,
    )
    assert told["gen_ai.usage.completion_tokens"] == told["gen_ai.usage.output_tokens"] == 12
    assert told["gen_ai.usage.prompt_tokens"] == 2 * answer["usage"]["prompt_tokens"]
    assert told["gen_ai.response.finish_reasons"] == ["length", "length"]
    times = [told[f"gen_ai.latency.time_{name}"] for name in ("in_queue", "in_model_prefill", "in_model_decode")]
    assert all(0 < one < told["gen_ai.latency.e2e"] for one in times)
    assert times[0] + times[1] < told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"]
    assert span.status.code == span.status.STATUS_CODE_UNSET
    assert collector.paths[-1] == "/v1/traces"


def test_chats_streams_and_those_that_went_away(server: ServerProcess, collector: Collector) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "stream": True}
    with server.client() as client:
        client.post("/v1/chat/completions", json=chat).read()
        with client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 4000, "stream": True}) as stream:
            next(stream.iter_lines())
    (first, second) = sorted(spans_of(collector, 2), key=lambda one: one[0].start_time_unix_nano)
    assert (first[1]["gen_ai.operation.name"], first[1]["url.path"]) == ("chat", "/v1/chat/completions")
    assert not first[0].parent_span_id
    assert first[0].trace_id != second[0].trace_id
    assert second[1]["gen_ai.response.finish_reasons"] == ["cancelled"]


def test_an_error_is_told_and_no_text_is(server: ServerProcess, collector: Collector) -> None:
    with server.client() as client:
        refused = client.post("/v1/completions", json=BODY | {"max_tokens": 3000, "timeout": 0.05})
        assert refused.status_code == 504
    wait_for(lambda: len(collector.spans()) == 1)
    everything = b"".join(collector.raw)
    ((span, told),) = spans_of(collector, 1)
    assert (told["error.type"], span.status.code) == ("timeout", span.status.STATUS_CODE_ERROR)
    assert SECRET.encode() not in everything
    assert b"nobody" not in everything


def test_a_client_that_wants_no_trace_gets_none(server: ServerProcess, collector: Collector) -> None:
    with server.client() as client:
        for flag in ("00", "01"):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flag}"}
            client.post("/v1/completions", json=BODY, headers=headers).raise_for_status()
        client.post("/v1/completions", json=BODY, headers={"traceparent": "nonsense"}).raise_for_status()
    spans = spans_of(collector, 2)
    assert sorted(bool(span.parent_span_id) for span, _ in spans) == [False, True]


def test_what_is_still_to_be_sent_is_sent_at_the_end(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    sent = tracing.Tracing(f"{collector.url}/elsewhere")
    choice = Choice(Add("cmpl-1-0", [1, 2, 3], 5), 0, None)  # type: ignore[arg-type]
    never_started = Generation(None, Metrics(Stats, gpus=False), [choice], (), 0.0)  # type: ignore[arg-type]
    scope = {"llmkit.arrived": time.perf_counter(), "headers": [], "path": "/v1/completions"}
    sent.record(scope, "tiny", never_started)
    assert collector.raw == []
    sent.close()
    ((_, told),) = spans_of(collector, 1)
    assert told["gen_ai.usage.prompt_tokens"] == 3
    assert "gen_ai.latency.time_to_first_token" not in told
    assert collector.paths[-1] == "/elsewhere"


def test_a_wrong_endpoint_and_a_missing_package_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("localhost:4317", "grpc://localhost:4317", "http://"):
        with pytest.raises(UsageError, match="is no URL of a collector"):
            run_server(ServeOptions(model="none", otlp_traces_endpoint=endpoint))
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ShortageError, match=r"not installed. pip install 'llmkit\[otel\]'"):
        run_server(ServeOptions(model="none", otlp_traces_endpoint="http://localhost:4318"))
