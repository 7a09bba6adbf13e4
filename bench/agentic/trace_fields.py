"""The fields of a trace's JSON objects, read with checks of names, types and limits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from llmkit.bench.agentic.agent_trace import HashedTokens, HashId, trace_error
from llmkit.common.errors import InputError
from llmkit.common.formatting import nearest

_MAX_SHOWN = 60  # characters of a wrong value in a message


class Fields:
    """The fields of one object of a trace.

    Every method raises InputError with file and line for a value of another type or out of range.
    """

    def __init__(self, path: str, line: int, what: str, document: Any) -> None:
        """what: the object's name in messages: "the line", "turn 2"."""
        self.path = path
        self.line = line
        self.what = what
        if not isinstance(document, dict):
            raise trace_error(path, line, f"{what} is {_shown(document)}", "An object was expected")
        self.document: dict[str, Any] = document

    def __contains__(self, name: str) -> bool:
        return self.document.get(name) is not None

    def only(self, known: Collection[str]) -> None:
        """Refuse fields that are not `known`: a misspelled one must not be ignored."""
        for name in self.document:
            if name not in known:
                hint = nearest(str(name), known, "Fields are")
                raise self.error(f"{self.what} has an unknown field, {name!r}", hint)

    def error(self, what: str, expected: str = "", todo: str = "") -> InputError:
        """An error of this line."""
        return trace_error(self.path, self.line, what, expected, todo)

    def text(self, name: str) -> str | None:
        """A string that is not empty; a number becomes a string. None: it is absent."""
        value = self.document.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise self._wrong(name, value, "A text")
        return str(value)

    def whole(self, name: str, low: int) -> int | None:
        """A whole number of `low` or more. None: it is absent."""
        value = self.document.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self._wrong(name, value, f"A whole number of at least {low}")
        return value

    def milliseconds(self, name: str) -> float | None:
        """A time in milliseconds, as seconds. None: it is absent."""
        value = self.document.get(name)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise self._wrong(name, value, "Milliseconds of at least 0")
        return float(value) / 1000

    def flag(self, name: str) -> bool:
        """A boolean; False when it is absent."""
        value = self.document.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first one when it is absent."""
        value = self.document.get(name)
        if value is None:
            return choices[0]
        if value not in choices:
            raise self._wrong(name, value, f"One of {', '.join(choices)}")
        return str(value)

    def items(self, name: str, empty: bool = False) -> Iterator[Any]:
        """The items of a list; none when it is absent. empty: whether it may be empty."""
        value = self.document.get(name)
        if value is None:
            return
        if not isinstance(value, list) or not (value or empty):
            raise self._wrong(name, value, "A list" if empty else "A list that is not empty")
        yield from value

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object. None: it is absent."""
        value = self.document.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, value, "An object")
        return value

    def hashed_tokens(self, length_name: str, block_tokens: int) -> HashedTokens:
        """`hash_ids` with the number of tokens that they stand for.

        The last block may be partial. Tokens after the last block have no id.
        """
        num_tokens = self.whole(length_name, 1)
        if num_tokens is None:
            raise self.error(f"{self.what} has no {length_name}", "Its number of tokens")
        hash_ids: list[HashId] = []
        for value in self.items("hash_ids", empty=True):
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise self._wrong("hash_ids", value, "Whole numbers or texts")
            hash_ids.append(value)
        if num_tokens <= (len(hash_ids) - 1) * block_tokens:
            raise self.error(
                f"{len(hash_ids)} hash_ids are too many for {num_tokens} tokens",
                f"An id stands for a block of {block_tokens} tokens",
                "Set --hash-block-tokens to the block size of the trace",
            )
        return HashedTokens(tuple(hash_ids), num_tokens)

    def _wrong(self, name: str, value: Any, expected: str) -> InputError:
        return self.error(
            f"{name} of {self.what} is {_shown(value)}", f"{expected} {_was_expected(expected)}"
        )


def _was_expected(expected: str) -> str:
    return "were expected" if expected.split()[0].endswith("s") else "was expected"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
