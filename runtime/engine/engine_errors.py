"""Errors of the engine."""

from __future__ import annotations

from llmkit.common.errors import LlmkitError


class RequestError(LlmkitError):
    """A request that the engine cannot serve. `code` and `param` are those of the OpenAI API."""

    exit_code = 3

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
