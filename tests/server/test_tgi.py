"""TGI's API through huggingface_hub's InferenceClient, and as its documentation has it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import ValidationError
from support.scripted_model import start_scripted_server, trigger
from support.server_process import LlmkitServer
from support.tgi_client import inference_client

from llmkit.runtime.server.http.http_errors import ApiError

KEY = "sk-tgi"
PROMPT = trigger("plain")  # to which the model writes "Just words."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("tgi")
    (folder / "keys").write_text(f"{KEY}\n")
    options = {"api_key_file": str(folder / "keys")}
    with start_scripted_server(folder, "hermes", key=KEY, **options) as running:
        yield running


@pytest.fixture(scope="module")
def inference(server: LlmkitServer) -> Iterator[huggingface_hub.InferenceClient]:
    with inference_client(server.url, KEY) as client:
        yield client


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_tgi_text_streamed_equals_the_full_one(
    inference: huggingface_hub.InferenceClient,
) -> None:
    assert inference.text_generation(PROMPT) == "Just words."
    assert "".join(inference.text_generation(PROMPT, stream=True)) == "Just words."
    whole = inference.text_generation(PROMPT, return_full_text=True)
    assert whole == f"{PROMPT}Just words."


def test_tgi_details_have_each_token(inference: huggingface_hub.InferenceClient) -> None:
    answer = inference.text_generation(
        PROMPT, details=True, decoder_input_details=True, top_n_tokens=2, seed=7
    )
    details = answer.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("eos_token", 5, 7)
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    *tokens, end = details.tokens
    assert (end.special, end.text) == (True, "")
    assert all(token.logprob <= 0 and not token.special for token in tokens)
    (prefill,) = details.prefill
    assert (prefill.text, prefill.logprob) == (PROMPT, None)
    assert [len(top) for top in details.top_tokens or []] == [2] * len(tokens)


def test_tgi_stream_has_an_event_for_each_token(
    inference: huggingface_hub.InferenceClient,
) -> None:
    parts = list(inference.text_generation(PROMPT, stream=True, details=True, top_n_tokens=1))
    assert [part.index for part in parts] == [1, 2, 3, 4, 5]
    assert "".join(part.token.text for part in parts) == "Just words."
    assert all(part.details is None and part.generated_text is None for part in parts[:-1])
    last = parts[-1]
    assert last.generated_text == "Just words."
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("eos_token", 5)
    assert last.details.input_length == 1
    assert [len(part.top_tokens or []) for part in parts] == [1, 1, 1, 1, 0]


def test_tgi_stop_sequence_is_part_of_the_text(
    inference: huggingface_hub.InferenceClient,
) -> None:
    answer = inference.text_generation(PROMPT, stop=["wor", "never"], details=True)
    assert answer.generated_text == "Just wor"
    assert answer.details is not None
    assert answer.details.finish_reason == "stop_sequence"
    parts = list(inference.text_generation(PROMPT, stop=["wor"], details=True, stream=True))
    assert "".join(part.token.text for part in parts) == parts[-1].generated_text == "Just wor"
    cut = inference.text_generation(PROMPT, max_new_tokens=2, details=True)
    assert cut.generated_text == "Just w"
    assert cut.details is not None
    assert cut.details.finish_reason == "length"


def test_tgi_samples_only_if_asked(inference: huggingface_hub.InferenceClient) -> None:
    greedy = {inference.text_generation("no script", max_new_tokens=8) for _ in range(3)}
    assert len(greedy) == 1
    sampled = {
        inference.text_generation("no script", max_new_tokens=8, do_sample=True, seed=seed)
        for seed in range(3)
    }
    assert len(sampled) == 3
    again = inference.text_generation("no script", max_new_tokens=8, do_sample=True, seed=0)
    assert again in sampled
    hot = inference.text_generation("no script", max_new_tokens=8, temperature=1.5, seed=0)
    assert hot not in greedy


def test_tgi_best_of_returns_the_likeliest(inference: huggingface_hub.InferenceClient) -> None:
    answer = inference.text_generation(
        "no script", max_new_tokens=4, do_sample=True, best_of=3, details=True
    )
    assert answer.details is not None
    others = answer.details.best_of_sequences or []
    assert len(others) == 2

    def mean(tokens: Any) -> float:
        values = [token.logprob for token in tokens if token.logprob is not None]
        return sum(values) / len(values) if values else -math.inf

    assert mean(answer.details.tokens) >= max(mean(other.tokens) for other in others)


def test_tgi_grammars_constrain_the_text(inference: huggingface_hub.InferenceClient) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"const": 1}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    for kind, value in (
        ("json", schema),
        ("json_schema", {"name": "x", "schema": schema}),
        ("json_schema", schema),
    ):
        grammar: Any = {"type": kind, "value": value}
        text = inference.text_generation("no script", grammar=grammar, max_new_tokens=60)
        assert json.loads(text)["a"] == 1
    digits: Any = {"type": "regex", "value": "[0-9]{3}"}
    assert inference.text_generation("no script", grammar=digits).isdigit()


def test_tgi_parameters_reach_the_engine(server: LlmkitServer) -> None:
    with server.client() as http:

        def text(**parameters: Any) -> Any:
            body = {"inputs": PROMPT, "parameters": {"details": True, **parameters}}
            answer = http.post("/generate", json=body)
            return answer.json()["generated_text"]

        assert text(repetition_penalty=1.1, frequency_penalty=0.1) == "Just words."
        assert text(top_k=5, top_p=0.9, temperature=0.3, typical_p=1.0) == "Just words."
        assert text(watermark=False, best_of=1, adapter_id="said") == "Just words."
        assert text(adapter_id="") == "Just words."
        whole = http.post("/generate", json={"inputs": "x" * 50 + PROMPT, "parameters": None})
        assert whole.json() == {"generated_text": "Just words."}
        cut = {"truncate": 1, "details": True, "decoder_input_details": True}
        answer = http.post("/generate", json={"inputs": "x" * 50 + PROMPT, "parameters": cut})
        assert len(answer.json()["details"]["prefill"]) == 1
        unknown = http.post("/generate", json={"inputs": PROMPT, "parameters": {"unheard": 1}})
        assert unknown.headers["x-llmkit-ignored"] == "parameters.unheard"


def test_tgi_routes_stream_or_not(server: LlmkitServer) -> None:
    body = {"inputs": PROMPT}
    with server.client() as http:
        *_, last = events(http.post("/generate_stream", json=body))
        assert last["generated_text"] == "Just words."
        assert http.post("/generate", json=body).json()["generated_text"] == "Just words."
        assert http.post("/", json=body).json() == [{"generated_text": "Just words."}]
        assert events(http.post("/", json=body | {"stream": True}))[-1] == last
        assert http.get("/health").status_code == 200
        assert http.get("/").headers["content-type"].startswith("text/html")
        info = http.get("/info").json()
        assert (info["max_total_tokens"], info["max_input_tokens"]) == (4096, 4095)
        assert (info["model_dtype"], info["model_device_type"]) == ("float32", "cpu")


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"typical_p": 0.5}, "parameters.typical_p"),
        ({"watermark": True}, "parameters.watermark"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"temperature": 9.0}, "parameters.temperature"),
        ({"top_p": 0.0}, "parameters.top_p"),
        ({"truncate": 0}, "parameters.truncate"),
        ({"seed": -1}, "parameters.seed"),
        ({"stop": "x"}, "parameters.stop"),
        ({"best_of": 2}, "parameters.best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "parameters.best_of"),
        ({"adapter_id": "unheard"}, "model"),
        ({"grammar": {"type": "regex", "value": {}}}, "parameters.grammar.value"),
        ({"grammar": {"type": "json", "value": "x"}}, "parameters.grammar.value"),
        ({"grammar": {"type": "ebnf", "value": "x"}}, "parameters.grammar.type"),
        ({"grammar": {"type": "regex", "value": "("}}, "guided_regex"),
    ],
)
def test_tgi_errors_name_the_parameter(
    server: LlmkitServer, parameters: dict[str, Any], param: str
) -> None:
    with server.client() as http:
        for path in ("/generate", "/"):
            answer = http.post(path, json={"inputs": "x", "parameters": parameters})
            assert answer.status_code == (404 if param == "model" else 400)
            error = answer.json()
            assert (error["param"], error["error_type"]) == (param, "validation")
            assert isinstance(error["error"], str)


def test_tgi_client_raises_its_own_errors(
    inference: huggingface_hub.InferenceClient, server: LlmkitServer
) -> None:
    with pytest.raises(ValidationError, match="typical_p"):
        inference.text_generation("x", typical_p=0.5)
    with pytest.raises(ValidationError, match="too short"):
        inference.text_generation("x" * 5000)
    with server.client() as http:
        for stream in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
            refused = http.post("/generate_stream", json={"inputs": "x", "parameters": stream})
            assert refused.status_code == 400
        empty = http.post("/generate", json={"inputs": ""})
        assert (empty.status_code, empty.json()["param"]) == (400, "inputs")
        assert http.get("/generate").json()["error_type"] == "validation"


@pytest.mark.parametrize(
    ("status", "error_type"),
    [(400, "validation"), (429, "overloaded"), (503, "overloaded"), (500, "generation")],
)
def test_tgi_error_types_follow_the_status(status: int, error_type: str) -> None:
    assert ApiError(status, "x").tgi_envelope()["error_type"] == error_type


def test_tgi_client_chats_without_a_models_name(
    inference: huggingface_hub.InferenceClient,
) -> None:
    say = [{"role": "user", "content": PROMPT}]
    whole = inference.chat_completion(say, max_tokens=9)
    assert whole.choices[0].message.content == "Just words."
    assert whole.model == "said"
    parts = inference.chat_completion(say, max_tokens=9, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Just words."
    assert inference.chat_completion(say, max_tokens=9, model="said").model == "said"


def test_tgi_async_client_streams(server: LlmkitServer) -> None:
    async def stream() -> list[str]:
        client = huggingface_hub.AsyncInferenceClient(server.url, token=KEY)
        return [text async for text in await client.text_generation(PROMPT, stream=True)]

    with inference_client(server.url, KEY):  # which lets the package reach this server
        assert "".join(asyncio.run(stream())) == "Just words."


def test_page_path_needs_a_key_for_posts(server: LlmkitServer) -> None:
    refused = httpx.post(server.url, json={"inputs": PROMPT})
    assert (refused.status_code, refused.json()["code"]) == (401, "invalid_api_key")
    assert httpx.get(server.url).status_code == 200
    assert httpx.head(server.url).status_code == 200
    with server.client() as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert "security" in paths["/"]["post"]
    assert "security" not in paths["/"]["get"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/audio/transcriptions"),
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/moderations"),
        ("GET", "/v1/files"),
        ("GET", "/v1/files/file-1/content"),
        ("POST", "/v1/batches"),
        ("DELETE", "/v1/assistants/a"),
        ("GET", "/v1/vector_stores"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("POST", "/api/pull"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/blobs/sha256:0"),
    ],
)
def test_refused_routes_say_what_is_not_supported(
    server: LlmkitServer, method: str, path: str
) -> None:
    with server.client() as http:
        answer = http.request(method, path)
        document = answer.json()
    error = document if path.startswith("/api/") else document["error"]
    assert (answer.status_code, error["code"]) == (404, "not_supported")
    message = error["error"] if path.startswith("/api/") else error["message"]
    assert "not " in message
    assert message.endswith(".")
