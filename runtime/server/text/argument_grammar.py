"""Grammars of argument values that are no JSON: raw text, Python's literals, and Gemma's maps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.text.lark_grammar import (
    ANY_TEXT,
    LarkGrammar,
    escaped,
    joined,
    lark_string,
    sequence,
)
from llmkit.runtime.server.text.schema_options import options_of, resolve, unsupported

_COMMA = '"," " "?'
_PYTHON_ESCAPES = {"\\": r"\\", "'": r"\'", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
# Escapes of Python's strings that mean the same to all who read them.
_ESCAPE = (
    r"\\(['\"\\nrt]|x[0-9a-fA-F]{2}|u[0-9a-cA-Ce-fE-F][0-9a-fA-F]{3}|U000[1-9a-fA-F][0-9a-fA-F]{4})"
)
_MAX_KEY_CHARS = 64  # of a property that the schema does not name


@dataclass(frozen=True)
class LiteralStyle:
    """How values are written."""

    words: Mapping[Any, str]  # true, false, null
    quote: str = ""  # before and after a string without escapes; "": Python's strings


PYTHON = LiteralStyle({True: "True", False: "False", None: "None"})
JSON_WORDS = {True: "true", False: "false", None: "null"}


def text_like(option: Mapping[str, Any]) -> str:
    """Return the terminal of texts that follow a simple schema of a string."""
    bodies = []
    if "pattern" in option:
        bodies.append(_searched(option["pattern"]))
    if "minLength" in option or "maxLength" in option:
        limits = option.get("minLength", 0), option.get("maxLength", "")
        if not all(limit == "" or (type(limit) is int and limit >= 0) for limit in limits):
            raise invalid("tools", "minLength and maxLength must be integers.", "invalid_grammar")
        bodies.append(rf"/(.|\n){{{limits[0]},{limits[1]}}}/")
    return " & ".join(bodies) or ANY_TEXT


def _searched(pattern: Any) -> str:
    """Return the terminal of texts in which a schema's `pattern` is found."""
    if not isinstance(pattern, str):
        raise invalid("tools", "pattern must be a string.", "invalid_grammar")
    begins = pattern.startswith("^")
    ends = pattern.endswith("$") and not re.search(r"(?<!\\)(\\\\)*\\\$$", pattern)
    if (begins or ends) and "|" in re.sub(r"\\.|\([^()]*\)|\[[^]]*\]", "", pattern):
        raise unsupported(f"The schema of a tool has the pattern {pattern!r:.100}.")
    inner = pattern[begins : len(pattern) - ends]
    inner = re.sub(r"\\.|/|\n", lambda m: {"/": r"\/", "\n": r"\n"}.get(m[0], m[0]), inner)
    any_text = r"(.|\n)*"
    return f"/{'' if begins else any_text}({inner}){'' if ends else any_text}/"


def number(option: Mapping[str, Any], lark: LarkGrammar) -> str:
    """Return the expression of a number that follows a simple schema."""
    if option.keys() != {"type"}:
        return lark.json(option)
    # JSON has no limit; readers of text have one.
    fraction = r"(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,2})?" if option["type"] == "number" else ""
    return lark.terminal(rf"/-?(0|[1-9][0-9]{{0,30}}){fraction}/")


class LiteralGrammar:
    """Rules of values in one style."""

    def __init__(self, lark: LarkGrammar, style: LiteralStyle, root: Mapping[str, Any]) -> None:
        """root: the schema that references lead into."""
        self._lark = lark
        self._style = style
        self._root = root
        self._references: dict[str, str] = {}  # names of rules, by reference
        self._any = ""  # the rule of any value
        self._steps: list[None] = []

    def value(self, schema: Any) -> str:
        """Return the expression of a value that follows `schema`. Raises ApiError."""
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if isinstance(reference, str):
            if reference not in self._references:
                resolve(reference, self._root)
                name = self._references[reference] = self._lark.new_name()
                self._lark.define(name, self._options(schema))
            return self._references[reference]
        return self._options(schema)

    def arguments(self, schema: Any, key_end: str, separator: str) -> str:
        """Return the expression of a call's arguments: keys, `key_end`, and values."""
        found = options_of({"type": "object"} | dict(schema), self._root, self._steps)
        if len(found) != 1 or found[0].get("type") != "object":
            raise unsupported("The arguments of a tool are more than one object.")
        return self._members(found[0], key_end, separator, quoted_keys=False)

    def string(self, option: Mapping[str, Any]) -> str:
        """Return the expression of a string that follows a simple schema."""
        lark, quote = self._lark, self._style.quote
        body = text_like(option)
        if quote:
            return f"{lark.mark(quote)} {lark.until(quote, body)}"
        quoted = []
        for mark in "\"'":
            if body == ANY_TEXT:
                text = rf"([^{mark}\\]|{_ESCAPE})*"
                quoted.append(f"/{mark}{text}{mark}/")
            else:
                quoted.append(
                    f"({lark_string(mark)} ({body} & /[^{mark}\\\\]*/) {lark_string(mark)})"
                )
        return lark.terminal(" | ".join(quoted))

    def _options(self, schema: Any) -> str:
        expressions = [
            self._option(option) for option in options_of(schema, self._root, self._steps)
        ]
        if not expressions:
            raise invalid("tools", "The schema of a tool allows no value.", "invalid_grammar")
        return self._lark.rule(" | ".join(dict.fromkeys(expressions)))

    def _option(self, option: Mapping[str, Any]) -> str:
        lark = self._lark
        if "const" in option:
            return self._constant(option["const"])
        match option.get("type"):
            case "string":
                return self.string(option)
            case "integer" | "number":
                return number(option, lark)
            case "boolean":
                return lark.words([self._style.words[True], self._style.words[False]])
            case "null":
                return lark.words([self._style.words[None]])
            case "array":
                return self._array(option)
            case "object":
                members = self._members(option, ":", _COMMA, quoted_keys=not self._style.quote)
                return lark.rule(sequence('"{"', members, '"}"'))
            case _:
                return self._any_value()

    def _array(self, option: Mapping[str, Any]) -> str:
        least, most = option.get("minItems", 0), option.get("maxItems")
        if type(least) is not int or (most is not None and type(most) is not int):
            raise invalid("tools", "minItems and maxItems must be integers.", "invalid_grammar")
        if most == 0:
            return '"[" "]"'
        item = self.value(option.get("items", True))
        limit = "" if most is None else most - 1
        items = f"{item} ({_COMMA} {item}){{{max(0, least - 1)},{limit}}}"
        return self._lark.rule(f'"[" {items} "]"' if least else f'"[" ({items})? "]"')

    def _members(
        self, option: Mapping[str, Any], key_end: str, separator: str, quoted_keys: bool
    ) -> str:
        """Return the expression of an object's keys and values; "" when it has none."""
        space = '" "?' if quoted_keys else ""
        properties = option.get("properties", {})
        required = option.get("required", [])
        more = option.get("additionalProperties", not properties)
        schemas = dict.fromkeys(required, True if more is False else more) | dict(properties)
        items = []
        for name, schema in schemas.items():
            if schema is False and name not in required:
                continue
            key = self._key(name, quoted_keys)
            value = self.value(schema)
            items.append((sequence(key, lark_string(key_end), space, value), name in required))
        others = ""
        if more is not False:
            key = self._other_key(list(schemas), quoted_keys)
            others = self._lark.rule(sequence(key, lark_string(key_end), space, self.value(more)))
        return joined(items, separator, others, self._lark)

    def _key(self, name: str, quoted: bool) -> str:
        if quoted:
            return self._constant(name)
        allowed = name.isidentifier()
        if self._style.quote:
            allowed = re.fullmatch(r"[^\s:,{}\[\]<>|\"]+", name) is not None
        if not allowed:
            raise unsupported(f"The schema of a tool has the property {name!r:.100}.")
        return lark_string(name)

    def _other_key(self, known: list[str], quoted: bool) -> str:
        """Return the terminal of a key that is none of `known`."""
        return other_key(self._lark, known, ['"', "'"] if quoted else [""])

    def _any_value(self) -> str:
        if not self._any:
            self._any = self._lark.new_name()
            kinds = ("string", "number", "boolean", "null", "array", "object")
            options = [self._option({"type": kind}) for kind in kinds]
            self._lark.define(self._any, " | ".join(options))
        return self._any

    def _constant(self, value: Any) -> str:
        """Return the expression of one value."""
        lark = self._lark
        match value:
            case str() if self._style.quote:
                quote = self._style.quote
                if quote in value + quote[:-1]:
                    raise unsupported(f"The schema of a tool has the text {value!r:.100}.")
                return f"{lark.mark(quote)} {sequence(lark_text(value), lark.mark(quote))}"
            case str():
                return lark.words(_python_string(value, mark) for mark in "\"'")
            case bool() | None:
                return lark_string(self._style.words[value])
            case int() | float():
                return lark_string(json.dumps(value))
            case list():
                items = [(self._constant(item), True) for item in value]
                return sequence('"["', joined(items, _COMMA, "", lark), '"]"')
            case _:
                quoted = not self._style.quote
                pairs = [
                    (f'{self._key(key, quoted)} ":" " "? {self._constant(item)}', True)
                    for key, item in value.items()
                ]
                return sequence('"{"', joined(pairs, _COMMA, "", lark), '"}"')


def lark_text(text: str) -> str:
    """Return the expression of `text`, which may be empty."""
    return lark_string(text) if text else ""


def other_key(lark: LarkGrammar, known: list[str], quotes: list[str]) -> str:
    """Return the terminal of a word that is none of `known`, between one of `quotes`."""
    word = f"/[A-Za-z_][A-Za-z0-9_]{{0,{_MAX_KEY_CHARS - 1}}}/"
    if known:
        word = f"({word} & ~/({'|'.join(map(escaped, known))})/)"
    forms = [sequence(lark_text(quote), word, lark_text(quote)) for quote in quotes]
    return lark.terminal(" | ".join(f"({form})" for form in forms))


def _python_string(text: str, mark: str) -> str:
    """Return the Python string of `text` between the quotation mark `mark`."""
    other = {'"', "'"} - {mark}
    escapes = {char: code for char, code in _PYTHON_ESCAPES.items() if char not in other}
    return mark + "".join(escapes.get(char, char) for char in text) + mark
