"""OpenTelemetry traces: one span for each request.

Attributes have vLLM's names and those of OpenTelemetry's conventions for generative AI. This needs
the extra `otel`. A thread of the SDK sends spans in batches to one collector by OTLP over HTTP;
spans are dropped while the collector is away. They hold sizes, times and settings, never text. The
SDK's environment variables apply (OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS,
OTEL_TRACES_SAMPLER...).
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Scope

from llmkit.common.errors import ShortageError, UsageError
from llmkit.common.version import version
from llmkit.runtime.server.generation import Generation

SPAN_NAME = "llm_request"
_PARENT_HEADERS = (b"traceparent", b"tracestate")
_CHAT_PATHS = ("/v1/chat", "/v1/messages", "/v1/responses")


def require_tracing(endpoint: str) -> None:
    """Check that traces can be sent to `endpoint`.

    Raises UsageError when it is not a URL, ShortageError when OpenTelemetry is not installed.
    """
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(
            f"--otlp-traces-endpoint {endpoint!r} is not the URL of a collector",
            "OTLP over HTTP was expected",
            "Write it like http://localhost:4318/v1/traces",
        )
    try:
        sdk = find_spec("opentelemetry.sdk")
        exporter = find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:  # a parent package is missing
        sdk = exporter = None
    if sdk is None or exporter is None:
        raise ShortageError(
            "--otlp-traces-endpoint needs OpenTelemetry, which is not installed",
            todo="pip install 'llmkit[otel]'",
        )


class Tracing:
    """Sends spans to the collector at the URL `endpoint`; OTLP's path is added if it has none."""

    def __init__(self, endpoint: str) -> None:
        # An optional dependency.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        url = endpoint
        if not urlsplit(endpoint).path.strip("/"):
            url = endpoint.rstrip("/") + "/v1/traces"
        name = os.environ.get("OTEL_SERVICE_NAME", "llmkit")
        resource = Resource.create({"service.name": name, "service.version": version()})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("llmkit", version())
        self._propagator = TraceContextTextMapPropagator()

    def record(self, scope: Scope, model: str, generation: Generation) -> None:
        """Record the span of a request that has ended; its parent is the client's span, if any."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now_ns = time.time_ns()
        now = time.perf_counter()
        arrived: float = scope["llmkit.arrival_time"]
        trace_headers = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in _PARENT_HEADERS
        }
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(trace_headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(generation, model, scope, arrived, now),
            start_time=now_ns - int((now - arrived) * 1e9),
        )
        if generation.outcome not in ("finished", "cancelled"):
            span.set_attribute("error.type", generation.outcome)
            span.set_status(Status(StatusCode.ERROR))
        span.end(now_ns)

    def close(self) -> None:
        """Send the remaining spans. Blocks until the collector has taken them."""
        self._provider.shutdown()


def _attributes(
    generation: Generation, model: str, scope: Scope, arrived: float, now: float
) -> dict[str, Any]:
    """Return a span's attributes: vLLM's names, and the conventions' names for the same values."""
    choices = generation.choices
    request = choices[0].request
    params = request.sampling_params
    request_id = request.request_id.rpartition("-")[0]
    times = choices[0].times
    prompt = sum(len(choice.request.prompt_token_ids) for choice in choices)
    completion = sum(choice.completion_tokens for choice in choices)
    path: str = scope["path"]
    operation = "text_completion"
    if request.pooling:
        operation = "embeddings"
    elif path.startswith(_CHAT_PATHS):
        operation = "chat"
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "llmkit",
        "url.path": path,
        "http.request.header.x-request-id": [scope["llmkit.request_id"]],
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.id": request_id,
        "gen_ai.response.id": request_id,
        "gen_ai.request.n": len(choices),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.usage.prompt_tokens": prompt,
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.cache_read.input_tokens": sum(choice.cached_tokens for choice in choices),
        "gen_ai.usage.completion_tokens": completion,
        "gen_ai.usage.output_tokens": completion,
        "gen_ai.response.finish_reasons": [
            choice.finish_reason or generation.outcome for choice in choices
        ],
        "gen_ai.latency.e2e": now - arrived,
    }
    if times.first_token:
        attributes |= {
            "gen_ai.latency.time_in_queue": times.queue_s,
            "gen_ai.latency.time_to_first_token": times.ttft_s,
            "gen_ai.latency.time_in_model_prefill": times.prefill_s,
            "gen_ai.latency.time_in_model_decode": times.decode_s,
        }
    return attributes
