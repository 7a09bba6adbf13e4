"""Background responses behind a router: they run on after the request that has started them.

The router cannot see their end. So it asks the model's server, whose health check says in a header
how many run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from llmkit.runtime.server.stored_responses.background_runs import BACKGROUND_HEADER

_PATH = "/v1/responses"
_TIMEOUT_S = 10.0


def starts_background(path: str, body: Mapping[str, Any]) -> bool:
    """Whether a request to `path`, without its query, asks for a background response."""
    return path == _PATH and body.get("background") is True


async def has_background_work(server: Any) -> bool:
    """Whether a model's server runs background responses.

    Raises aiohttp.ClientError, OSError or TimeoutError when it does not answer.
    """
    connector = aiohttp.UnixConnector(server.socket_path, force_close=True)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        session.get(URL(server.url + "/health")) as response,
    ):
        return int(response.headers.get(BACKGROUND_HEADER, "0")) > 0
