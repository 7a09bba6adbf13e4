"""The paths of WebSockets, and what SecurityMiddleware puts into a socket's scope."""

RESPONSES_SOCKET = "/v1/responses"
STREAM_SOCKET = "/v1/stream"
SOCKET_PATHS = frozenset({RESPONSES_SOCKET, STREAM_SOCKET})

# The ASGI application that answers the socket's requests, with all checks of HTTP.
HTTP_APP = "llmkit.http_app"
# The headers of these requests: the socket's API key.
SOCKET_HEADERS = "llmkit.socket_headers"
# The subprotocol that the handshake agrees on; None without any.
SUBPROTOCOL = "llmkit.subprotocol"
