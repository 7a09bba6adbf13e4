"""The routes of TGI's API on one model's server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from llmkit.runtime.server.http_response import respond
from llmkit.runtime.server.prepare import prepare_completion
from llmkit.runtime.server.read_request import check_ready, client_salt, read_request
from llmkit.runtime.server.schemas.base_request import MAX_N, MAX_STOPS
from llmkit.runtime.server.server_state import ServerState
from llmkit.runtime.server.tgi.tgi_request import (
    TgiCompatRequest,
    TgiGenerateRequest,
    TgiStreamRequest,
)
from llmkit.runtime.server.tgi.tgi_response import TgiResponseBuilder


def add_tgi_routes(app: FastAPI, state: ServerState) -> None:
    """Add the routes to `app`. /health and /info are llmkit's own."""
    routes = TgiRoutes(state)
    for path, endpoint in (
        ("/generate", routes.generate),
        ("/generate_stream", routes.generate_stream),
        ("/", routes.compat),
    ):
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)


def tgi_info(state: ServerState) -> dict[str, Any]:
    """The fields of TGI's /info that this server can tell."""
    info = state.engine_info
    engine = state.options.engine
    return {
        "model_id": state.root,
        "model_dtype": info.dtype,
        "model_device_type": info.device.partition(":")[0].partition(" ")[0],
        "max_concurrent_requests": engine.dp * engine.max_num_seqs + state.options.max_waiting,
        "max_best_of": MAX_N,
        "max_stop_sequences": MAX_STOPS,
        "max_input_tokens": info.max_model_len - 1,
        "max_total_tokens": info.max_model_len,
        "max_client_batch_size": 1,
        "router": "llmkit",
    }


class TgiRoutes:
    """One method per route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def generate(self, request: Request) -> Response:
        return await self._respond(request, TgiGenerateRequest)

    async def generate_stream(self, request: Request) -> Response:
        return await self._respond(request, TgiStreamRequest)

    async def compat(self, request: Request) -> Response:
        """Generate, streamed if the body says so. A full response is a list, as TGI's is."""
        return await self._respond(request, TgiCompatRequest, as_list=True)

    async def _respond(
        self, request: Request, schema: type[TgiGenerateRequest], as_list: bool = False
    ) -> Response:
        state = self._state
        body = await read_request(state, schema, request)
        builder = TgiResponseBuilder(body, state.text.tokenizer, as_list)
        choices = await prepare_completion(state, body.completion, builder.id, client_salt(request))
        check_ready(state)  # again: the engine may have ended while this request was prepared
        return await respond(state, request, builder, choices, body.streams)
