"""Passes on Python's literals and Gemma's maps as JSON while they come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator

from llmkit.runtime.server.text.argument_types import STRING, argument_json, scalar_json
from llmkit.runtime.server.text.json_reader import MAX_DEPTH, Emit, json_text, pass_json_string
from llmkit.runtime.server.text.text_cursor import EndOfTextError, Steps, TextCursor

_MAX_SCALAR_CHARS = 1024
_WORD = re.compile(r"[^\s,:()\[\]{}'\"=]+")
_OCTAL = re.compile(r"[0-7]{1,3}")
_ESCAPES = {
    "\n": "",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


def pass_python_literal(cursor: TextCursor, emit: Emit, depth: int = 0) -> Steps:
    """Pass on the JSON of the Python literal that follows.

    Strings, numbers, True, False and None (and JSON's words), lists, tuples, and dictionaries with
    keys that are strings or numbers. Raises MalformedError for anything else.
    """
    yield from cursor.skip_space()
    char = yield from cursor.peek()
    if char in "([{":
        if depth == MAX_DEPTH:
            cursor.fail()
        yield from _pass_items(cursor, emit, depth + 1)
        return
    word = yield from read_word(cursor)
    if cursor.ahead(1) in "'\"":
        if len(word) > 2 or word.strip("rRuUbBfF"):
            cursor.fail()
        yield from _pass_python_string(cursor, emit, raw="r" in word.lower())
        return
    written = scalar_json(word)
    if written is None:
        cursor.fail()
    emit(written)


def read_word(cursor: TextCursor) -> Generator[None, None, str]:
    """Read characters up to white space, a mark or a quotation mark, which must follow."""
    word = ""
    while True:
        word += cursor.match(_WORD)
        if len(word) > _MAX_SCALAR_CHARS:
            cursor.fail()
        if not cursor.at_end:
            return word
        yield from cursor.wait()


def _pass_items(cursor: TextCursor, emit: Emit, depth: int) -> Steps:
    """Pass on a list, tuple or dictionary."""
    opener = yield from cursor.expect("(", "[", "{")
    closer = {"(": ")", "[": "]", "{": "}"}[opener]
    is_map = opener == "{"
    emit("{" if is_map else "[")
    first = True
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.take(closer)):
            break
        if not first:
            emit(", ")
        first = False
        if is_map:
            key: list[str] = []
            yield from pass_python_literal(cursor, key.append, MAX_DEPTH)
            written = "".join(key)
            emit(written if written.startswith('"') else json.dumps(written))
            yield from cursor.skip_space()
            yield from cursor.expect(":")
            emit(": ")
        yield from pass_python_literal(cursor, emit, depth)
        yield from cursor.skip_space()
        if (yield from cursor.expect(",", closer)) == closer:
            break
    emit("}" if is_map else "]")


def _pass_python_string(cursor: TextCursor, emit: Emit, raw: bool) -> Steps:
    """Pass on the strings that follow each other, as one."""
    emit('"')
    while True:
        quote = yield from cursor.expect('"""', "'''", '"', "'")
        while True:
            mark = yield from cursor.until([quote, "\\"], lambda text: emit(json_text(text)))
            if not mark:
                raise EndOfTextError
            if mark == quote:
                break
            if raw:
                char = yield from cursor.peek()
                cursor.skip(1)
                emit(json_text("\\" + char))
            else:
                emit(json_text((yield from _read_escape(cursor))))
        yield from cursor.skip_space()
        if (yield from cursor.peek()) not in "'\"":
            break
    emit('"')


def _read_escape(cursor: TextCursor) -> Generator[None, None, str]:
    """Return what an escape sequence in a Python string stands for, after its backslash."""
    char = yield from cursor.peek()
    if char in _HEX_DIGITS:
        length = 1 + _HEX_DIGITS[char]
        while len(digits := cursor.ahead(length)) < length:
            yield from cursor.wait()
        try:
            point = int(digits[1:], 16)
        except ValueError:
            cursor.fail()
        cursor.skip(length)
        if 0xD800 <= point < 0xE000 or point > 0x10FFFF:
            return "\ufffd"
        return chr(point)
    if char in "01234567":
        while len(cursor.ahead(3)) < 3:
            yield from cursor.wait()
        return chr(int(cursor.match(_OCTAL), 8))
    cursor.skip(1)
    return _ESCAPES.get(char, "\\" + char)


def pass_map(
    cursor: TextCursor,
    emit: Emit,
    quote: str,
    types: Callable[[str], frozenset[str]] | None,
    depth: int = 1,
) -> Steps:
    """Pass on the JSON of the map that follows, after its opening brace.

    quote: stands before and after strings. types: returns the JSON types of a key's value; None
    where they are not known.
    """
    if depth > MAX_DEPTH:
        cursor.fail()
    emit("{")
    keys: set[str] = set()
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.take("}")):
            break
        key, _ = yield from cursor.read_until([":"], _MAX_SCALAR_CHARS)
        key = key.strip().removeprefix(quote).removesuffix(quote)
        shown = emit
        if key in keys:  # the first value was passed on
            shown = _ignore
        shown((", " if keys else "") + json.dumps(key, ensure_ascii=False) + ": ")
        keys.add(key)
        yield from _pass_map_value(cursor, shown, quote, types and types(key), depth)
        yield from cursor.skip_space()
        if (yield from cursor.expect(",", "}")) == "}":
            break
    emit("}")


def _pass_map_value(
    cursor: TextCursor, emit: Emit, quote: str, types: frozenset[str] | None, depth: int
) -> Steps:
    """Pass on a value of a map or list."""
    yield from cursor.skip_space()
    mark = yield from cursor.take(quote, "{", "[")
    if mark == quote:
        emit('"')
        if not (yield from cursor.until([quote], lambda text: emit(json_text(text)))):
            raise EndOfTextError
        emit('"')
    elif mark == "{":
        yield from pass_map(cursor, emit, quote, None, depth + 1)
    elif mark == "[":
        yield from _pass_map_list(cursor, emit, quote, depth + 1)
    elif (yield from cursor.peek()) == '"':
        yield from pass_json_string(cursor, emit)
    else:
        text, end = yield from cursor.read_until([",", "}", "]"], _MAX_SCALAR_CHARS)
        cursor.skip(-len(end))
        text = text.strip()
        if types is not None and types != STRING:
            emit(argument_json(text, types))
        else:
            written = scalar_json(text) if types is None else None
            emit(json.dumps(text, ensure_ascii=False) if written is None else written)


def _ignore(text: str) -> None:
    """Drop `text`."""


def _pass_map_list(cursor: TextCursor, emit: Emit, quote: str, depth: int) -> Steps:
    """Pass on a list, after its opening bracket."""
    if depth > MAX_DEPTH:
        cursor.fail()
    emit("[")
    first = True
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.take("]")):
            break
        if not first:
            emit(", ")
        first = False
        yield from _pass_map_value(cursor, emit, quote, None, depth)
        yield from cursor.skip_space()
        if (yield from cursor.expect(",", "]")) == "]":
            break
    emit("]")
