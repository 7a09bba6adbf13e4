"""The WebSockets of a server that are open."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from llmkit.runtime.server.websockets.socket_routes import serve_socket


class OpenSockets:
    """Serves WebSockets, and counts them while they are open.

    The requests of a socket count as requests, the connection itself does not.
    """

    def __init__(self) -> None:
        self.count = 0

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a WebSocket until it closes."""
        self.count += 1
        try:
            await serve_socket(scope, receive, send)
        finally:
            self.count -= 1
