"""The text of an answer, as it comes, to its parts: what is said, what was only thought, and the tools that are called.

What comes out does not depend on where the text was cut. Whatever only looks like a call or a thought is text, unchanged.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from llmkit.runtime.server.stop import possible_start

MAX_CALL_CHARS = 1 << 18  # what is longer is text
THINK, END_THINK = "<think>", "</think>"


class Text(NamedTuple):
    """A piece of the answer proper."""

    text: str


class Reasoning(NamedTuple):
    """A piece of what the model thought before it."""

    text: str


class Call(NamedTuple):
    """A tool called; `arguments` is the JSON text of an object, as the model wrote it."""

    id: str
    name: str
    arguments: str


Part = Text | Reasoning | Call


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls: JSON of an object or a list of them, between marks or as the whole answer."""

    opener: str
    closer: str = ""
    whole: bool = False  # the answer is calls with ";" between them and nothing else; the opener may be missing
    id_chars: int = 29

    def new_id(self) -> str:
        """An id for a call. Mistral's templates take none but of 9 letters and digits."""
        return secrets.token_hex(5)[:9] if self.id_chars == 9 else "call_" + secrets.token_hex(12)


HERMES = CallFormat("<tool_call>", "</tool_call>")
MISTRAL = CallFormat("[TOOL_CALLS]", id_chars=9)
LLAMA = CallFormat("<|python_tag|>", whole=True)


def call_format(template: str) -> CallFormat | None:
    """How the model with this chat template writes calls; None when that is not known."""
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:  # others put XML between these marks
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    return LLAMA if '{"name": function name, "parameters":' in template else None


class Parts:
    """One answer's parser. thinks: the model may begin with a thought; it has begun one, where `begun`."""

    def __init__(self, thinks: bool = False, begun: bool = False, calls: Calls | None = None) -> None:
        self._thoughts = Thoughts(begun) if thinks or begun else None
        self._calls = calls

    @property
    def called(self) -> int:
        """Calls until now."""
        return self._calls.count if self._calls else 0

    @property
    def stopped(self) -> bool:
        """Whether the answer is over though the text may go on."""
        return self._calls is not None and self._calls.stopped

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that `text` completes; `final`: no text follows."""
        parts: list[Part] = []
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, final)
            parts += [Reasoning(thought)] if thought else []
        if self._calls is not None:
            return parts + self._calls.feed(text, final)
        return parts + ([Text(text)] if text else [])


class Thoughts:
    """Splits a thought, with the line feeds around it, from the answer that follows it."""

    def __init__(self, begun: bool) -> None:
        self._held = ""
        self._place = "start" if begun else "before"  # before, start, inside, after, done

    def feed(self, text: str, final: bool) -> tuple[str, str]:
        """The thought and the answer that `text` completes."""
        self._held += text
        thought = ""
        if self._place == "before":
            begin = self._held.lstrip()
            if begin.startswith(THINK):
                self._held, self._place = begin[len(THINK) :], "start"
            elif not THINK.startswith(begin) or final:
                self._place = "done"
        if self._place == "start":
            self._held = self._held.lstrip("\n")
            self._place = "inside" if self._held else "start"
        if self._place == "inside":
            thought = self._thought(final)
        if self._place == "after":
            self._held = self._held.lstrip("\n")
            self._place = "done" if self._held else "after"
        if self._place != "done":
            return thought, ""
        answer, self._held = self._held, ""
        return thought, answer

    def _thought(self, final: bool) -> str:
        end = self._held.find(END_THINK)
        if end >= 0:
            thought, self._held, self._place = self._held[:end], self._held[end + len(END_THINK) :], "after"
            return thought.rstrip("\n")
        keep = 0 if final else possible_start(self._held, [END_THINK])
        thought = self._held[: len(self._held) - keep].rstrip("\n")
        self._held = self._held[len(thought) :]
        return thought


class Calls:
    """Finds calls of the tools `names` in an answer; white space next to them is dropped.

    A call is held back until it is complete: only then is it known to be one. parallel: more than one may be made.
    """

    def __init__(self, form: CallFormat, names: Collection[str], parallel: bool = True) -> None:
        self.count = 0
        self.stopped = False
        self._form, self._names, self._parallel = form, frozenset(names), parallel
        self._held = ""
        self._json: _JsonEnd | None = None  # of the value behind the opener that `_held` begins with
        self._space = ""  # said, if something other than a call follows
        self._plain = False  # the whole answer is text

    def feed(self, text: str, final: bool) -> list[Part]:
        """The parts that `text` completes."""
        if self.stopped:
            return []
        self._held += text
        parts: list[Part] = self._whole(final) if self._form.whole else self._marked(final)
        if final and self._space:
            parts, self._space = [*parts, Text(self._space)], ""
        if not self._parallel and self.count:
            self.stopped = True
            first = next(index for index, part in enumerate(parts) if isinstance(part, Call))
            del parts[first + 1 :]
        return parts

    def _whole(self, final: bool) -> list[Part]:
        """The answer of a model that calls with nothing but calls."""
        if not self._plain:
            begin = self._held.lstrip()
            body = begin.removeprefix(self._form.opener).lstrip()
            if not final and (not body or self._form.opener.startswith(begin)):
                return []
            if body.startswith("{"):
                start = self._held.index("{")
                self._json = self._json or _JsonEnd(start)
                end = self._json.find(self._held)
                if end is not None and self._read(self._held[start:end]) is None:
                    self._plain = True
                elif not final and len(self._held) - start <= MAX_CALL_CHARS:
                    return []
                elif final and (calls := self._sequence(self._held[start:])) is not None:
                    self._held = ""
                    return self._made(calls)
            self._plain = True
        parts: list[Part] = [Text(self._held)] if self._held else []
        self._held = ""
        return parts

    def _sequence(self, text: str) -> list[tuple[str, str]] | None:
        """The calls of `{...}; {...}`; None when it is not just that."""
        calls: list[tuple[str, str]] = []
        while True:
            end = _JsonEnd(0).find(text) if text.startswith("{") else None
            found = None if end is None else self._read(text[:end])
            if found is None:
                return None
            calls += found
            text = text[end:].strip()
            if not text:
                return calls
            if not text.startswith(";"):
                return None
            text = text[1:].lstrip()

    def _marked(self, final: bool) -> list[Part]:
        """Text with calls between marks."""
        opener, parts = self._form.opener, list[Part]()
        while self._held:
            if self._json is None:
                at = self._held.find(opener)
                text, self._held = self._cut(at if at >= 0 else len(self._held) - self._pending(final))
                parts += self._said(text)
                if at < 0:
                    break
                self._json = _JsonEnd(len(opener))
            taken = self._take(final)
            if taken is None:
                break
            self._json = None
            length, calls = taken
            text, self._held = self._cut(length)
            parts += self._made(calls) if calls else self._said(text)
        return parts

    def _cut(self, at: int) -> tuple[str, str]:
        return self._held[:at], self._held[at:]

    def _pending(self, final: bool) -> int:
        return 0 if final else possible_start(self._held, [self._form.opener])

    def _take(self, final: bool) -> tuple[int, list[tuple[str, str]]] | None:
        """How much of `_held`, which begins with the opener, is done with, and the calls in it; None: wait."""
        assert self._json is not None
        no_call = len(self._form.opener), list[tuple[str, str]]()
        end = self._json.find(self._held)
        if end is None:
            return no_call if final or self._json.impossible or len(self._held) > MAX_CALL_CHARS else None
        start = self._json.start
        calls = self._read(self._held[start:end]) if end <= MAX_CALL_CHARS else None
        if not calls:
            return no_call
        rest = self._held[end:].lstrip()
        closer = self._form.closer
        if rest.startswith(closer):
            return len(self._held) - len(rest) + len(closer), calls
        if closer.startswith(rest):
            return (no_call if rest else (len(self._held), calls)) if final else None
        return no_call

    def _read(self, text: str) -> list[tuple[str, str]] | None:
        """Name and arguments of the calls that `text` is; None when it is something else."""
        try:
            found = _decoder.decode(text)
        except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
            return None
        objects = found if isinstance(found, list) else [found]
        calls = []
        for one in objects:
            arguments = bytes(one.arguments if one.arguments is not None else one.parameters or b"{}").decode()
            if one.name not in self._names or not arguments.startswith("{"):
                return None
            calls.append((one.name, arguments))
        return calls or None

    def _made(self, calls: Sequence[tuple[str, str]]) -> list[Part]:
        self.count += len(calls)
        self._space = ""
        return [Call(self._form.new_id(), name, arguments) for name, arguments in calls]

    def _said(self, text: str) -> list[Part]:
        """`text` without the white space next to a call."""
        text = self._space + text
        if self.count and not self._space and self._after_call:
            text = text.lstrip()
        return []


class _CallJson(msgspec.Struct):
    name: str
    arguments: msgspec.Raw | None = None
    parameters: msgspec.Raw | None = None


_decoder = msgspec.json.Decoder(_CallJson | list[_CallJson])


class _JsonEnd:
    """Where the JSON object or list in a growing text ends, that follows white space at `start`."""
