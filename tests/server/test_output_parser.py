"""Tool calls as JSON objects, and thoughts, in the text of answers, however the text is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmkit.runtime.server.text.output_parser import new_output_parser
from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)
from llmkit.runtime.server.text.text_cursor import MAX_HELD_CHARS
from llmkit.runtime.server.text.tool_dialects import (
    HERMES,
    KIMI_K2,
    LLAMA3_JSON,
    MISTRAL_V3,
    THINK,
    JsonObjectCall,
    ToolDialect,
)

NAMES = ["get_weather", "add"]
CITY = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
SUM = '{"name": "add", "parameters": {"a": 1, "b": [2, "}]"]}}'
FORMATS = [HERMES, MISTRAL_V3, LLAMA3_JSON]


def tools(names: list[str]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


def read(
    pieces: list[str],
    call_format: ToolDialect | None = None,
    parallel: bool = True,
    may_reason: bool = False,
    starts_in_reasoning: bool = False,
    required: bool = False,
    strict: bool = False,
) -> list[Any]:
    """The parts of a text in `pieces`: adjacent ones of a kind joined, calls without ids.

    The arguments of a complete call are parsed; those of another stay text.
    """
    parser = new_output_parser(
        call_format,
        tools(NAMES),
        parallel,
        required,
        strict,
        may_reason,
        starts_in_reasoning,
        THINK,
    )
    parts: list[OutputPart] = [part for piece in pieces for part in parser.feed(piece)]
    parts += parser.feed("", final=True)
    found: list[Any] = []
    for part in join_parts(parts):
        if isinstance(part, ToolCallPart):
            assert part.is_first
            arguments = json.loads(part.arguments) if part.is_complete else part.arguments
            found.append((part.name, arguments))
        else:
            assert part.text
            found.append(part)
    return found


PARIS = ("get_weather", {"city": "Paris"})
ADD = ("add", {"a": 1, "b": [2, "}]"]})

CALLED = [
    (HERMES, f"<tool_call>\n{CITY}\n</tool_call>", [PARIS]),
    (
        HERMES,
        f"Let me see. \n<tool_call>{CITY}</tool_call>\n<tool_call>\n{SUM}\n</tool_call>\n",
        [TextPart("Let me see."), PARIS, ADD],
    ),
    (HERMES, f"<tool_call>{CITY}</tool_call>\n\nDone. ", [PARIS, TextPart("Done. ")]),
    (HERMES, f"<tool_call>{CITY}", [PARIS]),  # the last closer is often missing
    (HERMES, f"<tool_call>oh <tool_call>{CITY}</tool_call>", [TextPart("<tool_call>oh"), PARIS]),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>\\\\\\""}}</tool_call>',
        [("add", {"a": '</tool_call>\\"'})],
    ),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', [("add", {})]),
    (MISTRAL_V3, f"[TOOL_CALLS][{CITY}, {SUM}]", [PARIS, ADD]),
    (MISTRAL_V3, f"Well. [TOOL_CALLS] [{CITY}]", [TextPart("Well."), PARIS]),
    (LLAMA3_JSON, CITY, [PARIS]),
    (LLAMA3_JSON, f"<|python_tag|>{CITY}; {SUM} \n", [PARIS, ADD]),
]
NOT_CALLED = [
    (HERMES, "<tool_call>"),
    (HERMES, "a <tool_call b"),
    (HERMES, f"<tool_call>{CITY[:36]}"),
    (HERMES, '<tool_call>{"name": "add"} and more</tool_call>'[:25]),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (HERMES, f"{CITY}\n"),
    (HERMES, "<tool_call>[]</tool_call>"),
    (MISTRAL_V3, "[TOOL_CALLS] none"),
    (MISTRAL_V3, "[TOOL_CALLS][]"),
    (LLAMA3_JSON, '{"name": "add"} is how to ask.'),
    (LLAMA3_JSON, '{"name": "other", "parameters": {}}'),
    (LLAMA3_JSON, '{"answer": 42}\n'),
    (LLAMA3_JSON, f"I say {CITY}"),
    (LLAMA3_JSON, "<|python_tag|>print(1)"),
    (LLAMA3_JSON, " "),
]


# Calls that have begun when the model goes on with something else.
BEGUN = [
    (HERMES, f"<tool_call>{CITY[:-1]}", [PARIS]),
    (HERMES, f"<tool_call>{CITY} and more</tool_call>", [PARIS, TextPart("and more</tool_call>")]),
    (HERMES, f"<tool_call>{CITY}</tool_cal", [PARIS]),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call> ',
        [("add", '{"a": '), TextPart("NaN}}</tool_call> ")],
    ),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "b" "c"}}</tool_call> '
        f"<tool_call>{CITY}</tool_call>",
        [("add", '{"a": "b" '), TextPart('"c"}}</tool_call>'), PARIS],
    ),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 3000 + "]" * 3000 + "}}",
        [("add", '{"a": ' + "[" * 127), TextPart("[" * 2873 + "]" * 3000 + "}}")],
    ),
    (LLAMA3_JSON, f"{CITY} is how to ask.", [PARIS, TextPart("is how to ask.")]),
    (LLAMA3_JSON, f" {CITY};", [PARIS]),
    (
        MISTRAL_V3,
        f'[TOOL_CALLS][{CITY}, {{"name": "sub"}}]',
        [PARIS, TextPart(', {"name": "sub"}]')],
    ),
]


@pytest.mark.parametrize(("call_format", "text", "parts"), [*CALLED, *BEGUN])
def test_parser_finds_tool_calls(call_format: ToolDialect, text: str, parts: list[Any]) -> None:
    assert read([text], call_format) == parts
    assert read(list(text), call_format) == parts


@pytest.mark.parametrize(("call_format", "text"), NOT_CALLED)
def test_parser_keeps_lookalikes_unchanged(call_format: ToolDialect, text: str) -> None:
    assert read([text], call_format) == [TextPart(text)]
    assert read(list(text), call_format) == [TextPart(text)]


THOUGHTS = [
    ("<think>\nhm\nhm\n</think>\n\nYes.\n", False, [ReasoningPart("hm\nhm"), TextPart("Yes.\n")]),
    ("\n<think>\n\n</think>\n\nYes.", False, [TextPart("Yes.")]),
    ("<think>never ends", False, [ReasoningPart("never ends")]),
    ("\nhm\n</think>Yes.", True, [ReasoningPart("hm"), TextPart("Yes.")]),
    ("hm </thin", True, [ReasoningPart("hm </thin")]),
    ("I <think> so</think>", False, [TextPart("I <think> so</think>")]),
    ("<thin", False, [TextPart("<thin")]),
    (" \n", False, [TextPart(" \n")]),
    ("", True, []),
]


@pytest.mark.parametrize(("text", "starts_in_reasoning", "parts"), THOUGHTS)
def test_parser_separates_reasoning(text: str, starts_in_reasoning: bool, parts: list[Any]) -> None:
    assert read([text], may_reason=True, starts_in_reasoning=starts_in_reasoning) == parts
    assert read(list(text), may_reason=True, starts_in_reasoning=starts_in_reasoning) == parts


def test_parser_ignores_calls_in_reasoning() -> None:
    text = f"<think>I could <tool_call>{CITY}</tool_call></think><tool_call>{SUM}</tool_call>"
    expected = [ReasoningPart(f"I could <tool_call>{CITY}</tool_call>"), ADD]
    assert read(list(text), HERMES, may_reason=True) == expected


def test_parser_stops_after_one_call_without_parallel() -> None:
    for call_format, text in (
        (HERMES, f"a<tool_call>{CITY}</tool_call><tool_call>{SUM}</tool_call>b"),
        (LLAMA3_JSON, f"{CITY};{SUM}"),
    ):
        for pieces in ([text], list(text)):
            assert [
                part
                for part in read(pieces, call_format, parallel=False)
                if not isinstance(part, TextPart)
            ] == [PARIS]


def opener(call_format: ToolDialect) -> str:
    return call_format.section_start or call_format.call_start


def call_head(call_format: ToolDialect, name: str) -> str:
    assert isinstance(call_format.syntax, JsonObjectCall)
    return f'{{"name": "{name}", "{call_format.syntax.arguments_key}": '


def written_call(call_format: ToolDialect, name: str, arguments: str) -> str:
    return call_head(call_format, name) + arguments + "}"


OSLO = '{"city": "Oslo \\"<tool_call>\\"", "days": [1, {"x": "}; {"}]}'
TOTAL = '{"a": 1}'
# Two required calls as each format's grammar lets a model write them.
REQUIRED = {
    HERMES: "<tool_call>\n{}\n</tool_call>\n<tool_call>{}</tool_call>",
    MISTRAL_V3: "[TOOL_CALLS][{}, {}]",
    LLAMA3_JSON: "<|python_tag|>{}; {}",
}


@given(
    st.sampled_from(FORMATS),
    st.integers(0, 400),
    st.lists(st.integers(0, 400), max_size=6),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150)
def test_parser_required_call_cut_anywhere_is_a_call(
    call_format: ToolDialect, length: int, cuts: list[int], reasons: bool, has_opener: bool
) -> None:
    first = written_call(call_format, "get_weather", OSLO)
    text = REQUIRED[call_format].format(first, written_call(call_format, "add", TOTAL))
    if call_format is LLAMA3_JSON and not has_opener:
        text = text.removeprefix(opener(call_format))
    begins = text.index(first) + len(call_head(call_format, "get_weather"))
    second = text.index(TOTAL)
    text = text[: min(length, len(text))]
    thought = "<think>hm</think>\n" if reasons else ""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [thought] + [text[start:end] for start, end in itertools.pairwise(edges)]
    found = read(pieces, call_format, may_reason=reasons, required=True)
    assert read([thought + text], call_format, may_reason=reasons, required=True) == found
    assert read(list(thought + text), call_format, may_reason=reasons, required=True) == found
    if reasons:
        assert found.pop(0) == ReasoningPart("hm")
    expected: list[Any] = []
    # The name is known before it is complete: only one tool begins with "g", and one with "a".
    if len(text) >= begins + len(OSLO):
        expected.append(("get_weather", json.loads(OSLO)))
    elif '{"name": "g' in text:
        expected.append(("get_weather", text[begins:]))
    if len(text) >= second + len(TOTAL):
        expected.append(("add", json.loads(TOTAL)))
    elif '{"name": "a' in text:
        expected.append(("add", text[second:]))
    assert found == expected


@pytest.mark.parametrize("call_format", FORMATS)
def test_parser_strict_call_cut_anywhere_is_a_call(call_format: ToolDialect) -> None:
    before = "" if call_format is LLAMA3_JSON else "Sure. \n"
    first = written_call(call_format, "get_weather", OSLO)
    text = REQUIRED[call_format].format(first, written_call(call_format, "add", TOTAL))
    opener_end = len(before) + len(opener(call_format))
    text = before + text
    for length in range(len(text) + 1):
        cut = text[:length]
        found = read([cut], call_format, strict=True)
        assert read(list(cut), call_format, strict=True) == found
        if length < opener_end:  # other text may begin in the same way
            assert found == ([TextPart(cut)] if cut else [])
            continue
        if before:
            assert found.pop(0) == TextPart("Sure.")
        expected = read([cut[len(before) :]], call_format, required=True)
        if found != expected:  # the same before the second opener
            assert call_format is HERMES
            assert found.pop() == TextPart(cut[cut.rindex("<") :])
            assert opener(HERMES).startswith(cut[cut.rindex("<") :])
        assert found == expected
    other = before + opener(call_format) + "other"
    assert read([other], call_format, strict=True) == [TextPart(other)]


@pytest.mark.parametrize("call_format", FORMATS)
def test_parser_names_the_only_tool_before_the_model_does(call_format: ToolDialect) -> None:
    for text in (opener(call_format)[:2], opener(call_format), opener(call_format) + '{"na'):
        if call_format is MISTRAL_V3:
            text = text.replace("{", "[{")
        parser = new_output_parser(call_format, tools(["add"]), required=True)
        (part,) = parser.feed(text, final=True)
        assert isinstance(part, ToolCallPart)
        assert (part.name, part.arguments, part.is_complete) == ("add", "", False)
        assert parser.num_tool_calls == 0  # which would make the finish reason tool_calls
        assert not parser.stopped
    empty = new_output_parser(call_format, tools(["add"]), required=True)
    assert empty.feed("", final=True) == []


@pytest.mark.parametrize("call_format", FORMATS)
def test_parser_keeps_unfinished_calls_that_nothing_requires(call_format: ToolDialect) -> None:
    text = REQUIRED[call_format].format(written_call(call_format, "add", "{"), "")
    text = text[: text.index('{"name"') + 28]
    assert read([text], call_format) == [TextPart(text)]
    other = text.replace("add", "sub")
    assert read([other], call_format, required=True) == [TextPart(other)]
    unknown = written_call(call_format, "sub", "{}")
    mixed = REQUIRED[call_format].format(unknown, "")
    mixed = mixed[: mixed.index(unknown)] + unknown + ", " + written_call(call_format, "add", "{")
    assert read([mixed], call_format, required=True) == [TextPart(mixed)]


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<think>",
    "</think>",
    CITY,
    SUM,
    f"[{CITY}]",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    " ",
    "\n",
    ";",
    "x",
    "<",
    "tool",
    '{"name": "add", "arguments": {}}',
    "é",
]


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from([*FORMATS, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["no", "strict", "required"]),
)
@example(f"<tool_call>{CITY}</tool_call>", [1], HERMES, True, False, False, "no")
@settings(max_examples=200)
def test_parser_result_is_independent_of_cuts(
    text: str,
    cuts: list[int],
    call_format: ToolDialect | None,
    parallel: bool,
    may_reason: bool,
    starts_in_reasoning: bool,
    grammar: str,
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    options = call_format, parallel, may_reason, starts_in_reasoning
    options = *options, grammar == "required", grammar == "strict"
    whole = read([text], *options)
    assert read(pieces, *options) == whole
    assert read(list(text), *options) == whole
    if (
        grammar == "no"
        and not may_reason
        and not starts_in_reasoning
        and not any(isinstance(part, tuple) and not hasattr(part, "text") for part in whole)
    ):
        assert "".join(part.text for part in whole) == text


def test_parser_returns_a_call_that_is_too_long_before_its_name_as_text() -> None:
    text = '<tool_call>{"arguments": {"a": "' + "x" * (MAX_HELD_CHARS + 1000) + '"}, "name": "add"}'
    for size in (64, len(text)):
        parser = new_output_parser(HERMES, tools(NAMES))
        shown = ""
        for start in range(0, len(text), size):
            for part in parser.feed(text[start : start + size]):
                assert isinstance(part, TextPart)
                shown += part.text
            assert start < MAX_HELD_CHARS + 64 or shown
        assert shown == text


def test_parser_passes_a_call_on_as_it_comes() -> None:
    parser = new_output_parser(HERMES, tools(NAMES))
    assert parser.feed('<tool_call>{"name": "add", "arguments": ') == []
    (first,) = parser.feed('{"a": "')
    assert isinstance(first, ToolCallPart)
    assert first[1:] == ("add", '{"a": "', True, False)
    (piece,) = parser.feed("x" * 100)
    assert piece == ToolCallPart(first.id, "add", "x" * 100, False, False)
    assert parser.num_tool_calls == 0
    assert parser.feed('"}') == [ToolCallPart(first.id, "add", '"}', False, True)]
    assert parser.num_tool_calls == 1


def test_tool_call_ids_fit_the_models_templates() -> None:
    def ids(dialect: ToolDialect, text: str) -> list[str]:
        parts = new_output_parser(dialect, tools(["add"])).feed(text, final=True)
        return [part.id for part in parts if isinstance(part, ToolCallPart)]

    call = '{"name": "add", "arguments": {}}'
    short = ids(MISTRAL_V3, "[TOOL_CALLS][" + ", ".join([call] * 100) + "]")
    assert len(set(short)) == 100
    assert all(one.isalnum() and len(one) == 9 for one in short)
    assert ids(HERMES, f"<tool_call>{call}</tool_call>")[0].startswith("call_")
    kimi = "<|tool_call_begin|>functions.add:{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    text = "<|tool_calls_section_begin|>" + "".join(kimi.format(index) for index in (3, 3, "x"))
    assert ids(KIMI_K2, text) == ["functions.add:3", "functions.add:4", "functions.add:0"]
