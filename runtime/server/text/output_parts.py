"""The parts of an answer: text, reasoning, and tool calls in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TextPart(NamedTuple):
    """A piece of the answer's text."""

    text: str


class ReasoningPart(NamedTuple):
    """A piece of the reasoning."""

    text: str


class ToolCallPart(NamedTuple):
    """A piece of a tool call, or the whole call.

    The pieces of a call follow each other, with nothing else between them. Their `arguments`
    together are the JSON text of an object; at any time they are the beginning of one. A call
    whose last piece is not complete was cut off, or went on with something other than JSON.
    """

    id: str
    name: str
    arguments: str
    is_first: bool = True  # the call begins with this piece
    is_complete: bool = True  # the arguments are complete after this piece


OutputPart = TextPart | ReasoningPart | ToolCallPart


def join_parts(parts: Sequence[OutputPart]) -> list[OutputPart]:
    """Return `parts` with adjacent pieces of text, of reasoning and of a call joined."""
    if len(parts) < 2:  # as with most tokens
        return list(parts)
    groups: list[list[OutputPart]] = []
    for part in parts:
        if groups and _continues(groups[-1][-1], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    return [_joined(group) for group in groups]


def _continues(last: OutputPart, part: OutputPart) -> bool:
    if isinstance(part, ToolCallPart):
        return isinstance(last, ToolCallPart) and not part.is_first
    return type(last) is type(part)


def _joined(group: list[OutputPart]) -> OutputPart:
    first, last = group[0], group[-1]
    if isinstance(first, ToolCallPart):
        pieces = [part for part in group if isinstance(part, ToolCallPart)]
        arguments = "".join(piece.arguments for piece in pieces)
        return first._replace(arguments=arguments, is_complete=pieces[-1].is_complete)
    if first is last:
        return first
    texts = [part.text for part in group if not isinstance(part, ToolCallPart)]
    return type(first)("".join(texts))
