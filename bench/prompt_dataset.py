"""Prompt datasets: random tokens, the builtin text, files and `datasets` ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from llmkit.bench.workload import Conversation, PromptDataset, Turn, builtin_prompt_text
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import InputError
from llmkit.quant.calibration_text import BUILTIN, records

RANDOM = "random"
RANDOM_TOKENS = 1 << 18
MAX_RECORDS = 10_000  # read from one source
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def load_prompt_dataset(source: str, tokenizer: Tokenizer, seed: int) -> PromptDataset:
    """Read "builtin", "random", a .txt, .json, .jsonl or .parquet file, or a `datasets` id.

    Records with `conversations` (ShareGPT's `from` and `value`) or `messages` (`role` and
    `content`) become conversations with a turn for each answer, as plain text without a chat
    template. Records with `prompt` and `output` (or `completion`) become conversations of one turn.
    Records with `text` are joined into one text. Raises InputError for other records, and as
    `load_text` does.
    """
    if source == RANDOM:
        random = Random(f"{seed}/random")  # noqa: S311
        # Tokens of a text: they are in the vocabulary, and none is a special token.
        candidates = sorted(set(tokenizer.encode(builtin_prompt_text(), False)))
        return PromptDataset(RANDOM, random.choices(candidates, k=RANDOM_TOKENS))
    builtin_tokens = tokenizer.encode(builtin_prompt_text(), add_special_tokens=False)
    if source == BUILTIN:
        return PromptDataset(BUILTIN, builtin_tokens)
    conversations: list[Conversation] = []
    texts: list[str] = []
    for location, record in islice(_records(source), MAX_RECORDS):
        turns = list(_turns(record, tokenizer))
        if turns:
            conversations.append(turns)
        elif isinstance(record.get("text"), str):
            texts.append(record["text"])
        elif not {"conversations", "messages"} & record.keys():
            raise InputError(
                f"{location} has nothing to prompt with (keys seen: {', '.join(record) or 'none'})",
                "Expected `conversations`, `messages`, `prompt` and `output`, or `text`",
            )
    if conversations and not texts:
        return PromptDataset(source, builtin_tokens, conversations)
    if not texts or conversations:
        raise InputError(
            f"{source} holds no conversation with an answer, or texts and conversations mixed"
        )
    return PromptDataset(source, tokenizer.encode("\n\n".join(texts), add_special_tokens=False))


def drop_long_conversations(data: PromptDataset, max_tokens: int, turns: int) -> PromptDataset:
    """The dataset without conversations whose first `turns` turns have more than `max_tokens`.

    Raises InputError when none is left.
    """

    def num_tokens(conversation: Conversation) -> int:
        return sum(len(message) + len(answer) for message, answer in conversation[:turns])

    fitting = [entry for entry in data.conversations if num_tokens(entry) <= max_tokens]
    if data.conversations and not fitting:
        raise InputError(f"no conversation of {data.name} fits a context of {max_tokens} tokens")
    return replace(data, conversations=fitting)


def _records(source: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The records of a source, each with its location for error messages."""
    if not source.endswith(".json"):
        return records(source)
    try:
        entries = json.loads(Path(source).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{source} cannot be read as JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(
            f"{source} is not a list of records", "A JSON array of objects was expected"
        )
    return [(f"record {number} of {source}", entry) for number, entry in enumerate(entries, 1)]


def _turns(record: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[Turn]:
    """The turns of a record: all messages since the last answer, and the next answer."""
    message = ""
    for role, text in _messages(record):
        if role != "assistant":
            message += text
        elif message:
            message_tokens = tokenizer.encode(message, add_special_tokens=False)
            answer_tokens = tokenizer.encode(text, add_special_tokens=False)
            if message_tokens and answer_tokens:
                yield message_tokens, answer_tokens
            message = ""


def _messages(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The role and text of each message of a record."""
    answer = record.get("output") or record.get("completion")
    if isinstance(record.get("prompt"), str) and isinstance(answer, str):
        yield "user", record["prompt"]
        yield "assistant", answer
    for message in record.get("conversations") or record.get("messages") or ():
        if isinstance(message, dict):
            role = str(message.get("from") or message.get("role"))
            text = str(message.get("value") or message.get("content") or "")
            yield _ROLES.get(role, role), text
