"""A tier: what a route can ask for an answer. This file has the interface and the local tier."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import msgspec
from starlette.requests import Request

from llmkit.common.errors import LlmkitError
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.router.background_work import has_background_work, starts_background
from llmkit.runtime.server.router.client_stream import UpstreamAnswer
from llmkit.runtime.server.router.forward import not_loaded, server_ended, upstream_request
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.tiers.confidence import CONFIDENCE_HEADER, GATE_HEADER, Confidence
from llmkit.runtime.server.tiers.uncertainty import Uncertainty

_NOT_READY = 503


@dataclass(frozen=True)
class TierRequest:
    """What a tier is asked. Its own model name takes the place of the body's."""

    client: Request  # whose headers and key count
    path: str  # with the query
    body: dict[str, Any]
    stream: bool
    gate: Uncertainty | None = None  # when the answer is given up; None: never


@dataclass(frozen=True)
class TierAnswer:
    """The response of a tier. Nothing of it may be forwarded if the tier is not sure."""

    answer: UpstreamAnswer
    confidence: Confidence | None = None  # None: the request has no gate

    @property
    def is_sure(self) -> bool:
        """Whether the answer stands."""
        return self.confidence is None or self.confidence.is_sure


class TierDownError(Exception):
    """A tier cannot answer now; another one may. `error` is for a client that gets no other."""

    def __init__(self, error: ApiError) -> None:
        self.error = error
        super().__init__(error.message)


class Tier(Protocol):
    """A model that a route can ask."""

    name: str

    def open(self, request: TierRequest) -> AbstractAsyncContextManager[TierAnswer]:
        """The response to `request`; leaving the context cancels what is left of it.

        Raises TierDownError before it yields.
        """
        ...


class LocalTier:
    """A model of this server's pool; it is loaded when a request needs it."""

    def __init__(self, pool: ModelPool, model: PooledModel) -> None:
        self.name = model.name
        self._pool = pool
        self._model = model

    @contextlib.asynccontextmanager
    async def open(self, request: TierRequest) -> AsyncIterator[TierAnswer]:
        """See `Tier.open`."""
        async with contextlib.AsyncExitStack() as stack:
            response = await self._open_twice(stack, request)
            if response.status == _NOT_READY:
                raise TierDownError(await _error_of(response))
            path = request.path.partition("?")[0]
            if response.status == 200 and starts_background(path, request.body):
                self._pool.keep_loaded(self._model, has_background_work)
            yield TierAnswer(_without_confidence(response), _confidence(response))

    async def _open_twice(
        self, stack: contextlib.AsyncExitStack, request: TierRequest
    ) -> aiohttp.ClientResponse:
        """Open the response; once more if the server has ended and the pool has not noticed."""
        data = encode_body(request.body, self.name)
        orders = []
        if request.gate is not None:
            orders.append((GATE_HEADER, request.gate.model_dump_json()))
        for is_last in (False, True):
            attempt = contextlib.AsyncExitStack()
            server = None
            try:
                server = await attempt.enter_async_context(self._pool.acquire(self._model))
                response = await attempt.enter_async_context(
                    upstream_request(server, request.client, request.path, data, orders)
                )
            except LlmkitError as error:
                await attempt.aclose()
                raise TierDownError(not_loaded(self.name, error)) from error
            except (aiohttp.ClientError, OSError) as error:
                await attempt.aclose()
                if is_last:
                    raise TierDownError(server_ended(self.name, error)) from error
                await self._pool.wait_until_removed(self._model, server)
            except BaseException:
                await attempt.aclose()
                raise
            else:
                stack.push_async_exit(attempt)
                return response
        raise AssertionError("the second attempt has returned or raised")


def encode_body(body: dict[str, Any], model: str) -> bytes:
    """A request's body with another model's name. Numbers of any size stay as they are."""
    return json.dumps({**body, "model": model}).encode()


def _confidence(response: aiohttp.ClientResponse) -> Confidence | None:
    header = response.headers.get(CONFIDENCE_HEADER)
    return None if header is None else msgspec.json.decode(header, type=Confidence)


def _without_confidence(response: aiohttp.ClientResponse) -> UpstreamAnswer:
    answer = UpstreamAnswer.of(response)
    answer.headers = [pair for pair in answer.headers if pair[0] != CONFIDENCE_HEADER.encode()]
    return answer


async def _error_of(response: aiohttp.ClientResponse) -> ApiError:
    """The error of a model's server as an ApiError, with its own text and code."""
    content = await response.read()
    error: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        error = json.loads(content).get("error", {})
    if not isinstance(error, dict):
        error = {"message": error}
    message = str(error.get("message") or "The model's server is not ready.")
    retry = response.headers.get("retry-after", "1")
    code = str(error.get("code") or "not_ready")
    return ApiError(response.status, message, code=code, headers={"retry-after": retry})
