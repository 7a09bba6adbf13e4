"""A small OpenAI-compatible server that answers what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Delta = dict[str, str]


class ChatServer:
    """Streams the deltas that `answers` has for the last message.

    A delta {"wait": ""} holds the stream until the client has gone or the server stops.
    """

    def __init__(self, answers: dict[str, Sequence[Delta]]) -> None:
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []  # of the requests
        self.keys: list[str | None] = []  # of all requests
        self.client_left = threading.Event()
        self.stopped = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.keys.append(self.headers["authorization"])
                self._reply(200, {"data": [{"id": "tiny"}, {"id": "other"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.bodies.append(body)
                server.keys.append(self.headers["authorization"])
                deltas = server.answers.get(body["messages"][-1]["content"])
                if deltas is None:
                    error = {"message": "too \x1b[31mlong", "code": "context_length_exceeded"}
                    self._reply(400, {"error": error})
                    return
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                for delta in deltas:
                    if "wait" in delta:
                        self._wait()
                        return
                    self._event({"choices": [{"delta": delta, "finish_reason": None}]})
                self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                self._event({"choices": [], "usage": {"completion_tokens": len(deltas)}})
                self.wfile.write(b"data: [DONE]\n\n")

            def _wait(self) -> None:
                """Send comments until the client has gone."""
                while not server.stopped.wait(0.02):
                    try:
                        self.wfile.write(b": alive\n\n")
                    except OSError:
                        server.client_left.set()
                        return

            def _event(self, event: dict[str, Any]) -> None:
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

            def _reply(self, status: int, document: dict[str, Any]) -> None:
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator[ChatServer]:
        """Serve on another thread."""
        thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.stopped.set()
            self._http.shutdown()
            thread.join()
            self._http.server_close()
