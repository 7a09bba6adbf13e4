"""/ping and /invocations, which SageMaker calls, as vLLM has them.

An invocation is a request of another route. Its fields say which one, or the custom attribute
`route=PATH` does. So a client of boto3 sends the same bodies as a client of the API.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import FastAPI, Request, Response

from llmkit.runtime.server.http.http_errors import TGI_PATHS, ApiError, invalid
from llmkit.runtime.server.http.request_body import read_json_body
from llmkit.runtime.server.sagemaker.inner_request import InnerResponse
from llmkit.runtime.server.score_routes import SCORE_PATHS
from llmkit.runtime.server.serve_options import ServeOptions

PING = "/ping"
INVOCATIONS = "/invocations"
# A body's field, and the route that answers a request with this field; the first field counts.
ROUTES_BY_FIELD = (
    ("messages", "/v1/chat/completions"),
    ("prompt", "/v1/completions"),
    ("query", "/v1/rerank"),
    ("queries", "/v1/score"),
    ("text_1", "/v1/score"),
    ("data_1", "/v1/score"),
    ("input", "/v1/embeddings"),
    ("inputs", "/"),
)
# What the custom attribute `route` may name.
INVOKED_ROUTES = frozenset(
    {
        *(path for _, path in ROUTES_BY_FIELD),
        *SCORE_PATHS,
        *TGI_PATHS,
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)
ATTRIBUTES_HEADER = "x-amzn-sagemaker-custom-attributes"
ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"
SESSION_HEADER = "x-amzn-sagemaker-session-id"
NEW_SESSION_HEADER = "x-amzn-sagemaker-new-session-id"
CLOSED_SESSION_HEADER = "x-amzn-sagemaker-closed-session-id"
NEW_SESSION = "NEW_SESSION"
CLOSE_SESSION = "CLOSE"
SESSION_S = 1200  # how long SageMaker sends a session's requests to the same instance
_MAX_ATTRIBUTES = 1024  # SageMaker's limit


def add_invocation_routes(
    app: FastAPI, options: ServeOptions, ready: Callable[[], Awaitable[Response]]
) -> None:
    """Add the routes to `app`. ready: answers the health check, or raises ApiError 503."""

    async def ping() -> Response:
        return await ready()

    async def invocations(request: Request) -> Response:
        return invoke(app, request, await read_body(request, options))

    app.add_api_route(PING, ping, methods=["GET"], response_model=None)
    app.add_api_route(INVOCATIONS, invocations, methods=["POST"], response_model=None)


def add_adapter_routes(app: FastAPI, options: ServeOptions) -> None:
    """Add the routes by which SageMaker loads and unloads LoRA adapters, for `--lora-dir`."""

    async def load(request: Request) -> Response:
        body = parse_object(await read_body(request, options))
        fields = {"lora_name": body.get("name"), "lora_path": body.get("src")}
        return _inner(app, request, "/v1/load_lora_adapter", fields)

    async def unload(request: Request, name: str) -> Response:
        return _inner(app, request, "/v1/unload_lora_adapter", {"lora_name": name})

    app.add_api_route("/adapters", load, methods=["POST"], response_model=None)
    app.add_api_route("/adapters/{name:path}", unload, methods=["DELETE"], response_model=None)


async def read_body(request: Request, options: ServeOptions) -> bytes:
    """The body of a request of SageMaker's. Raises ApiError."""
    return await read_json_body(request, options.max_body_bytes, options.body_timeout)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object of a body. Its fields are not checked. Raises ApiError 400."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        message = f"The body is not JSON ({error})."
        raise ApiError(400, message, code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_type")
    return body


def invoke(app: FastAPI, request: Request, data: bytes, model: str | None = None) -> Response:
    """The response to an invocation. model: answers in place of the body's.

    Raises ApiError 400 for a body of no route.
    """
    body = parse_object(data)
    session = request.headers.get(SESSION_HEADER)
    if "requestType" in body:
        return _change_session(body["requestType"], session)
    path = _route_attribute(request.headers.get(ATTRIBUTES_HEADER, "")) or _route_of(body)
    model = request.headers.get(ADAPTER_HEADER) or model
    if model is not None:
        data = json.dumps(body | {"model": model}).encode()
    request_id: str = request.scope["llmkit.request_id"]
    # SageMaker passes on no other header of ours.
    attributes = f"x-request-id={request_id}"[:_MAX_ATTRIBUTES]
    headers = [(ATTRIBUTES_HEADER.encode(), attributes.encode("latin-1", "replace"))]
    if session == NEW_SESSION:
        headers.append((NEW_SESSION_HEADER.encode(), _new_session().encode()))
    return InnerResponse(app, request, path, data, headers)


def _route_of(body: Mapping[str, Any]) -> str:
    for field, path in ROUTES_BY_FIELD:
        if field in body:
            return path
    fields = ", ".join(field for field, _ in ROUTES_BY_FIELD)
    message = f"The body is a request of no route: it has none of the fields {fields}."
    raise ApiError(400, message, code="missing_required_parameter")


def _route_attribute(attributes: str) -> str | None:
    """The path of `route=PATH` among the custom attributes; None: there is none.

    Raises ApiError 400 for a path that cannot be invoked.
    """
    for attribute in attributes.replace(";", ",").split(","):
        name, _, path = attribute.strip().partition("=")
        if name != "route":
            continue
        if path not in INVOKED_ROUTES:
            known = ", ".join(sorted(INVOKED_ROUTES))
            message = f"{path!r} cannot be invoked. These can: {known}."
            raise invalid(ATTRIBUTES_HEADER, message)
        return path
    return None


def _change_session(change: Any, session: str | None) -> Response:
    """The response to a request that only begins or ends a session.

    A session has no state here: SageMaker sends its requests to the instance that began it, where
    the prefix cache has what came before.
    """
    if change == NEW_SESSION:
        return Response(headers={NEW_SESSION_HEADER: _new_session()})
    if change != CLOSE_SESSION:
        message = f"requestType must be {NEW_SESSION} or {CLOSE_SESSION}."
        raise invalid("requestType", message)
    if session is None:
        message = f"The header {SESSION_HEADER} says which session ends, and is missing."
        raise invalid(SESSION_HEADER, message, "missing_required_parameter")
    return Response(headers={CLOSED_SESSION_HEADER: session})


def _new_session() -> str:
    """A new session's id and the time when it ends, as SageMaker reads them."""
    expires = datetime.now(UTC) + timedelta(seconds=SESSION_S)
    return f"{uuid.uuid4()}; Expires={expires:%Y-%m-%dT%H:%M:%SZ}"


def _inner(app: FastAPI, request: Request, path: str, body: Mapping[str, Any]) -> Response:
    return InnerResponse(app, request, path, json.dumps(body).encode())
