"""What a server of one model offers clients that know little of it: no name, its tokenizer."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest
from support.server_process import LlmkitServer

KEY = "any"  # none is needed, and the clients want one
SERVER = {"served_model_name": "said", "aliases": ["other"]}
USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": ""}])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [USER], "max_tokens": 2}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": [USER], "max_tokens": 2}),
        ("/v1/embeddings", {"input": "hello"}),
    ],
)
def test_model_is_optional_and_the_answer_names_it(
    http: httpx.Client, path: str, body: dict[str, object], given: dict[str, object]
) -> None:
    assert http.post(path, json=body | given).json()["model"] == "said"
    assert http.post(path, json=body | {"model": "other"}).json()["model"] == "other"
    assert http.post(path, json=body | {"model": "wrong"}).status_code == 404
    assert http.post(path, json=body | {"model": 3}).status_code == 400


def test_model_is_optional_for_streams_and_token_counts(
    server: LlmkitServer, http: httpx.Client
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        stream = client.chat.completions.create(
            model="", messages=[USER], max_tokens=2, stream=True
        )
        assert {chunk.model for chunk in stream} == {"said"}
    with anthropic.Anthropic(base_url=server.url, api_key=KEY) as of_messages:
        counted = of_messages.messages.count_tokens(model="", messages=[USER])
    tokens = http.post("/tokenize", json={"messages": [USER]}).json()["tokens"]
    assert counted.input_tokens == len(tokens)
    required = http.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]["required"]
    assert required == ["messages"]


def test_tokenizer_info_serves_the_remote_tokenizer_of_lm_eval(
    server: LlmkitServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

    url = f"{server.url}/v1/completions"
    assert check_remote_tokenizer_support(url)
    tokenizer = RemoteTokenizer(url)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("hello there")) == "hello there"
    prompt = tokenizer.apply_chat_template([USER])
    tokens = http.post("/tokenize", json={"messages": [USER]}).json()["tokens"]
    assert tokenizer.encode(prompt) == tokens
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lm = LocalCompletionsAPI(
        base_url=url, model="said", tokenizer_backend="remote", max_length=256, num_concurrent=1
    )
    assert lm.eot_token_id == tokenizer.eos_token_id
    ((total, greedy),) = lm._loglikelihood_tokens([(("a", "b"), tokens[:4], tokens[4:6])])
    answer = http.post(
        "/v1/completions",
        json={"prompt": tokens[:6], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0},
    ).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert total == pytest.approx(sum(answer[4:6]), rel=1e-6)
    assert greedy in (True, False)
    assert http.get("/tokenizer_info?model=other").json() == http.get("/tokenizer_info").json()
    assert http.get("/tokenizer_info?model=wrong").status_code == 404
    assert http.get("/tokenizer_info").json()["model_max_length"] == 256
    documented = http.get("/openapi.json").json()["paths"]["/tokenizer_info"]["get"]["parameters"]
    assert [(one["name"], one["in"], one["required"]) for one in documented] == [
        ("model", "query", False)
    ]
