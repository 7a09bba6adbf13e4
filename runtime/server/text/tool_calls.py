"""Finds tool calls in the text of an answer, as it arrives, in the formats that models write.

A possible call is held back until it is complete: only then is it known to be a call. Text that
only looks like a call is returned as text. Where a grammar lets only a call follow the opener, an
unfinished one at the end of the answer is a call too, with the part of its arguments that was
written.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from llmkit.runtime.server.text.stop_strings import partial_match_length

MAX_CALL_CHARS = 1 << 18  # anything longer is text


class TextPart(NamedTuple):
    """A piece of the answer's text."""

    text: str


class ToolCallPart(NamedTuple):
    """A tool call; `arguments` is the JSON text of an object, as the model wrote it.

    Of a call that is not `complete`, `arguments` is only the beginning of that text.
    """

    id: str
    name: str
    arguments: str
    complete: bool = True


@dataclass(frozen=True)
class ToolCallFormat:
    """How a model writes calls: as a JSON object or a list of JSON objects.

    The JSON stands between `opener` and `closer`, or is the whole answer.
    """

    opener: str
    closer: str = ""
    # The answer consists of calls separated by ";" and nothing else; the opener is optional.
    whole_answer: bool = False
    short_ids: bool = False  # 9 letters and digits: Mistral's templates accept no others

    def new_id(self) -> str:
        """Return an id for a call."""
        return secrets.token_hex(5)[:9] if self.short_ids else "call_" + secrets.token_hex(12)

    def call_head(self, name: str) -> str:
        """Return the JSON of a call up to its arguments, as grammars make models write it."""
        key = "parameters" if self.whole_answer else "arguments"
        return f'{{"name": {json.dumps(name)}, "{key}": '


HERMES = ToolCallFormat("<tool_call>", "</tool_call>")
MISTRAL = ToolCallFormat("[TOOL_CALLS]", short_ids=True)
LLAMA = ToolCallFormat("<|python_tag|>", whole_answer=True)


def detect_tool_call_format(template: str) -> ToolCallFormat | None:
    """Return how the model with this chat template writes calls; None when that is unknown."""
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        # Some models write XML between these marks.
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    return LLAMA if '{"name": function name, "parameters":' in template else None


class ToolCallParser:
    """Finds calls of the tools `tool_names`; white space next to a call is dropped."""

    def __init__(
        self,
        call_format: ToolCallFormat,
        tool_names: Collection[str],
        parallel: bool = True,
        required: bool = False,
        strict: bool = False,
    ) -> None:
        """Create a parser.

        `parallel`: the answer may have more than one call. `required`: a grammar lets the model
        write calls and nothing else. `strict`: a grammar lets only a call follow the opener, or be
        the whole answer, and allows other text.
        """
        self.count = 0  # of the complete calls found so far
        self.stopped = False  # the answer is complete although the text may go on
        self._format = call_format
        self._tool_names = frozenset(tool_names)
        self._parallel = parallel
        self._required = required
        self._strict = strict or required
        self._buffer = ""  # text that is held back
        self._json: _JsonScanner | None = None  # scans what follows the opener in the buffer
        self._space = ""  # white space that is text unless a call follows
        self._after_call = False  # white space is dropped now
        self._is_plain_text = False  # no part of the answer is a call

    def feed(self, text: str, final: bool) -> list[TextPart | ToolCallPart]:
        """Add the next `text`; return the parts that it completes. `final`: no text follows."""
        if self.stopped:
            return []
        self._buffer += text
        if self._format.whole_answer:
            parts = self._parse_whole_answer(final)
        else:
            parts = self._parse_marked(final)
        if final and self._space:
            parts = [*parts, TextPart(self._space)]
            self._space = ""
        if self.count and not self._parallel:
            self.stopped = True
            first = next(i for i, part in enumerate(parts) if isinstance(part, ToolCallPart))
            del parts[first + 1 :]
        return parts

    # Calls that are the whole answer

    def _parse_whole_answer(self, final: bool) -> list[TextPart | ToolCallPart]:
        """Parse `{...}; {...}`."""
        if not self._is_plain_text:
            begin = self._buffer.lstrip()
            body = begin.removeprefix(self._format.opener).lstrip()
            if not final and (not body or self._format.opener.startswith(begin)):
                return []
            calls = self._parse_sequence(body, final)
            if calls is None:
                return []
            if calls:
                self._buffer = ""
                return self._call_parts(calls)
            begins_call = begin.startswith(self._format.opener) or body.startswith("{")
            if final and begin and (self._required or (self._strict and begins_call)):
                unfinished = self._parse_unfinished(
                    "" if self._format.opener.startswith(begin) else body
                )
                if unfinished is not None:
                    self._buffer = ""
                    return unfinished
            self._is_plain_text = True
        parts: list[TextPart | ToolCallPart] = [TextPart(self._buffer)] if self._buffer else []
        self._buffer = ""
        return parts

    def _parse_sequence(self, body: str, final: bool) -> list[_CallJson] | None:
        """Return the calls in `body`; [] when it is something else; None while it is incomplete."""
        if not body.startswith("{") or len(body) > MAX_CALL_CHARS:
            return []
        self._json = self._json or _JsonScanner(0)
        if self._json.end(body) is not None and not self._decode_calls(body, self._json):
            return []
        if not final:
            return None
        calls: list[_CallJson] = []
        while True:
            value = _JsonScanner(0)
            end = value.end(body)
            if end is None:
                return []
            decoded = self._decode_calls(body, value)
            if not decoded:
                return []
            calls += decoded
            body = body[end:].strip()
            if not body:
                return calls
            if not body.startswith(";"):
                return []
            body = body[1:].lstrip()

    # Calls between marks

    def _parse_marked(self, final: bool) -> list[TextPart | ToolCallPart]:
        """Parse text with calls between marks."""
        opener = self._format.opener
        parts = list[TextPart | ToolCallPart]()
        while self._buffer:
            if self._json is None:
                position = self._buffer.find(opener)
                if position < 0:
                    held_back = partial_match_length(self._buffer, [opener])
                    if final and not self._required:
                        held_back = 0
                    parts += self._take_text(len(self._buffer) - held_back)
                    if final and held_back:
                        self._buffer = ""
                        parts += self._unfinished_parts("")
                    break
                parts += self._take_text(position)
                self._json = _JsonScanner(len(opener))
            result = self._parse_marked_call(self._json, final)
            if result is None:
                break
            self._json = None
            length, calls = result
            if calls:
                self._buffer = self._buffer[length:]
                parts += self._call_parts(calls)
                continue
            if final and self._strict:
                unfinished = self._parse_unfinished(self._buffer[length:])
                if unfinished is not None:
                    self._buffer = ""
                    parts += unfinished
                    break
            parts += self._take_text(length)
        return parts

    def _parse_marked_call(
        self, value: _JsonScanner, final: bool
    ) -> tuple[int, list[_CallJson]] | None:
        """Parse the buffer, which begins with an opener, up to the closer.

        Returns how many characters are parsed, and their calls: none when the opener is text. None
        when more text is needed.
        """
        no_call = len(self._format.opener), list[_CallJson]()
        end = value.end(self._buffer)
        if end is None:
            if final or value.impossible or len(self._buffer) > MAX_CALL_CHARS:
                return no_call
            return None
        if end > MAX_CALL_CHARS:
            return no_call
        calls = self._decode_calls(self._buffer, value)
        if not calls:
            return no_call
        rest = self._buffer[end:].lstrip()
        closer = self._format.closer
        if rest.startswith(closer):
            return len(self._buffer) - len(rest) + len(closer), calls
        if not closer.startswith(rest):
            return no_call
        if not final:
            return None
        # Some models omit the closer of the last call.
        return no_call if rest else (len(self._buffer), calls)

    # Both kinds

    def _parse_unfinished(self, body: str) -> list[TextPart | ToolCallPart] | None:
        """Parse what follows an opener, when the answer ends before the calls do.

        Returns the complete calls, then the unfinished one if its name is known; None when `body`
        does not begin a call.
        """
        calls: list[_CallJson] = []
        rest = body.lstrip()
        while True:
            value = _JsonScanner(0)
            end = value.end(rest)
            if end is not None:
                decoded = self._decode_calls(rest, value)
                if not decoded:
                    return None
                calls += decoded
                rest = rest[end:].lstrip()
                if rest.startswith((",", ";")):
                    rest = rest[1:].lstrip()
            elif rest.startswith("[") and not calls:
                rest = rest[1:].lstrip()
            else:
                break
        if calls and (not rest or self._format.closer.startswith(rest)):
            return self._call_parts(calls)
        names = self._names_beginning(rest)
        return [*self._call_parts(calls), *self._unfinished_parts(rest)] if names else None

    def _unfinished_parts(self, call_json: str) -> list[TextPart | ToolCallPart]:
        """Return the call that begins with `call_json`, if only one tool is possible."""
        names = self._names_beginning(call_json)
        if len(names) != 1:
            return []
        arguments = call_json[len(self._format.call_head(names[0])) :]
        return [ToolCallPart(self._format.new_id(), names[0], arguments, complete=False)]

    def _names_beginning(self, call_json: str) -> list[str]:
        """Return the tools of which a call can begin with `call_json`."""
        names = []
        for name in self._tool_names:
            head = self._format.call_head(name)
            if head.startswith(call_json) or call_json.startswith(head):
                names.append(name)
        return names

    def _decode_calls(self, text: str, value: _JsonScanner) -> list[_CallJson]:
        """Return the calls that `value` of `text` holds; [] when it is something else."""
        if value.calls is None:
            try:
                decoded = _decoder.decode(text[value.start : value.end(text)])
            except (msgspec.MsgspecError, RecursionError):
                decoded = []
            calls = decoded if isinstance(decoded, list) else [decoded]
            valid = all(
                call.name in self._tool_names and call.arguments_json.startswith("{")
                for call in calls
            )
            value.calls = calls if valid else []
        return value.calls

    def _call_parts(self, calls: list[_CallJson]) -> list[TextPart | ToolCallPart]:
        self.count += len(calls)
        self._space = ""
        self._after_call = True
        return [
            ToolCallPart(self._format.new_id(), call.name, call.arguments_json) for call in calls
        ]

    def _take_text(self, length: int) -> list[TextPart | ToolCallPart]:
        """Remove `length` characters from the buffer and return them as text.

        White space next to a call is dropped.
        """
        text = self._space + self._buffer[:length]
        self._buffer = self._buffer[length:]
        if self._after_call:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._after_call = self._after_call and not shown
        return [TextPart(shown)] if shown else []


class _CallJson(msgspec.Struct):
    """A call as models write it. Raw is JSON of which only the syntax has been checked."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")

    @property
    def arguments_json(self) -> str:
        """The JSON of the arguments."""
        return bytes(self.arguments).decode() or bytes(self.parameters).decode() or "{}"


_decoder = msgspec.json.Decoder(_CallJson | list[_CallJson])


class _JsonScanner:
    """Finds the end of the JSON object or list that begins at `start` of a growing text."""

    _OUTSIDE_STRING = re.compile(r'["{}\[\]]')
    _INSIDE_STRING = re.compile(r'["\\]')

    def __init__(self, start: int) -> None:
        self.start = start  # `end` moves it past white space before the value
        self.impossible = False  # there is something other than an object or a list
        self.calls: list[_CallJson] | None = None  # set by the parser when it decodes the value
        self._position = start  # all text before it has been scanned
        self._depth = 0  # of braces and brackets
        self._in_string = False
        self._end: int | None = None

    def end(self, text: str) -> int | None:
        """Return the position after the value; None until it is complete.

        `text` must begin with the `text` of the previous call.
        """
        if self._end is None and not self.impossible:
            self._end = self._scan(text)
        return self._end

    def _scan(self, text: str) -> int | None:
        if self._depth == 0:
            self.start = len(text) - len(text[self.start :].lstrip())
            self._position = self.start
            self.impossible = self.start < len(text) and text[self.start] not in "{["
            if self.start == len(text) or self.impossible:
                return None
        while True:
            pattern = self._INSIDE_STRING if self._in_string else self._OUTSIDE_STRING
            match = pattern.search(text, self._position)
            if match is None:
                self._position = len(text)
                return None
            mark = match[0]
            if mark == "\\":
                if match.end() == len(text):  # the escaped character is still to come
                    self._position = match.start()
                    return None
                self._position = match.end() + 1
                continue
            self._position = match.end()
            if mark == '"':
                self._in_string = not self._in_string
            elif mark in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    return self._position
