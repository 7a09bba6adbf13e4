"""A model of Triton's Python backend: each request becomes one of Triton's generate extension to a server of our own.

Triton imports it through the `model.py` that `llmkit deploy triton` writes. Inputs and outputs are those of
`runtime/server/kserve`, which also checks them.
"""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future
from typing import Any

import aiohttp
import msgspec
import numpy as np

from llmkit.runtime.child import Child
from llmkit.runtime.server.kserve.tensors import INPUTS, OUTPUTS
from llmkit.runtime.server.options import ServeOptions

_DTYPES = {"BYTES": np.object_, "UINT32": np.uint32}
_WATCH_S = 0.2  # how often a request is looked at for having been cancelled
_STOP_S = 30.0


class TritonPythonModel:
    """Named, and used, as Triton's Python backend wants it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the server. args: what Triton says of the model. Raises LlmkitError, which Triton shows."""
        import triton_python_backend_utils as utils

        self._utils = utils
        options = json.loads(json.loads(args["model_config"])["parameters"]["options"]["string_value"])
        self._child = Child(ServeOptions.of_document(options))
        self._model = self._child.ready.result()["model"]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmkit", daemon=True)
        self._thread.start()
        self._session = self._run(self._connect()).result()
        self._under_way: set[Future[None]] = set()

    def execute(self, requests: list[Any]) -> None:
        """Take requests; what they are answered goes to their senders, then and as it comes."""
        for request in requests:
            answer = self._run(self._answer(request, request.get_response_sender()))
            self._under_way.add(answer)
            answer.add_done_callback(self._under_way.discard)

    def finalize(self) -> None:
        """Triton unloads the model: requests under way come to their end first."""
        for answer in list(self._under_way):
            answer.exception(_STOP_S)
        self._run(self._session.close()).result()
        self._child.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _connect(self) -> aiohttp.ClientSession:
        connector = aiohttp.UnixConnector(path=str(self._child.unix), limit=0)
        return aiohttp.ClientSession(self._child.url, connector=connector, timeout=aiohttp.ClientTimeout())

    async def _answer(self, request: Any, sender: Any) -> None:
        """Send what comes of a request, an error too, and then that it is complete."""
        stream = asyncio.ensure_future(self._stream(request, sender))
        try:
            while not (await asyncio.wait([stream], timeout=_WATCH_S))[0]:
                if sender.is_cancelled():
                    stream.cancel()
            if not stream.cancelled():
                stream.result()
        except Exception as error:
            sender.send(self._utils.InferenceResponse(error=self._utils.TritonError(str(error))))
        finally:
            sender.send(flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _stream(self, request: Any, sender: Any) -> None:
        fields = {name: _value(tensor) for name in INPUTS if (tensor := self._tensor(request, name)) is not None}
        fields |= {"id": request.request_id()} if request.request_id() else {}
        parameters = json.loads(request.parameters() or "{}")
        path = f"/v2/models/{self._model}/generate{'_stream' if fields.get('stream') else ''}"
        async with self._session.post(path, json=fields | {"parameters": parameters}) as response:
            if response.content_type == "application/json":  # a whole answer, or an error
                sender.send(self._response(await response.json()))
            async for line in response.content:
                if line.startswith(b"data: "):
                    sender.send(self._response(msgspec.json.decode(line.removeprefix(b"data: "))))

    def _tensor(self, request: Any, name: str) -> Any:
        return self._utils.get_input_tensor_by_name(request, name)

    def _response(self, document: dict[str, Any]) -> Any:
        if "error" in document:
            raise RuntimeError(_message(document))
        tensors = []
        for name, kind in OUTPUTS.items():
            if name in document:
                values = document[name] if isinstance(document[name], list) else [document[name]]
                coded = [value.encode() for value in values] if kind == "BYTES" else values
                tensors.append(self._utils.Tensor(name, np.array(coded, dtype=_DTYPES[kind])))
        return self._utils.InferenceResponse(output_tensors=tensors)


def _value(tensor: Any) -> Any:
    """One value, or a list of several."""
    values = [value.decode() if isinstance(value, bytes) else bool(value) for value in tensor.as_numpy().reshape(-1)]
    return values[0] if len(values) == 1 else values


def _message(document: dict[str, Any]) -> str:
    error = document.get("error")
    return str(error.get("message")) if isinstance(error, dict) else str(error)
