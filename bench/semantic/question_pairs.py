"""Pairs of questions that have the same answer or not: the built-in ones, or a user's."""

from __future__ import annotations

from pathlib import Path

import msgspec

from llmkit.common.errors import InputError

BUILTIN = "builtin"
_BUILTIN_FILE = Path(__file__).parent / "question_pairs.json"


class QuestionPair(msgspec.Struct, frozen=True):
    """Two questions; the answer to the first is in the cache when the second is asked."""

    first: str
    second: str
    same: bool  # one answer answers both
    kind: str = ""  # what differs, or "paraphrase"
    held_out: bool = False


class _PairsFile(msgspec.Struct):
    pairs: list[QuestionPair]


def read_pairs(name: str) -> list[QuestionPair]:
    """Read the pairs of a file: JSON with `pairs`, or JSONL with a pair on each line.

    Raises InputError for a file that has none, or that has something else.
    """
    path = _BUILTIN_FILE if name == BUILTIN else Path(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    try:
        if path.suffix == ".jsonl":
            pairs = msgspec.json.Decoder(QuestionPair).decode_lines(data)
        else:
            pairs = msgspec.json.decode(data, type=_PairsFile).pairs
    except msgspec.DecodeError as error:
        raise InputError(
            f"{path} has no pairs of questions ({error})",
            'JSON with "pairs", or JSONL: {"first": "…", "second": "…", "same": true}',
        ) from error
    if not any(pair.same for pair in pairs) or all(pair.same for pair in pairs):
        raise InputError(
            f"{path} has {len(pairs)} pairs of one kind",
            "Pairs with the same answer, and pairs with different answers",
        )
    return pairs
