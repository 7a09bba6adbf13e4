"""WebSockets: the protocol's limits, OpenAI's Responses over a socket, and streams of tokens."""
