"""A Lambda runtime that streams responses.

A container starts it by `python -m llmkit.deploy.lambda_streaming handler.handler`. AWS's own
runtime for Python sends whole responses only. This one takes events from the Lambda runtime API
(version 2018-06-01) and sends the parts of a response as they arrive, for a function URL with the
invoke mode RESPONSE_STREAM.
"""

from __future__ import annotations

import base64
import http.client
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from llmkit.common.errors import ShortageError, UsageError
from llmkit.deploy.lambda_function import EventResponse, LambdaFunction

_ADDRESS_VARIABLE = "AWS_LAMBDA_RUNTIME_API"
_API = "/2018-06-01/runtime"
# Status and headers are a JSON document before the body, and end with eight zero bytes.
_HTTP_RESPONSE = "application/vnd.awslambda.http-integration-response"
_PRELUDE_END = b"\0" * 8
_ERROR_TYPE = "Lambda-Runtime-Function-Error-Type"
_STREAM_ERROR = "Runtime.StreamError"
_ERROR_BODY = "Lambda-Runtime-Function-Error-Body"


class RuntimeApi:
    """The Lambda runtime API at an address `host:port`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def next_event(self) -> tuple[str, float, Any]:
        """Wait for an event: its request id, the seconds that it may take, and the event."""
        connection = http.client.HTTPConnection(self._address)  # waits for as long as it takes
        connection.request("GET", f"{_API}/invocation/next")
        response = connection.getresponse()
        body = response.read()
        connection.close()
        if response.status != HTTPStatus.OK:
            raise ShortageError(f"the Lambda runtime API answered {response.status}: {body!r}")
        deadline_s = int(response.headers["Lambda-Runtime-Deadline-Ms"]) / 1000
        request_id = response.headers["Lambda-Runtime-Aws-Request-Id"]
        return request_id, deadline_s - time.time(), json.loads(body)

    def send_response(self, request_id: str, response: EventResponse) -> None:
        """Send the parts of a response as they arrive.

        An error in the middle is reported in the trailers: what was sent before stays sent.
        """
        connection = http.client.HTTPConnection(self._address)
        connection.putrequest("POST", f"{_API}/invocation/{request_id}/response")
        kind = _HTTP_RESPONSE if response.is_http else "application/json"
        connection.putheader("Content-Type", kind)
        connection.putheader("Lambda-Runtime-Function-Response-Mode", "streaming")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.putheader("Trailer", f"{_ERROR_TYPE}, {_ERROR_BODY}")
        connection.endheaders()
        trailers = b""
        try:
            for part in _body(response):
                connection.send(b"%x\r\n%b\r\n" % (len(part), part))
        except (http.client.HTTPException, OSError) as error:
            document = base64.b64encode(json.dumps(_error_document(error)).encode())
            trailers = f"{_ERROR_TYPE}: {_STREAM_ERROR}\r\n{_ERROR_BODY}: ".encode()
            trailers += document + b"\r\n"
        connection.send(b"0\r\n" + trailers + b"\r\n")
        connection.getresponse().read()
        connection.close()

    def send_error(self, path: str, error: BaseException) -> None:
        """Report that the start (`init`) or an event (`invocation/ID`) failed."""
        connection = http.client.HTTPConnection(self._address)
        headers = {_ERROR_TYPE: type(error).__name__, "Content-Type": "application/json"}
        body = json.dumps(_error_document(error))
        connection.request("POST", f"{_API}/{path}/error", body, headers)
        connection.getresponse().read()
        connection.close()


def _body(response: EventResponse) -> Iterator[bytes]:
    if response.is_http:
        head = {"statusCode": response.status, "headers": response.headers}
        yield json.dumps(head).encode() + _PRELUDE_END
    yield from response.parts


def _error_document(error: BaseException) -> dict[str, Any]:
    trace = traceback.format_exception(error)
    return {"errorMessage": str(error), "errorType": type(error).__name__, "stackTrace": trace}


def _load_function(name: str) -> LambdaFunction:
    """The function `module.attribute` of the working directory. Its import starts the server."""
    module, _, attribute = name.rpartition(".")
    sys.path.insert(0, str(Path.cwd()))
    function: LambdaFunction = getattr(importlib.import_module(module), attribute)
    return function


def main() -> None:
    """Answer events until Lambda ends the container."""
    api = RuntimeApi(_address())
    try:
        function = _load_function(sys.argv[1])
    except Exception as error:
        api.send_error("init", error)
        raise
    while True:
        request_id, remaining_s, event = api.next_event()
        try:
            response = function.respond(event, remaining_s)
        except Exception as error:
            api.send_error(f"invocation/{request_id}", error)
        else:
            api.send_response(request_id, response)


def _address() -> str:
    address = os.environ.get(_ADDRESS_VARIABLE)
    if not address or len(sys.argv) != 2:
        raise UsageError(
            "this program is started by AWS Lambda",
            f"{_ADDRESS_VARIABLE} and the name of the handler were expected",
        )
    return address


if __name__ == "__main__":
    main()
