"""Thinking in the three APIs: budgets, efforts, thoughts that go out and come back, agent loops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from support.scripted_model import trigger
from support.server_process import LlmkitServer, serving
from support.thinking_model import harmony_checkpoint, thinking_checkpoint

from llmkit.runtime.server.responses.messages_response import THINKING_SIGNATURE
from llmkit.runtime.server.schemas.client_nonces import strip_client_nonces
from llmkit.runtime.server.schemas.reasoning_options import (
    EFFORT_BUDGETS,
    ThinkingWishes,
    contradiction,
    plan_thinking,
)

HEADER = "x-llmkit-ignored"


@pytest.fixture(scope="module")
def thinking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("thinking")
    model = thinking_checkpoint(folder / "model")
    with serving(
        folder / "log", model, served_model_name="said", kv_cache_memory=2**26, max_num_seqs=8
    ) as server:
        yield server


@pytest.fixture(scope="module")
def chats(thinking_server: LlmkitServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{thinking_server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def messages(thinking_server: LlmkitServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=thinking_server.url, api_key="none", max_retries=0)


def user(script: str) -> list[Any]:
    return [{"role": "user", "content": trigger(script)}]


@pytest.mark.parametrize("field", ["thinking_token_budget", "thinking_budget"])
def test_chat_thinking_budget_closes_the_thought(chats: openai.OpenAI, field: str) -> None:
    body: dict[str, Any] = {
        "model": "said",
        "messages": user("endless"),
        "temperature": 0,
        "max_tokens": 40,
    }
    done = chats.chat.completions.create(**body, extra_body={field: 5, "n": 2, "logprobs": True})
    for choice in done.choices:
        thought = choice.message.model_extra or {}
        assert thought["reasoning"] == thought["reasoning_content"]
        assert choice.message.content == "Enough said."
        assert choice.finish_reason == "stop"
    assert done.usage is not None and done.usage.completion_tokens_details is not None
    # The opening mark is counted with the thought.
    assert done.usage.completion_tokens_details.reasoning_tokens == 2 * (1 + 5)
    free = chats.chat.completions.create(**body, extra_body={field: -1})
    assert free.choices[0].finish_reason == "length" and not free.choices[0].message.content
    whole = (free.choices[0].message.model_extra or {})["reasoning"]
    assert whole.startswith(thought["reasoning"]) and len(whole) > len(thought["reasoning"])
    streamed = ""
    for chunk in chats.chat.completions.create(**body, stream=True, extra_body={field: 5}):
        delta = chunk.choices[0].delta.model_extra or {}
        assert delta.get("reasoning") == delta.get("reasoning_content")
        streamed += delta.get("reasoning") or ""
    assert streamed == thought["reasoning"]


def test_thinking_budget_closes_every_thought_of_a_model_with_channels(tmp_path: Path) -> None:
    model = harmony_checkpoint(tmp_path / "model")
    options = {"served_model_name": "said", "kv_cache_memory": 2**26}
    with serving(tmp_path / "log", model, **options) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        body: dict[str, Any] = {
            "model": "said",
            "messages": user("endless"),
            "temperature": 0,
            "max_tokens": 40,
        }
        free = client.chat.completions.create(**body)
        done = client.chat.completions.create(**body, extra_body={"thinking_token_budget": 3})
    thought = (done.choices[0].message.model_extra or {})["reasoning"]
    assert not free.choices[0].message.content and free.choices[0].finish_reason == "length"
    assert (free.choices[0].message.model_extra or {})["reasoning"].startswith(thought)
    # The second thought was closed before its first token, and what follows is the answer.
    assert done.choices[0].message.content is not None
    assert done.choices[0].message.content.startswith(thought)
    assert done.usage is not None and done.usage.completion_tokens == 40


def test_effort_none_and_disabled_thinking_close_the_thought_at_once(
    chats: openai.OpenAI, messages: anthropic.Anthropic
) -> None:
    chat = chats.chat.completions.with_raw_response.create(
        model="said", messages=user("endless"), temperature=0, reasoning_effort="none"
    )
    assert HEADER not in chat.headers
    assert chat.parse().choices[0].message.content == "Enough said."
    response = chats.responses.create(
        model="said", input=trigger("endless"), temperature=0, reasoning={"effort": "none"}
    )
    assert [item.type for item in response.output] == ["message"]
    said = messages.messages.create(
        model="said",
        messages=user("endless"),
        max_tokens=40,
        extra_body={"temperature": 0},
        thinking={"type": "disabled"},
    )
    assert [block.type for block in said.content] == ["text"]


def test_messages_thinking_budget_and_signature(messages: anthropic.Anthropic) -> None:
    body: dict[str, Any] = {
        "model": "said",
        "messages": user("endless"),
        "max_tokens": 40,
        "extra_body": {"temperature": 0},
        "thinking": {"type": "enabled", "budget_tokens": 6},
    }
    said = messages.messages.with_raw_response.create(**body)
    assert HEADER not in said.headers
    whole = said.parse()
    thought, text = whole.content
    assert thought.type == "thinking" and thought.signature == THINKING_SIGNATURE
    assert text.type == "text" and text.text == "Enough said."
    with messages.messages.stream(**body) as stream:
        streamed = stream.get_final_message().content
    assert [block.to_dict() for block in streamed] == [block.to_dict() for block in whole.content]
    # What came back may be edited, and what another server wrote cannot be read.
    back = messages.messages.with_raw_response.create(
        model="said",
        max_tokens=8,
        extra_body={"temperature": 0},
        messages=[
            *user("endless"),
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "other", "signature": "theirs"},
                    {"type": "redacted_thinking", "data": "secret"},
                    {"type": "text", "text": "Enough said."},
                ],
            },
            *user("final"),
        ],
    )
    assert back.headers[HEADER] == "messages.1.content.1"


def test_messages_context_management_clears_thinking(messages: anthropic.Anthropic) -> None:
    def tokens(keep: Any) -> int:
        turns: list[Any] = []
        for word in ("one", "two", "three"):
            turns += user("final")
            thinking = {"type": "thinking", "thinking": f"{word} " * 9, "signature": "x"}
            turns.append(
                {"role": "assistant", "content": [thinking, {"type": "text", "text": "y"}]}
            )
        edit: dict[str, Any] = {"type": "clear_thinking_20251015", "keep": keep}
        return messages.messages.count_tokens(
            model="said",
            messages=[*turns, *user("final")],
            extra_body={"context_management": {"edits": [edit]}},
        ).input_tokens

    kept = [tokens({"type": "thinking_turns", "value": count}) for count in (1, 2, 3)]
    assert kept[0] < kept[1] < kept[2] == tokens("all")
    with pytest.raises(anthropic.BadRequestError, match="thinking_turns"):
        tokens({"type": "thinking_turns", "value": 0})


def test_responses_carry_reasoning(chats: openai.OpenAI) -> None:
    def ask(items: Any, **fields: Any) -> Any:
        return chats.responses.create(model="said", input=items, temperature=0, **fields)

    first = ask(trigger("final"), include=["reasoning.encrypted_content"], store=False)
    thought, answer = first.output
    assert thought.content[0].text == "Both are here."
    item = thought.model_dump(exclude_none=True)
    question = {"role": "user", "content": trigger("final")}
    message = answer.model_dump(exclude_none=True)
    whole = ask([question, item, message, question]).usage.input_tokens
    # A client may send the item back without its text.
    carried = ask([question, {**item, "content": []}, message, question]).usage.input_tokens
    foreign = {**item, "content": [], "encrypted_content": "theirs"}
    without = ask([question, foreign, message, question]).usage.input_tokens
    assert whole == carried > without


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"enable_thinking": True, "reasoning_effort": "none"}, "reasoning_effort"),
        ({"enable_thinking": False, "reasoning_effort": "low"}, "reasoning_effort"),
        (
            {"chat_template_kwargs": {"reasoning_effort": "low"}, "reasoning_effort": "high"},
            "reasoning_effort",
        ),
        ({"thinking_budget": 3, "thinking_token_budget": 4}, "thinking_budget"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
    ],
)
def test_contradictory_thinking_fields_are_refused(
    chats: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chats.chat.completions.create(model="said", messages=user("final"), extra_body=fields)
    assert refused.value.param == param


@pytest.mark.parametrize("system_kind", ["blocks", "text"])
def test_client_nonce_does_not_spoil_the_prefix_cache(
    messages: anthropic.Anthropic, system_kind: str
) -> None:
    def ask(nonce: str) -> tuple[Any, str | None]:
        head = "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli;"
        head += f" cch={nonce};"
        rest = f"You are a coding agent ({system_kind}). " + "Be brief. " * 40
        blocks: Any = [{"type": "text", "text": head}, {"type": "text", "text": rest}]
        raw = messages.messages.with_raw_response.create(
            model="said",
            system=blocks if system_kind == "blocks" else f"{head}\n{rest}",
            messages=user("final"),
            max_tokens=4,
            extra_body={"temperature": 0},
        )
        return raw.parse().usage, raw.headers.get(HEADER)

    first, name = ask("71fea")
    assert name == "system.x-anthropic-billing-header"
    second, _ = ask("0aaa9")
    assert second.cache_read_input_tokens >= 200
    assert first.input_tokens + first.cache_read_input_tokens == (
        second.input_tokens + second.cache_read_input_tokens
    )


def test_client_nonce_rule_leaves_other_text() -> None:
    header = "x-anthropic-billing-header: cc_version=2.1.9; cc_entrypoint=sdk-cli; cch=36ee5;"
    for rest in ("You are.", "", "cch=12345; stays", "\nA line of its own."):
        stripped, names = strip_client_nonces(f"{header}\n{rest}")
        assert (stripped, names) == (rest, ["x-anthropic-billing-header"])
    assert strip_client_nonces(header + "You are.")[0] == "You are."
    for other in (
        f"You are. {header}",
        f" {header}",
        "x-anthropic-billing-header: hello",
        "x-anthropic-billing-header",
        "cch=36ee5;",
    ):
        assert strip_client_nonces(other) == (other, [])


SWITCH = "{% if enable_thinking is defined and not enable_thinking %}x{% endif %}<think>"
LEVELS = "{{ reasoning_effort }}{% if reasoning_effort == 'none' or reasoning_effort == 'high' %}"
LEVELS += "{% endif %}"


@pytest.mark.parametrize(
    ("wishes", "template", "variables", "max_tokens", "met"),
    [
        (ThinkingWishes(effort="none"), SWITCH, {"enable_thinking": False}, None, True),
        (ThinkingWishes(effort="low"), SWITCH, {"enable_thinking": True}, 1024, True),
        (ThinkingWishes(effort="max"), SWITCH, {"enable_thinking": True}, None, True),
        (ThinkingWishes(effort="low", budget=9), SWITCH, {"enable_thinking": True}, 9, True),
        (ThinkingWishes(effort="low", budget=-1), SWITCH, {"enable_thinking": True}, None, True),
        (ThinkingWishes(effort="none"), "<think>", {}, 0, True),
        (ThinkingWishes(effort="medium"), LEVELS, {"reasoning_effort": "high"}, None, True),
        (ThinkingWishes(effort="none"), LEVELS, {"reasoning_effort": "none"}, None, True),
        (
            ThinkingWishes(effort="max"),
            "{{ reasoning_effort }}",
            {"reasoning_effort": "high"},
            None,
            True,
        ),
        (
            ThinkingWishes(budget=7),
            "{{ thinking_budget }}",
            {"thinking_budget": 7},
            7,
            True,
        ),
    ],
)
def test_thinking_wishes_become_variables_and_budgets(
    wishes: ThinkingWishes,
    template: str,
    variables: dict[str, Any],
    max_tokens: int | None,
    met: bool,
) -> None:
    plan = plan_thinking(wishes, template, can_close=True)
    assert (plan.variables, plan.max_tokens, bool(plan.met)) == (variables, max_tokens, met)
    assert not plan.unlimitable


def test_thinking_wishes_without_a_way_are_not_met() -> None:
    plan = plan_thinking(ThinkingWishes(False, "none", 5), "{{ messages }}", can_close=False)
    assert not plan.met and not plan.variables and plan.max_tokens is None
    assert plan_thinking(ThinkingWishes(budget=5), "<think>", can_close=False).unlimitable
    assert contradiction(ThinkingWishes(True, "none")) and not contradiction(ThinkingWishes(True))
    assert list(EFFORT_BUDGETS.values()) == sorted(EFFORT_BUDGETS.values())


@anthropic.beta_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    assert city == "Paris"
    return trigger("sum")


@anthropic.beta_tool
def add(a: int) -> str:
    """Add one."""
    assert a == 1
    return trigger("final")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_runner_thinks_calls_and_answers(messages: anthropic.Anthropic, stream: bool) -> None:
    sent: list[dict[str, Any]] = []
    client = messages.with_options(
        http_client=anthropic.DefaultHttpxClient(
            event_hooks={"request": [lambda request: sent.append(json.loads(request.content))]}
        )
    )
    runner = client.beta.messages.tool_runner(
        model="said",
        max_tokens=200,
        extra_body={"temperature": 0},
        thinking={"type": "enabled", "budget_tokens": 64},
        tools=[get_weather, add],
        messages=user("agent"),
        stream=stream,
    )
    turns = [turn.get_final_message() if stream else turn for turn in runner]
    kinds = [[block.type for block in turn.content] for turn in turns]
    assert kinds == [["thinking", "tool_use"], ["thinking", "tool_use"], ["thinking", "text"]]
    assert [turn.stop_reason for turn in turns] == ["tool_use", "tool_use", "end_turn"]
    assert turns[-1].content[-1].text == "Sunny, and 2."
    # The runner asks for a conversation that the server stores, and then sends it itself.
    assert ["thread" in body for body in sent] == [True, False, False, False]
    # The thoughts of earlier turns go back, with their signatures, and are part of the prompt.
    thoughts = [
        block
        for message in sent[-1]["messages"]
        if message["role"] == "assistant"
        for block in message["content"]
        if block["type"] == "thinking"
    ]
    assert [block["thinking"] for block in thoughts] == ["The weather first.", "Now the sum."]
    assert {block["signature"] for block in thoughts} == {THINKING_SIGNATURE}
    assert turns[2].usage.input_tokens + (turns[2].usage.cache_read_input_tokens or 0) > 100
