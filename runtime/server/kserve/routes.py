"""The routes of the Open Inference Protocol over HTTP."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response

from llmkit.checkpoint.version import version
from llmkit.runtime.server.answer import answer, answer_whole
from llmkit.runtime.server.http.body import read_json_body
from llmkit.runtime.server.http.errors import ApiError, invalid, unknown_model
from llmkit.runtime.server.kserve.body import Asked, generate_request, infer_request
from llmkit.runtime.server.kserve.shapes import VERSION, GenerateShape, InferShape
from llmkit.runtime.server.kserve.tensors import CONFIG_TYPES, INPUTS, OUTPUTS
from llmkit.runtime.server.prepare import prepare_completion
from llmkit.runtime.server.state import State

HEADER = "inference-header-content-length"  # Triton's: so many bytes of the body are JSON, binary data follows
EXTENSIONS = ["binary_tensor_data", "generate", "model_configuration", "parameters"]
_BINARY_KINDS = ("", "application/json", "application/octet-stream")


def add_routes(app: FastAPI, state: State) -> None:
    """Serve the protocol beside the other routes."""
    routes = KserveRoutes(state)
    app.add_api_route("/v2", routes.server, methods=["GET"], response_model=None)
    app.add_api_route("/v2/health/live", routes.live, methods=["GET"], response_model=None)
    app.add_api_route("/v2/health/ready", routes.ready, methods=["GET"], response_model=None)
    app.add_api_route("/v2/repository/index", routes.index, methods=["POST"], response_model=None)
    for path, method, endpoint in (
        ("/ready", "GET", routes.model_ready),
        ("/config", "GET", routes.config),
        ("/infer", "POST", routes.infer),
        ("/generate", "POST", routes.generate),
        ("/generate_stream", "POST", routes.generate_stream),
        ("", "GET", routes.model),
    ):
        for base in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
            app.add_api_route(base + path, endpoint, methods=[method], response_model=None)


class KserveRoutes:
    """One method per route. A model's name may have slashes; it has one version."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def server(self) -> Response:
        return _json({"name": "llmkit", "version": version(), "extensions": EXTENSIONS})

    async def live(self) -> Response:
        return _json({"live": True})

    async def ready(self) -> Response:
        self._check_ready()
        return _json({"ready": True})

    async def index(self) -> Response:
        self._check_ready()
        return _json([{"name": name, "version": VERSION, "state": "READY"} for name in self._state.models])

    async def model_ready(self, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        return _json({"name": name, "ready": True})

    async def model(self, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        return _json(
            {
                "name": name,
                "versions": [VERSION],
                "platform": "llmkit",
                "inputs": [{"name": one, "datatype": kind, "shape": [-1]} for one, kind in INPUTS.items()],
                "outputs": [{"name": one, "datatype": kind, "shape": [-1]} for one, kind in OUTPUTS.items()],
            }
        )

    async def config(self, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        inputs, outputs = (
            [{"name": one, "data_type": CONFIG_TYPES[kind], "dims": [-1]} for one, kind in tensors.items()]
            for tensors in (INPUTS, OUTPUTS)
        )
        return _json(
            {
                "name": name,
                "backend": "llmkit",
                "max_batch_size": 0,
                "input": [one | {"optional": one["name"] != "text_input"} for one in inputs],
                "output": outputs,
                "model_transaction_policy": {"decoupled": True},
            }
        )

    async def infer(self, request: Request, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        header = request.headers.get(HEADER)
        if header is not None and not (header.isdecimal() and len(header) < 16):
            raise invalid(HEADER, f"{HEADER} must be a number of bytes.", "invalid_type")
        data = await self._data(request, _BINARY_KINDS)
        asked = infer_request(name, data, None if header is None else int(header))
        if asked.body.stream:
            raise invalid("stream", "infer is not streamed; use generate_stream, or gRPC.", "unsupported")
        shape = InferShape(asked)
        response = await self._answer(request, asked, shape)
        if shape.header is not None:
            response.headers[HEADER] = str(shape.header)
            response.headers["content-type"] = "application/octet-stream"
        return response

    async def generate(self, request: Request, name: str, version: str = VERSION) -> Response:
        self._check_model(name, version)
        asked = generate_request(name, await self._data(request))
        if asked.body.stream:
            raise invalid("stream", "generate is not streamed; use generate_stream.", "unsupported")
        return await self._answer(request, asked, GenerateShape(asked))

    async def generate_stream(self, request: Request, name: str, version: str = VERSION) -> Response:
        """Events, of which there is one where `stream` is not asked for."""
        self._check_model(name, version)
        asked = generate_request(name, await self._data(request))
        shape = GenerateShape(asked)
        choices = await prepare_completion(self._state, asked.body, shape.id, request.scope["llmkit.salt"])
        self._check_ready()
        return await answer(self._state, request, shape, choices, True, asked.body.timeout)

    async def _answer(self, request: Request, asked: Asked, shape: InferShape | GenerateShape) -> Response:
        choices = await prepare_completion(self._state, asked.body, shape.id, request.scope["llmkit.salt"])
        self._check_ready()  # reading and tokenizing took a while
        return await answer_whole(self._state, request, shape, choices, asked.body.timeout)

    async def _data(self, request: Request, kinds: Collection[str] = ("application/json",)) -> bytes:
        options = self._state.options
        return await read_json_body(request, options.max_body_bytes, options.body_timeout, kinds)

    def _check_model(self, name: str, version: str) -> None:
        self._check_ready()
        if name not in self._state.models:
            raise unknown_model(name, self._state.models)
        if version != VERSION:
            message = f"The model {name!r} has no version {version!r}; it has {VERSION}."
            raise ApiError(404, message, code="model_not_found", param="version")

    def _check_ready(self) -> None:
        if (error := self._state.unready) is not None:
            raise error


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
