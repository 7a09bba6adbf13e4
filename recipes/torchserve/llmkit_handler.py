"""A TorchServe handler that answers requests with an llmkit server of its own.

TorchServe's Python needs llmkit. TorchServe is archived: use it where it runs already. The handler
takes the requests of OpenAI's API under /predictions/NAME/1.0/v1/…, streams included. With
`asyncCommunication: true` (model-config.yaml), requests run together in one batch.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from typing import Any

import aiohttp
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.service import PredictionException
from ts.torch_handler.base_handler import BaseHandler

from llmkit.cli.serve import serve_options
from llmkit.common.errors import LlmkitError
from llmkit.common.sse import EventParser
from llmkit.runtime.server_client import Server, open_session
from llmkit.runtime.server_process import ServerProcess

_PATHS = ("v1/chat/completions", "v1/completions", "v1/embeddings", "v1/models")
_END = "[DONE]"


class LlmkitHandler(BaseHandler):
    """Starts a server when TorchServe loads the model; it ends with TorchServe's worker."""

    def initialize(self, context: Any) -> None:
        """Start the server. Raises LlmkitError, which TorchServe logs."""
        settings = context.model_yaml_config["handler"]
        gpu_id = context.system_properties.get("gpu_id")
        if gpu_id is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu_id)
        words = settings.get("serve_options", [])
        options = serve_options(settings["model"], context.model_name, words, None)
        # Only this process knows the key of the server, which listens on a private Unix socket.
        process = ServerProcess(options, key=secrets.token_hex(16))
        process.ready.result()
        self._server = Server(process=process)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        self.initialized = True

    async def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answer a request. Raises PredictionException with the server's message and status."""
        (row,) = data  # batchSize is 1: the server makes batches
        body = _parse(row.get("body") or row.get("data") or {})
        path = context.get_request_header(0, "url_path") or _PATHS[0]
        if path not in _PATHS:
            raise PredictionException(f"{path} is none of {', '.join(_PATHS)}", 404)
        try:
            return [await self._answer(path, body, context)]
        except (aiohttp.ClientError, OSError, LlmkitError) as error:
            raise PredictionException(f"the server is lost ({error})", 503) from error

    async def _answer(self, path: str, body: dict[str, Any], context: Any) -> Any:
        """The response. All parts of a stream but the last one are sent before."""
        url = f"{self._server.base_url}/{path}"
        method = "GET" if path == "v1/models" else "POST"
        async with (
            open_session(self._server) as session,
            session.request(method, url, json=None if method == "GET" else body) as response,
        ):
            if response.content_type != "text/event-stream":
                document = await response.json()
                if response.status != 200:
                    raise PredictionException(str(document["error"]["message"]), response.status)
                return document
            parser = EventParser()
            async for read in response.content.iter_any():
                for event in parser.feed(read):
                    if event != _END:
                        part = f"data: {event}\n\n"
                        send_intermediate_predict_response(
                            [part], context.request_ids, "Result", 200, context
                        )
            return f"data: {_END}\n\n"


def _end_with_parent() -> None:
    """End this process, and so its server, when TorchServe has ended.

    A worker with asyncCommunication does not notice that by itself.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _parse(body: Any) -> dict[str, Any]:
    """The JSON object of a request. TorchServe has read it if its content type is JSON."""
    document = body
    if isinstance(body, bytes | bytearray | str):
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
    if not isinstance(document, dict):
        raise PredictionException("the body is not a JSON object", 400)
    return document
