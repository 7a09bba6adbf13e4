"""Splits the text of an answer, as it arrives, into text, reasoning and pieces of tool calls.

One parser reads every dialect by its data. The result does not depend on where the text is cut
into pieces.

A call is passed on as it comes, once its name is known to be that of a tool and its arguments
begin; what was passed on is the beginning of valid JSON at any time. Until then, text that only
looks like a call stays text, unchanged. A call that goes on with something other than JSON ends
there, incomplete; what follows is text.

Where a grammar lets only a call follow its first mark, a call that the answer's end cuts off is
one, too, as soon as only one tool is possible.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import Any, Protocol

from llmkit.runtime.server.text.call_reader import CallReader
from llmkit.runtime.server.text.harmony_reader import HarmonyReader
from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    TextPart,
)
from llmkit.runtime.server.text.parts_collector import AnswerEndError, PartsCollector
from llmkit.runtime.server.text.text_cursor import (
    EndOfTextError,
    MalformedError,
    Steps,
    TextCursor,
)
from llmkit.runtime.server.text.tool_dialects import (
    JsonObjectCall,
    ParameterCall,
    ReasoningMarks,
    ToolDialect,
)


class OutputParser(Protocol):
    """The parser of one answer."""

    @property
    def num_tool_calls(self) -> int:
        """How many complete tool calls were found so far."""

    @property
    def num_begun_calls(self) -> int:
        """How many tool calls were found so far, complete or not."""

    @property
    def is_reasoning(self) -> bool:
        """Whether reasoning has begun and not ended."""

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete although the text may go on."""

    def feed(self, text: str, final: bool = False, is_cut: bool = False) -> list[OutputPart]:
        """Add the next `text`; return the parts that it completes.

        final: no text follows. is_cut: because of a limit or a stop string, not of the model.
        """


class PlainParser:
    """The parser of an answer that is only text."""

    num_tool_calls = 0
    num_begun_calls = 0
    is_reasoning = False
    stopped = False

    def feed(self, text: str, final: bool = False, is_cut: bool = False) -> list[OutputPart]:
        """Return `text`."""
        return [TextPart(text)] if text else []


class TextParser(PlainParser):
    """The parser of a chat's answer that has neither reasoning nor calls.

    White space is held back until other text follows, as it is by a DialectParser.
    """

    def __init__(self) -> None:
        self._space = ""

    def feed(self, text: str, final: bool = False, is_cut: bool = False) -> list[OutputPart]:
        """Return what can be shown of `text`."""
        text = self._space + text
        shown = text if final else text.rstrip()
        self._space = text[len(shown) :]
        return [TextPart(shown)] if shown else []


def new_output_parser(
    dialect: ToolDialect | None,
    tools: Collection[Mapping[str, Any]] = (),
    parallel: bool = True,
    required: bool = False,
    strict: bool = False,
    may_reason: bool = False,
    starts_in_reasoning: bool = False,
    reasoning: ReasoningMarks | None = None,
) -> OutputParser:
    """Return a parser of one answer.

    dialect: how the model writes calls; None: it writes none. A dialect with channels is read as
    such without tools, too.
    tools: those that may be called, as in requests: `{"type": "function", "function": {...}}`.
    parallel: the answer may have more than one call. required: a grammar lets the model write calls
    and nothing else. strict: a grammar lets only a call follow a call's first mark, or be the whole
    answer, and allows other text.
    may_reason: the answer may begin with reasoning. starts_in_reasoning: the prompt ends with the
    mark before reasoning. reasoning: the marks; None: those of the dialect.
    """
    marks = reasoning or (dialect.reasoning if dialect else None)
    has_calls = dialect is not None and (tools or dialect.channels is not None)
    has_reasoning = marks is not None and (may_reason or starts_in_reasoning)
    if not has_calls and not has_reasoning:
        return TextParser()
    return DialectParser(
        dialect, tools, parallel, required, strict, may_reason, starts_in_reasoning, reasoning
    )


class DialectParser:
    """The parser of an answer in a dialect; see `new_output_parser`."""

    def __init__(
        self,
        dialect: ToolDialect | None,
        tools: Collection[Mapping[str, Any]],
        parallel: bool,
        required: bool,
        strict: bool,
        may_reason: bool,
        starts_in_reasoning: bool,
        reasoning: ReasoningMarks | None,
    ) -> None:
        self.is_reasoning = False
        self._required = required
        self._strict = strict or required
        self._may_reason = may_reason
        self._starts_in_reasoning = starts_in_reasoning
        self._marks = reasoning or (dialect.reasoning if dialect else None)
        self._dialect = dialect
        self._cursor = TextCursor()
        self._parts = PartsCollector(self._cursor, dialect, tools, parallel)
        self._harmony: HarmonyReader | None = None
        self._calls: CallReader | None = None
        if dialect is not None and (tools or dialect.channels is not None):
            self._calls = CallReader(self._cursor, self._parts, dialect)
            if dialect.channels is not None:
                self._harmony = HarmonyReader(
                    self._cursor, self._parts, self._calls, dialect.channels
                )
        self._steps = self._answer()

    @property
    def num_tool_calls(self) -> int:
        """How many complete tool calls were found so far."""
        return self._parts.num_complete

    @property
    def num_begun_calls(self) -> int:
        """How many tool calls were found so far, complete or not."""
        return self._parts.num_begun

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete although the text may go on."""
        return self._parts.num_complete > 0 and not self._parts.parallel

    def feed(self, text: str, final: bool = False, is_cut: bool = False) -> list[OutputPart]:
        """Add the next `text`; return the parts that it completes.

        final: no text follows. is_cut: because of a limit or a stop string, not of the model. Calls
        that the model ended without their last marks are complete.
        """
        if self.stopped:
            return []
        self._cursor.add(text, final, is_cut)
        next(self._steps, None)
        if self._harmony is not None:
            self.is_reasoning = self._harmony.is_reasoning
        return self._parts.take_parts()

    def _answer(self) -> Steps:
        """Read the whole answer."""
        parts = self._parts
        try:
            if self._harmony is not None:
                yield from self._harmony.read(self._starts_in_reasoning)
            else:
                yield from self._thought()
                if self._calls is not None and self._dialect is not None:
                    yield from self._text_and_calls(self._calls, self._dialect)
                else:
                    yield from self._cursor.until((), parts.text)
        except AnswerEndError:
            return
        except EndOfTextError:
            if self._harmony is not None:
                self._take_unfinished()
            return
        parts.end_text()

    def _thought(self) -> Steps:
        """Read reasoning at the beginning of the answer, if there is any.

        Line feeds at its beginning, at its end and after it are dropped.
        """
        cursor, parts, marks = self._cursor, self._parts, self._marks
        if marks is None or not (self._may_reason or self._starts_in_reasoning):
            return
        if not self._starts_in_reasoning:
            yield from cursor.skip_space()
            if not (yield from cursor.take(marks.start)):
                cursor.rewind()
                return
        self.is_reasoning = True
        yield from self._skip_line_feeds()
        line_feeds = ""

        def add(text: str) -> None:
            nonlocal line_feeds
            shown = (line_feeds + text).rstrip("\n")
            line_feeds = (line_feeds + text)[len(shown) :]
            if shown:
                parts.reasoning(shown)

        if (yield from cursor.until([marks.end], add)):
            self.is_reasoning = False
            yield from self._skip_line_feeds()
        cursor.commit()

    def _skip_line_feeds(self) -> Steps:
        while (yield from self._cursor.take("\n")):
            self._cursor.commit()

    def _text_and_calls(self, calls: CallReader, dialect: ToolDialect) -> Steps:
        """Read text with calls in it."""
        cursor, parts = self._cursor, self._parts
        starts = tuple(filter(None, (dialect.section_start, *dialect.other_section_starts)))
        openers = [*starts, *filter(None, [dialect.call_start])]
        if dialect.call_start_optional and isinstance(dialect.syntax, ParameterCall):
            openers.append(dialect.syntax.before_name)
        if dialect.whole_answer:
            cursor.commit()
            yield from cursor.skip_space()
            begins = ("[", "{") if isinstance(dialect.syntax, JsonObjectCall) else ("[",)
            begun = yield from cursor.take(*begins)
            if begun:
                cursor.skip(-len(begun))
                yield from self._try_section(calls, dialect, "", starts)
            else:
                cursor.rewind()
        while True:
            opener = yield from cursor.until(openers, parts.text, keep_partial=self._required)
            if not opener:
                if not cursor.at_end:  # the beginning of an opener
                    parts.read_call()
                    self._take_unfinished()
                return
            # An opener that is not one is text.
            cursor.skip(-len(opener))
            cursor.commit()
            cursor.skip(len(opener))
            yield from self._try_section(calls, dialect, opener, starts)

    def _try_section(
        self, calls: CallReader, dialect: ToolDialect, opener: str, starts: tuple[str, ...]
    ) -> Steps:
        """Read the calls after `opener`; what is none of them becomes text, or is read again.

        Raises EndOfTextError where an unfinished call ends the answer.
        """
        parts = self._parts
        begun = parts.num_begun
        try:
            yield from self._section(calls, dialect, opener, starts)
        except EndOfTextError:
            if self._take_unfinished():
                raise
            self._go_back(opener if begun == parts.num_begun else "")
        except MalformedError:
            parts.abandon_call()
            self._go_back(opener if begun == parts.num_begun else "")

    def _go_back(self, opener: str) -> None:
        """Go back to the last commit; the `opener` that follows there is text."""
        self._cursor.rewind()
        if opener:
            self._cursor.skip(len(opener))
            self._parts.text(opener)

    def _take_unfinished(self) -> bool:
        """Take the call that the answer's end cuts off; return whether there is one.

        One that has not begun is passed on only if a grammar wants it and one tool is possible.
        """
        parts = self._parts
        if parts.call is not None:
            parts.abandon_call()
            return True
        if not self._strict or not parts.possible_names:
            return False
        if len(parts.possible_names) == 1:
            parts.unfinished_call(parts.possible_names[0])
        return True

    def _section(
        self, calls: CallReader, dialect: ToolDialect, opener: str, starts: tuple[str, ...]
    ) -> Steps:
        """Read the calls after `opener`: a section's start, a call's, or none."""
        cursor = self._cursor
        in_section = not opener or opener in starts
        call_begun = not in_section
        name_begun = call_begun and opener != dialect.call_start
        self._parts.read_call()
        yield from cursor.skip_space()
        in_list = False
        if isinstance(dialect.syntax, JsonObjectCall):
            in_list = bool((yield from cursor.take("[")))
        elif dialect.in_list:
            in_list = bool((yield from cursor.expect("[")))
        while True:
            self._parts.read_call()
            yield from cursor.skip_space()
            if dialect.call_start and not (call_begun or name_begun or in_list):
                yield from cursor.expect(dialect.call_start)
            yield from calls.read(name_begun, needs_arguments=not opener)
            call_begun = name_begun = False
            if in_list:
                in_list = yield from self._next_in_list()
                if in_list:
                    continue
            yield from cursor.close(dialect.call_end)
            cursor.commit()
            if not in_section or (yield from cursor.close(dialect.section_end)):
                return
            yield from cursor.skip_space()
            if dialect.whole_answer:
                yield from cursor.take(";", ",")
                yield from cursor.skip_space()
                if cursor.at_end and cursor.final:
                    return
                if cursor.ahead(1) != "{":
                    cursor.rewind()
                    return
            elif dialect.call_start:
                call_begun = bool((yield from cursor.take(dialect.call_start)))
            elif isinstance(dialect.syntax, ParameterCall):
                name_begun = bool((yield from cursor.take(dialect.syntax.before_name)))
            if not (dialect.whole_answer or call_begun or name_begun):
                return

    def _next_in_list(self) -> Generator[None, None, bool]:
        """Read what follows a call in a list; return whether it is another call."""
        cursor = self._cursor
        cursor.commit()
        yield from cursor.skip_space()
        if not (yield from cursor.take(",", ";")):
            yield from cursor.take("]")
            return False
        yield from cursor.skip_space()
        return not (cursor.at_end and cursor.final)
