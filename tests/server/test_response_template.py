"""Dialects read from response templates; transformers' own parser reads the same answers."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llguidance import LLTokenizer
from transformers.utils.chat_parsing import parse_response

from llmkit.runtime.grammar_compiler import compile_grammar
from llmkit.runtime.server.text.dialect_detection import detect_chat_dialect
from llmkit.runtime.server.text.lark_grammar import lark_string
from llmkit.runtime.server.text.output_parser import new_output_parser
from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)
from llmkit.runtime.server.text.tool_call_grammar import tool_call_grammar

CUTS = 300
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
ARGUMENTS = {"city": "Zürich <b> \n{}", "days": 3}
JSON_ARGUMENTS = json.dumps(ARGUMENTS, ensure_ascii=False)
FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
XML = {"tag_pattern": r"<v k=(?P<key>[^>]+)>\s*(?P<value>.*?)\s*</v>"}
TWO_MARKS = {"tag_pattern": r"\[K\](?P<key>\w+)\[/K\]\s*\[V\](?P<value>.*?)\[/V\]"}
Field = dict[str, Any]


def json_field(**fields: Any) -> Field:
    return {"open": "<<call>>", "close": "<</call>>", "content": "json", "repeats": True, **fields}


FIELDS: dict[str, tuple[Field, str]] = {
    "json": (
        json_field(
            transform={
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.input}"},
            }
        ),
        f'<<call>>{{"name": "get_weather", "input": {JSON_ARGUMENTS}}}<</call>>',
    ),
    "list": (
        json_field(
            transform={"function": {"name": "{name}", "arguments": "{parameters}"}},
            transform_each=True,
        ),
        f'<<call>>[{{"name": "get_weather", "parameters": {JSON_ARGUMENTS}}}]<</call>>',
    ),
    "name and json": (
        {
            "open_pattern": r"\[\[use\s+(?P<name>\w+)\]\]\s*",
            "close_pattern": r"\[\[end\]\]",
            "content": "json",
            "repeats": True,
            "transform": FUNCTION,
        },
        f"[[use get_weather]]{JSON_ARGUMENTS}[[end]]",
    ),
    "name and parameters": (
        {
            "open_pattern": r"<run>\s*<f=(?P<name>[^>]+)>\s*",
            "close_pattern": r"\s*</f>\s*</run>",
            "content": "xml-inline",
            "content_args": XML,
            "repeats": True,
            "transform": FUNCTION,
        },
        "<run>\n<f=get_weather>\n<v k=city>\nZürich <b> \n{}\n</v>\n"
        "<v k=days>\n3\n</v>\n</f>\n</run>",
    ),
    "parameters with two marks": (
        {
            "open_pattern": r"@do (?P<name>\w+)\s*",
            "close": "@done",
            "content": "xml-inline",
            "content_args": TWO_MARKS,
            "repeats": True,
            "transform": FUNCTION,
        },
        "@do get_weather\n[K]city[/K][V]Zürich <b> \n{}[/V][K]days[/K]\n[V]3[/V]@done",
    ),
}


def template(field: Field, **others: Any) -> dict[str, Any]:
    thinking = {"open": "<mind>", "close": "</mind>", "content": "text"}
    fields = {"content": {"content": "text"}, "thinking": thinking, "tool_calls": field}
    return {"start_anchor": "assistant:", "fields": {**fields, **others}}


def read(field: Field, pieces: list[str]) -> list[Any]:
    """The joined parts of an answer, calls as (name, arguments)."""
    found = detect_chat_dialect({}, {"response_template": template(field)})
    parser = new_output_parser(found.tools, TOOLS, may_reason=True, reasoning=found.reasoning)
    parts: list[OutputPart] = []
    for index, piece in enumerate([*pieces, ""]):
        parts = join_parts([*parts, *parser.feed(piece, final=index == len(pieces))])
    return [
        (part.name, json.loads(part.arguments)) if isinstance(part, ToolCallPart) else part
        for part in parts
    ]


@pytest.mark.parametrize("shape", FIELDS)
def test_response_template_is_read_as_transformers_reads_it(shape: str) -> None:
    field, call = FIELDS[shape]
    answer = f"<mind>Hm, a [call]?</mind>Well.\n{call}\n{call}"
    message = parse_response(answer, template(field), prefix="assistant:", tools=TOOLS)
    first, second = message["tool_calls"]
    if shape == "list":  # a field that repeats has a list of each
        (first,), (second,) = first, second
    assert first == second
    assert first["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    expected: list[Any] = [
        ReasoningPart(message["thinking"]),
        TextPart("Well."),  # transformers drops text that follows a thought
        *[("get_weather", ARGUMENTS)] * 2,
    ]
    assert read(field, [answer]) == expected
    generator = random.Random(shape)
    for _ in range(CUTS):
        places = sorted(generator.choices(range(len(answer)), k=generator.randint(1, 20)))
        pieces = [answer[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]
        assert read(field, pieces) == expected


@pytest.mark.parametrize("shape", FIELDS)
def test_response_template_gives_a_grammar_of_its_calls(shape: str) -> None:
    field, call = FIELDS[shape]
    found = detect_chat_dialect({}, {"response_template": template(field)})
    assert found.tools is not None and found.tools_source == "response_template"
    grammar = tool_call_grammar(found.tools, TOOLS, parallel=True, optional=False, mark=lark_string)
    matcher = compile_grammar(LLTokenizer("byte"), grammar)

    def takes(text: str) -> bool:
        fresh = matcher.deep_copy()
        return fresh.consume_tokens(list(text.encode())) and bool(fresh.is_accepting())

    assert takes(call)
    assert not takes(call.replace("get_weather", "get_wether"))


@pytest.mark.parametrize(
    "changed",
    [
        {"content": "kv-lines"},
        {"open": ["<a>", "<b>"]},
        {"close": None, "close_pattern": r"(?P<x>\w)"},
        {"open": None, "open_pattern": "<a>|<b>"},
        {"open": None, "open_pattern": "<a+>"},
        {"open": None, "open_pattern": r"<a (?P<name>\w+"},
        {"transform": {"function": {"name": "{content.tool}", "arguments": "{content.input}"}}},
        {"transform": "{content}"},
        {"content": "xml-inline"},
    ],
)
def test_response_template_of_another_shape_is_left(changed: dict[str, Any]) -> None:
    field = {key: value for key, value in (json_field() | changed).items() if value is not None}
    found = detect_chat_dialect({}, {"response_template": template(field)})
    assert found.tools is None
    assert found.reasoning is not None and found.reasoning.start == "<mind>"


def test_response_template_without_marks_of_thoughts_has_none() -> None:
    field, _ = FIELDS["json"]
    pattern = {"open_pattern": "<mind (?P<kind>.*?)>", "close": "</mind>", "content": "text"}
    found = detect_chat_dialect({}, {"response_template": template(field, thinking=pattern)})
    assert found.tools is not None
    assert found.reasoning is None
