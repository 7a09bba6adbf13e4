"""The running servers of this user, with the requests that each of them has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from llmkit.runtime.process_channel import API_KEY_VARIABLE
from llmkit.runtime.server_files import ServerEntry, server_entries

_QUERY_TIMEOUT_S = 2.0
_RUNNING = "llmkit:num_requests_running"
_WAITING = "llmkit:num_requests_waiting"
# The address of a client on the same machine, for a server that listens on all addresses.
_LOOPBACK = {"://0.0.0.0": "://127.0.0.1", "://[::]": "://[::1]"}


@dataclass(frozen=True)
class RunningServer:
    """A server that runs on this machine, and its requests."""

    entry: ServerEntry
    # Requests in the running batch and in the queue; None: the server did not say, for example
    # because it wants another API key.
    running: int | None = None
    waiting: int | None = None

    @property
    def uptime_s(self) -> float:
        """The time since it was ready."""
        return max(0.0, time.time() - self.entry.ready_at)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document. The keys are an interface: programs read them."""
        return {
            "pid": self.entry.pid,
            "url": self.entry.url,
            "models": list(self.entry.models),
            "uptime_s": round(self.uptime_s, 1),
            "requests_running": self.running,
            "requests_waiting": self.waiting,
        }


def running_servers() -> list[RunningServer]:
    """The running servers of this user on this machine, the oldest first."""
    return asyncio.run(_ask_all(server_entries()))


async def _ask_all(entries: list[ServerEntry]) -> list[RunningServer]:
    return list(await asyncio.gather(*map(_ask, entries)))


async def _ask(entry: ServerEntry) -> RunningServer:
    """The server with the numbers of its requests, over all its replicas."""
    counts: dict[str, int] = {}
    with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
        for line in (await _metrics(entry.url)).splitlines():
            name, _, value = line.rpartition(" ")
            metric = name.partition("{")[0]
            if metric in (_RUNNING, _WAITING):
                counts[metric] = counts.get(metric, 0) + int(float(value))
    return RunningServer(entry, counts.get(_RUNNING), counts.get(_WAITING))


async def _metrics(url: str) -> str:
    connector: aiohttp.BaseConnector
    if url.startswith("unix:"):
        connector = aiohttp.UnixConnector(url.removeprefix("unix:"))
        url = "http://localhost"
    else:
        # The certificate is for the server's name, and this asks a process of this machine.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connector = aiohttp.TCPConnector(ssl=context)
        for address, loopback in _LOOPBACK.items():
            url = url.replace(address, loopback)
    key = os.environ.get(API_KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=_QUERY_TIMEOUT_S)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session,
        session.get(f"{url}/metrics", allow_redirects=False) as response,
    ):
        return await response.text() if response.status == 200 else ""
