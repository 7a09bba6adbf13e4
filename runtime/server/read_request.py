"""What every route does first: is the server ready, is the body right, is the model there."""

from __future__ import annotations

from collections.abc import Collection

from fastapi import Request

from llmkit.runtime.server.http.http_errors import unknown_model
from llmkit.runtime.server.http.request_body import JSON_MEDIA_TYPE, read_json_body
from llmkit.runtime.server.prepare import check_reasoning_controls
from llmkit.runtime.server.schemas.base_request import RequestT, parse_request
from llmkit.runtime.server.server_state import ServerState


async def read_request(state: ServerState, schema: type[RequestT], request: Request) -> RequestT:
    """Read and check the body of a request to a model of this server. Raises ApiError."""
    body = await read_body(state, schema, request)
    check_model(state, body.model)
    return body


async def read_body(
    state: ServerState,
    schema: type[RequestT],
    request: Request,
    media_types: Collection[str] = (JSON_MEDIA_TYPE,),
) -> RequestT:
    """As `read_request`, but the model is not checked. media_types: see `read_json_body`."""
    check_ready(state)
    options = state.options
    data = await read_json_body(request, options.max_body_bytes, options.body_timeout, media_types)
    body = parse_request(schema, data, options.strict_fields, state.model_name)
    request.scope["llmkit.ignored_fields"].append(body.ignored)
    check_reasoning_controls(body, state.text)
    return body


def check_ready(state: ServerState) -> None:
    """Raise ApiError 503 unless requests are accepted."""
    error = state.unavailable_error
    if error is not None:
        raise error


def check_model(state: ServerState, name: str) -> None:
    """Raise ApiError 404 for a model that this server does not have."""
    if name not in state.models:
        raise unknown_model(name, state.models)


def client_salt(request: Request) -> str:
    """Return the salt that keeps what is cached of this client to itself.

    SecurityMiddleware sets it.
    """
    cache_salt: str = request.scope["llmkit.cache_salt"]
    return cache_salt
