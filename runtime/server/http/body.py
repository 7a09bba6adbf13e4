"""Reading a request's body within limits of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.requests import ClientDisconnect, Request

from llmkit.runtime.server.http.errors import ApiError

_JSON = "application/json"
_DISCARD_FACTOR = 4  # a client that is still sending does not read its 413, so a bounded rest is read and dropped


async def read_json_body(
    request: Request, limit_bytes: int, timeout_s: float, kinds: Collection[str] = (_JSON,)
) -> bytes:
    """The body. ApiError 415 unless its declared type is one of `kinds`, 413 over the limit, 408 when it is slow."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() not in kinds:
        raise ApiError(415, f"The content type is {kind or 'missing'!r}; send application/json.", code="content_type")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared.lstrip("0") or 0) > limit_bytes * _DISCARD_FACTOR:
        raise _too_large(limit_bytes)
    body = bytearray()
    received = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                received += len(chunk)
                if received <= limit_bytes:
                    body += chunk
                elif received > limit_bytes * _DISCARD_FACTOR:
                    break
    except TimeoutError:
        message = f"The body did not arrive within {timeout_s:g} s."
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "The client closed the connection.", code="disconnected") from None
    if received > limit_bytes:
        raise _too_large(limit_bytes)
    return bytes(body)


def _too_large(limit_bytes: int) -> ApiError:
    message = f"The body is larger than the limit of {limit_bytes} bytes."
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})
