"""The OpenAPI document of the server's routes, from the schemas that check the requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from llmkit.common.version import version
from llmkit.runtime.server.engine_change_routes import ReloadRequest
from llmkit.runtime.server.http.assets import PAGE_PATHS
from llmkit.runtime.server.http.http_errors import TGI_PATHS, is_inference_protocol, is_ollama
from llmkit.runtime.server.http.security_middleware import needs_no_key
from llmkit.runtime.server.kserve.kserve_request import InferRequest
from llmkit.runtime.server.lora_adapters import LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from llmkit.runtime.server.ollama.ollama_request import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from llmkit.runtime.server.responses.response_builder import JSON_LINES, SERVER_SENT_EVENTS
from llmkit.runtime.server.sagemaker.invocations import INVOCATIONS, ROUTES_BY_FIELD
from llmkit.runtime.server.sagemaker.multi_model_routes import (
    INVOKE_MODEL,
    MODELS,
    LoadModelRequest,
)
from llmkit.runtime.server.schemas.base_request import BaseRequest
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest
from llmkit.runtime.server.schemas.ignored_fields import HEADER as IGNORED_FIELDS_HEADER
from llmkit.runtime.server.schemas.ignored_fields import MAX_HEADER_CHARS
from llmkit.runtime.server.schemas.messages_request import CountTokensRequest, MessagesRequest
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.schemas.score_request import (
    ClassifyRequest,
    RerankRequest,
    ScoreRequest,
)
from llmkit.runtime.server.schemas.tokenize_request import DetokenizeRequest, TokenizeRequest
from llmkit.runtime.server.server_metrics import CONTENT_TYPE
from llmkit.runtime.server.tgi.tgi_request import (
    TgiCompatRequest,
    TgiGenerateRequest,
    TgiStreamRequest,
)

REQUEST_SCHEMAS: dict[str, type[BaseRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/reload": ReloadRequest,
    "/v1/load_lora_adapter": LoadLoraAdapterRequest,
    "/v1/unload_lora_adapter": UnloadLoraAdapterRequest,
    "/score": ScoreRequest,
    "/v1/score": ScoreRequest,
    "/rerank": RerankRequest,
    "/v1/rerank": RerankRequest,
    "/v2/rerank": RerankRequest,
    "/classify": ClassifyRequest,
    "/api/chat": OllamaChatRequest,
    "/api/generate": OllamaGenerateRequest,
    "/api/embed": OllamaEmbedRequest,
    "/api/embeddings": OllamaEmbeddingsRequest,
    "/api/show": OllamaShowRequest,
    "/generate": TgiGenerateRequest,
    "/generate_stream": TgiStreamRequest,
    "/": TgiCompatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    MODELS: LoadModelRequest,
    "/v2/models/{name}/infer": InferRequest,
    "/v2/models/{name}/versions/{version}/infer": InferRequest,
}
# A body is a request of another route.
_INVOCATIONS = frozenset({INVOCATIONS, INVOKE_MODEL.replace(":path", "")})
_REF_PREFIX = "#/components/schemas/"
# Schema names in the document are an interface, because clients are generated from them. So a class
# that is renamed keeps its name in the document.
_SCHEMA_NAMES = {
    "ChatCompletionRequest": "ChatBody",
    "ChatMessage": "Message",
    "CompletionRequest": "CompletionBody",
    "CountTokensRequest": "CountBody",
    "DetokenizeRequest": "DetokenizeBody",
    "EmbeddingRequest": "EmbeddingsBody",
    "FunctionDefinition": "Function",
    "InferRequest": "InferBody",
    "LoadLoraAdapterRequest": "LoadBody",
    "LoadModelRequest": "LoadModelBody",
    "MessageParam": "Turn",
    "MessagesRequest": "MessagesBody",
    "MessagesToolChoice": "MessagesChoice",
    "ResponsesRequest": "ResponsesBody",
    "TokenizeRequest": "TokenizeBody",
    "UnloadLoraAdapterRequest": "UnloadBody",
}
_ERROR_FIELDS: dict[str, Any] = {
    "message": {"type": "string"},
    "type": {"type": "string"},
    "param": {"type": ["string", "null"], "description": "The field at fault."},
    "code": {"type": ["string", "null"], "description": "What a program can test for."},
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error", "description": "Of /v1/messages only."},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": _ERROR_FIELDS,
        },
    },
}
# The body of /v2's generate routes. Other fields of a completion may stand beside `text_input` or
# in `parameters`.
_GENERATE = {
    "type": "object",
    "required": ["text_input"],
    "properties": {
        "text_input": {"type": "string", "minLength": 1},
        "parameters": {"type": ["object", "null"]},
    },
}


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": description,
        "schema": schema,
    }


# Query parameters by path. The others have none.
_QUERY_PARAMETERS = {
    "/v1/responses/{response_id}": [
        _query("stream", "true: the events of a background response.", {"type": "boolean"}),
        _query(
            "starting_after",
            "With stream: the number of the event after which they begin.",
            {"type": "integer"},
        ),
    ],
    "/v1/responses/{response_id}/input_items": [
        _query("limit", "Items of a page.", {"type": "integer", "minimum": 1, "maximum": 100}),
        _query("order", "asc, or desc: the last item first.", {"enum": ["asc", "desc"]}),
        _query("after", "The item before the page.", {"type": "string"}),
    ],
    "/tokenizer_info": [
        {
            "name": "model",
            "in": "query",
            "required": False,
            "description": "The model's name; it may be left out where one model is served.",
            "schema": {"type": "string"},
        }
    ],
}
# Errors of /v2, /api (Ollama's) and TGI's routes.
_FLAT_ERROR = {
    "type": "object",
    "required": ["error", "type", "param", "code"],
    "properties": _ERROR_FIELDS
    | {
        "error": {"type": "string"},
        "error_type": {"type": "string", "description": "Of TGI's routes only."},
    },
}


# Of responses to requests that may have unknown fields.
_IGNORED_FIELDS = {
    "description": "The request's fields that had no effect, separated by commas.",
    "schema": {"type": "string", "maxLength": MAX_HEADER_CHARS},
}


def openapi(routes: Iterable[Any], needs_key: bool, strict_fields: bool = False) -> dict[str, Any]:
    """Return the document of `routes`, without those that are not an APIRoute.

    needs_key: whether requests need an API key, unless `needs_no_key`. strict_fields: whether
    unknown fields of a request are refused.
    """
    api_routes = [route for route in routes if isinstance(route, APIRoute)]
    request_schemas = {
        route.path_format: REQUEST_SCHEMAS[route.path_format]
        for route in api_routes
        if route.path_format in REQUEST_SCHEMAS
    }
    _, schemas = models_json_schema(
        [(schema, "validation") for schema in request_schemas.values()],
        ref_template=_REF_PREFIX + "{model}",
    )
    definitions = schemas.get("$defs", {})
    if strict_fields:
        for definition in definitions.values():
            definition["additionalProperties"] = False
    definitions = _with_schema_names(definitions)
    paths: dict[str, dict[str, Any]] = {}
    for route in api_routes:
        path = route.path_format
        for method in route.methods or ():
            operation = _operation(method, path, request_schemas.get(path))
            if needs_key and not needs_no_key(method, path):
                operation["security"] = [{"bearer": []}, {"key": []}]
            paths.setdefault(path, {})[method.lower()] = operation
    security_schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmkit serve", "version": version()},
        "paths": paths,
        "components": {
            "schemas": {**definitions, "Error": _ERROR, "FlatError": _FLAT_ERROR},
            "securitySchemes": security_schemes if needs_key else {},
        },
    }


def _operation(method: str, path: str, request_schema: type[BaseRequest] | None) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {}}
    if method == "GET":
        request_schema = None
    if request_schema is not None and "stream" in request_schema.model_fields:
        form = JSON_LINES if is_ollama(path) else SERVER_SENT_EVENTS
        content[form.media_type] = {}
    elif path == "/metrics":
        content = {CONTENT_TYPE: {}}
    elif path in PAGE_PATHS and method == "GET":
        content = {"*/*": {}}
    elif path in _INVOCATIONS:
        content[SERVER_SENT_EVENTS.media_type] = {}
    elif path.endswith("/generate_stream"):
        content = {"text/event-stream": {}}
    elif path.endswith("/infer"):
        content["application/octet-stream"] = {}
    is_flat = is_inference_protocol(path) or is_ollama(path) or path in TGI_PATHS
    error_schema = "FlatError" if is_flat else "Error"
    error_content = {"application/json": {"schema": {"$ref": _REF_PREFIX + error_schema}}}
    operation: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "An error, of at most 16 KiB.", "content": error_content},
        }
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    parameters += _QUERY_PARAMETERS.get(path, [])
    if parameters:
        operation["parameters"] = parameters
    schema: dict[str, Any] | None = None
    if request_schema is not None:
        if request_schema.model_config.get("extra") == "allow":
            operation["responses"]["200"]["headers"] = {IGNORED_FIELDS_HEADER: _IGNORED_FIELDS}
        schema = {"$ref": _REF_PREFIX + _schema_name(request_schema.__name__)}
    elif is_inference_protocol(path) and path.endswith(("/generate", "/generate_stream")):
        schema = _GENERATE
    elif path in _INVOCATIONS:
        invoked = dict.fromkeys(REQUEST_SCHEMAS[route].__name__ for _, route in ROUTES_BY_FIELD)
        references = [{"$ref": _REF_PREFIX + _schema_name(name)} for name in invoked]
        schema = {"anyOf": references}
    if schema is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _schema_name(class_name: str) -> str:
    """Return the document's name of the schema of a class."""
    return _SCHEMA_NAMES.get(class_name, class_name)


def _with_schema_names(definitions: dict[str, Any]) -> dict[str, Any]:
    """Return pydantic's `definitions` with the document's names, sorted by name."""
    renamed: dict[str, Any] = {}
    for class_name, schema in definitions.items():
        schema = _with_renamed_refs(schema)
        if schema.get("title") == class_name:
            schema["title"] = _schema_name(class_name)
        renamed[_schema_name(class_name)] = schema
    return dict(sorted(renamed.items()))


def _with_renamed_refs(value: Any) -> Any:
    """Return a copy of a JSON value in which every "$ref" has the document's name of its schema."""
    if isinstance(value, list):
        return [_with_renamed_refs(item) for item in value]
    if not isinstance(value, dict):
        return value
    copy = {key: _with_renamed_refs(item) for key, item in value.items()}
    if isinstance(copy.get("$ref"), str):
        copy["$ref"] = _REF_PREFIX + _schema_name(copy["$ref"].removeprefix(_REF_PREFIX))
    return copy
