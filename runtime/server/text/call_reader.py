"""Reads one tool call in the syntax of a dialect, and passes it on as it comes.

A call begins to be passed on once its name is known, is that of a tool, and what follows is the
beginning of arguments. Until then a reader that raises MalformedError has passed on nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Generator
from typing import assert_never

from llmkit.runtime.server.text.argument_types import STRING, argument_json, argument_types
from llmkit.runtime.server.text.json_reader import (
    json_text,
    pass_json,
    read_json_string,
)
from llmkit.runtime.server.text.literal_reader import pass_map, pass_python_literal, read_word
from llmkit.runtime.server.text.parts_collector import PartsCollector
from llmkit.runtime.server.text.text_cursor import (
    MAX_HELD_CHARS,
    EndOfTextError,
    MalformedError,
    Steps,
    TextCursor,
)
from llmkit.runtime.server.text.tool_dialects import (
    ChannelCall,
    JsonObjectCall,
    MapCall,
    NamedJsonCall,
    ParameterCall,
    PythonCall,
    ToolDialect,
)

_MAX_ID_CHARS = 256  # that models write
_MAX_KEY_CHARS = 4096


class CallReader:
    """Reads calls of the tools that `parts` knows."""

    def __init__(self, cursor: TextCursor, parts: PartsCollector, dialect: ToolDialect) -> None:
        self._cursor = cursor
        self._parts = parts
        self._dialect = dialect
        self._max_name_chars = max(map(len, parts.schemas), default=0) + 2

    def read(self, name_begun: bool = False, needs_arguments: bool = False) -> Steps:
        """Read a call, after `call_start`.

        name_begun: the syntax's `before_name` was read, too. needs_arguments: a JSON object without
        arguments is no call.
        """
        self._parts.read_call()
        match self._dialect.syntax:
            case JsonObjectCall(arguments_key):
                begun = self._parts.num_begun
                keys = {arguments_key, "arguments", "parameters"}
                try:
                    yield from self._json_object(keys, needs_arguments)
                except EndOfTextError:
                    if begun == self._parts.num_begun or self._parts.call is not None:
                        raise
                    self._cursor.skip_rest()  # after the arguments
            case NamedJsonCall() as syntax:
                yield from self._named_json(syntax)
            case ParameterCall() as syntax:
                yield from self._parameters(syntax, name_begun)
            case PythonCall():
                yield from self._python()
            case MapCall() as syntax:
                yield from self._map(syntax)
            case ChannelCall():
                raise AssertionError("harmony_reader.py reads channels")
            case _ as unreachable:
                assert_never(unreachable)

    def read_arguments(self, name: str, written_id: str = "") -> Steps:
        """Read the arguments of a call of `name`, which are a JSON object."""
        if (yield from self._cursor.peek()) != "{":
            self._cursor.fail()
        self._parts.begin_call(name, written_id)
        yield from pass_json(self._cursor, self._parts.arguments)
        self._parts.complete_call()

    def _read_name(self, ends: tuple[str, ...]) -> Generator[None, None, tuple[str, str]]:
        """Read a tool's name and the one of `ends` that follows it; return both."""
        pieces: list[str] = []
        limit = self._max_name_chars

        def add(piece: str) -> None:
            pieces.append(piece)
            if sum(map(len, pieces)) > limit:
                raise MalformedError

        end = yield from self._cursor.until(ends, add, keep_partial=True)
        name = "".join(pieces).strip()
        if not end:
            if self._cursor.at_end:
                self._parts.begun_name(name)
            else:
                self._parts.check_name(name)
            raise EndOfTextError
        self._parts.check_name(name)
        return name, end

    def _json_object(
        self, arguments_keys: Collection[str], needs_arguments: bool, is_wrapped: bool = False
    ) -> Steps:
        """Read `{"name": NAME, "arguments": {...}}`; the keys may be in another order.

        It may be wrapped as in requests: `{"type": "function", "function": {...}}`. arguments_keys:
        any of them has the arguments. is_wrapped: this is the inner object.
        """
        cursor, parts = self._cursor, self._parts
        yield from cursor.expect("{")
        name = ""
        held: list[str] = []  # arguments before the name
        begun = parts.num_begun
        first = True
        while True:
            yield from cursor.skip_space()
            char = yield from cursor.peek()
            if first and char == "}":
                cursor.fail()
            key = yield from read_json_string(cursor)
            first = False
            yield from cursor.skip_space()
            yield from cursor.expect(":")
            yield from cursor.skip_space()
            if key == "name" and not name:
                name = yield from read_json_string(cursor, parts.begun_name)
                parts.check_name(name)
                if held:
                    parts.begin_call(name)
                    parts.arguments("".join(held))
                    parts.complete_call()
            elif key in arguments_keys and not held and begun == parts.num_begun:
                if name:
                    yield from self.read_arguments(name)
                elif (yield from cursor.peek()) == "{":
                    yield from pass_json(cursor, _Holder(held))
                else:
                    cursor.fail()
            elif (
                key == "function"
                and not (name or held or is_wrapped or begun < parts.num_begun)
                and (yield from cursor.peek()) == "{"
            ):
                yield from self._json_object(arguments_keys, needs_arguments, is_wrapped=True)
            else:
                yield from pass_json(cursor, _Holder([]))
            yield from cursor.skip_space()
            if (yield from cursor.expect(",", "}")) == "}":
                break
        if begun == parts.num_begun:
            if not name or needs_arguments:
                cursor.fail()
            parts.begin_call(name)
            parts.arguments("{}")
            parts.complete_call()

    def _named_json(self, syntax: NamedJsonCall) -> Steps:
        """Read a name and the JSON of arguments."""
        cursor = self._cursor
        yield from cursor.skip_space()
        if syntax.before_name:
            yield from cursor.expect(syntax.before_name)
        ends = tuple(filter(None, (syntax.after_name, syntax.before_id)))
        name, end = yield from self._read_name(ends)
        written_id = ""
        if end == syntax.before_id:
            written_id, _ = yield from cursor.read_until([syntax.after_name], _MAX_ID_CHARS)
        yield from cursor.skip_space()
        yield from self.read_arguments(name, written_id.strip())
        yield from cursor.close(syntax.after_arguments)

    def _parameters(self, syntax: ParameterCall, name_begun: bool) -> Steps:
        """Read a name and parameters between marks."""
        cursor, parts = self._cursor, self._parts
        yield from cursor.skip_space()
        if syntax.before_name and not name_begun:
            yield from cursor.expect(syntax.before_name)
        # Models sometimes leave out the first of these.
        end_marks = tuple(
            filter(None, (syntax.end, self._dialect.call_end, self._dialect.section_end))
        )
        if syntax.after_name:
            name, _ = yield from self._read_name((syntax.after_name,))
        else:
            name, end = yield from self._read_name(("\n", " ", syntax.before_key, *end_marks))
            cursor.skip(-len(end))
        schema = parts.schemas[name]
        keys: set[str] = set()
        begun = False
        while True:
            yield from cursor.skip_space()
            if keys and (yield from self._ends_without_mark(end_marks)):
                break
            mark = yield from cursor.expect(syntax.before_key, *end_marks)
            if not begun:
                parts.begin_call(name)
                begun = True
            if mark != syntax.before_key:
                if mark != end_marks[0]:
                    cursor.skip(-len(mark))  # it ends the call or the section
                break
            after_key = tuple(filter(None, (syntax.after_key, syntax.after_key_of_json)))
            key, mark = yield from cursor.read_until(after_key, _MAX_KEY_CHARS)
            if syntax.before_value:
                yield from cursor.skip_space()
                yield from cursor.expect(syntax.before_value)
            key = key.strip()
            types = argument_types(schema, key)
            if syntax.after_key_of_json:
                types = types - STRING if mark == syntax.after_key_of_json else STRING
                types = types or _ANY_BUT_STRING
            if key in keys:  # the first value was passed on
                yield from cursor.until([syntax.after_value], _ignore)
            else:
                parts.arguments(("{" if not keys else ", ") + json.dumps(key, ensure_ascii=False))
                parts.arguments(": ")
                yield from self._parameter_value(syntax, types)
            keys.add(key)
        parts.arguments("}" if keys else "{}")
        parts.complete_call()

    def _ends_without_mark(self, end_marks: tuple[str, ...]) -> Generator[None, None, bool]:
        """Whether the model ended the answer after a parameter; what it began is read."""
        cursor = self._cursor
        while True:
            rest = cursor.ahead(max(map(len, end_marks)))
            if any(map(cursor.ends_before, end_marks)):
                cursor.skip_rest()
                return True
            if rest in end_marks or cursor.final or not any(m.startswith(rest) for m in end_marks):
                return False
            yield from cursor.wait()

    def _parameter_value(self, syntax: ParameterCall, types: frozenset[str]) -> Steps:
        """Read a parameter's value up to its end."""
        cursor, parts = self._cursor, self._parts
        ends = [syntax.after_value]
        if syntax.on_lines:
            yield from cursor.take("\n")
            ends.append("\n" + syntax.after_value)
        if types != STRING:
            value, _ = yield from cursor.read_until(ends)
            parts.arguments(argument_json(value, types))
            return
        parts.arguments('"')
        if not (yield from cursor.until(ends, lambda text: parts.arguments(json_text(text)))):
            raise EndOfTextError
        parts.arguments('"')

    def _python(self) -> Steps:
        """Read `NAME(key=value, ...)`."""
        cursor, parts = self._cursor, self._parts
        yield from cursor.skip_space()
        name, _ = yield from self._read_name(("(",))
        keys: set[str] = set()
        begun = False
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.take(")")):
                break
            key = yield from read_word(cursor)
            yield from cursor.skip_space()
            yield from cursor.expect("=")
            if not key.isidentifier():
                cursor.fail()
            if not begun:
                parts.begin_call(name)
                begun = True
            if key in keys:  # the first value was passed on
                yield from pass_python_literal(cursor, _ignore)
            else:
                parts.arguments(("{" if not keys else ", ") + json.dumps(key, ensure_ascii=False))
                parts.arguments(": ")
                keys.add(key)
                yield from pass_python_literal(cursor, parts.arguments)
            yield from cursor.skip_space()
            if (yield from cursor.expect(",", ")")) == ")":
                break
        if not begun:
            parts.begin_call(name)
        parts.arguments("}" if keys else "{}")
        parts.complete_call()

    def _map(self, syntax: MapCall) -> Steps:
        """Read a name and a map."""
        cursor, parts = self._cursor, self._parts
        yield from cursor.skip_space()
        yield from cursor.expect(syntax.before_name)
        name, _ = yield from self._read_name(("{",))
        parts.begin_call(name)
        schema = parts.schemas[name]
        yield from pass_map(
            cursor, parts.arguments, syntax.quote, lambda key: argument_types(schema, key)
        )
        parts.complete_call()


_ANY_BUT_STRING = frozenset({"integer", "number", "boolean", "null", "object", "array"})


class _Holder:
    """Holds back text in `pieces`, but not too much."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces
        self._length = 0

    def __call__(self, text: str) -> None:
        self._pieces.append(text)
        self._length += len(text)
        if self._length > MAX_HELD_CHARS:
            raise MalformedError


def _ignore(text: str) -> None:
    """Drop `text`."""
