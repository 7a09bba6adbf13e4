"""Lambda's runtime API (2018-06-01) on a free port, for tests of runtimes and functions."""

from __future__ import annotations

import base64
import json
import queue
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

_INVOCATION = "/2018-06-01/runtime/invocation/"
_INIT_ERROR = "/2018-06-01/runtime/init/error"


@dataclass
class Invocation:
    """An event, and what the runtime sent for it."""

    event: Any
    timeout_s: float
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    headers: dict[str, str] = field(default_factory=dict)  # of the response, lower case
    parts: list[tuple[float, bytes]] = field(default_factory=list)  # when it arrived, and what
    trailers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None  # the document of a failed invocation
    done: queue.Queue[None] = field(default_factory=queue.Queue)

    @property
    def body(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    def document(self) -> Any:
        """The response of a function that returns JSON."""
        assert self.error is None, self.error
        return json.loads(self.body)

    def streamed(self) -> tuple[dict[str, Any], bytes]:
        """The head and the body of a streamed HTTP response."""
        assert self.error is None, self.error
        assert self.headers["lambda-runtime-function-response-mode"] == "streaming"
        kind = "application/vnd.awslambda.http-integration-response"
        assert self.headers["content-type"] == kind
        head, zeros, body = self.body.partition(b"\0" * 8)
        assert zeros
        return json.loads(head), body

    def stream_error(self) -> dict[str, Any]:
        """The error in the trailers of a stream that broke off."""
        document = base64.b64decode(self.trailers["lambda-runtime-function-error-body"])
        return json.loads(document)


class LambdaApi:
    """The API, as a context. A runtime finds it by AWS_LAMBDA_RUNTIME_API=`address`."""

    process: subprocess.Popen[bytes]  # the runtime's, set by who starts it

    def __init__(self) -> None:
        self.init_error: dict[str, Any] | None = None
        self.next_calls: queue.Queue[float] = queue.Queue()  # when the runtime asked for events
        self._events: queue.Queue[Invocation] = queue.Queue()
        self._running: dict[str, Invocation] = {}
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                """Nothing on stderr."""

            def do_GET(self) -> None:
                assert self.path == f"{_INVOCATION}next"
                api.next_calls.put(time.monotonic())
                api._send_event(self)

            def do_POST(self) -> None:
                api._receive(self)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *arguments: Any) -> None:
                """Nothing on stderr: a test ends the runtime while it waits for an event."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LambdaApi:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def start(self, event: Any, timeout_s: float = 60) -> Invocation:
        """Give an event to the runtime."""
        invocation = Invocation(event, timeout_s)
        self._events.put(invocation)
        return invocation

    def invoke(self, event: Any, timeout_s: float = 60) -> Invocation:
        """Give an event to the runtime, and wait for the end of its response."""
        invocation = self.start(event, timeout_s)
        invocation.done.get(timeout=timeout_s + 30)
        return invocation

    def _send_event(self, handler: BaseHTTPRequestHandler) -> None:
        invocation = self._events.get()
        self._running[invocation.id] = invocation
        body = json.dumps(invocation.event).encode()
        deadline_ms = int((time.time() + invocation.timeout_s) * 1000)
        handler.send_response(200)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Lambda-Runtime-Aws-Request-Id": invocation.id,
            "Lambda-Runtime-Deadline-Ms": str(deadline_ms),
            "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-west-1:1:function:test",
            "Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=0",
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def _receive(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == _INIT_ERROR:
            self.init_error = json.loads(_read_all(handler))
        else:
            request_id, _, kind = handler.path.removeprefix(_INVOCATION).partition("/")
            invocation = self._running.pop(request_id)
            if kind == "error":
                invocation.error = json.loads(_read_all(handler))
            else:
                assert kind == "response"
                _read_response(handler, invocation)
            invocation.done.put(None)
        handler.send_response(202)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


def _read_all(handler: BaseHTTPRequestHandler) -> bytes:
    return handler.rfile.read(int(handler.headers["Content-Length"]))


def _read_response(handler: BaseHTTPRequestHandler, invocation: Invocation) -> None:
    invocation.headers = {name.lower(): value for name, value in handler.headers.items()}
    if invocation.headers.get("transfer-encoding", "").lower() != "chunked":
        invocation.parts.append((time.monotonic(), _read_all(handler)))
        return
    while size := int(handler.rfile.readline(), 16):
        invocation.parts.append((time.monotonic(), handler.rfile.read(size)))
        assert handler.rfile.readline() == b"\r\n"
    while (line := handler.rfile.readline().strip()) != b"":
        name, _, value = line.decode().partition(":")
        invocation.trailers[name.lower()] = value.strip()


def url_event(
    method: str, path: str, body: str | bytes = b"", headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """An event of a function URL. bytes are sent as base64, as AWS sends binary bodies."""
    path, _, query = path.partition("?")
    is_binary = isinstance(body, bytes)
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": query,
        "headers": {
            "host": "abc.lambda-url.eu-west-1.on.aws",
            "content-type": "application/json",
            "x-forwarded-for": "203.0.113.7",
            **(headers or {}),
        },
        "requestContext": {
            "domainName": "abc.lambda-url.eu-west-1.on.aws",
            "http": {"method": method, "path": path, "protocol": "HTTP/1.1"},
            "stage": "$default",
        },
        "body": base64.b64encode(body).decode() if is_binary else body,
        "isBase64Encoded": is_binary,
    }
