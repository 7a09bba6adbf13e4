"""An AWS Lambda function: it answers events by requests to a server of the same container.

The `handler.py` that `llmkit deploy lambda` writes makes one. AWS's runtime for Python
(`awslambdaric`) calls it for a buffered response. It has no streams: `lambda_streaming.py` sends
those.

Lambda gives 10 seconds to what runs before the first event, and starts over when that is not
enough. So the server starts then, and a model that loads longer is waited for in the first event.
Lambda suspends all processes between events.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote

from llmkit.common.errors import LlmkitError
from llmkit.deploy.local_request import CHAT_PATH, COMPLETION_PATH, RequestError, log_line
from llmkit.runtime.process_channel import API_KEY_VARIABLE
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_process import ServerProcess

_INIT_WAIT_S = 8.0  # of Lambda's 10 seconds
_REPLY_S = 1.0  # of an event's time: for the answer that its time is over
_END_S = 10.0  # until it is known how a server ended that closes connections
_READ_BYTES = 1 << 16
# Of a connection, not of a request or response. Lambda's own host name is not the server's.
_HOP_HEADERS = frozenset(
    {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "date", "server"}
)
_JSON = {"content-type": "application/json"}


class EventError(Exception):
    """An event that is no request."""


@dataclass(frozen=True)
class EventRequest:
    """The request of an event. is_http: the event came by a function URL or API Gateway."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    is_http: bool


@dataclass(frozen=True)
class EventResponse:
    """The response to an event. parts: the body, as it arrives."""

    status: int
    headers: dict[str, str]
    parts: Iterator[bytes]
    is_http: bool


class LambdaFunction:
    """A function, with its server. The server starts with this object.

    Raises the LlmkitError of a start that fails in Lambda's first phase.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._server = ServerProcess(options, message=log_line)
        self._wait_ready(_INIT_WAIT_S)

    def __call__(self, event: Any, context: Any) -> dict[str, Any]:
        """The response to an event, in the form that a function URL and API Gateway take.

        For an event with `messages` or `prompt`, it is the server's JSON document. Raises
        EventError and RequestError for such events: they make the invocation fail.
        """
        response = self.respond(event, context.get_remaining_time_in_millis() / 1000)
        body = b"".join(response.parts)
        if not response.is_http:
            document: dict[str, Any] = json.loads(body)
            if response.status >= http.HTTPStatus.BAD_REQUEST:
                raise RequestError(response.status, document)
            return document
        document = {"statusCode": response.status, "headers": response.headers}
        try:
            return document | {"body": body.decode(), "isBase64Encoded": False}
        except UnicodeDecodeError:
            return document | {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}

    def respond(self, event: Any, remaining_s: float) -> EventResponse:
        """Send an event's request. remaining_s: the time after which Lambda ends the event.

        Raises EventError for an event that is no request.
        """
        request = read_event(event)
        if request.is_http and not _is_authorized(event):
            return _error(
                http.HTTPStatus.UNAUTHORIZED,
                f"this function has no key: set {API_KEY_VARIABLE}, or let AWS authorize requests",
                request,
            )
        if self._server.ended.done():
            self._exit()
        limit_s = max(0.1, remaining_s - _REPLY_S)
        if not self._wait_ready(limit_s):
            return _error(http.HTTPStatus.SERVICE_UNAVAILABLE, "the model is loading", request)
        connection = _UnixConnection(str(self._server.socket_path), limit_s)
        try:
            connection.request(request.method, request.path, request.body, request.headers)
            response = connection.getresponse()
        except TimeoutError:
            connection.close()
            return _error(
                http.HTTPStatus.GATEWAY_TIMEOUT,
                f"no response within {limit_s:.0f} seconds, the function's timeout",
                request,
            )
        except ConnectionError:
            self._exit()
        headers = {
            name.lower(): value
            for name, value in response.getheaders()
            if name.lower() not in _HOP_HEADERS
        }
        return EventResponse(
            response.status, headers, _parts(connection, response), request.is_http
        )

    def _exit(self) -> NoReturn:
        """End this process, because the server was lost: Lambda then starts a new container."""
        log_line(str(self._server.ended.result(_END_S)))
        os._exit(1)

    def _wait_ready(self, timeout_s: float) -> bool:
        """Wait for the server. False: it is still loading. Raises the error of its start."""
        try:
            self._server.ready.result(timeout_s)
        except TimeoutError:
            return False
        except LlmkitError as error:
            log_line(str(error))
            raise
        return True


def read_event(event: Any) -> EventRequest:
    """The request in an event of a function URL or an HTTP API, or in one with a prompt.

    Raises EventError for any other.
    """
    if isinstance(event, dict):
        if event.get("version") == "2.0" and "requestContext" in event:
            return _read_http_event(event)
        for field, path in (("messages", CHAT_PATH), ("prompt", COMPLETION_PATH)):
            if field in event:
                return _read_plain_event(event, path)
        if "httpMethod" in event:
            raise EventError(
                "events of REST APIs (payload format 1.0) are not supported; a function URL or an "
                "HTTP API with payload format 2.0 was expected"
            )
    raise EventError(
        "the event is no request; one of a function URL, of an HTTP API with payload format 2.0, "
        "or an object with messages or prompt was expected"
    )


def _read_http_event(event: Mapping[str, Any]) -> EventRequest:
    context = event["requestContext"]
    body = event.get("body") or ""
    try:
        data = base64.b64decode(body, validate=True) if event.get("isBase64Encoded") else None
    except binascii.Error as error:
        raise EventError(f"the event's body is not base64 ({error})") from None
    path = str(event.get("rawPath") or "/")
    stage = context.get("stage", "$default")
    if stage != "$default":  # an HTTP API puts the name of its stage before the path
        path = path.removeprefix(f"/{stage}") or "/"
    # It arrives decoded.
    path = quote(path, safe="/:@!$&'()*+,;=~-._%")
    if event.get("rawQueryString"):
        path += f"?{event['rawQueryString']}"
    headers = {
        name: value
        for name, value in (event.get("headers") or {}).items()
        if name.lower() not in _HOP_HEADERS
    }
    return EventRequest(
        str(context["http"]["method"]),
        path,
        headers,
        body.encode() if data is None else data,
        is_http=True,
    )


def _read_plain_event(event: Mapping[str, Any], path: str) -> EventRequest:
    """Who may invoke a function is known to AWS: the request gets the function's own key."""
    if event.get("stream"):
        raise EventError("an event with stream: true needs a function URL; leave out `stream`")
    headers = dict(_JSON)
    key = os.environ.get(API_KEY_VARIABLE)
    if key:
        headers["authorization"] = f"Bearer {key.strip()}"
    return EventRequest("POST", path, headers, json.dumps(event).encode(), is_http=False)


def _is_authorized(event: Mapping[str, Any]) -> bool:
    """Whether AWS has checked who sends the request, or the server will check the key."""
    return bool(os.environ.get(API_KEY_VARIABLE) or event["requestContext"].get("authorizer"))


def _error(status: int, message: str, request: EventRequest) -> EventResponse:
    document = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    headers = dict(_JSON)
    if status == http.HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = "5"
    return EventResponse(status, headers, iter([json.dumps(document).encode()]), request.is_http)


def _parts(connection: _UnixConnection, response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it arrives. The server drops the request when the iterator is closed."""
    try:
        while part := response.read1(_READ_BYTES):
            yield part
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket. Importing aiohttp would make a cold start longer."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
