"""What a case's answer must call, and whether an answer's arguments are what the case accepts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class TextRule(Enum):
    """When two strings are the same.

    PLAIN ignores case, the amount of white space, and a final full stop. EXACT compares every
    character. BFCL ignores case, spaces and `,./-_*^`, and takes both quotes for one, as the
    checker of the Berkeley Function Calling Leaderboard does.
    """

    PLAIN = "plain"
    EXACT = "exact"
    BFCL = "bfcl"


@dataclass(frozen=True)
class AllowedObject:
    """An object whose members have allowed values of their own; no other members are accepted."""

    members: Mapping[str, AllowedValues]


@dataclass(frozen=True)
class AllowedValues:
    """The values that an argument may have: JSON values, or an AllowedObject."""

    values: tuple[Any, ...]
    optional: bool = False  # the argument may be left out
    text_rule: TextRule = TextRule.PLAIN
    unordered: bool = False  # the order of a list does not matter

    def accepts(self, value: Any) -> bool:
        """Whether `value` is one of the values."""
        return any(_is_same(value, expected, self) for expected in self.values)


@dataclass(frozen=True)
class ExpectedCall:
    """A call that the answer must have."""

    name: str
    arguments: Mapping[str, AllowedValues]
    reference: Mapping[str, Any]  # the arguments as the case's file has them, for reports

    def differences(self, name: str, arguments: Mapping[str, Any]) -> list[str]:
        """How a call differs from this one, a phrase for each difference; []: it is the same."""
        if name != self.name:
            return [f"{name} was called, not {self.name}"]
        found = [
            f"argument {key} is not expected" for key in arguments if key not in self.arguments
        ]
        for key, allowed in self.arguments.items():
            if key not in arguments:
                if not allowed.optional:
                    found.append(f"argument {key} is missing")
            elif not allowed.accepts(arguments[key]):
                found.append(f"argument {key} has another value")
        return found


def match_calls(
    expected: Sequence[ExpectedCall], calls: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """How the calls (name, arguments) of an answer differ from the expected ones, in any order.

    []: each call is one of the expected calls, and none is left.
    """
    if len(calls) != len(expected):
        return [f"{_count_calls(len(calls))}, {len(expected)} expected"]
    accepted = [
        [index for index, call in enumerate(calls) if not wanted.differences(*call)]
        for wanted in expected
    ]
    if _has_assignment(accepted):
        return []
    if len(expected) == 1:
        return expected[0].differences(*calls[0])
    missing = [
        wanted.name for wanted, indices in zip(expected, accepted, strict=True) if not indices
    ]
    if missing:
        return [f"no call is the expected one of {name}" for name in missing]
    return ["two expected calls are the same call of the answer"]


def standardize(text: str, rule: TextRule) -> str:
    """The text with what `rule` ignores removed."""
    if rule is TextRule.EXACT:
        return text
    if rule is TextRule.BFCL:
        return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
    normal = unicodedata.normalize("NFC", text).casefold()
    return " ".join(normal.split()).removesuffix(".")


def _count_calls(count: int) -> str:
    return "no call" if count == 0 else "1 call" if count == 1 else f"{count} calls"


def _has_assignment(accepted: Sequence[Sequence[int]]) -> bool:
    """Whether each entry can have an index of its own among those that it accepts.

    Augmenting paths (H. Kuhn 1955): trying all orders would take n! steps for n equal values.
    """
    entry_of: dict[int, int] = {}

    def assign(entry: int, tried: set[int]) -> bool:
        for index in accepted[entry]:
            if index in tried:
                continue
            tried.add(index)
            if index not in entry_of or assign(entry_of[index], tried):
                entry_of[index] = entry
                return True
        return False

    return all(assign(entry, set()) for entry in range(len(accepted)))


def _is_same(value: Any, expected: Any, rules: AllowedValues) -> bool:
    """Whether a JSON value is the expected one. 1 and 1.0 are the same number."""
    if isinstance(expected, AllowedObject):
        return isinstance(value, Mapping) and _has_members(value, expected.members)
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, str):
        return isinstance(value, str) and standardize(value, rules.text_rule) == standardize(
            expected, rules.text_rule
        )
    if isinstance(expected, Mapping):
        return (
            isinstance(value, Mapping)
            and value.keys() == expected.keys()
            and all(_is_same(value[key], item, rules) for key, item in expected.items())
        )
    if isinstance(expected, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(expected):
            return False
        if rules.unordered:
            same = [[i for i, v in enumerate(value) if _is_same(v, e, rules)] for e in expected]
            return _has_assignment(same)
        return all(_is_same(v, e, rules) for v, e in zip(value, expected, strict=True))
    if isinstance(expected, (int, float)):
        return isinstance(value, (int, float)) and value == expected
    return value is expected


def _has_members(value: Mapping[str, Any], members: Mapping[str, AllowedValues]) -> bool:
    if not value.keys() <= members.keys():
        return False
    return all(
        allowed.accepts(value[key]) if key in value else allowed.optional
        for key, allowed in members.items()
    )
