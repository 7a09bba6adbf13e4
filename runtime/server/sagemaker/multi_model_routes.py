"""The contract of SageMaker's multi-model endpoints: it says which models are loaded.

SageMaker copies a model to this machine, then names its folder here. It unloads models when a load
is answered with 507.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import Field

from llmkit.common.errors import InputError, LlmkitError, ShortageError
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.sagemaker.invocations import invoke, read_body
from llmkit.runtime.server.schemas.base_request import BaseRequest, parse_request
from llmkit.runtime.server.serve_options import ServeOptions

MODELS = "/models"
MODEL = "/models/{name:path}"
INVOKE_MODEL = "/models/{name:path}/invoke"


class LoadModelRequest(BaseRequest):
    """POST /models."""

    model: Annotated[str, Field(max_length=0)] = ""  # its name is model_name
    model_name: Annotated[str, Field(min_length=1, max_length=1024)]
    url: Annotated[str, Field(min_length=1, max_length=4096)]  # a folder on this machine


class MultiModelRoutes:
    """One method per route."""

    def __init__(
        self,
        app: FastAPI,
        options: ServeOptions,
        pool: ModelPool,
        new_model: Callable[[str, str], PooledModel],
    ) -> None:
        """Load models from the folder `options.model`. new_model: of a name and a folder."""
        self._app = app
        self._options = options
        self._pool = pool
        self._new_model = new_model
        self._folder = Path(options.model).resolve()

    def add_to_app(self) -> None:
        """Add the routes."""
        for path, method, endpoint in (
            (MODELS, "POST", self.load),
            (MODELS, "GET", self.models),
            (INVOKE_MODEL, "POST", self.invoke),
            (MODEL, "GET", self.model),
            (MODEL, "DELETE", self.unload),
        ):
            self._app.add_api_route(path, endpoint, methods=[method], response_model=None)

    async def load(self, request: Request) -> Response:
        """Load the model in the folder `url`, and serve it as `model_name`."""
        body = parse_request(LoadModelRequest, await read_body(request, self._options), False)
        name = body.model_name
        if name in self._pool.models:
            message = f"The model {name!r} is loaded already, or is being loaded."
            raise ApiError(409, message, code="already_exists", param="model_name")
        model = self._new_model(name, self._resolve(body.url))
        try:
            await self._pool.add(model)
        except LlmkitError as error:
            raise _load_error(name, error) from None
        return _json_response(_entry(model))

    async def unload(self, name: str) -> Response:
        """Refuse new requests for a model, and unload it after its running requests."""
        model = self._find(name)
        await self._pool.remove(model, self._options.drain_timeout)
        return _json_response(_entry(model))

    async def models(self) -> Response:
        entries = [_entry(model) for model in self._pool.models.values()]
        return _json_response({"models": entries})

    async def model(self, name: str) -> Response:
        return _json_response(_entry(self._find(name)))

    async def invoke(self, request: Request, name: str) -> Response:
        """Answer a request of any route by the model `name`."""
        self._find(name)
        return invoke(self._app, request, await read_body(request, self._options), name)

    def _find(self, name: str) -> PooledModel:
        model = self._pool.models.get(name)
        if model is None:
            message = f"The model {name!r} is not loaded."
            raise ApiError(404, message, code="model_not_found", param="model_name")
        return model

    def _resolve(self, url: str) -> str:
        """Return the path of a model's folder.

        Raises the same ApiError 400 for every path that is not a folder within the folder of
        models, so that clients learn nothing about other files.
        """
        try:
            path = (self._folder / url).resolve()
            if self._folder in path.parents and path.is_dir():
                return str(path)
        except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
            pass
        message = f"There is no such folder in {self._folder}, from which models are loaded."
        raise invalid("url", message, "model_not_found")


def _load_error(name: str, error: LlmkitError) -> ApiError:
    """The error for a model that could not be loaded. 507 makes SageMaker unload others."""
    message = f"The model {name!r} could not be loaded: {error}"
    if isinstance(error, ShortageError):
        return ApiError(507, message, code="insufficient_memory")
    if isinstance(error, InputError):
        return ApiError(400, message, code="invalid_model", param="url")
    return ApiError(500, message, code="model_failed")


def _entry(model: PooledModel) -> dict[str, Any]:
    return {"modelName": model.name, "modelUrl": model.reference}


def _json_response(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
