"""Forced and strict calls, and structured answers, in the newer dialects through the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from support.openai_client import openai_client
from support.scripted_model import TOOLS, scripted_checkpoint, trigger
from support.server_process import serving
from support.tool_call_texts import rendered

from llmkit.runtime.server.text.tool_dialects import (
    GLM45,
    HARMONY,
    MISTRAL,
    PYTHONIC,
    QWEN3_CODER,
    ToolDialect,
)

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} MARKS{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
)
SPECIAL = {
    HARMONY: HARMONY.special_tokens,
    MISTRAL: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    GLM45: ("<tool_call>", "</tool_call>"),
}
STRICT = [
    {"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS[:1]
]
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "side",
        "schema": {
            "type": "object",
            "properties": {"side": {"enum": ["left", "right"]}},
            "required": ["side"],
            "additionalProperties": False,
        },
    },
}


def start(folder: Path, dialect: ToolDialect, scripts: dict[str, str]) -> Any:
    """A server of a model that knows `scripts`, in which texts in SPECIAL are tokens."""
    marks = " ".join(mark for mark in dialect.template_marks if isinstance(mark, str))
    model = scripted_checkpoint(
        folder / "model",
        scripts,
        TEMPLATE.replace("MARKS", marks.replace("{", "{{ '{' }}")),
        SPECIAL.get(dialect, ()),
    )
    return serving(folder / "log", model, served_model_name="said", kv_cache_memory=2**26)


def ask(client: openai.OpenAI, script: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model="said",
        messages=[{"role": "user", "content": trigger(script)}],
        **{"temperature": 0, "max_tokens": 3000, **more},
    )


def check_answers(client: openai.OpenAI) -> None:
    """Checks the script "words" where calls are optional, and where an answer has a format."""
    words = ask(client, "words", tools=STRICT).choices[0]
    assert (words.message.content, words.message.tool_calls) == ("Just words.", None)
    for tools in ([], TOOLS[:1]):
        more = {"tools": tools, "parallel_tool_calls": False} if tools else {}
        shaped = ask(client, "words", response_format=FORMAT, **more).choices[0]
        if shaped.message.tool_calls:
            assert tools and not shaped.message.content
        else:
            assert json.loads(shaped.message.content)["side"] in ("left", "right")


# test_tool_call_grammars.py has the grammars of all dialects.
@pytest.mark.parametrize(
    "dialect",
    [
        HARMONY,
        PYTHONIC,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (QWEN3_CODER, GLM45, MISTRAL)),
    ],
    ids=lambda found: found.name,
)
def test_call_grammar_forces_valid_calls(tmp_path: Path, dialect: ToolDialect) -> None:
    # The model wants a city that the tool does not take.
    scripts = {"rome": rendered(dialect.name, [("get_weather", {"city": "Rome"})])}
    if dialect is not HARMONY:
        scripts["words"] = "Just words."
    with start(tmp_path, dialect, scripts) as server, openai_client(server) as client:
        named = {"type": "function", "function": {"name": "add"}}
        fields: dict[str, Any]
        for fields, name in (
            ({"tools": TOOLS[:1], "tool_choice": "required"}, "get_weather"),
            ({"tools": TOOLS, "tool_choice": named}, "add"),
            ({"tools": STRICT}, "get_weather"),
        ):
            answer = ask(client, "rome", parallel_tool_calls=False, **fields).choices[0]
            assert answer.finish_reason == "tool_calls"
            (call,) = answer.message.tool_calls
            assert call.function.name == name
            arguments = json.loads(call.function.arguments)
            if name == "add":
                assert arguments.get("a", 1) == 1
            else:
                assert arguments in ({"city": "Paris"}, {"city": "Oslo"})
        # At this temperature, the next token is nearly any that the grammar allows.
        drawn = ask(
            client,
            "rome",
            tools=TOOLS[:1],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=2,
            seed=1,
            n=3,
        )
        for choice in drawn.choices:
            (call,) = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls"
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
        if dialect is not HARMONY:
            check_answers(client)
        if dialect is PYTHONIC:
            schema = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
            tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, "rome", tools=[tool], tool_choice="required")
            assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")
            assert "uniqueItems" in str(caught.value)


def test_call_grammar_keeps_answers_in_harmonys_final_channel(tmp_path: Path) -> None:
    scripts = {"words": "<|channel|>final<|message|>Just words."}
    with start(tmp_path, HARMONY, scripts) as server, openai_client(server) as client:
        check_answers(client)
