"""Reads a dialect from `response_template`, the description of answers in tokenizer_config.json.

transformers parses answers by it (transformers/utils/chat_parsing). Its marks are texts or regular
expressions. Read are those that consist of texts, white space and named groups, and calls in one of
three shapes: a JSON object with a name, a name and a JSON object, and a name and parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.runtime.server.text.tool_dialects import (
    CallSyntax,
    JsonObjectCall,
    NamedJsonCall,
    ParameterCall,
    ReasoningMarks,
    ToolDialect,
)

NAME = "response_template"  # of a dialect that was read from one
_CALLS_FIELD = "tool_calls"
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# A class of white space, or a repeated blank; a single blank may be inside of a text.
_WHITE_SPACE = re.compile(r"(?:\\s|\\n|\\r|\\t|\n)[*+?]{0,2}| [*+?]{1,2}")
_SOME_SPACE = r"\s+"
_GROUP_START = re.compile(r"\(\?P<(\w+)>")
_ESCAPED = re.compile(r"\\([^\w\s])")
_SPECIAL = frozenset(r".^$*+?{}[]|()\\")


@dataclass(frozen=True)
class _Space:
    """White space between two texts, which may be missing."""


@dataclass(frozen=True)
class _Group:
    """A named group: what the model writes there is used."""

    name: str


_Piece = str | _Space | _Group


class _UnknownShapeError(Exception):
    """The template describes something else than what this module reads."""


def dialect_of_response_template(template: object) -> ToolDialect | None:
    """Return how the model writes calls; None: the template has none, or in another shape."""
    field = _fields(template).get(_CALLS_FIELD)
    if not isinstance(field, Mapping):
        return None
    try:
        return _dialect(field)
    except _UnknownShapeError:
        return None


def reasoning_of_response_template(template: object) -> ReasoningMarks | None:
    """Return the marks of thoughts; None: the template has none, or they are not texts."""
    fields = _fields(template)
    for name in _REASONING_FIELDS:
        field = fields.get(name)
        if not isinstance(field, Mapping):
            continue
        try:
            start = _texts(_anchor(field, "open"))
            end = _texts(_anchor(field, "close"))
        except _UnknownShapeError:
            continue
        if len(start) == len(end) == 1:
            return ReasoningMarks(start[0], end[0])
    return None


def _fields(template: object) -> Mapping[str, Any]:
    fields = template.get("fields") if isinstance(template, Mapping) else None
    return fields if isinstance(fields, Mapping) else {}


def _dialect(field: Mapping[str, Any]) -> ToolDialect:
    """Raises _UnknownShapeError."""
    start = _anchor(field, "open")
    end = _anchor(field, "close")
    groups = [piece.name for piece in start if isinstance(piece, _Group)]
    if any(isinstance(piece, _Group) for piece in end) or len(groups) > 1:
        raise _UnknownShapeError
    content = field.get("content", "text")
    if content == "json" and not groups:
        return _json_dialect(field, _texts(start), _texts(end))
    if not groups or _call_part(field, "name") != f"{{{groups[0]}}}":
        raise _UnknownShapeError
    if _call_part(field, "arguments") != "{content}":
        raise _UnknownShapeError
    place = next(i for i, piece in enumerate(start) if isinstance(piece, _Group))
    before, after = _texts(start[:place]), _texts(start[place + 1 :])
    ends = _texts(end)
    if not before or len(before) > 2 or len(after) > 1 or not ends or len(ends) > 2:
        raise _UnknownShapeError
    call_start = before[0]
    before_name = before[1] if len(before) == 2 else ""
    after_name = after[0] if after else ""
    syntax: CallSyntax
    if content == "json" and after_name:
        inner_end = ends[0] if len(ends) == 2 else ""
        syntax = NamedJsonCall(before_name, after_name=after_name, after_arguments=inner_end)
    elif content == "xml-inline":
        inner_end = ends[0] if len(ends) == 2 else ""
        syntax = _parameter_call(field, before_name, after_name, inner_end)
    else:
        raise _UnknownShapeError
    return ToolDialect(
        NAME,
        syntax,
        call_start=call_start,
        separator="\n",
        call_end=ends[-1],
        reasoning=None,
    )


def _json_dialect(
    field: Mapping[str, Any], start: Sequence[str], end: Sequence[str]
) -> ToolDialect:
    """The dialect of calls that are JSON objects, or one list of them."""
    if len(start) != 1 or len(end) > 1:
        raise _UnknownShapeError
    in_list = bool(field.get("transform_each"))
    root = "" if in_list else "content."
    key = "arguments"
    if "transform" in field:
        key = str(_call_part(field, "arguments")).removeprefix(f"{{{root}").removesuffix("}")
        if _call_part(field, "name") != f"{{{root}name}}" or not key.isidentifier():
            raise _UnknownShapeError
    mark_end = end[0] if end else ""
    syntax = JsonObjectCall(key)
    if in_list:
        return ToolDialect(
            NAME,
            syntax,
            section_start=start[0],
            in_list=True,
            separator=", ",
            section_end=mark_end,
            reasoning=None,
        )
    if not mark_end:
        raise _UnknownShapeError
    return ToolDialect(
        NAME, syntax, call_start=start[0], separator="\n", call_end=mark_end, reasoning=None
    )


def _parameter_call(
    field: Mapping[str, Any], before_name: str, after_name: str, end: str
) -> ParameterCall:
    """The syntax of parameters between marks, from the pattern of one of them."""
    arguments = field.get("content_args")
    pattern = arguments.get("tag_pattern") if isinstance(arguments, Mapping) else None
    if not isinstance(pattern, str):
        raise _UnknownShapeError
    pieces = _pieces(pattern)
    groups = [piece for piece in pieces if isinstance(piece, _Group)]
    if [group.name for group in groups] != ["key", "value"]:
        raise _UnknownShapeError
    key, value = (pieces.index(group) for group in groups)
    before_key = _texts(pieces[:key])
    between = _texts(pieces[key + 1 : value])
    after_value = _texts(pieces[value + 1 :])
    if len(before_key) != 1 or len(between) not in (1, 2) or len(after_value) != 1:
        raise _UnknownShapeError
    return ParameterCall(
        before_name=before_name,
        after_name=after_name,
        before_key=before_key[0],
        after_key=between[0],
        before_value=between[1] if len(between) == 2 else "",
        after_value=after_value[0],
        end=end,
        # transformers removes white space around a value; one line feed is what models write.
        on_lines=any(isinstance(piece, _Space) for piece in (pieces[value - 1], pieces[value + 1])),
    )


def _call_part(field: Mapping[str, Any], part: str) -> object:
    """What a field's transform makes of a call's "name" or "arguments"."""
    transform = field.get("transform")
    if not isinstance(transform, Mapping):
        return None
    function = transform.get("function", transform)
    return function.get(part) if isinstance(function, Mapping) else None


def _anchor(field: Mapping[str, Any], name: str) -> list[_Piece]:
    """The pieces of a field's mark: a text, or a pattern. Raises _UnknownShapeError."""
    text = field.get(name)
    if isinstance(text, str):
        return _split_at_space(text)
    pattern = field.get(f"{name}_pattern")
    if text is not None or not (pattern is None or isinstance(pattern, str)):
        raise _UnknownShapeError
    return _pieces(pattern) if pattern else []


def _split_at_space(text: str) -> list[_Piece]:
    """A text's parts without the line feeds at its ends. Blanks at its ends are kept."""
    stripped = text.strip("\n\r\t")
    if not stripped.strip():
        return [_Space()] if text else []
    pieces: list[_Piece] = [stripped]
    if not text.startswith(stripped):
        pieces.insert(0, _Space())
    if not text.endswith(stripped):
        pieces.append(_Space())
    return pieces


def _pieces(pattern: str) -> list[_Piece]:
    """The pieces of a regular expression. Raises _UnknownShapeError for anything else in it."""
    pieces: list[_Piece] = []
    text = ""
    position = 0

    def finish_text() -> None:
        nonlocal text
        pieces.extend(_split_at_space(text))
        text = ""

    while position < len(pattern):
        if text and pattern.startswith(_SOME_SPACE, position):
            text += " "  # what stands there in nearly all formats
            position += len(_SOME_SPACE)
        elif match := _WHITE_SPACE.match(pattern, position):
            finish_text()
            pieces.append(_Space())
            position = match.end()
        elif match := _GROUP_START.match(pattern, position):
            finish_text()
            pieces.append(_Group(match[1]))
            position = _end_of_group(pattern, match.end())
        elif match := _ESCAPED.match(pattern, position):
            text += match[1]
            position = match.end()
        elif pattern[position] in _SPECIAL:
            raise _UnknownShapeError
        else:
            text += pattern[position]
            position += 1
        if text and position < len(pattern) and pattern[position] in "*+?{":
            raise _UnknownShapeError  # a repeated character is no text
    finish_text()
    return pieces


def _end_of_group(pattern: str, position: int) -> int:
    """The place after the bracket that closes a group. Raises _UnknownShapeError."""
    depth = 1
    in_class = False
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return position + 1
        position += 1
    raise _UnknownShapeError


def _texts(pieces: Sequence[_Piece]) -> list[str]:
    """The texts of pieces, without the white space between them. Raises _UnknownShapeError."""
    if any(isinstance(piece, _Group) for piece in pieces):
        raise _UnknownShapeError
    return [piece for piece in pieces if isinstance(piece, str)]
