"""Where prompts come from: random tokens, the builtin text, files and data sets of texts or conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from llmkit.bench.workload import Data, Turns, builtin_text
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.quant.text import BUILTIN, records

RANDOM = "random"
RANDOM_TOKENS = 1 << 18
MOST_RECORDS = 10_000  # of a source are read
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def load_data(source: str, tokenizer: Tokenizer, seed: int) -> Data:
    """Read "builtin", "random", or a .txt, .json, .jsonl or .parquet file or `datasets` id.

    Records with `conversations` (ShareGPT's `from` and `value`) or `messages` (`role` and `content`) become
    conversations, a turn for each answer, as plain text without a chat template; those with `prompt` and `output` (or
    `completion`) one turn; those with `text` are joined into one text to cut prompts from. Raises InputError for other
    records, and as `load_text` does.
    """
    if source == RANDOM:
        random, vocabulary = Random(f"{seed}/random"), sorted(set(tokenizer.encode(builtin_text(), False)))  # noqa: S311
        return Data(RANDOM, random.choices(vocabulary, k=RANDOM_TOKENS))
    text = tokenizer.encode(builtin_text(), add_special_tokens=False)
    if source == BUILTIN:
        return Data(BUILTIN, text)
    conversations: list[Turns] = []
    documents: list[str] = []
    for place, record in islice(_records(source), MOST_RECORDS):
        if turns := list(_turns(record, tokenizer)):
            conversations.append(turns)
        elif isinstance(record.get("text"), str):
            documents.append(record["text"])
        elif not {"conversations", "messages"} & record.keys():
            raise InputError(
                f"{place} has nothing to prompt with (keys seen: {', '.join(record) or 'none'})",
                "Expected `conversations`, `messages`, `prompt` and `output`, or `text`",
            )
    if conversations and not documents:
        return Data(source, text, conversations)
    if not documents or conversations:
        raise InputError(f"{source} holds no conversation with an answer, or texts and conversations mixed")
    return Data(source, tokenizer.encode("\n\n".join(documents), add_special_tokens=False))


def within(data: Data, context_tokens: int, turns: int) -> Data:
    """The same without the conversations whose first `turns` turns are longer than a context.

    Raises InputError when none is left.
    """

    def tokens(talk: Turns) -> int:
        return sum(len(said) + len(answered) for said, answered in talk[:turns])

    fitting = [talk for talk in data.conversations if tokens(talk) <= context_tokens]
    if data.conversations and not fitting:
        raise InputError(f"no conversation of {data.name} fits a context of {context_tokens} tokens")
    return replace(data, conversations=fitting)


def _records(source: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not source.endswith(".json"):
        return records(source)
    try:
        entries = json.loads(Path(source).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{source} cannot be read as JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{source} is no list of records", "A JSON array of objects was expected")
    return [(f"record {number} of {source}", entry) for number, entry in enumerate(entries, 1)]


def _turns(record: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """What was said before each answer, all of it since the last one, and the answer."""
    said = ""
    for speaker, words in _messages(record):
        if speaker != "assistant":
            said += words
        elif said:
            turn = (tokenizer.encode(said, add_special_tokens=False), tokenizer.encode(words, add_special_tokens=False))
            if all(turn):
                yield turn
            said = ""


def _messages(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    answer = record.get("output") or record.get("completion")
    if isinstance(record.get("prompt"), str) and isinstance(answer, str):
        yield from (("user", record["prompt"]), ("assistant", answer))
    for message in record.get("conversations") or record.get("messages") or ():
        if isinstance(message, dict):
            speaker = str(message.get("from") or message.get("role"))
            yield _SPEAKERS.get(speaker, speaker), str(message.get("value") or message.get("content") or "")
