"""Errors of the HTTP interface: one exception and its JSON forms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

# These two limits keep every error below 16 KiB, whatever the client sent.
MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 200

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
    507: "server_error",
}
# The routes of TGI (text-generation-inference).
TGI_PATHS = frozenset({"/", "/generate", "/generate_stream"})
_ANTHROPIC_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An HTTP error. `param` is the wrong field; `code` is a stable word for programs.

    `details` are the fields of `error.details` in Anthropic's form, which its clients look at.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        self.status = status
        self.details = details
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}
        super().__init__(message)

    def envelope(self, anthropic: bool = False) -> dict[str, Any]:
        """Return OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

        Anthropic's form also has a `type` beside `error`.
        """
        types = _TYPES | _ANTHROPIC_TYPES if anthropic else _TYPES
        error: dict[str, Any] = {
            "message": _shorten(self.message, MAX_MESSAGE_CHARS),
            "type": types.get(self.status, "invalid_request_error"),
            "param": None if self.param is None else _shorten(self.param, MAX_PARAM_CHARS),
            "code": self.code,
        }
        if not anthropic:
            return {"error": error}
        if self.details is not None:
            error["details"] = self.details
        return {"type": "error", "error": error}

    def flat_envelope(self) -> dict[str, Any]:
        """Return the form of the Open Inference Protocol and of Ollama.

        `error` is the message; all else stands beside it.
        """
        error: dict[str, Any] = self.envelope()["error"]
        return {"error": error.pop("message"), **error}

    def tgi_envelope(self) -> dict[str, Any]:
        """Return TGI's form: the flat one with an `error_type`, which its clients look at."""
        error_type = "generation" if self.status >= 500 else "validation"
        if self.status in (429, 503):
            error_type = "overloaded"
        return {**self.flat_envelope(), "error_type": error_type}

    def body(self, path: str = "") -> bytes:
        """Return the error as JSON, in the form that the API of `path` uses."""
        if path in TGI_PATHS:
            return msgspec.json.encode(self.tgi_envelope())
        if is_inference_protocol(path) or is_ollama(path):
            return msgspec.json.encode(self.flat_envelope())
        return msgspec.json.encode(self.envelope(is_anthropic(path)))


def is_anthropic(path: str) -> bool:
    """Return whether a path belongs to Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def is_ollama(path: str) -> bool:
    """Return whether a path belongs to Ollama's API."""
    return path.startswith("/api/")


def is_inference_protocol(path: str) -> bool:
    """Return whether a path belongs to the Open Inference Protocol. Cohere has one under /v2."""
    return path == "/v2" or (path.startswith("/v2/") and path != "/v2/rerank")


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return a 400 for the field `param`."""
    return ApiError(400, message, code=code, param=param)


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """Return the 404 for a model name that is not in `known`."""
    message = f"The model {name!r} does not exist; this server has {', '.join(map(repr, known))}."
    return ApiError(404, message, code="model_not_found", param="model")


def _shorten(text: str, limit: int) -> str:
    # A lone surrogate (from a path or header) would make the JSON encoder fail.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"
