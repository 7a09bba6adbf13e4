"""What the router reads of a request's body. The model's server checks all fields."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import ConfigDict

from llmkit.runtime.server.http.http_errors import TGI_PATHS, is_ollama
from llmkit.runtime.server.http.request_body import JSON_MEDIA_TYPE
from llmkit.runtime.server.ollama.model_facts import untagged
from llmkit.runtime.server.ollama.ollama_routes import MEDIA_TYPES
from llmkit.runtime.server.schemas.base_request import BaseRequest


class RoutedRequest(BaseRequest):
    """A request to a path of OpenAI's, Anthropic's or vLLM's API."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    stream: Any = None

    def model_name(self, known: Collection[str]) -> str:
        """The model that is asked for, of the `known` ones; "" if none is named."""
        return self.model


class RoutedOllamaRequest(RoutedRequest):
    """A request of Ollama's API."""

    name: Any = None  # the older name of `model` in /api/show
    keep_alive: Any = None
    messages: Any = None
    prompt: Any = None
    input: Any = None

    def model_name(self, known: Collection[str]) -> str:
        name = self.name if isinstance(self.name, str) and self.name else self.model
        return untagged(name, known)

    @property
    def is_empty(self) -> bool:
        """Whether it only loads or unloads its model."""
        return not (self.messages or self.prompt or self.input)


class RoutedTgiRequest(RoutedRequest):
    """A request of TGI's API, which has no `model`: it is llmkit's, or the adapter's name."""

    parameters: Any = None

    def model_name(self, known: Collection[str]) -> str:
        parameters = self.parameters
        adapter = parameters.get("adapter_id") if isinstance(parameters, dict) else None
        return adapter if isinstance(adapter, str) and adapter else self.model


def routed_schema(path: str) -> type[RoutedRequest]:
    """The schema of a request to `path`."""
    if is_ollama(path):
        return RoutedOllamaRequest
    return RoutedTgiRequest if path in TGI_PATHS else RoutedRequest


def media_types(path: str) -> Collection[str]:
    """The content types that a body for `path` may have."""
    return MEDIA_TYPES if is_ollama(path) else (JSON_MEDIA_TYPE,)
