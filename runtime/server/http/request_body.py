"""Reading a request's body within limits of size and time."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Collection
from typing import Protocol

from starlette.requests import ClientDisconnect, Request

from llmkit.runtime.server.http.http_errors import ApiError

JSON_MEDIA_TYPE = "application/json"
_GZIP_WINDOW_BITS = 31  # zlib's: gzip's header and checksum
_PIECE_BYTES = 64 * 1024  # the most that is decoded at a time


async def read_json_body(
    request: Request,
    max_bytes: int,
    timeout_s: float,
    media_types: Collection[str] = (JSON_MEDIA_TYPE,),
) -> bytes:
    """Return the body of `request`, decoded if its content encoding is gzip.

    The header Content-Encoding is removed from the request's scope then, because what is forwarded
    is the decoded body.

    Raises ApiError 415 if the content type is none of `media_types` or the encoding is another one,
    413 if the body has more than `max_bytes`, as sent or decoded, 408 if it does not arrive within
    `timeout_s`, and 400 if it is not gzip or if the client disconnects.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() not in media_types:
        raise ApiError(
            415,
            f"The content type is {content_type or 'missing'!r}; send application/json.",
            code="content_type",
        )
    decoder = _decoder(request, max_bytes)
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared.lstrip("0") or 0) > max_bytes:
        raise _too_large(max_bytes)
    num_received = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                num_received += len(chunk)
                if num_received > max_bytes:
                    raise _too_large(max_bytes)
                decoder.feed(chunk)
    except TimeoutError:
        message = f"The body did not arrive within {timeout_s:g} s."
        raise ApiError(408, message, code="body_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client closed the connection.", code="disconnected") from None
    return decoder.finish()


class _Decoder(Protocol):
    """Collects a body."""

    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> bytes: ...


class _Plain:
    def __init__(self) -> None:
        self._body = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._body += chunk

    def finish(self) -> bytes:
        return bytes(self._body)


class _Gzip:
    """Decodes gzip in pieces, so that a small body that decodes to a huge one is noticed early."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._body = bytearray()
        self._decompressor = zlib.decompressobj(_GZIP_WINDOW_BITS)

    def feed(self, chunk: bytes) -> None:
        decompressor = self._decompressor
        try:
            while not decompressor.eof:
                piece = decompressor.decompress(chunk, _PIECE_BYTES)
                self._body += piece
                if len(self._body) > self._max_bytes:
                    raise _too_large(self._max_bytes, "decoded ")
                chunk = decompressor.unconsumed_tail
                # A full piece: the decompressor may hold more than it has returned.
                if not chunk and len(piece) < _PIECE_BYTES:
                    return
        except zlib.error as error:
            raise _not_gzip(str(error).rpartition(": ")[2]) from None
        if chunk or decompressor.unused_data:
            raise _not_gzip("data follows its end")

    def finish(self) -> bytes:
        if not self._decompressor.eof:
            raise _not_gzip("it is cut off")
        return bytes(self._body)


def _decoder(request: Request, max_bytes: int) -> _Decoder:
    """Return a decoder for the content encoding of `request`. Raises ApiError 415."""
    encoding = ",".join(request.headers.getlist("content-encoding")).strip().lower()
    if encoding in ("", "identity"):
        return _Plain()
    if encoding not in ("gzip", "x-gzip"):
        raise ApiError(
            415,
            f"The content encoding is {encoding!r}; send the body as it is, or as gzip.",
            code="content_encoding",
            headers={"accept-encoding": "gzip"},
        )
    headers = request.scope["headers"]
    headers[:] = [pair for pair in headers if pair[0] != b"content-encoding"]
    return _Gzip(max_bytes)


def _too_large(max_bytes: int, which: str = "") -> ApiError:
    message = f"The {which}body is larger than the limit of {max_bytes} bytes."
    return ApiError(413, message, code="body_too_large")


def _not_gzip(reason: str) -> ApiError:
    return ApiError(400, f"The body is not valid gzip: {reason}.", code="invalid_gzip")
