"""Reading a request's body within limits of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.requests import ClientDisconnect, Request

from llmkit.runtime.server.http.http_errors import ApiError

_JSON = "application/json"
# A client that is still sending does not read a 413. Therefore up to this many times the limit is
# read and dropped before the response.
_DISCARD_FACTOR = 4


async def read_json_body(
    request: Request,
    max_bytes: int,
    timeout_s: float,
    media_types: Collection[str] = (_JSON,),
) -> bytes:
    """Return the body of `request`.

    Raises ApiError 415 if the content type is none of `media_types`, 413 if the body has more than
    `max_bytes`, 408 if it does not arrive within `timeout_s`, and 400 if the client disconnects.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() not in media_types:
        raise ApiError(
            415,
            f"The content type is {content_type or 'missing'!r}; send application/json.",
            code="content_type",
        )
    max_read_bytes = max_bytes * _DISCARD_FACTOR
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared.lstrip("0") or 0) > max_read_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    num_received = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                num_received += len(chunk)
                if num_received <= max_bytes:
                    body += chunk
                elif num_received > max_read_bytes:
                    break
    except TimeoutError:
        message = f"The body did not arrive within {timeout_s:g} s."
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "The client closed the connection.", code="disconnected") from None
    if num_received > max_bytes:
        raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    message = f"The body is larger than the limit of {max_bytes} bytes."
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})
