"""Sampling parameters, log probabilities and tokens of the API, through the `openai` client."""

from __future__ import annotations

import math
from typing import Any

import httpx
import openai
import pytest
from support.tiny_models import EOS_ID

MODEL = {"max_position_embeddings": 1024}
SERVER = {"served_model_name": "tiny", "max_num_seqs": 8, "kv_cache_memory": 2**25}
API_KEYS = ("key",)
COMPLETION: dict[str, Any] = {
    "model": "tiny",
    "prompt": "hello world",
    "max_tokens": 12,
    "temperature": 0,
}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello, how are you?"}],
    "max_tokens": 12,
    "temperature": 0,
}
EXTRA: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}


def ids_of(choice: Any) -> list[int]:
    ids: list[int] = choice.token_ids
    return ids


def test_n_answers_have_own_seeds_and_count_the_prompt_once(
    client: openai.OpenAI,
) -> None:
    params = COMPLETION | {"temperature": 1.0, "seed": 7}
    several = client.completions.create(**params, n=3, extra_body=EXTRA)
    alone = [
        client.completions.create(**params | {"seed": 7 + i}, extra_body=EXTRA).choices[0].text
        for i in range(3)
    ]
    assert [choice.text for choice in several.choices] == alone
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(alone)) == 3
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (2, 36)
    again = client.completions.create(**params, n=3, best_of=3, extra_body=EXTRA)
    assert [choice.text for choice in again.choices] == alone


def test_n_answers_without_a_seed_differ(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **CHAT | {"temperature": 1.0}, n=4, extra_body={"ignore_eos": True}
    )
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_seed_wraps_around_int64(client: openai.OpenAI) -> None:
    params = COMPLETION | {"temperature": 1.0}
    several = client.completions.create(**params, seed=2**63 - 1, n=2, extra_body=EXTRA)
    second = client.completions.create(**params, seed=-(2**63), extra_body=EXTRA)
    assert several.choices[1].text == second.choices[0].text


def test_n_answers_to_several_prompts_are_ordered_by_prompt(
    client: openai.OpenAI,
) -> None:
    params = COMPLETION | {"prompt": ["one two", "three"], "temperature": 1.0, "seed": 1, "n": 2}
    whole = client.completions.create(**params, extra_body=EXTRA)
    texts = [choice.text for choice in whole.choices]
    alone = client.completions.create(**params | {"prompt": "three"}, extra_body=EXTRA)
    assert texts[2:] == [choice.text for choice in alone.choices]
    streamed = [""] * 4
    for chunk in client.completions.create(**params, stream=True, extra_body=EXTRA):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_n_chat_answers_stream_a_role_each(client: openai.OpenAI) -> None:
    params = CHAT | {"temperature": 1.0, "seed": 1, "n": 2}
    whole = client.chat.completions.create(**params)
    texts = ["", ""]
    roles = [0, 0]
    for chunk in client.chat.completions.create(**params, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [1, 1]


def test_logprobs_of_a_chat_belong_to_its_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3, extra_body=EXTRA)
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert len(content) == 12
    text = b"".join(bytes(token.bytes or []) for token in content).decode(errors="replace")
    assert text.startswith((choice.message.content or "").rstrip("\ufffd"))
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert (
            token.token
            == token.top_logprobs[0].token
            == bytes(token.bytes or []).decode(errors="replace")
        )
        assert sorted((top.logprob for top in token.top_logprobs), reverse=True) == [
            t.logprob for t in token.top_logprobs
        ]
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1
    none = (
        client.chat.completions.create(**CHAT, logprobs=True, extra_body=EXTRA).choices[0].logprobs
    )
    assert none is not None and none.content is not None
    assert [token.top_logprobs for token in none.content] == [[]] * 12
    assert [token.logprob for token in none.content] == pytest.approx(
        [token.logprob for token in content]
    )
    assert client.chat.completions.create(**CHAT).choices[0].logprobs is None


def test_logprobs_streamed_equal_those_in_full(client: openai.OpenAI) -> None:
    params = CHAT | {"logprobs": True, "top_logprobs": 2, "stop": ["the"]}
    whole = client.chat.completions.create(**params).choices[0].logprobs
    assert whole is not None and whole.content is not None
    streamed = [
        token
        for chunk in client.chat.completions.create(**params, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert [token.token for token in streamed] == [token.token for token in whole.content]
    assert [token.logprob for token in streamed] == pytest.approx(
        [token.logprob for token in whole.content]
    )
    legacy = (
        client.completions.create(**COMPLETION, logprobs=2, extra_body=EXTRA).choices[0].logprobs
    )
    pieces = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(
            **COMPLETION, logprobs=2, extra_body=EXTRA, stream=True
        )
    ]
    assert legacy is not None
    assert [name for piece in pieces if piece for name in piece.tokens or []] == legacy.tokens
    assert [
        offset for piece in pieces if piece for offset in piece.text_offset or []
    ] == legacy.text_offset


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    choice = client.completions.create(**COMPLETION, logprobs=5, extra_body=EXTRA).choices[0]
    answer_logprobs = choice.logprobs
    assert answer_logprobs is not None
    assert (
        answer_logprobs.tokens
        and answer_logprobs.token_logprobs
        and answer_logprobs.top_logprobs
        and answer_logprobs.text_offset
    )
    assert (
        len(answer_logprobs.tokens)
        == len(answer_logprobs.token_logprobs)
        == len(answer_logprobs.top_logprobs)
        == len(answer_logprobs.text_offset)
        == 12
    )
    for token, own, top in zip(
        answer_logprobs.tokens,
        answer_logprobs.token_logprobs,
        answer_logprobs.top_logprobs,
        strict=True,
    ):
        assert top[token] == own == max(top.values())
        assert 1 <= len(top) <= 5
    whole = [token for token in answer_logprobs.tokens if not token.startswith("bytes:")]
    assert all(token in choice.text for token in whole)
    for token, offset in zip(answer_logprobs.tokens, answer_logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text.startswith(token, offset)
    zero = client.completions.create(**COMPLETION, logprobs=0, extra_body=EXTRA).choices[0].logprobs
    assert zero is not None and zero.top_logprobs is not None and zero.tokens is not None
    assert [list(top) for top in zero.top_logprobs] == [[token] for token in zero.tokens]


def test_logprobs_ignore_sampling_parameters(client: openai.OpenAI) -> None:
    """A sampled answer that is sent back as a prompt has the same log probabilities."""
    sampled = client.completions.create(
        **COMPLETION | {"prompt": [5, 6], "temperature": 0.7, "seed": 3},
        logprobs=1,
        extra_body=EXTRA,
    ).choices[0]
    assert sampled.logprobs is not None and sampled.logprobs.token_logprobs is not None
    answer_logprobs = (
        client.completions.create(
            **COMPLETION | {"prompt": [5, 6, *ids_of(sampled)], "max_tokens": 1},
            logprobs=1,
            echo=True,
        )
        .choices[0]
        .logprobs
    )
    assert answer_logprobs is not None and answer_logprobs.token_logprobs is not None
    assert answer_logprobs.token_logprobs[2:14] == pytest.approx(
        sampled.logprobs.token_logprobs, abs=2e-3
    )
    assert answer_logprobs.token_logprobs[0] is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_precedes_each_answer(client: openai.OpenAI, stream: bool) -> None:
    plain = client.completions.create(**COMPLETION).choices[0].text
    prompts: list[Any] = ["hello world", "one two"]
    texts = ["", ""]
    offsets: list[list[int]] = [[], []]
    params = COMPLETION | {"prompt": prompts, "echo": True, "logprobs": 1}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**params, stream=True)]
    else:
        choices = client.completions.create(**params).choices
    for choice in choices:
        texts[choice.index] += choice.text
        assert choice.logprobs is not None
        offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts[0] == "hello world" + plain
    assert texts[1].startswith("one two")
    assert offsets[0][0] == 0 and sorted(offsets[0]) == offsets[0]
    assert len("hello world") in offsets[0] or plain == ""


def test_echo_without_new_tokens_is_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        **COMPLETION | {"max_tokens": 0}, echo=True, logprobs=1, extra_body=EXTRA
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, ids_of(choice)) == ("hello world", "length", [])
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == "hello world"
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    ids = (
        client.completions.create(**COMPLETION | {"prompt": [5, 6], "max_tokens": 0}, echo=True)
        .choices[0]
        .text
    )
    assert len(ids) == 2
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(**COMPLETION | {"max_tokens": 0})


def test_prompt_logprobs_have_vllms_format(client: openai.OpenAI, http: httpx.Client) -> None:
    prompt = [5, 6, 7, 8]
    extra = EXTRA | {"prompt_logprobs": 2}
    choice = client.completions.create(**COMPLETION | {"prompt": prompt}, extra_body=extra).choices[
        0
    ]
    first, *others = choice.prompt_logprobs  # type: ignore[attr-defined]
    echoed = (
        client.completions.create(**COMPLETION | {"prompt": prompt}, echo=True, logprobs=0)
        .choices[0]
        .logprobs
    )
    assert echoed is not None and echoed.token_logprobs is not None
    assert first is None
    for token, entry, own in zip(prompt[1:], others, echoed.token_logprobs[1:], strict=False):
        assert entry[str(token)]["logprob"] == pytest.approx(own, abs=2e-3)
        assert {one["rank"] for one in entry.values()} >= {1, 2}
        assert 2 <= len(entry) <= 3
        assert entry[str(token)].keys() == {"logprob", "rank", "decoded_token"}
    chat = http.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in chat["choices"][0]


def test_logit_bias_forbids_and_forces(client: openai.OpenAI) -> None:
    free = ids_of(client.completions.create(**COMPLETION, extra_body=EXTRA).choices[0])
    banned = ids_of(
        client.completions.create(
            **COMPLETION, logit_bias={str(free[0]): -100}, extra_body=EXTRA
        ).choices[0]
    )
    assert free[0] not in banned
    forced = client.completions.create(
        **COMPLETION, logit_bias={"77": 100}, extra_body=EXTRA
    ).choices[0]
    assert ids_of(forced) == [77] * 12


def test_penalties_prevent_repetition(client: openai.OpenAI) -> None:
    bias = {
        "77": 3.0,
        "78": 2.9,
        "79": 2.8,
    }  # these three are likely; without a penalty one of them comes often
    params = COMPLETION | {"max_tokens": 40, "logit_bias": bias}
    for name, value in (
        ("frequency_penalty", 2.0),
        ("presence_penalty", 2.0),
        ("repetition_penalty", 3.0),
    ):
        free = ids_of(client.completions.create(**params, extra_body=EXTRA).choices[0])
        kept = ids_of(
            client.completions.create(**params, extra_body=EXTRA | {name: value}).choices[0]
        )
        assert len(set(kept)) > len(set(free)), name


def test_min_tokens_delay_every_end(client: openai.OpenAI) -> None:
    params = COMPLETION | {"logit_bias": {str(EOS_ID): 100}}
    at_once = client.completions.create(**params)
    assert at_once.usage is not None and at_once.usage.completion_tokens == 1
    later = client.completions.create(**params, extra_body={"min_tokens": 5})
    assert later.usage is not None and later.usage.completion_tokens == 6
    assert later.choices[0].finish_reason == "stop"
    text = client.completions.create(**COMPLETION, extra_body=EXTRA).choices[0].text
    stopped = client.completions.create(
        **COMPLETION, stop=[text[0]], extra_body=EXTRA | {"min_tokens": 11}
    )
    assert stopped.usage is not None and stopped.usage.completion_tokens >= 12


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    text = "hello <|im_end|> wörld"
    answer = http.post(
        "/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}
    ).json()
    assert answer.keys() == {"count", "max_model_len", "tokens", "token_strs"}
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert EOS_ID in answer["tokens"] and "<|im_end|>" in answer["token_strs"]
    assert answer["max_model_len"] == 1024
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}
    assert http.post("/tokenize", json={"prompt": text}).json()["tokens"] == answer["tokens"]
    for path, field in (("/tokenize", {"prompt": text}), ("/detokenize", {"tokens": [5]})):
        assert http.post(path, json={"model": "other", **field}).status_code == 404


def test_tokenize_of_messages_equals_a_chats_prompt(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": CHAT["messages"]}
    answer = http.post("/tokenize", json=body).json()
    assert answer["token_strs"] is None
    assert (
        answer["count"]
        == http.post("/v1/chat/completions", json=CHAT).json()["usage"]["prompt_tokens"]
    )
    shorter = http.post("/tokenize", json=body | {"add_generation_prompt": False}).json()
    assert shorter["tokens"] == answer["tokens"][: shorter["count"]]
    assert shorter["count"] < answer["count"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "invalid_value"),
        ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}, "prompt", "invalid_value"),
        ("/tokenize", {"prompt": 5}, "prompt", "invalid_type"),
        (
            "/tokenize",
            {"prompt": "x", "add_generation_prompt": True},
            "add_generation_prompt",
            "invalid_value",
        ),
        (
            "/tokenize",
            {"prompt": "x", "continue_final_message": True},
            "continue_final_message",
            "invalid_value",
        ),
        (
            "/tokenize",
            {"messages": CHAT["messages"], "continue_final_message": True},
            "continue_final_message",
            "invalid_value",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages.0.role",
            "invalid_value",
        ),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/detokenize", {"tokens": [512]}, "tokens", "invalid_token_id"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0", "invalid_value"),
        ("/detokenize", {"tokens": "x"}, "tokens", "invalid_type"),
    ],
)
def test_tokenize_refuses_wrong_requests(
    http: httpx.Client, path: str, fields: Any, param: str, code: str
) -> None:
    answer = http.post(path, json={"model": "tiny", **fields})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0}]
)
def test_sampling_parameters_reach_the_engine_from_every_endpoint(
    http: httpx.Client, narrow: dict[str, Any]
) -> None:
    def text(path: str, **fields: Any) -> Any:
        return http.post(path, json={"model": "tiny", **fields}).raise_for_status().json()

    messages = [{"role": "user", "content": "hello there"}]
    greedy = text("/v1/chat/completions", messages=messages, max_tokens=8, temperature=0)[
        "choices"
    ][0]["message"]
    hot = {"temperature": 1.0, **narrow}
    chat = text("/v1/chat/completions", messages=messages, max_tokens=8, **hot)["choices"][0][
        "message"
    ]
    assert chat["content"] == greedy["content"]
    if "min_p" not in narrow:
        said = text("/v1/messages", messages=messages, max_tokens=8, **hot)["content"]
        assert "".join(block["text"] for block in said) == greedy["content"]
        prompt = http.post("/tokenize", json={"model": "tiny", "messages": messages}).json()[
            "tokens"
        ]
        answer = text("/v1/completions", prompt=prompt, max_tokens=8, **hot)
        assert answer["choices"][0]["text"] == greedy["content"]
    if "top_k" not in narrow and "min_p" not in narrow:
        output = text("/v1/responses", input="hello there", max_output_tokens=8, **hot)["output"]
        assert (
            "".join(part["text"] for item in output for part in item["content"])
            == greedy["content"]
        )


def test_neutral_fields_change_nothing(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**CHAT).choices[0].message.content
    fields: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "n": 1,
        "tools": [],
    }
    extra = {"priority": 5, "echo": False, "best_of": 1}
    assert (
        client.chat.completions.create(**CHAT, **fields, extra_body=extra)
        .choices[0]
        .message.content
        == plain
    )
