"""Calls of tools that were offered beside calls of tools that were not: none of them is a call."""

from __future__ import annotations

import pytest

from llmkit.runtime.server.text.tool_calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    TextPart,
    ToolCallFormat,
    ToolCallParser,
    ToolCallPart,
)

OFFERED = '{"name": "add", "arguments": {"a": 1}}'
OTHER = '{"name": "remove_files", "arguments": {"a": 1}}'
NO_OBJECT = '{"name": "add", "arguments": [1]}'


def read(call_format: ToolCallFormat, pieces: list[str]) -> tuple[str, list[str]]:
    """The text of an answer, and the names of its calls."""
    parser = ToolCallParser(call_format, ["add", "multiply"])
    parts = [part for piece in pieces for part in parser.feed(piece, final=False)]
    parts += parser.feed("", final=True)
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    return text, [part.name for part in parts if isinstance(part, ToolCallPart)]


@pytest.mark.parametrize("other", [OTHER, NO_OBJECT], ids=["not offered", "no object"])
@pytest.mark.parametrize("offered_first", [True, False])
@pytest.mark.parametrize(
    ("call_format", "form"),
    [
        (HERMES, "<tool_call>[{}, {}]</tool_call>"),
        (MISTRAL, "[TOOL_CALLS][{}, {}]"),
        (LLAMA, "{}; {}"),
    ],
    ids=["Hermes", "Mistral", "Llama"],
)
def test_parser_takes_a_list_with_an_impossible_call_as_text(
    call_format: ToolCallFormat, form: str, offered_first: bool, other: str
) -> None:
    text = form.format(*([OFFERED, other] if offered_first else [other, OFFERED]))
    for pieces in ([text], list(text)):
        assert read(call_format, pieces) == (text, [])
    both = form.format(OFFERED, OFFERED.replace("add", "multiply"))
    for pieces in ([both], list(both)):
        assert read(call_format, pieces) == ("", ["add", "multiply"])
