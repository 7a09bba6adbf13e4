"""Reads answers in Harmony, the format of gpt-oss: messages in channels.

Thoughts, text and calls are messages of their own, in any order. A message to a tool that was not
offered is text, or reasoning if its channel is that of thoughts.
"""

from __future__ import annotations

import re

from llmkit.runtime.server.text.call_reader import CallReader
from llmkit.runtime.server.text.parts_collector import PartsCollector
from llmkit.runtime.server.text.text_cursor import (
    EndOfTextError,
    MalformedError,
    Steps,
    TextCursor,
)
from llmkit.runtime.server.text.tool_dialects import ChannelCall

_MAX_HEADER_CHARS = 1024
_BETWEEN_MESSAGES = "\n\n"  # of the same kind
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


class HarmonyReader:
    """Reads the messages of one answer."""

    def __init__(
        self, cursor: TextCursor, parts: PartsCollector, calls: CallReader, syntax: ChannelCall
    ) -> None:
        self.is_reasoning = False  # a thought has begun and not ended
        self._cursor = cursor
        self._parts = parts
        self._calls = calls
        self._syntax = syntax
        self._shown_kinds: set[str] = set()  # "text" and "reasoning", since the last call
        self._channel_name = re.compile(re.escape(syntax.channel) + r"\s*(\w+)")

    def read(self, starts_in_reasoning: bool = False) -> Steps:
        """Read all messages. starts_in_reasoning: the prompt ends with a thought's header."""
        cursor, syntax = self._cursor, self._syntax
        if starts_in_reasoning:
            yield from self._shown_body(reasoning=True)
        # The prompt ends with the first message's start and role.
        while True:
            cursor.commit()
            yield from cursor.skip_space()
            if cursor.at_end and cursor.final:
                return
            if (yield from cursor.take(*syntax.ends)):
                continue
            if (yield from cursor.take(syntax.start)):
                yield from cursor.take(syntax.role)
                cursor.commit()
                yield from cursor.skip_space()
            begins = yield from cursor.take(syntax.channel, "to=", syntax.message)
            if begins:
                cursor.skip(-len(begins))
                yield from self._message()
            else:
                cursor.rewind()
                yield from self._shown_body(reasoning=False)

    def _message(self) -> Steps:
        """Read a message's header and body."""
        cursor, syntax = self._cursor, self._syntax
        pieces: list[str] = []

        def add(piece: str) -> None:
            pieces.append(piece)
            if sum(map(len, pieces)) > _MAX_HEADER_CHARS:
                raise MalformedError

        self._parts.possible_names = []
        try:
            mark = yield from cursor.until([syntax.message], add)
        except MalformedError:
            cursor.rewind()
            yield from self._shown_body(reasoning=False)
            return
        header = "".join(pieces)
        recipient = _RECIPIENT.search(header)
        channel = self._channel_name.search(header)
        to = recipient[1] if recipient is not None else ""
        if not mark:
            if to.startswith(syntax.recipient):
                self._parts.begun_name(to.removeprefix(syntax.recipient))
            elif syntax.channel not in header:
                cursor.rewind()
                yield from self._shown_body(reasoning=False)
            elif channel is None or channel[1] == syntax.call_channel:
                self._parts.read_call()
            raise EndOfTextError
        cursor.commit()
        name = to.removeprefix(syntax.recipient)
        if to.startswith(syntax.recipient) and name in self._parts.schemas:
            yield from self._call(name)
            return
        yield from self._shown_body(channel is not None and channel[1] == syntax.reasoning_channel)

    def _call(self, name: str) -> Steps:
        """Read the body of a call."""
        cursor, parts = self._cursor, self._parts
        begun = parts.num_begun
        parts.check_name(name)
        self._shown_kinds.clear()
        try:
            yield from cursor.skip_space()
            # The end's token may have ended the answer and is not part of its text then.
            ended = yield from cursor.take(*self._syntax.ends)
            if ended or (cursor.at_end and cursor.ends_before("")):
                parts.begin_call(name)
                parts.arguments("{}")
                parts.complete_call()
                return
            yield from self._calls.read_arguments(name)
        except MalformedError:
            cursor.rewind()
            parts.abandon_call()
            if begun == parts.num_begun:
                yield from self._shown_body(reasoning=False)

    def _shown_body(self, reasoning: bool) -> Steps:
        """Read a body that is text or reasoning, up to its end or the next message's header."""
        cursor, parts, syntax = self._cursor, self._parts, self._syntax
        kind = "reasoning" if reasoning else "text"
        show = parts.reasoning if reasoning else parts.text
        between = _BETWEEN_MESSAGES if kind in self._shown_kinds else ""

        def add(text: str) -> None:
            nonlocal between
            show(between + text)
            between = ""
            self._shown_kinds.add(kind)

        self.is_reasoning = reasoning
        mark = yield from cursor.until([*syntax.ends, syntax.start, syntax.channel], add)
        if mark in (syntax.start, syntax.channel):
            cursor.skip(-len(mark))
        if mark:
            self.is_reasoning = False
