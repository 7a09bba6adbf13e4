"""The routes of the Open Inference Protocol over HTTP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from llmkit.common.version import version
from llmkit.runtime.server.http.http_errors import ApiError, invalid, unknown_model
from llmkit.runtime.server.http.request_body import read_json_body
from llmkit.runtime.server.http_response import respond, respond_full
from llmkit.runtime.server.kserve.kserve_request import (
    KserveRequest,
    parse_generate_request,
    parse_infer_request,
)
from llmkit.runtime.server.kserve.kserve_response import (
    VERSION,
    GenerateResponseBuilder,
    InferResponseBuilder,
)
from llmkit.runtime.server.kserve.kserve_tensors import CONFIG_TYPES, INPUTS, OUTPUTS
from llmkit.runtime.server.prepare import prepare_completion
from llmkit.runtime.server.server_state import ServerState

# Triton's header: how many bytes of the body are JSON. Binary data follows them.
JSON_LENGTH_HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data", "generate", "model_configuration", "parameters", "statistics"]
# The content types of infer. Triton's client sends none.
_INFER_MEDIA_TYPES = ("", "application/json", "application/octet-stream")


def add_kserve_routes(app: FastAPI, state: ServerState) -> None:
    """Add the protocol's routes to `app`."""
    routes = KserveRoutes(state)
    app.add_api_route("/v2", routes.server, methods=["GET"], response_model=None)
    app.add_api_route("/v2/health/live", routes.live, methods=["GET"], response_model=None)
    app.add_api_route("/v2/health/ready", routes.ready, methods=["GET"], response_model=None)
    app.add_api_route("/v2/repository/index", routes.index, methods=["POST"], response_model=None)
    app.add_api_route("/v2/models/stats", routes.all_stats, methods=["GET"], response_model=None)
    for path, method, endpoint in (
        ("/ready", "GET", routes.model_ready),
        ("/config", "GET", routes.config),
        ("/stats", "GET", routes.stats),
        ("/infer", "POST", routes.infer),
        ("/generate", "POST", routes.generate),
        ("/generate_stream", "POST", routes.generate_stream),
        ("", "GET", routes.model),
    ):
        for base in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
            app.add_api_route(base + path, endpoint, methods=[method], response_model=None)


class KserveRoutes:
    """One method per route. A model's name may contain slashes; each model has one version."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def server(self) -> Response:
        return _json_response({"name": "llmkit", "version": version(), "extensions": EXTENSIONS})

    async def live(self) -> Response:
        return _json_response({"live": True})

    async def ready(self) -> Response:
        self._check_ready()
        return _json_response({"ready": True})

    async def index(self) -> Response:
        self._check_ready()
        return _json_response(
            [{"name": name, "version": VERSION, "state": "READY"} for name in self._state.models]
        )

    async def model_ready(self, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        return _json_response({"name": name, "ready": True})

    async def model(self, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        return _json_response(
            {
                "name": name,
                "versions": [VERSION],
                "platform": "llmkit",
                "inputs": _tensor_metadata(INPUTS),
                "outputs": _tensor_metadata(OUTPUTS),
            }
        )

    async def config(self, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        inputs = _tensor_config(INPUTS)
        for tensor in inputs:
            tensor["optional"] = tensor["name"] != "text_input"
        return _json_response(
            {
                "name": name,
                "backend": "llmkit",
                "max_batch_size": 0,
                "input": inputs,
                "output": _tensor_config(OUTPUTS),
                "model_transaction_policy": {"decoupled": True},
            }
        )

    async def stats(self, name: str, version: str = VERSION) -> Response:
        """Triton's statistics. All names of this server have the same: they share an engine."""
        self._check_model(name, version)
        return self._stats_of(name)

    async def all_stats(self) -> Response:
        self._check_ready()
        return self._stats_of(*self._state.models)

    def _stats_of(self, *names: str) -> Response:
        cache = self._state.response_cache
        figures = self._state.metrics.statistics(0 if cache is None else cache.hits)
        models = [{"name": name, "version": VERSION, **figures} for name in names]
        return _json_response({"model_stats": models})

    async def infer(self, request: Request, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        header = request.headers.get(JSON_LENGTH_HEADER)
        if header is not None and not (header.isdecimal() and len(header) < 16):
            message = f"{JSON_LENGTH_HEADER} must be a number of bytes."
            raise invalid(JSON_LENGTH_HEADER, message, "invalid_type")
        data = await self._read_body(request, _INFER_MEDIA_TYPES)
        infer_request = parse_infer_request(name, data, None if header is None else int(header))
        if infer_request.completion.stream:
            raise invalid(
                "stream", "infer is not streamed; use generate_stream, or gRPC.", "unsupported"
            )
        builder = InferResponseBuilder(infer_request)
        response = await self._respond_full(request, infer_request, builder)
        if builder.json_length is not None:
            response.headers[JSON_LENGTH_HEADER] = str(builder.json_length)
            response.headers["content-type"] = "application/octet-stream"
        return response

    async def generate(self, request: Request, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        generate_request = parse_generate_request(name, await self._read_body(request))
        if generate_request.completion.stream:
            raise invalid("stream", "generate is not streamed; use generate_stream.", "unsupported")
        builder = GenerateResponseBuilder(generate_request)
        return await self._respond_full(request, generate_request, builder)

    async def generate_stream(
        self, request: Request, name: str, version: str = VERSION
    ) -> Response:
        """Answer with server-sent events: one event only, unless `stream` is true."""
        self._check_model(name, version)
        generate_request = parse_generate_request(name, await self._read_body(request))
        completion = generate_request.completion
        builder = GenerateResponseBuilder(generate_request)
        choices = await prepare_completion(
            self._state, completion, builder.id, request.scope["llmkit.cache_salt"]
        )
        self._check_ready()  # again: the engine may have ended while this request was prepared
        return await respond(self._state, request, builder, choices, True, completion.timeout)

    async def _respond_full(
        self,
        request: Request,
        kserve_request: KserveRequest,
        builder: InferResponseBuilder | GenerateResponseBuilder,
    ) -> Response:
        completion = kserve_request.completion
        choices = await prepare_completion(
            self._state, completion, builder.id, request.scope["llmkit.cache_salt"]
        )
        self._check_ready()  # again: the engine may have ended while this request was prepared
        return await respond_full(self._state, request, builder, choices, completion.timeout)

    async def _read_body(
        self, request: Request, media_types: Collection[str] = ("application/json",)
    ) -> bytes:
        options = self._state.options
        return await read_json_body(
            request, options.max_body_bytes, options.body_timeout, media_types
        )

    def _check_model(self, name: str, version: str) -> None:
        self._check_ready()
        if name not in self._state.models:
            raise unknown_model(name, self._state.models)
        if version != VERSION:
            message = f"The model {name!r} has no version {version!r}; it has {VERSION}."
            raise ApiError(404, message, code="model_not_found", param="version")

    def _check_ready(self) -> None:
        error = self._state.unavailable_error
        if error is not None:
            raise error


def _tensor_metadata(datatypes: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in datatypes.items()
    ]


def _tensor_config(datatypes: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "data_type": CONFIG_TYPES[datatype], "dims": [-1]}
        for name, datatype in datatypes.items()
    ]


def _json_response(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
