"""A TorchServe handler that answers requests with an llmkit server of its own.

TorchServe's Python needs llmkit. TorchServe is archived: use it where it runs already. The handler
takes the requests of OpenAI's API under /predictions/NAME/1.0/v1/…, streams included. With
`asyncCommunication: true` (model-config.yaml), requests run together in one batch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from ts.handler_utils.utils import send_intermediate_predict_response
from ts.service import PredictionException
from ts.torch_handler.base_handler import BaseHandler

from llmkit.cli.serve import serve_options
from llmkit.deploy.local_request import CHAT_PATH, COMPLETION_PATH, LocalRequest, RequestError
from llmkit.deploy.local_server import LocalServer

_MODELS = "/v1/models"
_PATHS = (CHAT_PATH, COMPLETION_PATH, "/v1/embeddings", _MODELS)


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
        self._server = LocalServer(options)
        self._server.wait_ready()  # from now on, a lost server ends this worker; a new one starts
        threading.Thread(target=_end_with_parent, daemon=True).start()
        self.initialized = True

    async def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answer a request. Raises PredictionException with the server's message and status."""
        (row,) = data  # batchSize is 1: the server makes batches
        body = _parse(row.get("body") or row.get("data") or {})
        url_path = context.get_request_header(0, "url_path")
        path = f"/{url_path}" if url_path else CHAT_PATH
        if path not in _PATHS:
            raise PredictionException(f"{path} is none of {', '.join(_PATHS)}", 404)
        request = LocalRequest("POST", path, body)
        if path == _MODELS:
            request = LocalRequest("GET", path)
        try:
            return [await self._answer(request, context)]
        except RequestError as error:
            raise PredictionException(str(error), error.status) from error

    async def _answer(self, request: LocalRequest, context: Any) -> Any:
        """The response. The parts of a stream are sent before, so that nothing is left of it."""
        async for part in self._server.parts(request):
            if not request.is_stream:
                return part
            send_intermediate_predict_response([part], context.request_ids, "Result", 200, context)
        return ""


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
