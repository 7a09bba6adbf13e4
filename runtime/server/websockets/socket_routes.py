"""Which WebSocket is served at which path."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from llmkit.runtime.server.http.socket_paths import RESPONSES_SOCKET, STREAM_SOCKET
from llmkit.runtime.server.websockets.responses_socket import ResponsesSocket
from llmkit.runtime.server.websockets.socket_session import SocketSession
from llmkit.runtime.server.websockets.stream_socket import StreamSocket

SESSIONS: dict[str, type[SocketSession]] = {
    RESPONSES_SOCKET: ResponsesSocket,
    STREAM_SOCKET: StreamSocket,
}


async def serve_socket(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a WebSocket whose handshake SecurityMiddleware has checked."""
    await SESSIONS[scope["path"]](scope, receive, send).run()
