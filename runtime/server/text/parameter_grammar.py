"""Grammars of parameters between XML-like marks, whose values are raw text or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.runtime.server.text.argument_grammar import lark_text, number, other_key, text_like
from llmkit.runtime.server.text.argument_types import STRING, argument_types
from llmkit.runtime.server.text.lark_grammar import ANY_TEXT, LarkGrammar, lark_string, sequence
from llmkit.runtime.server.text.schema_options import (
    definitions,
    options_of,
    unsupported,
    without_notes,
)
from llmkit.runtime.server.text.tool_dialects import ParameterCall

LINE_FEED = '"\\n"'
GAP = LINE_FEED + "?"  # between marks
_NO_LINES_AROUND = r"~/\n(.|\n)*/ & ~/(.|\n)*\n/"
# Text that a reader may take for a list, an object, a number or a word of JSON or Python.
_LITERAL_LIKE = (
    r"/[ \t\r\n]*([\[({'\"0-9+.-]|[tT][rR][uU][eE]|[fF][aA][lL][sS][eE]|[nN][oO][nN][eE]"
    r"|[nN][uU][lL][lL]|[nN][iI][lL])(.|\n)*/"
)


class ParameterGrammar:
    """Rules of the parameters of one tool."""

    def __init__(self, lark: LarkGrammar, syntax: ParameterCall, schema: Mapping[str, Any]) -> None:
        self._lark = lark
        self._syntax = syntax
        self._root = schema
        self._steps: list[None] = []

    def parameters(self) -> str:
        """Return the expression of all parameters, in the schema's order. Raises ApiError."""
        found = options_of({"type": "object"} | dict(self._root), self._root, self._steps)
        properties = self._root.get("properties", {})  # which the reader of calls looks at
        is_object = len(found) == 1 and found[0].get("type") == "object"
        if not is_object or found[0].get("properties", {}) != properties:
            raise unsupported("The arguments of a tool are more than one object.")
        option = found[0]
        required = option.get("required", [])
        more = option.get("additionalProperties", not properties)
        unnamed = dict.fromkeys(required, True if more is False else more)
        rules = []
        for name, described in (unnamed | dict(properties)).items():
            if described is False and name not in required:
                continue
            key = self._key(name)
            parameter = self._parameter(key, described, argument_types(self._root, name))
            optional = "" if name in required else "?"
            rules.append(f"({parameter} {GAP}){optional}")
        if more is not False:
            key = other_key(self._lark, [*unnamed, *properties], [""])
            parameter = self._parameter(key, more, argument_types(self._root, ""))
            rules.append(f"({parameter} {GAP})*")
        return sequence(*rules)

    def _key(self, name: str) -> str:
        ends = (self._syntax.after_key, self._syntax.after_key_of_json)
        if not name or name != name.strip() or any(end and end in name for end in ends):
            raise unsupported(f"The schema of a tool has the property {name!r:.100}.")
        return lark_string(name)

    def _parameter(self, key: str, described: Any, types: frozenset[str]) -> str:
        """Return the expression of a parameter. types: which the reader of calls takes it for."""
        lark, syntax = self._lark, self._syntax
        options = [described]
        if "string" in types or not isinstance(described, Mapping):
            options = options_of(described, self._root, self._steps)
        strings = [option for option in options if _is_string(option)]
        others = [option for option in options if not _is_string(option)]
        if types == STRING:
            strings, others = strings or [{"type": "string"}], []
        after_json = syntax.after_key_of_json or syntax.after_key
        before = sequence(lark.mark(syntax.before_key), key)
        gap = GAP if syntax.before_value else ""
        written = []
        if strings:
            is_clear = not others or bool(syntax.after_key_of_json) or all(map(_is_plain, others))
            head = sequence(
                before, lark.mark(syntax.after_key), gap, lark.mark(syntax.before_value)
            )
            written += [sequence(head, self._text(option, is_clear)) for option in strings]
        if others:
            # The whole schema, unless a part of it is written as text.
            schema = {"anyOf": others} if strings else dict(described)
            json = lark.json(definitions(self._root) | schema)
            if len(others) == 1 and _is_plain(option := without_notes(others[0])):
                json = self._word(option)
            head = sequence(before, lark.mark(after_json), gap, lark.mark(syntax.before_value))
            written.append(sequence(head, GAP, json, GAP, lark.mark(syntax.after_value)))
        return lark.rule(" | ".join(written))

    def _word(self, option: Mapping[str, Any]) -> str:
        """Return the expression of a number, truth value or null."""
        if option["type"] in ("integer", "number"):
            return number(option, self._lark)
        words = {"boolean": ("true", "false"), "null": ("null",)}
        return self._lark.words(words[option["type"]])

    def _text(self, option: Mapping[str, Any], is_clear: bool) -> str:
        """Return the expression of a string and the mark after it.

        is_clear: the reader of calls takes any text for what the schema allows.
        """
        lark, syntax = self._lark, self._syntax
        end = lark.mark(syntax.after_value)
        around = LINE_FEED if syntax.on_lines else ""
        if "const" in option:
            text = option["const"]
            if syntax.after_value in text or (around and text != text.strip("\n")):
                raise unsupported(f"The schema of a tool has the text {text!r:.100}.")
            gap = GAP if around else ""
            return sequence(gap, lark_text(text), gap, end)
        body = text_like(option)
        if not is_clear:
            body = f"{body} & ~{_LITERAL_LIKE}"
        if body == ANY_TEXT or not around:
            return lark.until(syntax.after_value, body)
        return lark.until(syntax.after_value, f"{body} & {_NO_LINES_AROUND}", around=around)


def _is_string(option: Mapping[str, Any]) -> bool:
    return option.get("type") == "string" or isinstance(option.get("const"), str)


def _is_plain(option: Mapping[str, Any]) -> bool:
    """Whether a value of the option's type is sure to follow it."""
    names = ("integer", "number", "boolean", "null")
    return option.keys() == {"type"} and option["type"] in names
