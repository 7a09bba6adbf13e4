"""Passes on JSON as it comes, and nothing that is not the beginning of valid JSON.

The text is passed on as written, except that what JSON forbids and models write is replaced:
control characters in strings are escaped, and halves of a surrogate pair become U+FFFD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator

from llmkit.runtime.server.text.text_cursor import EndOfTextError, Steps, TextCursor

MAX_DEPTH = 128  # of nested objects and lists

Emit = Callable[[str], object]

_SPACE = re.compile(r"[ \t\r\n]+")
_SCALAR = re.compile(r"[-+.0-9A-Za-z]+")
_VALID_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_BEGUN_NUMBER = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*|(\.[0-9]+)?[eE][-+]?[0-9]*)?)?")
_MAX_SCALAR_CHARS = 1024
_CHARACTERS = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_BEGUN_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{0,3})?")
_ESCAPE_CHARS = 6  # of the longest one
_REPLACEMENT = "\\ufffd"


def json_text(text: str) -> str:
    """Return `text` as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def pass_json(cursor: TextCursor, emit: Emit) -> Steps:
    """Pass on the JSON value that follows.

    Raises MalformedError where it is not valid, before which everything was passed on.
    """
    closers: list[str] = []
    expected = "value"  # or: "first value", "first key", "key", "comma"
    while True:
        yield from _pass_space(cursor, emit)
        char = yield from cursor.peek()
        if closers and char == closers[-1] and expected in ("first value", "first key", "comma"):
            closers.pop()
            _pass(cursor, char, emit)
            expected = "comma"
        elif expected == "comma":
            if char != ",":
                cursor.fail()
            _pass(cursor, char, emit)
            expected = "key" if closers[-1] == "}" else "value"
        elif expected in ("key", "first key"):
            if char != '"':
                cursor.fail()
            yield from pass_json_string(cursor, emit)
            yield from _pass_space(cursor, emit)
            if (yield from cursor.peek()) != ":":
                cursor.fail()
            _pass(cursor, ":", emit)
            expected = "value"
        else:
            if char in "{[":
                if len(closers) == MAX_DEPTH:
                    cursor.fail()
                closers.append("}" if char == "{" else "]")
                _pass(cursor, char, emit)
                expected = "first key" if char == "{" else "first value"
                continue
            if char == '"':
                yield from pass_json_string(cursor, emit)
            else:
                yield from _pass_scalar(cursor, emit)
            expected = "comma"
        if not closers:
            return


def pass_json_string(cursor: TextCursor, emit: Emit) -> Steps:
    """Pass on the JSON string that follows, which begins with a quotation mark."""
    yield from cursor.expect('"')
    emit('"')
    while True:
        text = cursor.match(_CHARACTERS)
        if text:
            emit(text)
        char = yield from cursor.peek()
        if char == '"':
            _pass(cursor, char, emit)
            return
        if char == "\\":
            escape = yield from _read_escape(cursor, emit)
            if escape.startswith("\\u") and 0xD800 <= int(escape[2:], 16) < 0xE000:
                escape = yield from _pair(cursor, escape)
            emit(escape)
        elif not _CHARACTERS.match(char):
            cursor.skip(1)
            emit(_REPLACEMENT if char >= "\ud800" else json_text(char))


def read_json_string(
    cursor: TextCursor, begun: Callable[[str], object] | None = None
) -> Generator[None, None, str]:
    """Read the JSON string that follows and return its value.

    begun: called with the value so far when the text ends inside of it.
    """
    pieces: list[str] = []
    try:
        yield from pass_json_string(cursor, pieces.append)
    except EndOfTextError:
        text = "".join(pieces)[1:]
        if begun is not None and "\\" not in text:
            begun(text)
        raise
    return str(json.loads("".join(pieces)))


def _read_escape(cursor: TextCursor, emit: Emit) -> Generator[None, None, str]:
    while True:
        escape = cursor.match(_ESCAPE)
        if escape:
            return escape
        rest = cursor.ahead(_ESCAPE_CHARS)
        if not _BEGUN_ESCAPE.fullmatch(rest):
            cursor.fail()
        if cursor.final:
            emit(rest)
        yield from cursor.wait()


def _pair(cursor: TextCursor, escape: str) -> Generator[None, None, str]:
    """Return `escape`, half of a surrogate pair, with the other half."""
    if int(escape[2:], 16) >= 0xDC00:
        return _REPLACEMENT
    while len(rest := cursor.ahead(_ESCAPE_CHARS)) < _ESCAPE_CHARS:
        if rest and not _BEGUN_ESCAPE.fullmatch(rest):
            return _REPLACEMENT
        yield from cursor.wait()
    other = cursor.match(_ESCAPE)
    if not other.startswith("\\u"):
        cursor.skip(-len(other))
        return _REPLACEMENT
    if 0xDC00 <= int(other[2:], 16) < 0xE000:
        return escape + other
    cursor.skip(-len(other))
    return _REPLACEMENT


def _pass_scalar(cursor: TextCursor, emit: Emit) -> Steps:
    """Pass on a number, true, false or null."""
    scalar = ""
    while True:
        scalar += cursor.match(_SCALAR)
        if not cursor.at_end:
            break
        begun = _BEGUN_NUMBER.fullmatch(scalar) is not None or any(
            word.startswith(scalar) for word in ("true", "false", "null")
        )
        if not begun or len(scalar) > _MAX_SCALAR_CHARS:
            cursor.fail()
        if cursor.final:
            emit(scalar)
        yield from cursor.wait()
    if not _VALID_SCALAR.fullmatch(scalar) or len(scalar) > _MAX_SCALAR_CHARS:
        cursor.fail()
    emit(scalar)


def _pass_space(cursor: TextCursor, emit: Emit) -> Steps:
    while True:
        space = cursor.match(_SPACE)
        if space:
            emit(space)
        if not cursor.at_end or cursor.final:
            return
        yield from cursor.wait()


def _pass(cursor: TextCursor, char: str, emit: Emit) -> None:
    cursor.skip(1)
    emit(char)
