"""Builds grammars in llguidance's dialect of Lark, rule by rule.

Its syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. A terminal is one
regular expression, made of others by `&`, `~` and sequence; rules refer to terminals and rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# White space between JSON tokens: a space, or a line feed and its indentation. A model that cannot
# stop writing white space would fill the answer with it.
WHITE_SPACE = {"x-guidance": {"whitespace_pattern": r" |\n(?: {0,16}|\t{0,8})"}}
ANY_TEXT = r"/(.|\n)*/"
# A possible special token in a mark. The first one that the tokenizer has is taken.
_SPECIAL_TOKENS = (
    re.compile(r"<[^<>\s]+>"),
    re.compile(r"\[/?[A-Z_]+\]"),
    re.compile("\uff5c\\w+\uff5c"),  # as DeepSeek's, with fullwidth vertical lines
)

Mark = Callable[[str], str]  # converts a mark to a Lark expression


def lark_string(text: str) -> str:
    """Return `text` as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def lark_mark(text: str, special_id: Callable[[str], int | None]) -> str:
    """Return a Lark expression that matches the mark `text`; special tokens in it are ids.

    special_id: returns the id of a special token; None: the text is none.
    """
    for pattern in _SPECIAL_TOKENS:
        for match in pattern.finditer(text):
            token_id = special_id(match[0])
            if token_id is not None:
                before = lark_mark(text[: match.start()], special_id)
                after = lark_mark(text[match.end() :], special_id)
                return " ".join(filter(None, (before, f"<[{token_id}]>", after)))
    return lark_string(text) if text else ""


def containing(texts: Iterable[str]) -> str:
    """Return a regular expression that matches any text with one of `texts` in it."""
    return rf"/(.|\n)*({'|'.join(map(escaped, texts))})(.|\n)*/"


def escaped(text: str) -> str:
    """Return a regular expression, as it stands between slashes, that matches `text`."""
    special = {"\n": r"\n", "/": r"\/"}
    return "".join(special.get(char) or _escaped_char(char) for char in text)


def _escaped_char(char: str) -> str:
    return "\\" + char if char in r".^$*+?()[]{}|\\-" else char


class LarkGrammar:
    """The rules of a grammar; equal rules are one."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self._names: dict[str, str] = {}  # of a rule or terminal, by its definition
        self._num_rules = 0

    def text(self, start: str) -> str:
        """Return the grammar of the expression `start`."""
        rules = [f"{name}: {body}" for body, name in self._names.items()]
        return "\n".join([f"start: {start}", *rules])

    def new_name(self) -> str:
        """Return the name of a rule that will be defined by `define`."""
        self._num_rules += 1
        return f"r{self._num_rules}"

    def define(self, name: str, body: str) -> None:
        """Define the rule `name`; it may refer to itself."""
        # Parentheses make the definition differ from all others.
        self._names[f"({body})" if body in self._names else body] = name

    def rule(self, body: str) -> str:
        """Return the name of the rule `body`."""
        if body not in self._names:
            self._names[body] = self.new_name()
        return self._names[body]

    def terminal(self, body: str) -> str:
        """Return the name of the terminal `body`."""
        if body not in self._names:
            self._names[body] = self.new_name().upper()
        return self._names[body]

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return the expression of JSON that follows `schema`."""
        return self.rule("%json " + json.dumps(WHITE_SPACE | dict(schema)))

    def words(self, words: Iterable[str]) -> str:
        """Return the expression of one of `words`."""
        return "(" + " | ".join(map(lark_string, words)) + ")"

    def until(
        self, end: str, body: str = ANY_TEXT, also_without: Iterable[str] = (), around: str = ""
    ) -> str:
        """Return the expression of text up to the mark `end`, and of the mark.

        body: what the text matches; the first `end` ends it, and it contains none of
        `also_without`. around: an optional string before and after it.
        """
        text = f"({body} & ~{containing([end, *also_without])})"
        if around:
            text = f"{around}? {text} {around}?"
        mark = self.mark(end)
        if mark.startswith("<["):
            return f"{self.terminal(text)} {mark}"
        # One terminal, so that it is clear at once which of several ends there may be is meant.
        first, space, rest = _first_string(mark)
        return f"{self.terminal(f'{text} {first}')}{space}{rest}"


def _first_string(mark: str) -> tuple[str, str, str]:
    """Split the Lark expression of a mark, which begins with a string, after that."""
    _, end = json.JSONDecoder().raw_decode(mark)
    return mark[:end], mark[end : end + 1], mark[end + 1 :]


def sequence(*expressions: str) -> str:
    """Return the expression of those of `expressions` that are not empty, one after the other."""
    return " ".join(filter(None, expressions))


def joined(items: Iterable[tuple[str, bool]], separator: str, more: str, lark: LarkGrammar) -> str:
    """Return the expression of items in their order with `separator` between them.

    items: each item's expression, and whether it is required. more: any number of these may
    follow; "": none. The result is "" when there can be nothing.
    """
    after = f"({separator} {more})*" if more else ""
    first = f"{more} {after}" if more else ""
    may_be_empty = True
    for item, required in reversed(list(items)):
        begins = sequence(item, after)
        first = begins if required or not first else f"{begins} | {first}"
        following = f"{separator} {item}" if required else f"({separator} {item})?"
        after = lark.rule(sequence(following, after))
        first = lark.rule(first)
        may_be_empty = may_be_empty and not required
    if not first:
        return ""
    return f"({first})?" if may_be_empty else first
