"""`llmkit deploy triton`, outside Triton: its configuration, and its model against Triton's
documented interface.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import tiny_checkpoint
from support.triton_python_backend import Request, loaded_model, model_config

from llmkit.cli.main import run


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
    with loaded_model(repository, "chat") as model:
        yield model


def test_triton_parses_the_configuration(repository: Path) -> None:
    config = model_config(repository, "chat")
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
