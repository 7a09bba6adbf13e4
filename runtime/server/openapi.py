"""The OpenAPI document of the server's own routes, made of the bodies that the routes validate with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llmkit.checkpoint.version import version
from llmkit.runtime.server.adapters import LoadBody, UnloadBody
from llmkit.runtime.server.bodies.base import Body
from llmkit.runtime.server.bodies.chat import HARMLESS_IN_MESSAGE, ChatBody, Message
from llmkit.runtime.server.bodies.completions import CompletionBody
from llmkit.runtime.server.bodies.embeddings import EmbeddingsBody
from llmkit.runtime.server.bodies.messages import CountBody, MessagesBody
from llmkit.runtime.server.bodies.responses import ResponsesBody
from llmkit.runtime.server.bodies.tokens import DetokenizeBody, TokenizeBody
from llmkit.runtime.server.http.guard import OPEN_PATHS
from llmkit.runtime.server.kserve.body import InferBody
from llmkit.runtime.server.metrics import CONTENT_TYPE

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/responses": ResponsesBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/v1/load_lora_adapter": LoadBody,
    "/v1/unload_lora_adapter": UnloadBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v2/models/{name}/infer": InferBody,
    "/v2/models/{name}/versions/{version}/infer": InferBody,
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error", "description": "Of /v1/messages only."},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": {"type": ["string", "null"], "description": "What a program can test for."},
            },
        },
    },
}
# Of /v2: a completion's other fields may stand beside, or in `parameters`.
_GENERATE = {
    "type": "object",
    "required": ["text_input"],
    "properties": {"text_input": {"type": "string", "minLength": 1}, "parameters": {"type": ["object", "null"]}},
}
# Of /v2, as the Open Inference Protocol has it.
_FLAT_ERROR = {
    "type": "object",
    "required": ["error", "type", "param", "code"],
    "properties": _ERROR["properties"]["error"]["properties"] | {"error": {"type": "string"}},  # type: ignore[index]
}


def openapi(routes: Iterable[Any], keys: bool) -> dict[str, Any]:
    """The document of those of `routes` that are APIRoutes. keys: whether most of them need an API key."""
    ours = [route for route in routes if isinstance(route, APIRoute)]
    used = {route.path_format: BODIES[route.path_format] for route in ours if route.path_format in BODIES}
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in used.values()], ref_template="#/components/schemas/{model}"
    )
    definitions = schemas.get("$defs", {})
    for kind in used.values():
        _close(definitions, kind, dict(kind.harmless), kind.no_effect)
    _close(definitions, Message, dict(HARMLESS_IN_MESSAGE), frozenset())
    paths: dict[str, dict[str, Any]] = {}
    for route in ours:
        operation = _operation(route.path_format, used.get(route.path_format))
        if keys and route.path_format not in OPEN_PATHS:
            operation["security"] = [{"bearer": []}, {"key": []}]
        for method in route.methods or ():
            paths.setdefault(route.path_format, {})[method.lower()] = operation
    security = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmkit serve", "version": version()},
        "paths": paths,
        "components": {
            "schemas": {**definitions, "Error": _ERROR, "FlatError": _FLAT_ERROR},
            "securitySchemes": security if keys else {},
        },
    }


def _operation(path: str, kind: type[Body] | None) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {}}
    if kind is not None and "stream" in kind.model_fields:
        content["text/event-stream"] = {}
    elif path == "/metrics":
        content = {CONTENT_TYPE: {}}
    elif path == "/" or path.startswith("/page/"):
        content = {"*/*": {}}
    elif path.endswith("/generate_stream"):
        content = {"text/event-stream": {}}
    elif path.endswith("/infer"):
        content["application/octet-stream"] = {}
    shape = "FlatError" if path == "/v2" or path.startswith("/v2/") else "Error"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    operation: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "An error, of at most 16 KiB.", "content": error},
        }
    }
    if names := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    schema: dict[str, Any] | None = None
    if kind is not None:
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    elif path.endswith(("/generate", "/generate_stream")):
        schema = _GENERATE
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _close(
    definitions: dict[str, Any], kind: type[BaseModel], harmless: dict[str, tuple[Any, ...]], no_effect: frozenset[str]
) -> None:
    """Write into the schema of `kind` which of the fields that it does not have are taken, and with what values."""
    if (schema := definitions.get(kind.__name__)) is None:
        return
    schema["additionalProperties"] = False
    for name, values in harmless.items():
        schema["properties"].setdefault(name, {"enum": [None, *values]})
    for name in no_effect:
        schema["properties"].setdefault(name, {})
