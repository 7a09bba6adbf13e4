"""Grammars of tool calls in every dialect, made from its data in `tool_dialects.py`.

What they allow is what `output_parser.py` reads as calls whose arguments follow the tools' schemas,
in the form of the models' chat templates, with a line feed or a space where these differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from llmkit.runtime.server.text.argument_grammar import (
    JSON_WORDS,
    PYTHON,
    LiteralGrammar,
    LiteralStyle,
)
from llmkit.runtime.server.text.lark_grammar import (
    ANY_TEXT,
    LarkGrammar,
    Mark,
    containing,
    lark_string,
    sequence,
)
from llmkit.runtime.server.text.parameter_grammar import GAP, ParameterGrammar
from llmkit.runtime.server.text.tool_dialects import (
    ChannelCall,
    JsonObjectCall,
    MapCall,
    NamedJsonCall,
    ParameterCall,
    PythonCall,
    ReasoningMarks,
    ToolDialect,
)

_SPACE = '" "?'
_COMMA = '"," " "?'
_CALL_ID = "/[a-zA-Z0-9]{9}/"
_INDEX = "/[0-9]{1,4}/"


def tool_call_grammar(
    dialect: ToolDialect,
    tools: Sequence[Mapping[str, Any]],
    parallel: bool,
    optional: bool,
    mark: Mark,
) -> str:
    """Return the Lark grammar of calls of `tools`, which are as in requests.

    parallel: there may be several calls. optional: there may be other text and no call, but
    text that begins like a call must be one. mark: converts a mark to a Lark expression.
    Raises ApiError 400 for a schema that the dialect's syntax cannot keep.
    """
    grammar = _CallGrammar(dialect, parallel, mark)
    call = grammar.lark.rule(" | ".join(grammar.call(tool["function"]) for tool in tools))
    return grammar.lark.text(grammar.answer(call, optional))


def answer_frame(
    channels: ChannelCall | None,
    alternatives: Sequence[str],
    reasoning: ReasoningMarks | None,
    starts_in_reasoning: bool,
    mark: Mark,
) -> str:
    """Return the Lark grammar of a whole answer: reasoning, and then one of `alternatives`.

    channels: the syntax of answers that consist of messages; the alternatives are messages, too.
    reasoning: the marks of reasoning, which may come first, and must come first if the prompt has
    begun it (`starts_in_reasoning`); None: there is none between marks.
    """
    lark = LarkGrammar(mark)
    body = f"({' | '.join(alternatives)})"
    if channels is not None:
        next_message = sequence(mark(channels.start), lark_string(channels.role))
        thought, preamble = (
            f"{_header(channels, name, mark)} {_body(channels, lark)} {next_message}"
            for name in (channels.reasoning_channel, channels.call_channel)
        )
        return lark.text(f"({lark.rule(thought)})* ({lark.rule(preamble)})? {body}")
    if reasoning is None:
        return lark.text(body)
    thought = sequence(lark.until(reasoning.end), r"/\n{0,2}/")
    if not starts_in_reasoning:
        thought = f"({mark(reasoning.start)} {thought})?"
    return lark.text(f"{thought} {body}")


def final_message(channels: ChannelCall, answer: str, mark: Mark) -> str:
    """Return the Lark expression of a message that is shown, with the body `answer`."""
    return sequence(_header(channels, "final", mark), answer, f"({mark(channels.ends[-1])})?")


def _header(channels: ChannelCall, name: str, mark: Mark) -> str:
    return sequence(mark(channels.channel), lark_string(name), mark(channels.message))


def _body(channels: ChannelCall, lark: LarkGrammar) -> str:
    """Return the expression of any text in a message that others follow, and of its end."""
    return lark.until(channels.ends[0], also_without=_message_marks(channels)[1:])


def _message_marks(channels: ChannelCall) -> tuple[str, ...]:
    return (*channels.ends, channels.start, channels.channel)


class _CallGrammar:
    """The rules of calls in one dialect."""

    def __init__(self, dialect: ToolDialect, parallel: bool, mark: Mark) -> None:
        self.lark = LarkGrammar(mark)
        self._dialect = dialect
        self._parallel = parallel
        self._mark = mark

    def call(self, function: Mapping[str, Any]) -> str:
        """Return the expression of a call of one tool, between the dialect's marks of calls."""
        lark, mark = self.lark, self._mark
        name = function["name"]
        schema = {"type": "object"} | (function.get("parameters") or {})
        match self._dialect.syntax:
            case JsonObjectCall(arguments_key):
                head = f'{{"name": {json.dumps(name)}, "{arguments_key}": '
                return lark.rule(f'{lark_string(head)} {lark.json(schema)} "}}"')
            case NamedJsonCall() as syntax:
                call_id = ""
                if syntax.before_id:
                    call_id = f"{mark(syntax.before_id)} {_CALL_ID}"
                    if self._dialect.ids == "indexed":
                        call_id = f"{mark(syntax.before_id)} {_INDEX}"
                    else:
                        call_id = f"({call_id})?"
                before = sequence(mark(syntax.before_name), lark_string(name), call_id)
                arguments = lark.json(schema)
                after = mark(syntax.after_arguments)
                return lark.rule(sequence(before, mark(syntax.after_name), arguments, after))
            case ParameterCall() as syntax:
                before = sequence(mark(syntax.before_name), lark_string(name))
                parameters = ParameterGrammar(lark, syntax, schema).parameters()
                return lark.rule(
                    sequence(before, mark(syntax.after_name), GAP, parameters, mark(syntax.end))
                )
            case PythonCall():
                members = LiteralGrammar(lark, PYTHON, schema).arguments(schema, "=", _COMMA)
                return lark.rule(sequence(lark_string(name + "("), members, '")"'))
            case MapCall() as syntax:
                style = LiteralStyle(JSON_WORDS, syntax.quote)
                members = LiteralGrammar(lark, style, schema).arguments(schema, ":", _COMMA)
                before = sequence(mark(syntax.before_name), lark_string(name + "{"))
                return lark.rule(sequence(before, members, '"}"'))
            case ChannelCall() as syntax:
                to = f"to={syntax.recipient}{name}"
                form = f'({_SPACE} {mark(syntax.constrain)} "json" | " json" | {_SPACE})'
                call_channel = syntax.call_channel
                in_channel = f"{mark(syntax.channel)} {lark_string(f'{call_channel} {to}')}"
                before = f"{lark_string(' ' + to)} {mark(syntax.channel)} "
                before += lark_string(call_channel)
                head = f"({in_channel} | {before}) {form} {mark(syntax.message)}"
                return lark.rule(f"{head} {lark.json(schema)}")
            case _ as unreachable:
                assert_never(unreachable)

    def answer(self, call: str, optional: bool) -> str:
        """Return the expression of an answer with calls."""
        dialect, lark, mark = self._dialect, self.lark, self._mark
        syntax = dialect.syntax
        if isinstance(syntax, ChannelCall):
            end = mark(syntax.ends[1])
            next_call = f"{end} {mark(syntax.start)} {lark_string(syntax.role)} {call}"
            calls = sequence(call, f"({next_call})*" if self._parallel else "", f"({end})?")
            if not optional:
                return calls
            marks = _message_marks(syntax)
            text = lark.terminal(f"{ANY_TEXT} & ~{containing(marks)}")
            text = f"({text} | {lark.until(syntax.ends[-1], also_without=marks)})"
            return f"{calls} | {_header(syntax, 'final', mark)} {text}"
        if dialect.whole_answer:
            calls = self._after_opener(call, dialect.section_start)
            calls = f"({mark(dialect.section_start)})? {calls}"
            if not optional:
                return calls
            brackets = r"\[\{" if isinstance(syntax, JsonObjectCall) else r"\["
            text = rf"/[ \t\r\n]*([^ \t\r\n{brackets}](.|\n)*)?/"
            return f"{calls} | {lark.terminal(f'{text} & ~{containing(self._openers())}')}"
        starts = (dialect.section_start, *dialect.other_section_starts)
        if not dialect.section_start:
            starts = (dialect.call_start,)
        sections = {start: self._after_opener(call, start) for start in starts}
        if not optional:
            options = " | ".join(f"{mark(start)} {rest}" for start, rest in sections.items())
            return f"({options})"
        leads = [
            f"{lark.until(start, also_without=self._openers())} {rest}"
            for start, rest in sections.items()
        ]
        text = lark.terminal(f"{ANY_TEXT} & ~{containing(self._openers())}")
        return f"({' | '.join(leads)}){'*' if self._parallel else '?'} {text}"

    def _openers(self) -> tuple[str, ...]:
        """Return the marks that are not in text beside calls."""
        dialect = self._dialect
        openers = [dialect.section_start, *dialect.other_section_starts, dialect.call_start]
        if dialect.call_start_optional and isinstance(dialect.syntax, ParameterCall):
            openers.append(dialect.syntax.before_name)
        return tuple(filter(None, openers))

    def _after_opener(self, call: str, opener: str) -> str:
        """Return the expression of the calls after `opener`, up to the section's end."""
        dialect, mark = self._dialect, self._mark
        if dialect.in_list:
            more = f"({_COMMA} {call})*" if self._parallel else ""
            # Models write no mark after the ways in which they begin a section, too.
            end = f"({mark(dialect.section_end)})?" if dialect.section_end else ""
            if opener == dialect.section_start and not dialect.whole_answer:
                end = mark(dialect.section_end)
            return sequence(_SPACE, '"["', call, more, '"]"', end)
        if dialect.whole_answer:
            return sequence(call, f'("; " {call})*' if self._parallel else "")
        if not dialect.section_start:
            one = sequence(GAP, call, GAP, mark(dialect.call_end))
            more = f"({GAP} {mark(opener)} {one})*" if self._parallel else ""
            return sequence(one, more)
        one = call
        if dialect.call_start:
            one = sequence(mark(dialect.call_start), GAP, call, GAP, mark(dialect.call_end))
        more = f"({GAP} {one})*" if self._parallel else ""
        return sequence(GAP, one, more, GAP, mark(dialect.section_end))
