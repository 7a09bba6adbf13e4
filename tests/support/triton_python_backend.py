"""A stand-in for Triton's Python backend, by its documented interface, and a loader of models."""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

FINAL = 1


@dataclass
class Tensor:
    """`triton_python_backend_utils.Tensor`."""

    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


@dataclass
class TritonError:
    text: str


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


class Sender:
    """What `get_response_sender` gives: here, into a queue."""

    def __init__(self) -> None:
        self.sent: queue.Queue[InferenceResponse | None] = queue.Queue()
        self.cancelled = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if response is not None:
            self.sent.put(response)
        if flags == FINAL:
            self.sent.put(None)

    def is_cancelled(self) -> bool:
        return self.cancelled

    def responses(self) -> list[InferenceResponse]:
        """All, until it is complete."""
        return list(iter(lambda: self.sent.get(timeout=120), None))

    def text(self) -> str:
        return "".join(
            value.decode()
            for response in self.responses()
            for tensor in response.output_tensors
            if tensor.name == "text_output"
            for value in tensor.as_numpy()
        )


class Request:
    """`InferenceRequest`: tensors by name, of texts, other values, and arrays."""

    def __init__(self, parameters: dict[str, Any] | None = None, **inputs: Any) -> None:
        self.inputs = {name: Tensor(name, _array(value)) for name, value in inputs.items()}
        self.sender = Sender()
        self._parameters = parameters

    def get_response_sender(self) -> Sender:
        return self.sender

    def request_id(self) -> str:
        return "7"

    def parameters(self) -> str:
        return json.dumps(self._parameters or {})


def _array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str):
        return np.array([value.encode()], dtype=object)
    return np.array([value])


def model_config(repository: Path, name: str) -> dict[str, Any]:
    """config.pbtxt as Triton hands it to the model: parsed by its own message."""
    from google.protobuf import json_format, text_format

    messages = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed"
    )
    text = (repository / name / "config.pbtxt").read_text()
    parsed = text_format.Parse(text, messages.ModelConfig())
    document: dict[str, Any] = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    return document


@contextmanager
def loaded_model(repository: Path, name: str) -> Iterator[Any]:
    """The written model.py, imported and initialized as Triton does it, then unloaded.

    No server process is left.
    """
    utils = types.ModuleType("triton_python_backend_utils")
    for attribute, value in {
        "Tensor": Tensor,
        "TritonError": TritonError,
        "InferenceResponse": InferenceResponse,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "get_input_tensor_by_name": lambda request, name: request.inputs.get(name),
    }.items():
        setattr(utils, attribute, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", utils)
        path = repository / name / "1" / "model.py"
        spec = importlib.util.spec_from_file_location("model", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        before = _server_processes()
        model = module.TritonPythonModel()
        config = model_config(repository, name)
        model.initialize({"model_config": json.dumps(config), "model_name": name})
        yield model
        if hasattr(model, "finalize"):
            model.finalize()
        assert _server_processes() <= before


def _server_processes() -> set[int]:
    """The process ids of the servers that this process has started."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and "serve_process" in str(child.cmdline()):
                found.add(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found
