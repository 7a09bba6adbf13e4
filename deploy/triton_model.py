"""A model of Triton's Python backend, which sends each request to a server process.

It uses Triton's generate extension. Triton imports it through the `model.py` that `llmkit deploy
triton` writes. Inputs and outputs are those of `runtime/server/kserve`, which also checks them.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import aiohttp
import msgspec
import numpy as np

from llmkit.runtime.server.kserve.kserve_tensors import INPUTS, OUTPUTS
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_process import ServerProcess

_DTYPES = {"BYTES": np.object_, "UINT32": np.uint32}
# How often a request is checked for cancellation.
_CANCEL_CHECK_S = 0.2
# The longest time that running requests may take when Triton unloads the model.
_DRAIN_TIMEOUT_S = 30.0
_DONE = b"[DONE]"  # the last event of a stream of completions


def model_options(args: Mapping[str, str]) -> ServeOptions:
    """The options that `llmkit deploy triton` wrote into a model's configuration.

    args: Triton's description of the model, the argument of `initialize`.
    """
    parameters = json.loads(args["model_config"])["parameters"]
    return ServeOptions.from_dict(json.loads(parameters["options"]["string_value"]))


class ServerModel:
    """A model whose requests a server process answers, in Triton's decoupled mode."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the server.

        args: Triton's description of the model. Raises LlmkitError, which Triton shows.
        """
        import triton_python_backend_utils as utils

        self._utils = utils
        self._server = ServerProcess(model_options(args))
        self._model = self._server.ready.result()["model"]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmkit", daemon=True)
        self._thread.start()
        self._session = self._run(self._connect()).result()
        self._in_flight: set[Future[None]] = set()

    def execute(self, requests: list[Any]) -> None:
        """Start requests; their responses are sent as they arrive."""
        for request in requests:
            answer = self._run(self._answer(request, request.get_response_sender()))
            self._in_flight.add(answer)
            answer.add_done_callback(self._in_flight.discard)

    def finalize(self) -> None:
        """Triton unloads the model: running requests finish first."""
        for answer in list(self._in_flight):
            answer.exception(_DRAIN_TIMEOUT_S)
        self._run(self._session.close()).result()
        self._server.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _connect(self) -> aiohttp.ClientSession:
        connector = aiohttp.UnixConnector(path=str(self._server.socket_path), limit=0)
        return aiohttp.ClientSession(
            self._server.url, connector=connector, timeout=aiohttp.ClientTimeout()
        )

    async def _answer(self, request: Any, sender: Any) -> None:
        """Send the responses to a request, or its error, and then the final flag."""
        stream = asyncio.ensure_future(self._stream(request, sender))
        try:
            while not (await asyncio.wait([stream], timeout=_CANCEL_CHECK_S))[0]:
                if sender.is_cancelled():
                    stream.cancel()
            if not stream.cancelled():
                stream.result()
        except Exception as error:
            sender.send(self._utils.InferenceResponse(error=self._utils.TritonError(str(error))))
        finally:
            sender.send(flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _stream(self, request: Any, sender: Any) -> None:
        """Send the responses to a request. An exception becomes the response's error."""
        raise NotImplementedError

    async def _documents(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Post a request to the server, and yield its response or the events of its stream.

        Raises RuntimeError with the server's message for an error.
        """
        async with self._session.post(path, json=body) as response:
            if response.content_type == "application/json":  # a complete response, or an error
                yield _checked(await response.json())
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if line.startswith(b"data: ") and data != _DONE:
                    yield _checked(msgspec.json.decode(data))

    def _inputs(self, request: Any, names: Iterable[str]) -> dict[str, Any]:
        """The values of a request's input tensors; those that it has not are absent."""
        fields: dict[str, Any] = {}
        for name in names:
            tensor = self._utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                fields[name] = _value(tensor)
        return fields


class TritonPythonModel(ServerModel):
    """The class that Triton's Python backend looks for: text to text."""

    async def _stream(self, request: Any, sender: Any) -> None:
        fields = self._inputs(request, INPUTS)
        if request.request_id():
            fields["id"] = request.request_id()
        fields["parameters"] = json.loads(request.parameters() or "{}")
        path = f"/v2/models/{self._model}/generate{'_stream' if fields.get('stream') else ''}"
        async for document in self._documents(path, fields):
            sender.send(self._response(document))

    def _response(self, document: dict[str, Any]) -> Any:
        tensors = []
        for name, kind in OUTPUTS.items():
            if name in document:
                values = document[name] if isinstance(document[name], list) else [document[name]]
                if kind == "BYTES":
                    values = [value.encode() for value in values]
                tensors.append(self._utils.Tensor(name, np.array(values, dtype=_DTYPES[kind])))
        return self._utils.InferenceResponse(output_tensors=tensors)


def _value(tensor: Any) -> Any:
    """A tensor's only value, or a list of several."""
    values = [
        value.decode() if isinstance(value, bytes) else bool(value)
        for value in tensor.as_numpy().reshape(-1)
    ]
    return values[0] if len(values) == 1 else values


def _checked(document: dict[str, Any]) -> dict[str, Any]:
    """A response of the server. Raises RuntimeError when it is an error."""
    if "error" not in document:
        return document
    error = document["error"]
    raise RuntimeError(str(error.get("message")) if isinstance(error, dict) else str(error))
