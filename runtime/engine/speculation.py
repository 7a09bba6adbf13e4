"""`--speculate`: how draft tokens are proposed, and how many."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

from llmkit.common.errors import UsageError
from llmkit.common.option_values import within
from llmkit.common.options import ValueFormat

Method = Literal["ngram", "suffix", "mtp"]
METHODS: tuple[Method, ...] = get_args(Method)
# Draft tokens of a method that is named without a number. An MTP head is trained for one; the
# suffix proposer drafts only as many as are likely.
DEFAULT_TOKENS: dict[Method, int] = {"ngram": 4, "suffix": 8, "mtp": 1}
MAX_TOKENS = 64


class Speculation(NamedTuple):
    """What a value of `--speculate` means."""

    method: Method
    num_tokens: int  # draft tokens for each request; 0: no speculation


def parse_speculation(value: int | str, option: str = "--speculate") -> Speculation:
    """Read N, METHOD or METHOD:N. Raises UsageError."""
    match = re.fullmatch(r"(?:([a-z]+)(?::([0-9]+))?|(-?[0-9]+))", str(value).strip())
    if match is None or (match[1] and match[1] not in METHODS):
        raise UsageError(
            f"{option}: {value!r} is not understood",
            f"A number of draft tokens, {', '.join(METHODS[:-1])} or {METHODS[-1]}, or both such as"
            " mtp:2",
        )
    if match[1] is None:
        speculation = Speculation("ngram", int(match[3]))
        within(0, MAX_TOKENS)(option, speculation.num_tokens)
        return speculation
    method = next(method for method in METHODS if method == match[1])
    num_tokens = int(match[2]) if match[2] else DEFAULT_TOKENS[method]
    within(1, MAX_TOKENS)(option, num_tokens)
    return Speculation(method, num_tokens)


def check_speculation(option: str, value: int | str) -> None:
    """The check of `--speculate`. Raises UsageError."""
    parse_speculation(value, option)


def _parse(option: str, text: int | str) -> int | str:
    value = str(text).strip()
    return int(value) if re.fullmatch(r"-?[0-9]+", value) else value


SPECULATION = ValueFormat(_parse, yaml_type=int | str)
