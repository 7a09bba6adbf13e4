"""OpenTelemetry traces: a span for each request, with vLLM's names and those of the conventions for generative AI.

Needs the extra `otel`. Spans are sent by a thread of the SDK's, in batches, to one collector that speaks OTLP over
HTTP; when it is away they are dropped. They tell of sizes, times and settings, never of text. The SDK's own variables
apply (OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER and the like).
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmkit.checkpoint.errors import ShortageError, UsageError
from llmkit.checkpoint.version import version

if TYPE_CHECKING:
    from starlette.types import Scope

    from llmkit.runtime.server.generation import Generation

SPAN = "llm_request"
_PARENT = (b"traceparent", b"tracestate")
_CHATS = ("/v1/chat", "/v1/messages", "/v1/responses")


def require_tracing(endpoint: str) -> None:
    """Raises UsageError for what is no URL, ShortageError when OpenTelemetry is not installed."""
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(
            f"--otlp-traces-endpoint {endpoint!r} is no URL of a collector",
            "OTLP over HTTP was expected",
            "Write it like http://localhost:4318/v1/traces",
        )
    try:
        found = find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ShortageError(
            "--otlp-traces-endpoint needs OpenTelemetry, which is not installed", todo="pip install 'llmkit[otel]'"
        )


class Tracing:
    """Spans on their way to a collector. endpoint: a URL; without a path it gets OTLP's own."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
        name = os.environ.get("OTEL_SERVICE_NAME", "llmkit")
        resource = Resource.create({"service.name": name, "service.version": version()})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("llmkit", version())
        self._parents = TraceContextTextMapPropagator()

    def record(self, scope: Scope, model: str, generation: Generation) -> None:
        """Tell of a request for `model` that has ended. Its parent is the client's span, where it names one."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now_ns, now = time.time_ns(), time.perf_counter()
        arrived: float = scope["llmkit.arrived"]
        given = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _PARENT}
        span = self._tracer.start_span(
            SPAN,
            context=self._parents.extract(given),
            kind=SpanKind.SERVER,
            attributes=_attributes(generation, model, scope["path"], arrived, now),
            start_time=now_ns - int((now - arrived) * 1e9),
        )
        if generation.ended not in ("finished", "cancelled"):
            span.set_attribute("error.type", generation.ended)
            span.set_status(Status(StatusCode.ERROR))
        span.end(now_ns)

    def close(self) -> None:
        """Send what is left; takes as long as the collector does."""
        self._provider.shutdown()


def _attributes(generation: Generation, model: str, path: str, arrived: float, now: float) -> dict[str, Any]:
    """Of the span: vLLM's names where it has one, beside those of the conventions that say the same."""
    choices = generation.choices
    asked, times = choices[0].request, choices[0].times
    prompt = sum(len(choice.request.prompt) for choice in choices)
    completion = sum(choice.completion_tokens for choice in choices)
    operation = "embeddings" if asked.pooling else "chat" if path.startswith(_CHATS) else "text_completion"
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "llmkit",
        "url.path": path,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.id": asked.id.rpartition("-")[0],
        "gen_ai.response.id": asked.id.rpartition("-")[0],
        "gen_ai.request.n": len(choices),
        "gen_ai.request.max_tokens": asked.max_tokens,
        "gen_ai.request.temperature": float(asked.temperature),
        "gen_ai.request.top_p": float(asked.top_p),
        "gen_ai.usage.prompt_tokens": prompt,
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.cache_read.input_tokens": sum(choice.cached_tokens for choice in choices),
        "gen_ai.usage.completion_tokens": completion,
        "gen_ai.usage.output_tokens": completion,
        "gen_ai.response.finish_reasons": [choice.finish_reason or generation.ended for choice in choices],
        "gen_ai.latency.e2e": now - arrived,
    }
    if times.first:
        attributes |= {
            "gen_ai.latency.time_in_queue": times.queued_s,
            "gen_ai.latency.time_to_first_token": times.first - times.arrived,
            "gen_ai.latency.time_in_model_prefill": max(0.0, times.first - times.sent - times.queued_s),
            "gen_ai.latency.time_in_model_decode": times.last - times.first,
        }
    return attributes
