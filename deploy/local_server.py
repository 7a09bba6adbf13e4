"""A server beside a platform's own Python library, as RunPod's workers and Replicate's models have.

The library owns the container's process, its port and its queue. It calls a function for each job,
and the function sends the job to `llmkit serve` on a Unix socket.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from llmkit.common.sse import EventParser
from llmkit.deploy.container_server import ContainerServer
from llmkit.deploy.local_request import LocalRequest, RequestError
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_client import Server, open_session

_DONE = "[DONE]"


class LocalServer(ContainerServer):
    """A server on a Unix socket, and the requests to it.

    Its key is known here only: the platform has checked who sends a job.
    """

    def __init__(self, options: ServeOptions) -> None:
        super().__init__(options, key=secrets.token_hex(16), tcp=False)
        self._server = Server(process=self._process)

    async def parts(self, request: LocalRequest) -> AsyncGenerator[str | dict[str, Any]]:
        """The response: whole server-sent events as text, as they arrive, or one JSON document.

        Raises RequestError, also when the server is lost.
        """
        async with self._open(request) as response:
            if response.content_type == "application/json":
                yield await response.json()
                return
            if response.content_type != "text/event-stream":
                raise RequestError(400, _error(f"{request.path} answers no JSON"))
            held = b""
            async for read in response.content.iter_any():
                # A read may end inside an event, even inside a character.
                events, blank_line, held = (held + read).rpartition(b"\n\n")
                if blank_line:
                    yield (events + blank_line).decode()

    async def texts(self, request: LocalRequest) -> AsyncGenerator[str]:
        """The text of a streamed chat, as it arrives. Raises RequestError."""
        parser = EventParser()
        async with self._open(request) as response:
            async for read in response.content.iter_any():
                for data in parser.feed(read):
                    if data == _DONE:
                        return
                    document = json.loads(data)
                    if "error" in document:  # after the stream began
                        raise RequestError(500, document)
                    for choice in document["choices"]:
                        text = choice["delta"].get("content")
                        if text:
                            yield text

    def iter_texts(self, request: LocalRequest) -> Iterator[str]:
        """The same as `texts`, for a caller without an event loop."""
        texts = self.texts(request)

        async def next_text() -> str | None:
            return await anext(texts, None)

        with asyncio.Runner() as runner:
            try:
                while (text := runner.run(next_text())) is not None:
                    yield text
            finally:
                runner.run(texts.aclose())

    @asynccontextmanager
    async def _open(self, request: LocalRequest) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request. The server drops it when the context ends early."""
        url = self._server.base_url + request.path
        try:
            async with (
                open_session(self._server) as session,
                session.request(request.method, url, json=request.body) as response,
            ):
                if response.status >= 400:
                    raise RequestError(response.status, await response.json(content_type=None))
                yield response
        except aiohttp.ClientError as error:
            lost = _error(f"the server of this container was lost ({error})", "server_error")
            raise RequestError(502, lost) from error


def _error(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error document, as the OpenAI API has it."""
    return {"error": {"message": message, "type": kind}}
