"""Errors of the HTTP interface: one exception, one envelope, one table of types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

MAX_MESSAGE_CHARS = 2000  # an envelope stays far below 16 KiB whatever was sent
MAX_PARAM_CHARS = 200

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An answer other than 200. `param` is the field at fault, `code` what a program can test for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}
        super().__init__(message)

    def envelope(self, anthropic: bool = False) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`, as OpenAI writes it; Anthropic has a `type` beside."""
        types = _TYPES | _ANTHROPIC_TYPES if anthropic else _TYPES
        error = {
            "message": _shorten(self.message, MAX_MESSAGE_CHARS),
            "type": types.get(self.status, "invalid_request_error"),
            "param": None if self.param is None else _shorten(self.param, MAX_PARAM_CHARS),
            "code": self.code,
        }
        return {"type": "error", "error": error} if anthropic else {"error": error}

    def flat(self) -> dict[str, Any]:
        """The same as the Open Inference Protocol has it: `error` is the message, the rest lies beside it."""
        error: dict[str, Any] = self.envelope()["error"]
        return {"error": error.pop("message"), **error}

    def body(self, path: str = "") -> bytes:
        """The envelope as JSON, for a request to `path`."""
        if path == "/v2" or path.startswith("/v2/"):
            return msgspec.json.encode(self.flat())
        return msgspec.json.encode(self.envelope(path == "/v1/messages" or path.startswith("/v1/messages/")))


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 for the field `param`."""
    return ApiError(400, message, code=code, param=param)


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """The 404 for a model that is none of `known`."""
    message = f"The model {name!r} does not exist; this server has {', '.join(map(repr, known))}."
    return ApiError(404, message, code="model_not_found", param="model")


def _shorten(text: str, limit: int) -> str:
    # A lone surrogate (from a path or header) would make the JSON encoder fail.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"
