"""Calls and thoughts in the text of answers, however the text is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmkit.runtime.server.text.calls import (
    HERMES,
    LLAMA,
    MAX_CALL_CHARS,
    MISTRAL,
    Call,
    CallFormat,
    Calls,
    Text,
    call_format,
)
from llmkit.runtime.server.text.parts import Part, Parts, Reasoning

NAMES = ["get_weather", "add"]
CITY = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
SUM = '{"name": "add", "parameters": {"a": 1, "b": [2, "}]"]}}'
FORMATS = [HERMES, MISTRAL, LLAMA]


def read(
    pieces: list[str], form: CallFormat | None = None, parallel: bool = True, thinks: bool = False, begun: bool = False
) -> list[Any]:
    """The parts of a text that comes in `pieces`, joined where they are of one kind, calls without their ids."""
    parser = Parts(thinks, begun, Calls(form, NAMES, parallel) if form else None)
    parts: list[Part] = [part for piece in pieces for part in parser.feed(piece)]
    parts += parser.feed("", final=True)
    found: list[Any] = []
    for part in parts:
        if isinstance(part, Call):
            found.append((part.name, json.loads(part.arguments)))
        elif found and type(found[-1]) is type(part):
            found[-1] = type(part)(found[-1].text + part.text)
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
        [Text("Let me see."), PARIS, ADD],
    ),
    (HERMES, f"<tool_call>{CITY}</tool_call>\n\nDone. ", [PARIS, Text("Done. ")]),
    (HERMES, f"<tool_call>{CITY}", [PARIS]),  # the last closer is often missing
    (HERMES, f"<tool_call>oh <tool_call>{CITY}</tool_call>", [Text("<tool_call>oh"), PARIS]),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>\\\\\\""}}</tool_call>',
        [("add", {"a": '</tool_call>\\"'})],
    ),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', [("add", {})]),
    (MISTRAL, f"[TOOL_CALLS][{CITY}, {SUM}]", [PARIS, ADD]),
    (MISTRAL, f"Well. [TOOL_CALLS] [{CITY}]", [Text("Well."), PARIS]),
    (LLAMA, CITY, [PARIS]),
    (LLAMA, f"<|python_tag|>{CITY}; {SUM} \n", [PARIS, ADD]),
]
NOT_CALLED = [
    (HERMES, "<tool_call>"),
    (HERMES, "a <tool_call b"),
    (HERMES, f"<tool_call>{CITY[:-1]}"),
    (HERMES, f"<tool_call>{CITY} and more</tool_call>"),
    (HERMES, f"<tool_call>{CITY}</tool_cal"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call> '),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (HERMES, f"{CITY}\n"),
    (HERMES, "<tool_call>[]</tool_call>"),
    (HERMES, '<tool_call>{"name": "add", "arguments": ' + "[" * 3000 + "]" * 3000 + "}</tool_call>"),
    (MISTRAL, "[TOOL_CALLS] none"),
    (MISTRAL, "[TOOL_CALLS][]"),
    (LLAMA, f"{CITY} is how to ask."),
    (LLAMA, f" {CITY};"),
    (LLAMA, '{"name": "other", "parameters": {}}'),
    (LLAMA, '{"answer": 42}\n'),
    (LLAMA, f"I say {CITY}"),
    (LLAMA, "<|python_tag|>print(1)"),
    (LLAMA, " "),
]


@pytest.mark.parametrize(("form", "text", "parts"), CALLED)
def test_calls_are_found(form: CallFormat, text: str, parts: list[Any]) -> None:
    assert read([text], form) == parts
    assert read(list(text), form) == parts


@pytest.mark.parametrize(("form", "text"), NOT_CALLED)
def test_what_only_looks_like_a_call_comes_out_unchanged(form: CallFormat, text: str) -> None:
    assert read([text], form) == [Text(text)]
    assert read(list(text), form) == [Text(text)]


THOUGHTS = [
    ("<think>\nhm\nhm\n</think>\n\nYes.\n", False, [Reasoning("hm\nhm"), Text("Yes.\n")]),
    ("\n<think>\n\n</think>\n\nYes.", False, [Text("Yes.")]),
    ("<think>never ends", False, [Reasoning("never ends")]),
    ("\nhm\n</think>Yes.", True, [Reasoning("hm"), Text("Yes.")]),
    ("hm </thin", True, [Reasoning("hm </thin")]),
    ("I <think> so</think>", False, [Text("I <think> so</think>")]),
    ("<thin", False, [Text("<thin")]),
    (" \n", False, [Text(" \n")]),
    ("", True, []),
]


@pytest.mark.parametrize(("text", "begun", "parts"), THOUGHTS)
def test_thoughts_are_told_apart(text: str, begun: bool, parts: list[Any]) -> None:
    assert read([text], thinks=True, begun=begun) == parts
    assert read(list(text), thinks=True, begun=begun) == parts


def test_a_thought_of_a_call_is_no_call() -> None:
    text = f"<think>I could <tool_call>{CITY}</tool_call></think><tool_call>{SUM}</tool_call>"
    expected = [Reasoning(f"I could <tool_call>{CITY}</tool_call>"), ADD]
    assert read(list(text), HERMES, thinks=True) == expected


def test_one_call_only_where_no_more_are_wanted() -> None:
    for form, text in (
        (HERMES, f"a<tool_call>{CITY}</tool_call><tool_call>{SUM}</tool_call>b"),
        (LLAMA, f"{CITY};{SUM}"),
    ):
        for pieces in ([text], list(text)):
            assert [part for part in read(pieces, form, parallel=False) if not isinstance(part, Text)] == [PARIS]


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
)
@example(f"<tool_call>{CITY}</tool_call>", [1], HERMES, True, False, False)
@settings(max_examples=600, deadline=None)
def test_parts_do_not_depend_on_how_the_text_is_cut(
    text: str, cuts: list[int], form: CallFormat | None, parallel: bool, thinks: bool, begun: bool
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    whole = read([text], form, parallel, thinks, begun)
    assert read(pieces, form, parallel, thinks, begun) == whole
    assert read(list(text), form, parallel, thinks, begun) == whole
    if not thinks and not begun and not any(isinstance(part, tuple) and not hasattr(part, "text") for part in whole):
        assert "".join(part.text for part in whole) == text


def test_a_call_that_never_ends_is_text_in_the_end() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": "' + "x" * (MAX_CALL_CHARS + 1000)
    calls = Calls(HERMES, NAMES)
    shown = ""
    for start in range(0, len(text), 64):
        shown += "".join(part.text for part in calls.feed(text[start : start + 64], False) if isinstance(part, Text))
        assert start < MAX_CALL_CHARS + 64 or shown
    assert shown == text


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("... <tool_call>{{ x }}</tool_call>", HERMES),
        ("... <tool_call><function={{ x }}>", None),
        ("... [AVAILABLE_TOOLS] ... [TOOL_CALLS]", MISTRAL),
        ("... [TOOL_CALLS]{{ name }}[ARGS]", None),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name}', LLAMA),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_chosen_from_the_template(template: str, form: CallFormat | None) -> None:
    assert call_format(template) == form


def test_ids_are_what_the_models_templates_take() -> None:
    assert len({MISTRAL.new_id() for _ in range(100)}) == 100
    assert MISTRAL.new_id().isalnum() and len(MISTRAL.new_id()) == 9
    assert HERMES.new_id().startswith("call_")
