"""A tier at a URL that the operator chose: another llmkit, vLLM, or any OpenAI-compatible server.

Of the client's request only the body and a few headers leave this server; the client's key does
not, unless the operator wants it. Redirects are refused, and certificates are checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from yarl import URL

from llmkit.common.errors import InputError
from llmkit.common.sse import EventParser
from llmkit.runtime.server.http import request_ids
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.responses.response_builder import STREAM_FORMATS
from llmkit.runtime.server.router.client_stream import UpstreamAnswer
from llmkit.runtime.server.tiers.confidence import Confidence
from llmkit.runtime.server.tiers.route_config import Upstream
from llmkit.runtime.server.tiers.tier import TierAnswer, TierDownError, TierRequest, encode_body
from llmkit.runtime.server.tiers.url_logprobs import (
    LogprobsFilter,
    UrlConfidence,
    num_choices,
    parse_json,
)

# Headers of a client that are sent on, and headers of the response that the client gets.
_SENT_HEADERS = ("accept", "anthropic-version", "anthropic-beta", request_ids.HEADER.decode())
_KEY_HEADERS = ("authorization", "x-api-key")
_RETURNED_HEADERS = frozenset({"content-type", "cache-control", "retry-after", "x-llmkit-ignored"})
_MAX_RESPONSE_BYTES = 64 * 1024 * 1024  # of a response that must be read before it is forwarded
_MAX_HELD_BYTES = 4 * 1024 * 1024  # of a stream that is held back


class UrlTier:
    """A tier at a URL. `close` ends its connections."""

    def __init__(self, name: str, upstream: Upstream) -> None:
        """Raises InputError for a key or certificate that is not there."""
        self.name = name
        self._upstream = upstream
        self._model = upstream.model or name
        self._base = upstream.url.rstrip("/")
        self._key = _read_key(name, upstream)
        self._ssl = _ssl_context(name, upstream)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    @contextlib.asynccontextmanager
    async def open(self, request: TierRequest) -> AsyncIterator[TierAnswer]:
        """See `Tier.open`.

        A gate needs log probabilities: paths and servers without them count as not sure.
        """
        path = request.path.partition("?")[0]
        if request.gate is not None and not LogprobsFilter.supports(path):
            yield _unsure()
            return
        async with contextlib.AsyncExitStack() as stack:
            if request.gate is None:
                response = await self._request(stack, request, request.body)
                yield TierAnswer(_answer(response, response.content.iter_any()))
                return
            logprobs = LogprobsFilter(path, request.body)
            response = await self._request(stack, request, logprobs.body)
            signals = UrlConfidence(
                request.gate, logprobs, num_choices(request.body), request.stream
            )
            if response.status != 200:
                yield TierAnswer(_answer(response, response.content.iter_any()))
            elif response.content_type == "text/event-stream":
                yield await self._gated_stream(response, logprobs, signals)
            else:
                yield await self._gated_full(response, logprobs, signals)

    async def _request(
        self, stack: contextlib.AsyncExitStack, request: TierRequest, body: dict[str, object]
    ) -> aiohttp.ClientResponse:
        """The response, whose status is 200 or that of a wrong request."""
        data = encode_body(body, self._model)
        try:
            response = await stack.enter_async_context(
                self._open_session().post(
                    self._url(request.path),
                    data=data,
                    headers=self._headers(request),
                    allow_redirects=False,
                )
            )
        except TimeoutError as error:
            message = f"The server of {self.name!r} did not answer in time."
            raise TierDownError(ApiError(504, message, code="upstream_timeout")) from error
        except (aiohttp.ClientError, OSError) as error:
            message = f"The server of {self.name!r} cannot be reached ({type(error).__name__})."
            raise TierDownError(ApiError(503, message, code="upstream_down")) from error
        status = response.status
        # The client cannot mend these: a wrong key or model name is the operator's.
        if status in (401, 403, 404, 408, 429) or status >= 500 or 300 <= status < 400:
            message = f"The server of {self.name!r} answered HTTP {status}."
            retry = response.headers.get("retry-after", "")
            headers = {"retry-after": retry} if retry.isdecimal() else {}
            public = status if status in (429, 504) else 503
            raise TierDownError(ApiError(public, message, code="upstream_failed", headers=headers))
        return response

    def _url(self, path: str) -> URL:
        """The address of `path`. A base that has a path other than /v1 takes the place of /v1."""
        if URL(self._base).path in ("/", "/v1") or self._base.endswith("/v1"):
            return URL(self._base.removesuffix("/v1") + path, encoded=True)
        return URL(self._base + path.removeprefix("/v1"), encoded=True)

    def _open_session(self) -> aiohttp.ClientSession:
        """The session, which needs a running event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._ssl),
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=self._upstream.connect_timeout,
                    sock_read=self._upstream.timeout,
                ),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("user-agent",),
                trust_env=False,
            )
        return self._session

    def _headers(self, request: TierRequest) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        given = request.client.headers
        names: tuple[str, ...] = _SENT_HEADERS
        if self._upstream.forward_client_key:
            names += _KEY_HEADERS
        headers |= {name: given[name] for name in names if name in given}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
            if request.path.startswith("/v1/messages"):
                headers["x-api-key"] = self._key
        return headers

    async def _gated_full(
        self, response: aiohttp.ClientResponse, logprobs: LogprobsFilter, signals: UrlConfidence
    ) -> TierAnswer:
        document = parse_json(await self._read(response))
        signals.add(document)
        confidence = signals.result()
        content = json.dumps(logprobs.clean(document)).encode()

        async def chunks() -> AsyncIterator[bytes]:
            yield content

        return TierAnswer(_answer(response, chunks()), confidence)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        try:
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > _MAX_RESPONSE_BYTES:
                    raise self._broken("is too large")
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(f"broke off ({type(error).__name__})") from error
        return bytes(content)

    async def _gated_stream(
        self, response: aiohttp.ClientResponse, logprobs: LogprobsFilter, signals: UrlConfidence
    ) -> TierAnswer:
        """Hold events back until there are enough tokens, then let all flow."""
        events = _events(response)
        held = bytearray()
        try:
            async for data in events:
                held += _clean_event(data, logprobs, signals)
                if signals.is_ready or len(held) > _MAX_HELD_BYTES:
                    break
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(f"broke off ({type(error).__name__})") from error

        async def chunks() -> AsyncIterator[bytes]:
            yield bytes(held)
            async for data in events:
                yield _clean_event(data, logprobs, None)

        return TierAnswer(_answer(response, chunks()), signals.result())

    def _broken(self, what: str) -> TierDownError:
        message = f"The response of {self.name!r} {what}."
        return TierDownError(ApiError(503, message, code="upstream_failed"))


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of each event."""
    parser = EventParser()
    async for read in response.content.iter_any():
        for data in parser.feed(read):
            yield data
    for data in parser.close():
        yield data


def _clean_event(data: str, logprobs: LogprobsFilter, signals: UrlConfidence | None) -> bytes:
    """The event for the client. Its tokens are added to `signals` before."""
    document = parse_json(data)  # "[DONE]" is none
    if isinstance(document, dict):
        if signals is not None:
            signals.add(document)
        cleaned = logprobs.clean(document)
        data = json.dumps(cleaned, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n".encode("utf-8", "replace")


def _answer(response: aiohttp.ClientResponse, chunks: AsyncIterator[bytes]) -> UpstreamAnswer:
    headers = [
        (name.lower().encode(), value.encode("latin-1", "replace"))
        for name, value in response.headers.items()
        if name.lower() in _RETURNED_HEADERS
    ]
    stream_format = STREAM_FORMATS.get(response.content_type)
    return UpstreamAnswer(response.status, headers, stream_format, chunks)


async def _nothing() -> AsyncIterator[bytes]:
    no_chunks: tuple[bytes, ...] = ()
    for chunk in no_chunks:
        yield chunk


def _unsure() -> TierAnswer:
    """An answer that was not asked for, because nothing could tell how sure the tier is of it."""
    return TierAnswer(UpstreamAnswer(409, [], None, _nothing()), Confidence(0.0, 0, 0, False))


def _read_key(name: str, upstream: Upstream) -> str | None:
    """The operator's key. Raises InputError; no message has the key."""
    if upstream.api_key_env is not None:
        key = os.environ.get(upstream.api_key_env, "").strip()
        if not key:
            raise InputError(
                f"the key of the upstream {name!r} is missing: {upstream.api_key_env} is not set"
            )
    elif upstream.api_key_file is not None:
        try:
            lines = Path(upstream.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(
                f"the key file of the upstream {name!r} cannot be read"
                f" ({upstream.api_key_file}: {reason})"
            ) from None
        key = lines[0].strip() if lines else ""
        if not key:
            raise InputError(f"the key file {upstream.api_key_file} is empty")
    else:
        return None
    if not key.isascii() or not key.isprintable():
        raise InputError(f"the key of the upstream {name!r} has characters that no key has")
    return key


def _ssl_context(name: str, upstream: Upstream) -> ssl.SSLContext:
    """A context that checks certificates and host names. Raises InputError for a wrong ca_file."""
    try:
        return ssl.create_default_context(cafile=upstream.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"ca_file of the upstream {name!r} cannot be used"
            f" ({upstream.ca_file}: {getattr(error, 'strerror', None) or error})",
            "A PEM file of certificates was expected",
        ) from None
