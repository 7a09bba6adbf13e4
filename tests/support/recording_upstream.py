"""An OpenAI-compatible server that records what it is sent, for tests of tiers at URLs."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class RecordingUpstream:
    """Answers every POST with a chat completion, or with what its fields say."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.status = 200
        self.delay_s = 0.0
        self.headers: dict[str, str] = {}
        self.logprobs: Any = None
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                body = json.loads(self.rfile.read(size))
                headers = {name.lower(): value for name, value in self.headers.items()}
                upstream.requests.append((self.path, headers, body))
                time.sleep(upstream.delay_s)
                content = json.dumps(upstream.answer(body)).encode()
                self.send_response(upstream.status)
                for name, value in upstream.headers.items():
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response's document."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "From afar."},
            "logprobs": self.logprobs,
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return {"model": body["model"], "choices": [choice], "usage": usage}

    def reset(self) -> None:
        """Forget requests, and answer as at first."""
        self.requests.clear()
        self.status, self.delay_s = 200, 0.0
        self.headers, self.logprobs = {}, None

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
