"""Calls as the models of each dialect write them, cut anywhere: always valid JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json
from support.tool_call_texts import Call, rendered

from llmkit.runtime.server.text.output_parser import new_output_parser
from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)
from llmkit.runtime.server.text.tool_dialects import (
    DIALECTS,
    GEMMA4,
    GLM45,
    HARMONY,
    HERMES,
    LFM2,
    LLAMA3_JSON,
    MINIMAX_M2,
    PYTHONIC,
    QWEN3_CODER,
    ToolDialect,
)

CUTS = 200
BY_NAME = {dialect.name: dialect for dialect in DIALECTS}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "share": {"type": ["number", "null"]},
        "exact": {"type": "boolean"},
        "tags": {"type": "array"},
        "place": {"$ref": "#/$defs/place"},
    },
    "$defs": {"place": {"type": "object"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_weather_now", "parameters": SCHEMA}},
]


def read(dialect: ToolDialect, pieces: list[str], **options: Any) -> list[Any]:
    """The joined parts, calls as (name, arguments); every cut is checked for valid JSON."""
    parser = new_output_parser(dialect, TOOLS, **options)
    parts: list[OutputPart] = []
    for index, piece in enumerate([*pieces, ""]):
        parts = join_parts([*parts, *parser.feed(piece, final=index == len(pieces))])
        if parts and isinstance(parts[-1], ToolCallPart) and parts[-1].arguments:
            # Raises for what is not the beginning of valid JSON.
            from_json(parts[-1].arguments, allow_partial="trailing-strings")
    found: list[Any] = []
    for part in parts:
        if isinstance(part, ToolCallPart):
            arguments = json.loads(part.arguments) if part.is_complete else part.arguments
            found.append((part.name, arguments))
        else:
            found.append(part)
    return found


def cut(text: str, edges: list[int]) -> list[str]:
    ends = [*sorted(edges), len(text)]
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


PARIS: Call = (
    "get_weather",
    {
        "city": 'Par"is\\ \n{}[] é 🌍 <tool <|"',
        "days": -3,
        "share": 0.5,
        "exact": True,
        "tags": [1, {"x": None, "ü": ["}]"]}],
        "place": {"a": {"b": []}, "c": "d"},
    },
)
EMPTY: Call = ("get_weather_now", {})


@pytest.mark.parametrize("name", BY_NAME)
def test_dialect_is_read_alike_however_it_is_cut(name: str) -> None:
    dialect = BY_NAME[name]
    paris = PARIS
    if dialect is GEMMA4:  # its strings cannot have the beginning of their end at the end
        paris = ("get_weather", PARIS[1] | {"city": "Paris 🌍"})
    text = rendered(name, [paris, EMPTY, paris])
    expected: list[Any] = [paris, EMPTY, paris]
    if dialect is HARMONY:
        text = f"<|channel|>commentary<|message|>Well.<|end|><|start|>assistant{text}"
        expected.insert(0, TextPart("Well."))
    elif not dialect.whole_answer:
        text = f"Well. \n{text}"
        expected.insert(0, TextPart("Well."))
    assert read(dialect, [text]) == expected
    assert read(dialect, list(text)) == expected
    chance = random.Random(name)
    for _ in range(CUTS):
        edges = [chance.randrange(len(text) + 1) for _ in range(chance.randrange(1, 6))]
        assert read(dialect, cut(text, edges)) == expected


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.text("ab", min_size=1), values, max_size=2)
    ),
    max_leaves=6,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": st.text(st.characters(codec="utf-8", exclude_characters="<\r"), max_size=20),
        "days": st.integers(),
        "share": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "exact": st.booleans(),
        "tags": st.lists(JSON_VALUES, max_size=3),
        "place": st.dictionaries(st.text("ab", min_size=1), JSON_VALUES, max_size=2),
    },
)


@given(st.sampled_from(sorted(BY_NAME)), st.lists(ARGUMENTS, min_size=1, max_size=2), st.data())
@settings(max_examples=150)
def test_dialect_keeps_any_arguments(
    name: str, arguments: list[dict[str, Any]], data: st.DataObject
) -> None:
    calls: list[Call] = [("get_weather", one) for one in arguments]
    text = rendered(name, calls)
    if name == "gemma4" and text.count('<|"|>') % 2:
        return
    edges = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert read(BY_NAME[name], [text]) == calls
    assert read(BY_NAME[name], cut(text, edges)) == calls


@pytest.mark.parametrize("name", BY_NAME)
def test_dialect_keeps_calls_of_other_tools_as_text(name: str) -> None:
    dialect = BY_NAME[name]
    text = rendered(name, [("remove_files", {"city": "x"})])
    (part,) = read(dialect, list(text))
    assert part == TextPart('{"city": "x"}' if dialect is HARMONY else text)


@given(st.sampled_from(sorted(BY_NAME)), st.data())
@settings(max_examples=150)
def test_dialect_reads_broken_calls_alike_however_they_are_cut(
    name: str, data: st.DataObject
) -> None:
    text = rendered(name, [("get_weather", {"city": "a", "days": 1, "tags": [{"x": [2]}]}), EMPTY])
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    text = (
        text[:start] + data.draw(st.sampled_from(["", '"', "}", "<", "x", "\n", "]"])) + text[end:]
    )
    whole = read(BY_NAME[name], [text])
    assert read(BY_NAME[name], list(text)) == whole
    edges = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert read(BY_NAME[name], cut(text, edges)) == whole


@pytest.mark.parametrize("name", BY_NAME)
def test_dialect_ends_a_cut_call_incomplete(name: str) -> None:
    text = rendered(name, [("get_weather", {"city": "Paris", "days": 1})])
    text = text[: text.index("Paris") + 3]
    (call,) = read(BY_NAME[name], list(text))
    assert call[0] == "get_weather"
    assert json.loads(call[1] + '"}') == {"city": "Par"}


@pytest.mark.parametrize(
    ("dialect", "text", "parts"),
    [
        (
            QWEN3_CODER,
            "<function=get_weather>\n<parameter=days>\nmany\n</parameter>\n</function>",
            [("get_weather", {"days": "many"})],
        ),
        (
            QWEN3_CODER,
            "<tool_call>\n<function=get_weather>\n<parameter=exact>\nTrue\n</parameter>\n"
            "<parameter=other>\n5\n</parameter>\n</function>\n</tool_call>",
            [("get_weather", {"exact": True, "other": "5"})],
        ),
        (
            GLM45,
            "<tool_call>get_weather<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>",
            [("get_weather", {"days": 2})],
        ),
        (
            MINIMAX_M2,
            '<minimax:tool_call><invoke name="get_weather"></invoke></minimax:tool_call>Done.',
            [("get_weather", {}), TextPart("Done.")],
        ),
        (
            LFM2,
            "<|tool_call_start|>[get_weather(city='a' \"b\\x41\\u00e9\", "
            "tags=(1, 2.50, 1e3, -0x10))]<|tool_call_end|>Done.",
            [
                ("get_weather", {"city": "abAé", "tags": [1, 2.5, 1000.0, -16]}),
                TextPart("Done."),
            ],
        ),
        (PYTHONIC, "[get_weather(1)]", [TextPart("[get_weather(1)]")]),
        (PYTHONIC, "[1, 2] are numbers", [TextPart("[1, 2] are numbers")]),
        (
            HARMONY,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
            " to=functions.get_weather<|channel|>commentary json<|message|>{}",
            [ReasoningPart("Hm."), ("get_weather", {})],
        ),
        (
            HARMONY,
            "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>"
            "B<|end|><|start|>assistant<|channel|>final<|message|>C<|return|>",
            [ReasoningPart("A\n\nB"), TextPart("C")],
        ),
        (
            HERMES,
            '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": '
            '{"days": 2}}}</tool_call>',
            [("get_weather", {"days": 2})],
        ),
        (
            LLAMA3_JSON,
            '{"type": "function", "name": "get_weather", "parameters": {"days": 2}}',
            [("get_weather", {"days": 2})],
        ),
        # The mark before is missing, which ends the call, too.
        (
            QWEN3_CODER,
            "<tool_call><function=get_weather><parameter=days>2</parameter></tool_call>Done.",
            [("get_weather", {"days": 2}), TextPart("Done.")],
        ),
        (HARMONY, "just words", [TextPart("just words")]),
        (HARMONY, "<|channel|>final<|message|>to=me <b>", [TextPart("to=me <b>")]),
    ],
)
def test_dialect_reads_what_models_write(dialect: ToolDialect, text: str, parts: list[Any]) -> None:
    assert read(dialect, [text]) == parts
    assert read(dialect, list(text)) == parts


LAST_MARKS = {
    QWEN3_CODER: "<tool_call>\n<function=get_weather>\n<parameter=days>\n2\n</parameter>\n",
    GLM45: "<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>",
    MINIMAX_M2: '<minimax:tool_call>\n<invoke name="get_weather">\n'
    '<parameter name="days">2</parameter>\n</inv',
    HARMONY: " to=functions.get_weather<|channel|>commentary json<|message|>",
}


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("dialect", LAST_MARKS, ids=lambda dialect: dialect.name)
def test_dialect_call_without_its_last_marks_is_complete(
    dialect: ToolDialect, is_cut: bool
) -> None:
    """If the model ended the answer there; more arguments might follow where a limit did."""
    for pieces in ([LAST_MARKS[dialect]], list(LAST_MARKS[dialect])):
        parser = new_output_parser(dialect, TOOLS)
        parts = [part for piece in pieces for part in parser.feed(piece)]
        calls = join_parts([*parts, *parser.feed("", final=True, is_cut=is_cut)])
        assert parser.num_tool_calls == (not is_cut)
        if dialect is HARMONY and is_cut:
            assert calls == []
            continue
        (call,) = calls
        assert isinstance(call, ToolCallPart)
        assert call.is_complete != is_cut
        expected = "{}" if dialect is HARMONY else '{"days": 2}'
        assert call.arguments == (expected.removesuffix("}") if is_cut else expected)


def test_dialect_streams_strings_before_they_end() -> None:
    for name, dialect in BY_NAME.items():
        text = rendered(name, [("get_weather", {"city": "x" * 1000})])
        parser = new_output_parser(dialect, TOOLS)
        parser.feed(text[: text.index("x" * 1000)])
        (part,) = parser.feed("x" * 500)
        assert isinstance(part, ToolCallPart), name
        assert len(part.arguments) >= 500 and not part.is_complete
