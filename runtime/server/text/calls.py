"""Calls of tools in the text of an answer, as it comes: the formats that models write them in, and one parser of them.

A call is held back until it is complete: only then is it known to be one, and what only looks like a call is text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from llmkit.runtime.server.text.stop import possible_start

MAX_CALL_CHARS = 1 << 18  # what is longer is text


class Text(NamedTuple):
    """A piece of the answer proper."""

    text: str


class Call(NamedTuple):
    """A tool called; `arguments` is the JSON text of an object, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls: JSON of an object or a list of them, between marks or as the whole answer."""

    opener: str
    closer: str = ""
    whole: bool = False  # the answer is calls with ";" between them and nothing else; the opener may be missing
    short_ids: bool = False  # of 9 letters and digits: Mistral's templates take no others

    def new_id(self) -> str:
        """An id for a call."""
        return secrets.token_hex(5)[:9] if self.short_ids else "call_" + secrets.token_hex(12)


HERMES = CallFormat("<tool_call>", "</tool_call>")
MISTRAL = CallFormat("[TOOL_CALLS]", short_ids=True)
LLAMA = CallFormat("<|python_tag|>", whole=True)


def call_format(template: str) -> CallFormat | None:
    """How the model with this chat template writes calls; None when that is not known."""
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:  # others put XML between these marks
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    return LLAMA if '{"name": function name, "parameters":' in template else None


class Calls:
    """Finds calls of the tools `names`; white space next to them is dropped. parallel: more than one may be made."""

    def __init__(self, form: CallFormat, names: Collection[str], parallel: bool = True) -> None:
        self.count = 0
        self.stopped = False  # the answer is over though the text may go on
        self._form, self._names, self._parallel = form, frozenset(names), parallel
        self._held = ""
        self._json: _Json | None = None  # behind the opener that `_held` begins with
        self._space = ""  # said, unless a call follows
        self._after_call = False
        self._plain = False  # the whole answer is text

    def feed(self, text: str, final: bool) -> list[Text | Call]:
        """The parts that `text` completes; `final`: no text follows."""
        if self.stopped:
            return []
        self._held += text
        parts = self._whole(final) if self._form.whole else self._marked(final)
        if final and self._space:
            parts, self._space = [*parts, Text(self._space)], ""
        if self.count and not self._parallel:
            self.stopped = True
            first = next(index for index, part in enumerate(parts) if isinstance(part, Call))
            del parts[first + 1 :]
        return parts

    def _whole(self, final: bool) -> list[Text | Call]:
        """Where nothing but calls is an answer that calls: `{...}; {...}`."""
        if not self._plain:
            begin = self._held.lstrip()
            body = begin.removeprefix(self._form.opener).lstrip()
            if not final and (not body or self._form.opener.startswith(begin)):
                return []
            if (found := self._sequence(body, final)) is None:
                return []
            if found:
                self._held = ""
                return self._made(found)
            self._plain = True
        parts: list[Text | Call] = [Text(self._held)] if self._held else []
        self._held = ""
        return parts

    def _sequence(self, body: str, final: bool) -> list[_CallJson] | None:
        """The calls that `body` is; empty when it is something else; None while that cannot be told."""
        if not body.startswith("{") or len(body) > MAX_CALL_CHARS:
            return []
        self._json = self._json or _Json(0)
        if self._json.end(body) is not None and not self._read(body, self._json):
            return []
        if not final:
            return None
        calls: list[_CallJson] = []
        while True:
            value = _Json(0)
            if value.end(body) is None or not (found := self._read(body, value)):
                return []
            calls += found
            body = body[value.end(body) :].strip()
            if not body:
                return calls
            if not body.startswith(";"):
                return []
            body = body[1:].lstrip()

    def _marked(self, final: bool) -> list[Text | Call]:
        """Text with calls between marks."""
        opener, parts = self._form.opener, list[Text | Call]()
        while self._held:
            if self._json is None:
                at = self._held.find(opener)
                pending = 0 if final else possible_start(self._held, [opener])
                parts += self._said(at if at >= 0 else len(self._held) - pending)
                if at < 0:
                    break
                self._json = _Json(len(opener))
            taken = self._take(self._json, final)
            if taken is None:
                break
            self._json = None
            length, calls = taken
            if calls:
                self._held = self._held[length:]
                parts += self._made(calls)
            else:
                parts += self._said(length)
        return parts

    def _take(self, value: _Json, final: bool) -> tuple[int, list[_CallJson]] | None:
        """How many characters of `_held`, which begins with an opener, are done with, and their calls. None: wait."""
        no_call = len(self._form.opener), list[_CallJson]()
        end = value.end(self._held)
        if end is None:
            return no_call if final or value.impossible or len(self._held) > MAX_CALL_CHARS else None
        if end > MAX_CALL_CHARS or not (calls := self._read(self._held, value)):
            return no_call
        rest, closer = self._held[end:].lstrip(), self._form.closer
        if rest.startswith(closer):
            return len(self._held) - len(rest) + len(closer), calls
        if not closer.startswith(rest):
            return no_call
        if not final:
            return None
        return no_call if rest else (len(self._held), calls)  # models leave the last closer out

    def _read(self, text: str, value: _Json) -> list[_CallJson]:
        """The calls that `value` of `text` is; empty when it is something else."""
        if value.calls is None:
            try:
                found = _decoder.decode(text[value.start : value.end(text)])
            except (msgspec.MsgspecError, RecursionError):
                found = []
            calls = found if isinstance(found, list) else [found]
            known = all(call.name in self._names and call.text.startswith("{") for call in calls)
            value.calls = calls if known else []
        return value.calls

    def _made(self, calls: list[_CallJson]) -> list[Text | Call]:
        self.count += len(calls)
        self._space, self._after_call = "", True
        return [Call(self._form.new_id(), call.name, call.text) for call in calls]

    def _said(self, length: int) -> list[Text | Call]:
        """The first `length` characters of what is held, without the white space next to a call."""
        text, self._held = self._space + self._held[:length], self._held[length:]
        if self._after_call:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._after_call = self._after_call and not shown
        return [Text(shown)] if shown else []


class _CallJson(msgspec.Struct):
    """A call as models write it; Raw is JSON that was checked but not read."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")

    @property
    def text(self) -> str:
        """The JSON of the arguments."""
        return bytes(self.arguments).decode() or bytes(self.parameters).decode() or "{}"


_decoder = msgspec.json.Decoder(_CallJson | list[_CallJson])


class _Json:
    """The JSON object or list in a growing text, behind white space at `start`."""

    _OUTSIDE = re.compile(r'["{}\[\]]')
    _QUOTED = re.compile(r'["\\]')

    def __init__(self, start: int) -> None:
        self.start = start
        self.impossible = False  # there is something else
        self.calls: list[_CallJson] | None = None  # what it was found to be
        self._at = start  # what is before has been looked at
        self._depth = 0
        self._quoted = False
        self._end: int | None = None

    def end(self, text: str) -> int | None:
        """The place behind it, once that is known. `text` is the one of before, or longer."""
        if self._end is None and not self.impossible:
            self._end = self._search(text)
        return self._end

    def _search(self, text: str) -> int | None:
        if self._depth == 0:
            self.start += len(text) - self.start - len(text[self.start :].lstrip())
            self._at = self.start
            self.impossible = self.start < len(text) and text[self.start] not in "{["
            if self.start == len(text) or self.impossible:
                return None
        while match := (self._QUOTED if self._quoted else self._OUTSIDE).search(text, self._at):
            mark = match[0]
            if mark == "\\" and match.end() == len(text):
                self._at = match.start()
                return None
            self._at = match.end() + (mark == "\\")
            if mark == '"':
                self._quoted = not self._quoted
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return self._at
        self._at = len(text)
        return None
