"""A replica on Ray: a server of its own on its node, whose answers it hands on as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

import aiohttp
from ray.serve.exceptions import RayServeException

from llmkit.deploy.front import HOP_HEADERS, Head
from llmkit.deploy.replica_metrics import INTERVAL_S, Metrics
from llmkit.runtime.child import Child
from llmkit.runtime.server.options import ServeOptions


class Replica:
    """The Serve deployment of a checkpoint. Ray gives it a node, cores and GPUs; the server does the batching."""

    async def __init__(self, options: ServeOptions) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the server and wait until it is ready. Raises its LlmkitError."""
        self._child = Child(replace(options, open_metrics=True))  # the front asks for the key
        await asyncio.wrap_future(self._child.ready)
        self._session = aiohttp.ClientSession(
            self._child.url,
            connector=aiohttp.UnixConnector(path=str(self._child.unix), limit=0),
            timeout=aiohttp.ClientTimeout(),
        )
        self._reporting = asyncio.create_task(self._report())

    async def answer(
        self, method: str, url: str, headers: list[tuple[str, str]], body: bytes, *, prefixes: list[int]
    ) -> AsyncGenerator[Head | bytes]:
        """The server's answer: its Head, then its body, a stream's in the parts in which it comes.

        prefixes: what PrefixRouter chose this replica by.
        """
        async with self._session.request(method, url, headers=headers, data=body) as response:
            kept = [(name, value) for name, value in response.headers.items() if name.lower() not in HOP_HEADERS]
            if response.content_type == "text/event-stream":
                yield Head(response.status, kept)
                async for part in response.content.iter_any():
                    yield part
            else:
                whole = await response.read()  # an answer that is cut off can then be asked for again
                yield Head(response.status, kept)
                yield whole

    async def _report(self) -> None:
        metrics = Metrics()
        while not self._child.gone.done():
            with suppress(aiohttp.ClientError):  # the next time, then
                async with self._session.get("/metrics") as response:
                    metrics.take(await response.text())
            await asyncio.sleep(INTERVAL_S)

    async def pid(self) -> int:
        """Of the server."""
        return self._child.pid

    async def check_health(self) -> None:
        """Serve asks for this now and then, and puts another in the place of a replica that fails."""
        if self._child.gone.done():
            raise RayServeException(f"the server of this replica has ended: {self._child.gone.result()}")

    def __del__(self) -> None:
        self._child.stop()
