"""`llmkit deploy triton --ensemble`: its configurations by Triton's own message and rules, and its
models against Triton's documented interface, with a real server behind one of them.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import tiny_checkpoint
from support.triton_python_backend import Request, loaded_model, model_config

from llmkit.checkpoint.open_model_files import open_model_files
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.cli.main import run

STAGES = ("chat_tokenizer", "chat_model", "chat_detokenizer")
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    return tiny_checkpoint(folder / "tiny", dtype="float32", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def repository(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "models"
    words = ["deploy", "triton", str(checkpoint), "-o", str(folder), "--quiet"]
    options = ["--", "--device", "cpu", "--max-num-seqs", "4"]
    assert run([*words, "--name", "chat", "--ensemble", *options]) == 0
    assert run([*words, "--name", "plain", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def stages(repository: Path) -> Iterator[dict[str, Any]]:
    with (
        loaded_model(repository, "chat_tokenizer") as tokenizer,
        loaded_model(repository, "chat_model") as model,
        loaded_model(repository, "chat_detokenizer") as detokenizer,
    ):
        yield dict(zip(STAGES, (tokenizer, model, detokenizer), strict=True))


@pytest.fixture(scope="module")
def plain(repository: Path) -> Iterator[Any]:
    with loaded_model(repository, "plain") as model:
        yield model


@pytest.fixture(scope="module")
def ask(repository: Path, stages: dict[str, Any]) -> Ask:
    """Sends a request through the steps of the ensemble's configuration, as Triton does.

    Returns the ensemble's responses: its output tensors' first values by name.
    """
    ensemble = model_config(repository, "chat")

    def send(**inputs: Any) -> list[dict[str, Any]]:
        request = Request(**inputs)
        tensors = [{name: tensor.values for name, tensor in request.inputs.items()}]
        for step in ensemble["ensemble_scheduling"]["step"]:
            tensors = [found | made for found in tensors for made in _run(stages, step, found)]
        names = [output["name"] for output in ensemble["output"]]
        return [{name: found[name].tolist()[0] for name in names} for found in tensors]

    return send


def _run(
    stages: dict[str, Any], step: dict[str, Any], found: dict[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """The tensors of each response of a step's model."""
    inputs = {name: found[own] for name, own in step["input_map"].items() if own in found}
    request = Request(**inputs)
    responses = stages[step["model_name"]].execute([request])
    if responses is None:  # a decoupled model
        responses = request.sender.responses()
    for response in responses:
        if response.error is not None:
            raise RuntimeError(response.error.text)
    return [
        {step["output_map"][tensor.name]: tensor.values for tensor in response.output_tensors}
        for response in responses
    ]


def sampling(**parameters: Any) -> str:
    return json.dumps({"max_tokens": 40, "temperature": 0, "ignore_eos": True} | parameters)


def test_ensemble_follows_the_rules_of_triton(repository: Path) -> None:
    ensemble = model_config(repository, "chat")
    assert ensemble["platform"] == "ensemble" and (repository / "chat" / "1").is_dir()
    known = {one["name"]: (one["data_type"], one["dims"]) for one in ensemble["input"]}
    optional = {one["name"] for one in ensemble["input"] if one.get("optional")}
    assert optional == {"stream", "sampling_parameters"}
    decoupled = dict.fromkeys(known, 0)  # how many decoupled models a tensor came through
    steps = ensemble["ensemble_scheduling"]["step"]
    assert [step["model_name"] for step in steps] == list(STAGES)
    for step in steps:
        config = model_config(repository, step["model_name"])
        assert config["instance_group"][0]["count"] == 1  # keeps responses in order
        for one in config["input"]:
            name = step["input_map"][one["name"]]
            assert known[name] == (one["data_type"], one["dims"])
            assert one.get("optional", False) is (name in optional)
        labels = {decoupled[name] for name in step["input_map"].values() if name not in optional}
        assert len(labels) == 1  # else "receives inputs originated from different decoupled models"
        (label,) = labels
        label += config.get("model_transaction_policy", {}).get("decoupled", False)
        for one in config["output"]:
            known[step["output_map"][one["name"]]] = (one["data_type"], one["dims"])
            decoupled[step["output_map"][one["name"]]] = label
    outputs = {one["name"]: (one["data_type"], one["dims"]) for one in ensemble["output"]}
    assert outputs == {name: known[name] for name in outputs}
    assert {decoupled[name] for name in outputs} == {1}
    assert ensemble["model_transaction_policy"] == {"decoupled": True}


def test_tokenizer_gives_the_ids_of_the_prompt(checkpoint: Path, stages: dict[str, Any]) -> None:
    (response,) = stages["chat_tokenizer"].execute([Request(text_input="hello wörld <|im_end|>")])
    (tensor,) = response.output_tensors
    expected = load_tokenizer(open_model_files(checkpoint)).encode("hello wörld <|im_end|>")
    assert (tensor.name, tensor.values.tolist()) == ("input_ids", expected)
    assert tensor.values.dtype == np.int64


@pytest.mark.parametrize("prompt", ["hello", "the quick brown fox", "wörld"])
def test_ensemble_answers_as_the_plain_model(ask: Ask, plain: Any, prompt: str) -> None:
    whole = Request(text_input=prompt, exclude_input_in_output=True, sampling_parameters=sampling())
    plain.execute([whole])
    text = whole.sender.text()
    (one,) = ask(text_input=prompt, sampling_parameters=sampling())
    assert one["text_output"].decode() == text != ""
    assert one["num_output_tokens"] == 40 and one["finish_reason"] == b"length"
    # Random tokens are parts of characters, which become whole in later responses.
    parts = ask(text_input=prompt, stream=True, sampling_parameters=sampling())
    assert len(parts) > 3
    assert b"".join(part["text_output"] for part in parts).decode() == text
    assert sum(part["num_output_tokens"] for part in parts) == 40
    assert [bool(part["finish_reason"]) for part in parts] == [False] * (len(parts) - 1) + [True]


def test_stream_of_the_ensemble_may_be_longer_than_its_context(ask: Ask) -> None:
    options = sampling(max_tokens=200)
    (one,) = ask(text_input="fox", sampling_parameters=options)
    parts = ask(text_input="fox", stream=True, sampling_parameters=options)
    assert b"".join(part["text_output"] for part in parts) == one["text_output"]


def test_stop_token_and_special_tokens_of_the_ensemble_are_as_in_the_plain_model(
    ask: Ask, plain: Any
) -> None:
    # Each id is once among those that end the answer.
    stopped = 0
    for stop in range(0, 512, 16):
        parameters = sampling(stop_token_ids=list(range(stop, stop + 16)), ignore_eos=False)
        shown = json.dumps(json.loads(parameters) | {"skip_special_tokens": False})
        for options in (parameters, shown):
            same = Request(
                text_input="hello", exclude_input_in_output=True, sampling_parameters=options
            )
            plain.execute([same])
            (one,) = ask(text_input="hello", sampling_parameters=options)
            assert one["text_output"].decode() == same.sender.text()
            stopped += one["finish_reason"] == b"stop"
    assert stopped > 0


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"stop": ["x"]}, "stop is not supported in an ensemble"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output is not supported"),
        ({"n": 2}, "n is not supported in an ensemble"),
        ({"logprobs": 1}, "logprobs is not supported in this protocol"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_request_that_an_ensemble_cannot_answer_fails_with_a_reason(
    ask: Ask, parameters: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        ask(text_input="hello", sampling_parameters=json.dumps(parameters))


def test_cancelled_request_of_the_ensemble_ends_early(stages: dict[str, Any]) -> None:
    request = Request(
        input_ids=np.array([5, 6, 7]), stream=True, sampling_parameters=sampling(max_tokens=1900)
    )
    stages["chat_model"].execute([request])
    assert request.sender.sent.get(timeout=120) is not None
    request.sender.cancelled = True
    assert len(request.sender.responses()) < 1800


def test_existing_stage_is_not_overwritten(
    repository: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chat_detokenizer").mkdir()
    words = ["deploy", "triton", str(checkpoint), "-o", str(tmp_path), "--name", "chat"]
    assert run([*words, "--ensemble"]) == 5
    assert "chat_detokenizer exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["chat_detokenizer"]


def test_full_disk_leaves_no_stage(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Path.write_text

    def fail_late(path: Path, text: str, encoding: str) -> int:
        if path.parent.name == "tiny_detokenizer":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, encoding=encoding)

    monkeypatch.setattr(Path, "write_text", fail_late)
    words = ["deploy", "triton", str(checkpoint), "-o", str(tmp_path), "--name", "tiny"]
    assert run([*words, "--ensemble"]) == 4
    assert "The disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
