"""`llmkit deploy triton`, outside Triton: its configuration, and its model against Triton's
documented interface.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.tiny_models import tiny_checkpoint

from llmkit.cli.main import run

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
    """`InferenceRequest`: tensors by name."""

    def __init__(self, parameters: dict[str, Any] | None = None, **inputs: Any) -> None:
        self.inputs = {
            name: Tensor(
                name, np.array([one.encode() if isinstance(one, str) else one], dtype=object)
            )
            if isinstance(one, str)
            else Tensor(name, np.array([one]))
            for name, one in inputs.items()
        }
        self.sender = Sender()
        self._parameters = parameters

    def get_response_sender(self) -> Sender:
        return self.sender

    def request_id(self) -> str:
        return "7"

    def parameters(self) -> str:
        return json.dumps(self._parameters or {})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    model = tiny_checkpoint(folder / "tiny", dtype="float32", max_position_embeddings=2048)
    words = [
        "deploy",
        "triton",
        str(model),
        "-o",
        str(folder / "models"),
        "--name",
        "chat",
        "--quiet",
    ]
    assert run([*words, "--", "--device", "cpu", "--max-num-seqs", "4"]) == 0
    assert run(words) == 5
    return folder / "models"


@pytest.fixture(scope="module")
def triton_model(repository: Path) -> Iterator[Any]:
    """The written model.py, imported and initialized as Triton does it."""
    utils = types.ModuleType("triton_python_backend_utils")
    for name, value in {
        "Tensor": Tensor,
        "TritonError": TritonError,
        "InferenceResponse": InferenceResponse,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "get_input_tensor_by_name": lambda request, name: request.inputs.get(name),
    }.items():
        setattr(utils, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", utils)
        spec = importlib.util.spec_from_file_location(
            "model", repository / "chat" / "1" / "model.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded = module.TritonPythonModel()
        loaded.initialize({"model_config": json.dumps(_config(repository)), "model_name": "chat"})
        yield loaded
        children = psutil.Process().children(recursive=True)
        loaded.finalize()
        assert not [
            child
            for child in children
            if child.is_running() and "serve_process" in " ".join(child.cmdline())
        ]


def _config(repository: Path) -> dict[str, Any]:
    """config.pbtxt as Triton hands it to the model: parsed by its own message."""
    from google.protobuf import json_format, text_format

    messages = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed"
    )
    parsed = text_format.Parse(
        (repository / "chat" / "config.pbtxt").read_text(), messages.ModelConfig()
    )
    document: dict[str, Any] = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    return document


def test_triton_parses_the_configuration(repository: Path) -> None:
    config = _config(repository)
    assert config["backend"] == "python" and config["model_transaction_policy"] == {
        "decoupled": True
    }
    assert [one["name"] for one in config["input"]][:2] == ["text_input", "stream"]
    assert (
        config["input"][0].get("optional", False) is False
        and config["input"][1]["optional"] is True
    )
    assert (
        json.loads(config["parameters"]["options"]["string_value"])["engine"]["max_num_seqs"] == 4
    )


SAMPLING = json.dumps({"max_tokens": 12, "temperature": 0, "ignore_eos": True})


def test_stream_has_the_text_of_the_complete_response(triton_model: Any) -> None:
    streamed = Request(text_input="hello", stream=True, sampling_parameters=SAMPLING)
    whole = Request(text_input="hello", exclude_input_in_output=True, sampling_parameters=SAMPLING)
    triton_model.execute([streamed, whole])
    parts = streamed.sender.responses()
    (one,) = whole.sender.responses()
    texts = [tensor.as_numpy()[0] for part in parts for tensor in part.output_tensors]
    assert len(parts) > 3 and b"".join(texts) == one.output_tensors[0].as_numpy()[0] != b""


def test_prompt_comes_first_unless_it_is_excluded(triton_model: Any) -> None:
    request = Request(
        text_input="hello", sampling_parameters=SAMPLING, return_num_output_tokens=True
    )
    triton_model.execute([request])
    (response,) = request.sender.responses()
    tensors = {tensor.name: tensor.as_numpy() for tensor in response.output_tensors}
    assert tensors["text_output"][0].startswith(b"hello") and tensors[
        "num_output_tokens"
    ].tolist() == [12]
    assert tensors["num_output_tokens"].dtype == np.uint32


def test_wrong_request_fails_alone_with_a_reason(triton_model: Any) -> None:
    wrong = Request(text_input="hello", sampling_parameters='{"temperature": 9}')
    right = Request(text_input="hello", stream=True, sampling_parameters=SAMPLING)
    triton_model.execute([wrong, right])
    (response,) = wrong.sender.responses()
    assert response.error is not None and "temperature" in response.error.text
    assert right.sender.text()


def test_request_parameters_are_applied(triton_model: Any) -> None:
    request = Request(
        {"max_tokens": 3, "temperature": 0, "ignore_eos": True},
        text_input="hello",
        return_num_output_tokens=True,
    )
    triton_model.execute([request])
    (response,) = request.sender.responses()
    assert {t.name: t.as_numpy().tolist() for t in response.output_tensors}[
        "num_output_tokens"
    ] == [3]


def test_cancelled_request_ends_early(triton_model: Any) -> None:
    sampling = json.dumps({"max_tokens": 1900, "temperature": 0, "ignore_eos": True})
    request = Request(text_input="hello", stream=True, sampling_parameters=sampling)
    triton_model.execute([request])
    first = request.sender.sent.get(timeout=120)
    assert first is not None
    request.sender.cancelled = True
    assert len(request.sender.responses()) < 1800
