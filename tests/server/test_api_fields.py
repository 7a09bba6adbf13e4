"""Fields that real clients send, through those clients: what they do, and which are ignored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.openai_client import openai_client
from support.server_process import LlmkitServer, serving
from support.tiny_models import CHAT_TEMPLATE, EOS_ID

from llmkit.runtime.server.schemas.ignored_fields import (
    HEADER,
    MAX_HEADER_CHARS,
    IgnoredFields,
    IgnoredFieldsLog,
)

CONTEXT = 256
SERVER = {"served_model_name": "tiny", "kv_cache_memory": 2**24, "response_cache": 2**20}
API_KEYS = ("key",)
FORCED = 77  # a token that a bias makes the only answer
SPECIAL = 1  # <|im_start|>
USER: dict[str, Any] = {"role": "user", "content": "hello, how are you?"}
COMPLETION: dict[str, Any] = {
    "model": "tiny",
    "prompt": "hello world",
    "max_tokens": 6,
    "temperature": 0,
}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 6, "temperature": 0}
IDS = {"return_token_ids": True}
# A template of a model that reasons, and that shows what it gets.
THINKING_TEMPLATE = (
    CHAT_TEMPLATE + "{% for message in messages %}{{ message.reasoning_content }}{% endfor %}"
    "{% if enable_thinking is defined %}think: {{ enable_thinking }}{% endif %}"
)


def edit_model(path: Path) -> None:
    """Let the tokenizer add <|endoftext|> before a text, as many models' do."""
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, text],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def strict_server(model: Path) -> Iterator[LlmkitServer]:
    """A server with --strict-fields of a model whose template has thinking."""
    thinker = model.parent / "thinker"
    shutil.copytree(model, thinker)
    settings = json.loads((thinker / "tokenizer_config.json").read_text())
    (thinker / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": THINKING_TEMPLATE})
    )
    options = {"served_model_name": "tiny", "kv_cache_memory": 2**24, "strict_fields": True}
    with serving(model.parent / "strict-log", thinker, **options) as running:
        yield running


@pytest.fixture(scope="module")
def strict_client(strict_server: LlmkitServer) -> Iterator[openai.OpenAI]:
    with openai_client(strict_server) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(server: LlmkitServer) -> Any:
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0, timeout=60)


def complete(client: openai.OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A completion; `extra` are the fields that the client does not know."""
    return client.completions.create(**COMPLETION | fields, extra_body=IDS | (extra or {}))


def forced(token: int) -> dict[str, Any]:
    return {"logit_bias": {str(token): 100}, "max_tokens": 3}


def chat_tokens(http: httpx.Client, messages: list[Any], **fields: Any) -> list[int]:
    answer = http.post("/tokenize", json={"messages": messages, **fields}).raise_for_status()
    tokens: list[int] = answer.json()["tokens"]
    return tokens


def test_skip_special_tokens_false_shows_them(client: openai.OpenAI) -> None:
    assert complete(client, **forced(SPECIAL)).choices[0].text == ""
    shown = complete(client, {"skip_special_tokens": False}, **forced(SPECIAL))
    assert shown.choices[0].text == "<|im_start|>" * 3
    chat = client.chat.completions.create(
        **CHAT | forced(SPECIAL), extra_body={"skip_special_tokens": False}
    )
    assert chat.choices[0].message.content == "<|im_start|>" * 3


def test_skip_special_tokens_decides_where_a_stop_string_is_found(client: openai.OpenAI) -> None:
    """The response cache must not confuse the two: a cached answer that ends early never ends."""
    fields = {"stop": ["<|im_start|>"], "prompt": "stop at a special token", **forced(SPECIAL)}
    stopped = complete(client, {"skip_special_tokens": False}, **fields)
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 1)
    whole = complete(client, **fields)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 3)


@pytest.mark.parametrize("stream", [False, True])
def test_include_stop_str_in_output(client: openai.OpenAI, stream: bool) -> None:
    def text(extra: dict[str, Any], **fields: Any) -> str:
        answer = complete(client, extra, stream=stream, **fields)
        chunks = answer if stream else [answer]
        return "".join(chunk.choices[0].text for chunk in chunks)

    include = {"include_stop_str_in_output": True}
    piece = complete(client, **forced(FORCED) | {"max_tokens": 1}).choices[0].text
    assert piece
    stop = forced(FORCED) | {"stop": [piece * 2]}
    assert (text({}, **stop), text(include, **stop)) == ("", piece * 2)
    by_token = {"stop_token_ids": [FORCED]}
    assert text(by_token, **forced(FORCED)) == ""
    assert text(by_token | include, **forced(FORCED)) == piece
    # The end token is special: both fields together show it.
    assert text(include, **forced(EOS_ID)) == ""
    assert text(include | {"skip_special_tokens": False}, **forced(EOS_ID)) == "<|im_end|>"


def test_add_special_tokens_of_texts_and_chats(client: openai.OpenAI, http: httpx.Client) -> None:
    with_bos = complete(client).usage.prompt_tokens
    assert complete(client, {"add_special_tokens": False}).usage.prompt_tokens == with_bos - 1
    chat = [
        client.chat.completions.create(**CHAT, extra_body=extra).usage.prompt_tokens
        for extra in ({}, {"add_special_tokens": True})
    ]
    assert chat[1] == chat[0] + 1
    plain = chat_tokens(http, [USER])
    assert chat_tokens(http, [USER], add_special_tokens=True) == [0, *plain]
    embedding = [
        client.embeddings.create(
            model="tiny", input="hello", extra_body={"add_special_tokens": add}
        ).usage.prompt_tokens
        for add in (True, False)
    ]
    assert embedding[0] == embedding[1] + 1


def test_add_generation_prompt_false_leaves_it_out(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    answer = client.chat.completions.create(
        **CHAT, extra_body={"add_generation_prompt": False, **IDS}
    )
    prompt = chat_tokens(http, [USER], add_generation_prompt=False)
    assert len(prompt) < len(chat_tokens(http, [USER]))
    same = complete(client, prompt=prompt)
    assert answer.choices[0].token_ids == same.choices[0].token_ids  # type: ignore[attr-defined]


@pytest.mark.parametrize("begun", ["Once upon ", "e", "\n"])
def test_continue_final_message_leaves_it_open(
    client: openai.OpenAI, anthropic_client: Any, http: httpx.Client, begun: str
) -> None:
    """`e` and the line feed are in the text after the message, too."""
    messages = [USER, {"role": "assistant", "content": begun}]
    text = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n{begun}"
    same = complete(client, {"add_special_tokens": False}, prompt=text)
    answer = client.chat.completions.create(
        **CHAT | {"messages": messages},
        extra_body={"continue_final_message": True, "add_generation_prompt": False, **IDS},
    )
    assert answer.choices[0].token_ids == same.choices[0].token_ids  # type: ignore[attr-defined]
    tokens = chat_tokens(http, messages, continue_final_message=True)
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    # Anthropic's API always continues an assistant's message at the end.
    said = anthropic_client.messages.create(
        model="tiny", messages=messages, max_tokens=6, extra_body={"temperature": 0}
    )
    assert "".join(block.text for block in said.content) == same.choices[0].text
    counted = anthropic_client.messages.count_tokens(model="tiny", messages=messages)
    assert counted.input_tokens == len(tokens)


def test_cache_salt_separates_prefixes_and_responses(
    client: openai.OpenAI, anthropic_client: Any
) -> None:
    prompt = [9, 8, 7, 6] * 12

    def cached(**extra: Any) -> int:
        usage = complete(client, extra, prompt=prompt, temperature=1).usage
        count: int = usage.prompt_tokens_details.cached_tokens
        return count

    assert [cached(), cached(), cached(cache_salt="a"), cached(cache_salt="a")] == [0, 32, 0, 32]
    assert cached(cache_salt="b") == 0
    assert cached(cache_prompt=False) == cached(cache_prompt=False) == 0
    assert cached(cache_prompt=True) == 32

    def response_header(**extra: Any) -> str | None:
        raw = client.completions.with_raw_response.create(
            **COMPLETION | {"prompt": "salted"}, extra_body=extra
        )
        return raw.headers.get("x-llmkit-cache")

    salts = [{}, {}, {"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_prompt": False}]
    assert [response_header(**salt) for salt in salts] == ["miss", "hit", "miss", "hit", "miss"]
    for _ in range(2):  # the other endpoints take it, too
        said = anthropic_client.messages.create(
            model="tiny",
            messages=[{"role": "user", "content": "one two three four " * 5}],
            max_tokens=1,
            extra_body={"cache_salt": "m"},
        )
        output = client.responses.create(
            model="tiny", input="five six seven " * 8, extra_body={"cache_salt": "r"}
        )
        client.embeddings.create(model="tiny", input="x", extra_body={"cache_salt": "e"})
    assert said.usage.cache_read_input_tokens > 0
    assert output.usage is not None and output.usage.input_tokens_details.cached_tokens > 0


def test_truncate_prompt_tokens_keeps_the_end(client: openai.OpenAI, http: httpx.Client) -> None:
    ids = list(range(20, 60))
    cut = complete(client, {"truncate_prompt_tokens": 5}, prompt=ids)
    same = complete(client, prompt=ids[-5:])
    assert cut.usage.prompt_tokens == 5
    assert cut.choices[0].token_ids == same.choices[0].token_ids
    # Of a text the tokenizer's own token stays.
    text = "the quick brown fox jumps over the lazy dog"
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    echoed = complete(client, {"truncate_prompt_tokens": 4}, prompt=text, echo=True, logprobs=0)
    same = complete(client, prompt=[tokens[0], *tokens[-3:]])
    assert (echoed.usage.prompt_tokens, len(tokens) > 4) == (4, True)
    assert echoed.choices[0].token_ids == same.choices[0].token_ids
    assert echoed.choices[0].text.endswith("dog" + same.choices[0].text)
    assert echoed.choices[0].text.startswith(echoed.choices[0].logprobs.tokens[1])
    longer = complete(client, {"truncate_prompt_tokens": 999}, prompt=text)
    assert longer.usage.prompt_tokens == len(tokens)
    chat = client.chat.completions.create(**CHAT, extra_body={"truncate_prompt_tokens": 3, **IDS})
    same = complete(client, prompt=chat_tokens(http, [USER])[-3:])
    assert chat.choices[0].token_ids == same.choices[0].token_ids  # type: ignore[attr-defined]


def test_truncate_prompt_tokens_to_what_fits(client: openai.OpenAI) -> None:
    for new_tokens in (6, CONTEXT - 1):
        answer = complete(
            client, {"truncate_prompt_tokens": -1}, prompt=[5] * 400, max_tokens=new_tokens
        )
        assert answer.usage.prompt_tokens == CONTEXT - new_tokens
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, prompt=[5] * 400)
    assert refused.value.code == "context_length_exceeded"


def test_truncate_prompt_tokens_keeps_the_beginning_of_an_embedding(client: openai.OpenAI) -> None:
    def vector(given: Any, **extra: Any) -> tuple[int, list[float]]:
        answer = client.embeddings.create(
            model="tiny", input=given, encoding_format="float", extra_body=extra
        )
        return answer.usage.prompt_tokens, answer.data[0].embedding

    ids = list(range(20, 60))
    assert vector(ids, truncate_prompt_tokens=7) == vector(ids[:7])
    assert vector([5] * 400, truncate_prompt_tokens=-1)[0] == CONTEXT


def test_max_tokens_minus_one_fills_the_context(client: openai.OpenAI) -> None:
    prompt = [5] * (CONTEXT - 20)
    endless = {"ignore_eos": True}
    for fields, extra in (
        ({"max_tokens": -1}, {}),
        ({"max_tokens": None}, {"n_predict": -1}),
        ({"max_tokens": None}, {"max_completion_tokens": -1}),
    ):
        answer = complete(client, endless | extra, prompt=prompt, **fields)
        assert answer.usage.completion_tokens == 20
        assert answer.choices[0].finish_reason == "length"
    for fields in ({"max_tokens": -1}, {"max_tokens": None, "max_completion_tokens": -1}):
        chat = client.chat.completions.create(
            **CHAT | fields,
            extra_body=endless | {"truncate_prompt_tokens": CONTEXT - 20},
        )
        assert chat.usage is not None
        assert chat.usage.prompt_tokens + chat.usage.completion_tokens == CONTEXT


def test_llama_cpp_names_mean_the_same(client: openai.OpenAI) -> None:
    assert complete(client, {"n_predict": 3}, max_tokens=None).usage.completion_tokens == 3
    likely = {"logit_bias": {str(token): 4 for token in range(70, 75)}, "max_tokens": 24}
    plain, renamed, named = (
        complete(client, extra, **likely).choices[0].token_ids
        for extra in ({}, {"repeat_penalty": 3.0}, {"repetition_penalty": 3.0})
    )
    assert renamed == named != plain


@pytest.mark.parametrize("chat", [False, True])
def test_continuous_usage_stats_are_in_every_chunk(client: openai.OpenAI, chat: bool) -> None:
    fields = CHAT if chat else COMPLETION
    endpoint: Any = client.chat.completions if chat else client.completions

    def usages(**options: Any) -> list[Any]:
        stream = endpoint.create(
            **fields,
            stream=True,
            n=2,
            stream_options=options,
            extra_body={"ignore_eos": True, "logit_bias": {str(FORCED): 100}},
        )
        return [chunk.usage for chunk in stream]

    *running, final = usages(include_usage=True, continuous_usage_stats=True)
    assert None not in running
    prompt_tokens = final.prompt_tokens
    assert {usage.prompt_tokens for usage in running} == {prompt_tokens}
    counts = [usage.completion_tokens for usage in running]
    # Each chunk counts the tokens of its own answer.
    assert sorted(counts) == sorted([*range(1, 7)] * 2)
    assert [usage.total_tokens for usage in running] == [prompt_tokens + n for n in counts]
    assert final.completion_tokens == 12
    assert set(usages(include_usage=False, continuous_usage_stats=True)) == {None}
    assert set(usages(include_usage=True)[:-1]) == {None}


def test_reasoning_of_a_message_has_two_names(strict_server: LlmkitServer) -> None:
    with strict_server.client() as http:
        newer, older, none = (
            chat_tokens(http, [USER, {"role": "assistant", "content": "x", **fields}])
            for fields in ({"reasoning": "why"}, {"reasoning_content": "why"}, {})
        )
    assert newer == older != none


def test_enable_thinking_reaches_the_template(
    client: openai.OpenAI, strict_client: openai.OpenAI
) -> None:
    def prompt_tokens(asked: openai.OpenAI, **extra: Any) -> tuple[int, str | None]:
        raw = asked.chat.completions.with_raw_response.create(**CHAT, extra_body=extra)
        usage = raw.parse().usage
        assert usage is not None
        return usage.prompt_tokens, raw.headers.get(HEADER)

    on = prompt_tokens(strict_client, enable_thinking=True)
    assert on == prompt_tokens(strict_client, chat_template_kwargs={"enable_thinking": True})
    assert on[0] > prompt_tokens(strict_client)[0]
    # This template has no such variable.
    assert prompt_tokens(client, enable_thinking=True)[1] == "enable_thinking"


def test_unknown_fields_are_ignored_and_named(
    client: openai.OpenAI, anthropic_client: Any, http: httpx.Client, server: LlmkitServer
) -> None:
    def named(call: Any, **fields: Any) -> str | None:
        header: str | None = call.with_raw_response.create(**fields).headers.get(HEADER)
        return header

    plain = client.chat.completions.create(**CHAT).choices[0].message
    odd: Any = {
        **USER,
        "id": "msg_1",
        "foo": 1,
        "content": [
            {
                "type": "text",
                "text": USER["content"],
                "cache_control": {"type": "ephemeral"},
                "bar": None,
            }
        ],
    }
    raw = client.chat.completions.with_raw_response.create(
        **CHAT | {"messages": [odd]}, extra_body={"baz": {"deep": 1}, "cache_prompt": True}
    )
    assert raw.headers[HEADER] == "baz, messages.0.foo, messages.0.content.0.bar"
    assert raw.parse().choices[0].message == plain
    streamed = client.chat.completions.with_raw_response.create(
        **CHAT, stream=True, stream_options={"include_usage": True, "odd": 1}, extra_body={"baz": 1}
    )
    assert streamed.headers[HEADER] == "baz, stream_options.odd"
    assert list(streamed.parse())
    extra = {"extra_body": {"baz": 1}}
    assert named(client.chat.completions, **CHAT) is None
    assert named(client.completions, **COMPLETION, **extra) == "baz"
    assert named(client.embeddings, model="tiny", input="x", **extra) == "baz"
    item: Any = {"role": "user", "content": [{"type": "input_text", "text": "x", "a": 1}], "b": 2}
    assert named(client.responses, model="tiny", input=[item], max_output_tokens=2, **extra) == (
        "baz, input.0.b, input.0.content.0.a"
    )
    block = {"type": "text", "text": "x", "b": 1}
    assert (
        named(
            anthropic_client.messages,
            model="tiny",
            messages=[{"role": "user", "content": [block], "a": 1}],
            max_tokens=2,
            **extra,
        )
        == "baz, messages.0.a, messages.0.content.0.b"
    )
    for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        answer = http.post(path, json=fields | {"baz": 1}).raise_for_status()
        assert answer.headers[HEADER] == "baz"
    # An error of a request that was read names them, too.
    refused = http.post("/v1/completions", json=COMPLETION | {"prompt": [5] * 999, "baz": 1})
    assert (refused.status_code, refused.headers[HEADER]) == (400, "baz")
    log = server.log.read_text()
    assert log.count("the field baz in a request to /v1/chat/completions is ignored\n") == 1
    assert log.count("the field baz ") == 1
    assert log.count("the field messages.*.content.*.bar ") == 1


def test_unknown_fields_are_an_error_with_strict_fields(
    strict_client: openai.OpenAI, strict_server: LlmkitServer
) -> None:
    for fields, param in (
        ({"baz": 1}, "baz"),
        ({"messages": [{**USER, "foo": 1}]}, "messages.0.foo"),
        ({"stream": True, "stream_options": {"odd": 1}}, "stream_options.odd"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            strict_client.chat.completions.create(
                **CHAT | {"stream": fields.pop("stream", False)}, extra_body=fields
            )
        assert (refused.value.param, refused.value.code) == (param, "unknown_parameter")
    with strict_server.client() as http:
        schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert {schemas[name]["additionalProperties"] for name in ("ChatBody", "Message")} == {False}
    assert schemas["Message"]["properties"]["annotations"] == {"enum": [None, []]}


def test_reasoning_controls_have_no_effect_on_a_model_without_reasoning(
    client: openai.OpenAI, anthropic_client: Any
) -> None:
    chat = client.chat.completions.with_raw_response.create(
        **CHAT, reasoning_effort="high", verbosity="low"
    )
    assert chat.headers[HEADER] == "reasoning_effort, verbosity"
    output = client.responses.with_raw_response.create(
        model="tiny",
        input="x",
        max_output_tokens=2,
        reasoning={"effort": "high", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        text={"verbosity": "low"},
        context_management=[{"type": "compaction"}],
    )
    assert output.headers[HEADER] == (
        "reasoning.effort, reasoning.summary, text.verbosity, context_management"
    )
    said = anthropic_client.messages.with_raw_response.create(
        model="tiny",
        messages=[USER],
        max_tokens=2,
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low"},
        extra_body={"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
    )
    assert said.headers[HEADER] == (
        "context_management.edits.0, output_config.effort, thinking.type, thinking.budget_tokens"
    )


def test_reasoning_controls_reach_a_template_with_a_switch(
    strict_client: openai.OpenAI,
) -> None:
    effort = strict_client.chat.completions.with_raw_response.create(
        **CHAT, reasoning_effort="high"
    )
    assert HEADER not in effort.headers
    switch = strict_client.chat.completions.create(**CHAT, extra_body={"enable_thinking": True})
    assert effort.parse().usage.prompt_tokens == switch.usage.prompt_tokens
    quiet = strict_client.chat.completions.with_raw_response.create(**CHAT, verbosity="low")
    assert quiet.headers[HEADER] == "verbosity"
    # A completion has no template.
    complete(strict_client, {"reasoning_effort": "high"})


def test_ignored_fields_header_is_short_and_ascii() -> None:
    ignored = IgnoredFields()
    ignored.strict = False
    for index in range(100_000):
        ignored.add_unknown(("messages", index, f"né\r\n, {index}" + "x" * 99))
    assert ignored.header.isascii() and ignored.header.isprintable()
    assert len(ignored.header) <= MAX_HEADER_CHARS
    names = ignored.header.split(", ")
    assert names[0].startswith("messages.0.n%C3%A9%0D%0A%2C%200x") and names[0].endswith("...")
    assert names[-1] == f"and {100_000 - len(names) + 1} more"
    assert len(list(ignored.names())) < 1000
    lone = IgnoredFields()
    lone.add(("\ud800",))
    lone.add(("",))
    assert lone.header == '%3F, ""'


def test_ignored_fields_log_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    log = IgnoredFieldsLog()
    for index in range(3000):
        ignored = IgnoredFields()
        ignored.add((f"field{index % 1500}",))
        log.record(ignored, "/v1/completions")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1001
    assert lines[0] == ("llmkit serve: the field field0 in a request to /v1/completions is ignored")
    assert "others are not logged" in lines[-1]
