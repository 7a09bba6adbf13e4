"""OpenAI's Responses API through the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.openai_client import openai_client
from support.scripted_model import start_scripted_server, trigger

CITY = {"city": {"enum": ["Oslo"]}}
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": CITY,
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    {"type": "function", "name": "add", "parameters": {"type": "object"}},
]


@pytest.fixture(scope="module")
def scripted_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with start_scripted_server(tmp_path_factory.mktemp("responses"), "thinker") as server:
        yield openai_client(server)


def request_body(script: str, **more: Any) -> dict[str, Any]:
    return {"model": "said", "input": trigger(script), "temperature": 0, **more}


def bare(item: Any) -> Any:
    return item.model_dump(exclude={"id", "call_id"})


def answer_both_ways(client: openai.OpenAI, **body: Any) -> Any:
    """The full answer; checks that the streamed one is the same, except for ids."""
    whole = client.responses.create(**body)
    events = list(client.responses.create(**body, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert [bare(item) for item in last.response.output] == [bare(item) for item in whole.output]
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [bare(item) for item in done] == [bare(item) for item in whole.output]
    return whole


def test_responses_text_and_usage(scripted_client: openai.OpenAI) -> None:
    answer = answer_both_ways(
        scripted_client, **request_body("plain", instructions="Be brief.", metadata={"a": "b"})
    )
    assert (answer.object, answer.status, answer.output_text) == (
        "response",
        "completed",
        "Just words.",
    )
    assert (answer.instructions, answer.metadata, answer.temperature) == (
        "Be brief.",
        {"a": "b"},
        0,
    )
    shorter = scripted_client.responses.create(**request_body("plain"))
    assert shorter.usage.input_tokens < answer.usage.input_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_responses_stream_events(scripted_client: openai.OpenAI) -> None:
    events = [
        event.type.removeprefix("response.")
        for event in scripted_client.responses.create(**request_body("plain"), stream=True)
    ]
    once = [name for index, name in enumerate(events) if index == 0 or events[index - 1] != name]
    assert once == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    with scripted_client.responses.stream(model="said", input=trigger("plain")) as stream:
        assert stream.get_final_response().output_text == "Just words."


def test_responses_cut_off_answer_is_incomplete(scripted_client: openai.OpenAI) -> None:
    answer = answer_both_ways(scripted_client, **request_body("plain", max_output_tokens=1))
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 1


def test_responses_call_cut_off_is_incomplete(scripted_client: openai.OpenAI) -> None:
    forced = {"type": "function", "name": "get_weather"}
    body = request_body("think", tools=TOOLS, tool_choice=forced, parallel_tool_calls=False)
    _, whole = answer_both_ways(scripted_client, **body, max_output_tokens=200).output
    assert whole.status == "completed"
    cut = answer_both_ways(scripted_client, **body, max_output_tokens=40)
    assert cut.status == "incomplete"
    thought, call = cut.output
    assert (thought.type, thought.status) == ("reasoning", "completed")
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "incomplete")
    assert call.arguments and call.arguments != whole.arguments
    assert whole.arguments.startswith(call.arguments)


def test_responses_items_can_be_sent_back(scripted_client: openai.OpenAI) -> None:
    answer = answer_both_ways(scripted_client, **request_body("think", tools=TOOLS))
    thought, text, call = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "A call?")
    assert (text.type, text.content[0].text) == ("message", "Yes:")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 1})
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    result = {"type": "function_call_output", "call_id": call.call_id, "output": trigger("plain")}
    items = [
        {"role": "user", "content": "x"},
        *(item.model_dump(exclude_none=True) for item in answer.output),
        result,
    ]
    again = scripted_client.responses.create(model="said", input=items, tools=TOOLS, temperature=0)
    assert again.output_text == "Just words."


def test_responses_tool_choice_and_text_format(scripted_client: openai.OpenAI) -> None:
    named = scripted_client.responses.create(
        **request_body(
            "think", tools=TOOLS, tool_choice={"type": "function", "name": "get_weather"}
        )
    )
    assert [
        (item.name, item.arguments) for item in named.output if item.type == "function_call"
    ] == [("get_weather", '{"city": "Oslo"}')] or json.loads(named.output[-1].arguments) == {
        "city": "Oslo"
    }
    schema = {
        "type": "object",
        "properties": CITY,
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    shaped = scripted_client.responses.create(**request_body("think", text=form))
    assert json.loads(shaped.output_text) == {"city": "Oslo"}


def test_responses_accept_store_and_do_not_store(scripted_client: openai.OpenAI) -> None:
    assert (
        scripted_client.responses.create(**request_body("plain", store=True)).model_dump()["store"]
        is False
    )


def test_responses_take_reasoning_controls_that_mean_the_default(
    scripted_client: openai.OpenAI,
) -> None:
    raw = scripted_client.responses.with_raw_response.create(
        **request_body(
            "think",
            reasoning={"effort": "medium", "summary": "detailed"},
            text={"verbosity": "medium"},
            include=["file_search_call.results"],
        )
    )
    assert raw.headers["x-llmkit-ignored"] == "reasoning.effort, reasoning.summary, text.verbosity"
    assert [item.type for item in raw.parse().output] == ["reasoning", "message"]


def test_continue_final_message_knows_whether_reasoning_is_open(
    scripted_client: openai.OpenAI,
) -> None:
    def continued(begun: str) -> tuple[Any, Any]:
        message = (
            scripted_client.chat.completions.create(
                model="said",
                messages=[
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": begun},
                ],
                temperature=0,
                extra_body={"continue_final_message": True},
            )
            .choices[0]
            .message
        )
        return getattr(message, "reasoning_content", None), message.content

    assert continued("<think>\n" + trigger("plain")) == ("Just words.", "")
    assert continued("<think>a</think>" + trigger("plain")) == (None, "Just words.")
    # After an answer has begun, the mark is text.
    thought, text = continued("Well: " + trigger("think"))
    assert thought is None and text.startswith("<think>\nA call?")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported"),
        ({"conversation": "c"}, "conversation", "unsupported"),
        ({"background": True}, "background", "unsupported"),
        ({"truncation": "auto"}, "truncation", "unsupported"),
        ({"include": ["unheard"]}, "include.0", "unsupported"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [5]}, "input.0", "invalid_type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing_required_parameter"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0",
            "unsupported",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "unsupported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"instructions": 5}, "instructions", "invalid_type"),
    ],
)
def test_responses_refuse_wrong_requests(
    scripted_client: openai.OpenAI, fields: Any, param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        scripted_client.post("/responses", body=request_body("plain") | fields, cast_to=object)
    assert (caught.value.param, caught.value.code) == (param, code)
