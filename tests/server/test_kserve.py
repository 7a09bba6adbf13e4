"""The Open Inference Protocol through Triton's clients, against the same completions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from support.server_process import LlmkitServer, held, serving, wait_for
from support.tiny_models import tiny_checkpoint
from tritonclient.utils import InferenceServerException

from llmkit.cli import main
from llmkit.common.errors import ShortageError
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.kserve.grpc_server import start_grpc_server
from llmkit.runtime.server.kserve.kserve_request import parse_generate_request, parse_infer_request
from llmkit.runtime.server.kserve.kserve_tensors import INPUTS
from llmkit.runtime.server.lifecycle import _start_grpc
from llmkit.runtime.server.serve_options import ServeOptions

KEY = "sk-kserve"
MODEL: dict[str, Any] = {"max_position_embeddings": 4096}
API_KEYS = (KEY,)
SERVER: dict[str, Any] = {
    "served_model_name": "tiny",
    "grpc_port": 0,
    "max_waiting": 4,
    "max_num_seqs": 8,
    "kv_cache_memory": 2**26,
    "stream_keep_alive": 0.1,
}
PROMPT = "the quick brown fox"
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
INFER = "/v2/models/tiny/infer"


def bearer() -> dict[str, str]:
    """The headers of a client; Triton's writes into them."""
    return {"authorization": f"Bearer {KEY}"}


def grpc_port(server: LlmkitServer) -> int:
    """The port that the server says, which it may do after it is ready."""
    return int(server.wait_for_line("gRPC is at").split()[-1])


@pytest.fixture
def over_http(server: LlmkitServer) -> Iterator[triton_http.InferenceServerClient]:
    with triton_http.InferenceServerClient(
        f"127.0.0.1:{server.port}", network_timeout=60
    ) as client:
        yield client


@pytest.fixture
def over_grpc(server: LlmkitServer) -> Iterator[triton_grpc.InferenceServerClient]:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{grpc_port(server)}") as client:
        yield client


@pytest.fixture(scope="module")
def expected(client: openai.OpenAI) -> str:
    """What a completion says."""
    request = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    return client.completions.create(**request, extra_body={"ignore_eos": True}).choices[0].text


def tensors(module: Any, binary: bool = True, **values: Any) -> list[Any]:
    inputs = []
    for name, value in values.items():
        kind = "BOOL" if isinstance(value, bool) else "BYTES"
        array = np.array([value], bool if kind == "BOOL" else object)
        tensor = module.InferInput(name, [1], kind)
        tensor.set_data_from_numpy(array, *([binary] if module is triton_http else []))
        inputs.append(tensor)
    return inputs


def text_of(result: Any, name: str = "text_output") -> str:
    values = result.as_numpy(name)
    assert values.shape == (1,)
    return str(values[0].decode() if isinstance(values[0], bytes) else values[0])


def text_inputs(**more: Any) -> dict[str, Any]:
    return {"text_input": PROMPT, "sampling_parameters": json.dumps(SAMPLING)} | more


def test_http_reports_the_server_and_its_models(
    over_http: triton_http.InferenceServerClient,
) -> None:
    assert over_http.is_server_live()  # health needs no key
    assert over_http.is_server_ready()
    assert not over_http.is_model_ready("tiny")
    assert over_http.is_model_ready("tiny", headers=bearer())
    assert over_http.is_model_ready("tiny", "1", headers=bearer())
    assert not over_http.is_model_ready("other", headers=bearer())
    assert not over_http.is_model_ready("tiny", "2", headers=bearer())
    assert over_http.get_server_metadata(headers=bearer())["name"] == "llmkit"
    model = over_http.get_model_metadata("tiny", headers=bearer())
    assert model["versions"] == ["1"]
    assert {one["name"]: one["datatype"] for one in model["inputs"]}["text_input"] == "BYTES"
    assert over_http.get_model_config("tiny", headers=bearer())["model_transaction_policy"] == {
        "decoupled": True
    }
    assert [one["name"] for one in over_http.get_model_repository_index(headers=bearer())] == [
        "tiny"
    ]


def test_statistics_count_requests_and_their_time(
    over_http: triton_http.InferenceServerClient,
    over_grpc: triton_grpc.InferenceServerClient,
    http: httpx.Client,
) -> None:
    def statistics() -> dict[str, Any]:
        document = over_http.get_inference_statistics("tiny", "1", headers=bearer())
        (model,) = document["model_stats"]
        return dict(model)

    before = statistics()
    started_ms = time.time() * 1e3
    body = {"model": "tiny", "prompt": PROMPT, "n": 2, **SAMPLING}
    http.post("/v1/completions", json=body).raise_for_status()
    after = statistics()
    assert (after["name"], after["version"]) == ("tiny", "1")
    assert after["inference_count"] - before["inference_count"] == 2
    # A step for each token of a choice. The choices share those that they run at the same time.
    assert 12 <= after["execution_count"] - before["execution_count"] <= 24
    assert started_ms - 1 <= after["last_inference"] <= time.time() * 1e3 + 1
    grown = {
        name: {key: after["inference_stats"][name][key] - duration[key] for key in duration}
        for name, duration in before["inference_stats"].items()
    }
    assert grown["success"]["count"] == grown["queue"]["count"] == 2
    assert grown["compute_infer"]["count"] == 2
    assert 0 < grown["compute_infer"]["ns"] <= grown["success"]["ns"] < 60e9
    assert grown["fail"] == {"count": 0, "ns": 0}

    over_rpc = over_grpc.get_inference_statistics("tiny", headers=bearer(), as_json=True)
    (model,) = over_rpc["model_stats"]
    assert int(model["inference_count"]) == after["inference_count"]
    assert (
        int(model["inference_stats"]["success"]["ns"]) == after["inference_stats"]["success"]["ns"]
    )
    assert len(over_grpc.get_inference_statistics(headers=bearer()).model_stats) == 1
    assert len(http.get("/v2/models/stats").json()["model_stats"]) == 1
    assert http.get("/v2/models/other/stats").status_code == 404
    assert "statistics" in http.get("/v2").json()["extensions"]


@pytest.mark.parametrize("binary", [True, False])
def test_infer_returns_what_a_completion_returns(
    over_http: triton_http.InferenceServerClient, expected: str, binary: bool
) -> None:
    inputs = tensors(triton_http, binary, **text_inputs())
    # The output contains the prompt, as with Triton's vLLM backend.
    assert text_of(over_http.infer("tiny", inputs, headers=bearer())) == PROMPT + expected
    packed = over_http.infer("tiny", inputs, headers=bearer(), request_compression_algorithm="gzip")
    assert text_of(packed) == PROMPT + expected
    inputs = tensors(
        triton_http, binary, **text_inputs(exclude_input_in_output=True, return_finish_reason=True)
    )
    assert (
        text_of(over_http.infer("tiny", inputs, "1", request_id="7", headers=bearer())) == expected
    )
    names = ("text_output", "num_output_tokens", "finish_reason")
    outputs = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in names]
    result = over_http.infer("tiny", inputs, request_id="7", outputs=outputs, headers=bearer())
    assert text_of(result) == expected
    assert text_of(result, "finish_reason") == "length"
    assert result.as_numpy("num_output_tokens").tolist() == [12]
    assert result.get_response()["id"] == "7"


def test_infer_takes_several_texts_and_answers_in_one_request(
    http: httpx.Client, expected: str
) -> None:
    texts = {
        "name": "text_input",
        "datatype": "BYTES",
        "shape": [2, 1],
        "data": [["hello"], [PROMPT]],
    }
    exclude = {"name": "exclude_input_in_output", "datatype": "BOOL", "shape": [1], "data": [True]}
    body = {"inputs": [texts, exclude], "parameters": SAMPLING | {"n": 2}}
    (output,) = http.post(INFER, json=body).json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("text_output", "BYTES", [4])
    assert output["data"][2:] == [expected, expected]


def test_generate_returns_the_same_text_streamed_and_not(http: httpx.Client, expected: str) -> None:
    path = "/v2/models/tiny/versions/1/generate"
    body = text_inputs(exclude_input_in_output=True, return_num_input_tokens=True)
    answer = http.post(path, json=body).json()
    tokens = len(http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"])
    assert answer == {
        "model_name": "tiny",
        "model_version": "1",
        "text_output": expected,
        "num_input_tokens": tokens,
    }
    nested = {
        "text_input": PROMPT,
        "id": "9",
        "parameters": SAMPLING | {"stream": True, "return_finish_reason": True},
    }
    with http.stream("POST", path + "_stream", json=nested) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]
    assert "".join(event["text_output"] for event in events) == expected
    assert len(events) > 1
    assert [event["triton_final_response"] for event in events] == [False] * (len(events) - 1) + [
        True
    ]
    assert {event["id"] for event in events} == {"9"}
    assert events[-1]["finish_reason"] == "length"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"text_input": PROMPT, "temperature": 9}, "temperature"),
    ({"text_input": PROMPT, "sampling_parameters": '{"top_p": 0}'}, "top_p"),
    ({"text_input": PROMPT, "sampling_parameters": "[]"}, "sampling_parameters"),
    ({"text_input": PROMPT, "sampling_parameters": "{" * 10_000}, "sampling_parameters"),
    ({"text_input": PROMPT, "sampling_parameters": {"top_p": 1}}, "sampling_parameters"),
    ({"text_input": PROMPT, "sampling_parameters": '{"n": 2}', "n": 2}, "n"),
    ({"text_input": PROMPT, "n": 2, "parameters": {"n": 2}}, "n"),
    ({"text_input": PROMPT, "parameters": 5}, "parameters"),
    ({"text_input": PROMPT, "logprobs": 2}, "logprobs"),
    ({"text_input": PROMPT, "model": "tiny"}, "model"),
    ({"text_input": PROMPT, "sequence_id": 3}, "sequence_id"),
    ({"text_input": PROMPT, "timeout": 1.5}, "timeout"),
    ({"text_input": PROMPT, "timeout": 10**400}, "timeout"),
    ({"text_input": PROMPT, "id": 5}, "id"),
    ({"text_input": PROMPT, "wrong": 1}, "wrong"),
    ({"text_input": 5}, "text_input"),
    ({"text_input": []}, "text_input"),
    ({"text_input": ""}, "prompt"),
    ({"stream": False}, "text_input"),
    ({"text_input": PROMPT, "stream": [True, False]}, "stream"),
    ({"text_input": PROMPT, "stream": True}, "stream"),
    (
        {"text_input": PROMPT, "stream": True, "exclude_input_in_output": False},
        "exclude_input_in_output",
    ),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_generate_refuses_wrong_requests(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    answer = http.post("/v2/models/tiny/generate", json=body)
    error = answer.json()
    assert (answer.status_code, error["param"]) == (400, param)
    assert isinstance(error["error"], str)  # the message, as this protocol has it


def tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hello"]} | fields


def infer_body(*inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"inputs": list(inputs)} | more


TEXT = tensor()


@pytest.mark.parametrize(
    ("body", "tail", "param"),
    [
        (infer_body(tensor(shape=[2])), b"", "text_input"),
        (infer_body(tensor(shape=[])), b"", "text_input"),
        (infer_body(tensor(shape=[-1])), b"", "inputs.0.shape.0"),
        (infer_body(tensor(datatype="FP32", data=[1.0])), b"", "text_input"),
        (infer_body(tensor(data=[5])), b"", "text_input"),
        (infer_body(TEXT, TEXT), b"", "text_input"),
        (infer_body(TEXT, tensor(name="image")), b"", "image"),
        (infer_body(TEXT, tensor(name="stream", datatype="BOOL", data=[True])), b"", "stream"),
        (infer_body(TEXT, outputs=[{"name": "logits"}]), b"", "outputs"),
        (infer_body(TEXT, parameters={"sequence_id": 5}), b"", "sequence_id"),
        (infer_body(TEXT, model="tiny"), b"", "model"),
        (infer_body(tensor(data=None)), b"", "text_input"),
        (infer_body(TEXT), b"rest", "inputs"),
        (
            infer_body(tensor(data=None, parameters={"binary_data_size": 9})),
            b"\4\0\0\0text",
            "text_input",
        ),
        (
            infer_body(tensor(data=None, parameters={"binary_data_size": 8})),
            b"\xff\0\0\0text",
            "text_input",
        ),
        (
            infer_body(tensor(data=None, parameters={"binary_data_size": 5})),
            b"\1\0\0\0\xff",
            "text_input",
        ),
        (infer_body(tensor(data=None, parameters={"binary_data_size": -1})), b"", "text_input"),
        (infer_body(tensor(data=None, parameters={"binary_data_size": True})), b"a", "text_input"),
    ],
)
def test_infer_refuses_wrong_requests(
    http: httpx.Client, body: dict[str, Any], tail: bytes, param: str
) -> None:
    head = json.dumps(body).encode()
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }
    answer = http.post(INFER, content=head + tail, headers=headers)
    assert (answer.status_code, answer.json()["param"]) == (400, param)


NUMBERS = st.sampled_from([-1, 0, 1, 4, 2**64, 10**400, 0.5, 1e300])
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.sampled_from(["", "x", "\x00", "{}", '{"n": 2}', "BYTES", "BOOL"])
)
OTHER_KEYS = (
    "id",
    "parameters",
    "inputs",
    "outputs",
    "name",
    "datatype",
    "shape",
    "data",
    "timeout",
    "binary_data_size",
    "binary_data_output",
    "sequence_id",
    "n",
    "priority",
)
KEYS = st.sampled_from([*INPUTS, *OTHER_KEYS])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=80)
@given(
    value=st.dictionaries(KEYS, VALUES, max_size=6),
    tensor=st.dictionaries(KEYS, VALUES),
    tail=st.binary(max_size=9),
)
def test_any_body_parses_to_a_completion_or_an_api_error(
    value: dict[str, Any], tensor: dict[str, Any], tail: bytes
) -> None:
    inputs = [TEXT, TEXT | {"name": "stream", "datatype": "BOOL"} | tensor]
    head = json.dumps(value | {"inputs": inputs}).encode()
    for read in (
        lambda: parse_infer_request("tiny", head + tail, len(head)),
        lambda: parse_generate_request("tiny", json.dumps({"text_input": "x"} | value).encode()),
        lambda: parse_generate_request("tiny", tail),
    ):
        with contextlib.suppress(ApiError):
            assert read().completion.prompts


@pytest.mark.parametrize("length", ["-1", "x", "9" * 30, "100000"])
def test_infer_refuses_a_wrong_json_length_header(http: httpx.Client, length: str) -> None:
    answer = http.post(
        INFER, json=infer_body(TEXT), headers={"inference-header-content-length": length}
    )
    assert (answer.status_code, answer.json()["param"]) == (400, "inference-header-content-length")


def test_http_checks_keys_and_model_names(server: LlmkitServer, http: httpx.Client) -> None:
    assert httpx.post(server.url + INFER, json=infer_body(TEXT)).status_code == 401
    assert httpx.get(server.url + "/v2/health/ready").status_code == 200
    for path in ("/v2/models/other/infer", "/v2/models/tiny/versions/2/infer"):
        answer = http.post(path, json=infer_body(TEXT))
        assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    assert (
        http.post(INFER, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    )


def test_grpc_reports_the_server_and_its_models(
    over_grpc: triton_grpc.InferenceServerClient,
) -> None:
    assert over_grpc.is_server_live()
    assert over_grpc.is_server_ready()
    assert over_grpc.is_model_ready("tiny", headers=bearer())
    assert not over_grpc.is_model_ready("other", headers=bearer())
    assert over_grpc.get_server_metadata(headers=bearer()).name == "llmkit"
    model = over_grpc.get_model_metadata("tiny", "1", headers=bearer())
    assert {one.name: (one.datatype, list(one.shape)) for one in model.outputs}["text_output"] == (
        "BYTES",
        [-1],
    )
    assert over_grpc.get_model_config(
        "tiny", headers=bearer()
    ).config.model_transaction_policy.decoupled
    assert [one.name for one in over_grpc.get_model_repository_index(headers=bearer()).models] == [
        "tiny"
    ]


def test_grpc_infer_returns_what_a_completion_returns(
    over_grpc: triton_grpc.InferenceServerClient, expected: str
) -> None:
    assert (
        text_of(over_grpc.infer("tiny", tensors(triton_grpc, **text_inputs()), headers=bearer()))
        == PROMPT + expected
    )
    inputs = tensors(triton_grpc, text_input=PROMPT, exclude_input_in_output=True)
    outputs = [
        triton_grpc.InferRequestedOutput(name) for name in ("num_output_tokens", "text_output")
    ]
    result = over_grpc.infer(
        "tiny", inputs, "1", outputs, "8", parameters=SAMPLING, headers=bearer()
    )
    assert text_of(result) == expected
    assert result.as_numpy("num_output_tokens").tolist() == [12]
    assert result.get_response().id == "8"


def stream_of(
    client: triton_grpc.InferenceServerClient,
    requests: list[dict[str, Any]],
    answers: int,
    **more: Any,
) -> list[tuple[Any, InferenceServerException | None]]:
    """So many answers to the requests of one stream, ids from "0" on."""
    inbox: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
    client.start_stream(lambda result, error: inbox.put((result, error)), headers=bearer())
    for index, request in enumerate(requests):
        client.async_stream_infer(
            "tiny", tensors(triton_grpc, **request), request_id=f"{index}", **more
        )
    found = list[tuple[Any, InferenceServerException | None]]()
    final = 0
    while final < answers:
        result, error = inbox.get(timeout=60)
        found.append((result, error))
        final += (
            error is not None
            or result.get_response().parameters["triton_final_response"].bool_param
        )
    client.stop_stream()
    return found


@pytest.mark.parametrize("empty", [False, True])
def test_grpc_stream_sends_the_text_in_parts(
    over_grpc: triton_grpc.InferenceServerClient, expected: str, empty: bool
) -> None:
    requests = [text_inputs(stream=True), text_inputs(stream=True), text_inputs()]
    found = stream_of(over_grpc, requests, 3, enable_empty_final_response=empty)
    assert all(error is None for _, error in found)
    texts: dict[str, list[str]] = {"0": [], "1": [], "2": []}
    for result, _ in found:
        response = result.get_response()
        texts[response.id] += [text_of(result)] if response.outputs else []
    assert ["".join(texts[name]) for name in "012"] == [expected, expected, PROMPT + expected]
    assert len(texts["0"]) > 1
    assert sum(not result.get_response().outputs for result, _ in found) == 3 * empty


def test_grpc_stream_has_no_keep_alive_comments(
    server: LlmkitServer, over_grpc: triton_grpc.InferenceServerClient, expected: str
) -> None:
    inbox: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
    with held(server.engine()):
        over_grpc.start_stream(lambda result, error: inbox.put((result, error)), headers=bearer())
        inputs = tensors(triton_grpc, **text_inputs(exclude_input_in_output=True))
        over_grpc.async_stream_infer("tiny", inputs)
        with pytest.raises(queue.Empty):
            inbox.get(timeout=5 * SERVER["stream_keep_alive"])
    text = ""
    is_final = False
    while not is_final:
        result, error = inbox.get(timeout=60)
        assert error is None
        text += text_of(result)
        is_final = result.get_response().parameters["triton_final_response"].bool_param
    over_grpc.stop_stream()
    assert text == expected


def test_grpc_stream_reports_wrong_requests_and_continues(
    over_grpc: triton_grpc.InferenceServerClient, expected: str
) -> None:
    wrong = {"text_input": PROMPT, "sampling_parameters": '{"temperature": 9}'}
    found = stream_of(over_grpc, [wrong, text_inputs(exclude_input_in_output=True)], 2)
    errors = [str(error) for _, error in found if error is not None]
    assert len(errors) == 1
    assert "temperature" in errors[0]
    assert "".join(text_of(result) for result, error in found if error is None) == expected


def test_grpc_errors_have_status_codes(over_grpc: triton_grpc.InferenceServerClient) -> None:
    def status(inputs: list[Any], model: str = "tiny", **headers: Any) -> str | None:
        with pytest.raises(InferenceServerException) as refused:
            over_grpc.infer(model, inputs, **{"headers": bearer()} | headers)
        code: str | None = refused.value.status()
        return code

    good = tensors(triton_grpc, **text_inputs())
    assert status(good, headers=None) == status(good, headers={"authorization": "Bearer no"})
    assert status(good, headers=None) == "StatusCode.UNAUTHENTICATED"
    assert status(good, "other") == "StatusCode.NOT_FOUND"
    assert (
        status(tensors(triton_grpc, text_input=PROMPT, stream=True))
        == "StatusCode.INVALID_ARGUMENT"
    )
    assert status(tensors(triton_grpc, image="x")) == "StatusCode.INVALID_ARGUMENT"
    assert (
        status(tensors(triton_grpc, text_input="x" * 9_000_000)) == "StatusCode.RESOURCE_EXHAUSTED"
    )
    with pytest.raises(InferenceServerException, match="API key"):
        over_grpc.get_model_metadata("tiny")


def test_grpc_client_that_disconnects_frees_its_blocks(
    server: LlmkitServer, over_grpc: triton_grpc.InferenceServerClient
) -> None:
    long = {
        "text_input": PROMPT,
        "stream": True,
        "sampling_parameters": json.dumps(SAMPLING | {"max_tokens": 4000}),
    }
    first: queue.Queue[Any] = queue.Queue()
    over_grpc.start_stream(lambda result, error: first.put(result or error), headers=bearer())
    over_grpc.async_stream_infer("tiny", tensors(triton_grpc, **long))
    assert text_of(first.get(timeout=60)) != ""
    over_grpc.stop_stream(cancel_requests=True)
    wait_for(lambda: server.metric("num_requests_running") == 0)


def test_grpc_reports_a_full_queue(
    server: LlmkitServer, over_grpc: triton_grpc.InferenceServerClient
) -> None:
    long = {
        "text_input": PROMPT,
        "stream": True,
        "sampling_parameters": json.dumps(SAMPLING | {"max_tokens": 4000}),
    }
    inbox: queue.Queue[Any] = queue.Queue()
    over_grpc.start_stream(
        lambda result, error: inbox.put(error) if error else None, headers=bearer()
    )
    try:
        for _ in range(
            11
        ):  # one less than the limit: what is over it waits for the stream's own others
            over_grpc.async_stream_infer("tiny", tensors(triton_grpc, **long))
        wait_for(
            lambda: (
                server.metric("num_requests_running") + server.metric("num_requests_waiting") == 11
            )
        )
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{grpc_port(server)}") as other:
            two = tensors(triton_grpc, text_input=PROMPT, sampling_parameters='{"n": 2}')
            with pytest.raises(InferenceServerException, match="queue is full") as refused:
                other.infer("tiny", two, headers=bearer())
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    finally:
        over_grpc.stop_stream(cancel_requests=True)
    wait_for(lambda: server.metric("num_requests_running") == 0)


def test_grpc_stream_finishes_while_the_server_drains(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    with serving(tmp_path / "log", model, grpc_port=0, kv_cache_memory=2**26) as server:
        inbox: queue.Queue[Any] = queue.Queue()
        sampling = json.dumps(SAMPLING | {"max_tokens": 100})
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{grpc_port(server)}") as client:
            client.start_stream(lambda result, error: inbox.put((result, error)))
            ask = {
                "text_input": PROMPT,
                "stream": True,
                "sampling_parameters": sampling,
                "return_finish_reason": True,
            }
            client.async_stream_infer("model", tensors(triton_grpc, **ask))
            inbox.get(timeout=60)
            with held(server.engine()):
                server.process.send_signal(signal.SIGTERM)
                wait_for(lambda: not client.is_server_ready())
                with pytest.raises(InferenceServerException) as refused:
                    client.infer("model", tensors(triton_grpc, text_input=PROMPT))
            assert refused.value.status() == "StatusCode.UNAVAILABLE"
            reason = ""
            while not reason:
                result, error = inbox.get(timeout=60)
                assert error is None
                reason = text_of(result, "finish_reason")
            client.stop_stream()
        assert reason == "length"
        assert server.process.wait(60) == 0


def self_signed(path: Path) -> Path:
    """A certificate of localhost and its key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    made = made.add_extension(
        x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
    )
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    certificate = made.sign(key, hashes.SHA256()).public_bytes(pem)
    path.write_bytes(certificate + key.private_bytes(pem, form, serialization.NoEncryption()))
    return path


def test_grpc_uses_tls_when_http_does(tmp_path: Path) -> None:
    pem = self_signed(tmp_path / "server.pem")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask() -> None:
        server, port = await start_grpc_server(
            app, ServeOptions("model", grpc_port=0, ssl_certfile=pem)
        )
        try:
            async with triton_grpc_aio.InferenceServerClient(
                f"localhost:{port}", ssl=True, root_certificates=str(pem)
            ) as client:
                assert await client.is_server_live()
            async with triton_grpc_aio.InferenceServerClient(f"localhost:{port}") as client:
                with pytest.raises(InferenceServerException):
                    await client.is_server_live()
        finally:
            await server.stop(0)

    asyncio.run(ask())


def test_missing_grpc_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    monkeypatch.delitem(sys.modules, "llmkit.runtime.server.kserve.grpc_server")
    with pytest.raises(ShortageError, match=r"pip install 'llmkit\[grpc\]'"):
        asyncio.run(_start_grpc(FastAPI(), ServeOptions("model", grpc_port=0)))


def test_grpc_port_in_use_is_reported_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.run(["serve", str(model), "--port", "0", "--grpc-port", str(port)]) == 4
    assert f"port {port} on 127.0.0.1 cannot be used for gRPC" in capsys.readouterr().err
