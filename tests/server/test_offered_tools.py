"""Calls of tools that were offered beside calls of tools that were not: these are text."""

from __future__ import annotations

import pytest

from llmkit.runtime.server.text.output_parser import new_output_parser
from llmkit.runtime.server.text.output_parts import TextPart, ToolCallPart
from llmkit.runtime.server.text.tool_dialects import HERMES, LLAMA3_JSON, MISTRAL_V3, ToolDialect

OFFERED = '{"name": "add", "arguments": {"a": 1}}'
OTHER = '{"name": "remove_files", "arguments": {"a": 1}}'
NO_OBJECT = '{"name": "add", "arguments": [1]}'


def read(dialect: ToolDialect, pieces: list[str]) -> tuple[str, list[str]]:
    """The text of an answer, and the names of its calls."""
    parser = new_output_parser(
        dialect, [{"type": "function", "function": {"name": name}} for name in ("add", "multiply")]
    )
    parts = [part for piece in pieces for part in parser.feed(piece)]
    parts += parser.feed("", final=True)
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    return text, [part.name for part in parts if isinstance(part, ToolCallPart) and part.is_first]


@pytest.mark.parametrize("other", [OTHER, NO_OBJECT], ids=["not offered", "no object"])
@pytest.mark.parametrize("offered_first", [True, False])
@pytest.mark.parametrize(
    ("dialect", "form"),
    [
        (HERMES, "<tool_call>[{}, {}]</tool_call>"),
        (MISTRAL_V3, "[TOOL_CALLS][{}, {}]"),
        (LLAMA3_JSON, "{}; {}"),
    ],
    ids=["Hermes", "Mistral", "Llama"],
)
def test_parser_takes_what_follows_an_impossible_call_in_a_list_as_text(
    dialect: ToolDialect, form: str, offered_first: bool, other: str
) -> None:
    text = form.format(*([OFFERED, other] if offered_first else [other, OFFERED]))
    for pieces in ([text], list(text)):
        shown, names = read(dialect, pieces)
        if not offered_first:
            assert (shown, names) == (text, [])
        else:
            # The first call had begun to be sent when the second was read.
            assert names == ["add"]
            assert OFFERED not in shown and other in shown
    both = form.format(OFFERED, OFFERED.replace("add", "multiply"))
    for pieces in ([both], list(both)):
        assert read(dialect, pieces) == ("", ["add", "multiply"])
