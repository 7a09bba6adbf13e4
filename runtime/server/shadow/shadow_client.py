"""Requests that the router itself sends to a model. They have no header and no key of a client."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
from starlette.requests import Request

from llmkit.common.errors import LlmkitError
from llmkit.runtime.server.router.model_pool import ModelPool
from llmkit.runtime.server.tiers.tier import Tier, TierDownError, TierRequest

_MAX_RESPONSE_BYTES = 32 * 1024 * 1024
_TIMEOUT_S = 600.0
# Lower values are served first, and a client's request has 0.
_LOCAL_PRIORITY = 1_000_000


class ShadowFailedError(Exception):
    """A model gave no usable response. The text says why and has nothing of the request."""


class ShadowClient:
    """Sends requests to one model, local or at a URL."""

    def __init__(self, tier: Tier, pool: ModelPool, router_key: str | None) -> None:
        """router_key: which the servers of local models accept; None: they need none."""
        self.name = tier.name
        self._tier = tier
        self._pool = pool
        self._is_local = tier.name in pool.models
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        if self._is_local and router_key is not None:
            headers.append((b"authorization", b"Bearer " + router_key.encode()))
        self._request = Request({"type": "http", "method": "POST", "headers": headers})

    def _check_place(self) -> None:
        """Raises ShadowFailedError if a request would unload another model."""
        if self._is_local and not self._pool.has_place(self._pool.models[self.name]):
            raise ShadowFailedError("the model is not loaded and has no place")

    async def load(self) -> None:
        """Load a local model, so that its load is not a part of a request's time.

        Raises ShadowFailedError.
        """
        self._check_place()
        if self._is_local:
            try:
                async with self._pool.acquire(self._pool.models[self.name]):
                    pass
            except LlmkitError as error:
                raise ShadowFailedError("the model could not be loaded") from error

    async def generate(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The response of a path that generates tokens.

        On a local model it yields to clients' requests. Raises ShadowFailedError.
        """
        priority = {"priority": _LOCAL_PRIORITY} if self._is_local else {}
        return await self.post(path, {**body, **priority})

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The body of a response with status 200. Raises ShadowFailedError."""
        self._check_place()
        asked = TierRequest(self._request, path, dict(body), stream=False)
        try:
            async with asyncio.timeout(_TIMEOUT_S), self._tier.open(asked) as opened:
                content = bytearray()
                async for chunk in opened.answer.chunks:
                    content += chunk
                    if len(content) > _MAX_RESPONSE_BYTES:
                        raise ShadowFailedError(f"the response of {path} is too large")
                if opened.answer.status != 200:
                    raise ShadowFailedError(f"HTTP {opened.answer.status} of {path}")
                return bytes(content)
        except TierDownError as down:
            raise ShadowFailedError(str(down)) from down
        except TimeoutError as error:
            raise ShadowFailedError(f"no response in {_TIMEOUT_S:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ShadowFailedError(type(error).__name__) from error
