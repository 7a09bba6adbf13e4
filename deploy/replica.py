"""A replica on Ray: it starts a server on its node and streams the server's responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

import aiohttp
from ray.serve.exceptions import RayServeException

from llmkit.deploy.ingress import HOP_HEADERS, ResponseHead
from llmkit.deploy.replica_metrics import INTERVAL_S, RayMetrics
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_process import ServerProcess


class Replica:
    """The Serve deployment of a checkpoint.

    Ray gives it a node, cores and GPUs. The server batches the requests.
    """

    # Ray Serve awaits it.
    async def __init__(self, options: ServeOptions) -> None:  # type: ignore[misc]
        """Start the server and wait until it is ready. Raises its LlmkitError."""
        # The ingress checks the API key; the metrics are read here without one.
        self._server = ServerProcess(replace(options, open_metrics=True))
        await asyncio.wrap_future(self._server.ready)
        self._session = aiohttp.ClientSession(
            self._server.url,
            connector=aiohttp.UnixConnector(path=str(self._server.socket_path), limit=0),
            timeout=aiohttp.ClientTimeout(),
        )
        self._reporting = asyncio.create_task(self._report())

    async def answer(
        self,
        method: str,
        url: str,
        headers: list[tuple[str, str]],
        body: bytes,
        *,
        prefixes: list[int],
    ) -> AsyncGenerator[ResponseHead | bytes]:
        """The server's response: its ResponseHead, then its body. A stream's body comes in parts.

        prefixes: the hashes that PrefixRouter chose this replica by.
        """
        async with self._session.request(method, url, headers=headers, data=body) as response:
            headers = [
                (name, value)
                for name, value in response.headers.items()
                if name.lower() not in HOP_HEADERS
            ]
            if response.content_type == "text/event-stream":
                yield ResponseHead(response.status, headers)
                async for part in response.content.iter_any():
                    yield part
            else:
                # Read in full first: when the server is lost on the way, another replica can still
                # respond.
                body = await response.read()
                yield ResponseHead(response.status, headers)
                yield body

    async def _report(self) -> None:
        metrics = RayMetrics()
        while not self._server.ended.done():
            # A failure is ignored: the next report follows soon.
            with suppress(aiohttp.ClientError):
                async with self._session.get("/metrics") as response:
                    metrics.update(await response.text())
            await asyncio.sleep(INTERVAL_S)

    async def pid(self) -> int:
        """The server's process id."""
        return self._server.pid

    async def check_health(self) -> None:
        """Called by Serve at intervals; Serve replaces a replica that raises."""
        if self._server.ended.done():
            raise RayServeException(
                f"the server of this replica has ended: {self._server.ended.result()}"
            )

    def __del__(self) -> None:
        self._server.stop()
