"""How a command reaches its server: one that runs already, or its own server process."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp

from llmkit.runtime.server_process import ServerProcess

_CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Server:
    """A command's server: the URL of a running one, or a process that may still be loading."""

    url: str = ""
    key: str = ""  # API key for `url`
    process: ServerProcess | None = None

    @property
    def base_url(self) -> str:
        """The address without a path, known once the server is ready."""
        return self.url if self.process is None else self.process.url


def open_session(server: Server) -> aiohttp.ClientSession:
    """An HTTP session that sends the server's API key. It has no limit of connections or time."""
    process = server.process
    key = process.key if process is not None else server.key
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connector: aiohttp.BaseConnector
    if process is not None and process.socket_path:
        connector = aiohttp.UnixConnector(process.socket_path, limit=0)
    else:
        connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
    return aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout)
