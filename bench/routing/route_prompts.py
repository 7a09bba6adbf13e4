"""The prompts that a route is calibrated on, with right answers where the user has them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.bench.routing.route_options import BUILTIN
from llmkit.common.errors import InputError
from llmkit.common.json_lines import read_json_lines
from llmkit.common.yaml_file import YamlFile

MIN_PROMPTS = 20  # fewer say nothing about a threshold
_ANSWERS_SEPARATOR = "|"
_BUILTIN_FILE = Path(__file__).parent / "builtin_questions.yaml"


@dataclass(frozen=True)
class RoutePrompt:
    """A conversation, and the answers that count as right; none: not known."""

    messages: tuple[dict[str, Any], ...]
    references: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The text of the last message."""
        content = self.messages[-1].get("content")
        return content if isinstance(content, str) else json.dumps(content)


def read_prompts(source: str) -> list[RoutePrompt]:
    """Read a text file, JSONL or the builtin questions. Raises InputError."""
    if source == BUILTIN:
        pairs = YamlFile(_BUILTIN_FILE).content["questions"]
        return [
            _question(text, tuple(answers.split(_ANSWERS_SEPARATOR))) for text, answers in pairs
        ]
    try:
        data = Path(source).read_bytes()
        is_json = source.endswith((".jsonl", ".json"))
        lines = [] if is_json else data.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"--prompts {source} cannot be read ({reason})") from None
    if is_json:
        records = read_json_lines(data, source)
        prompts = [_record(f"{source}, line {number}", record) for number, record in records]
    else:
        prompts = [_question(line.strip()) for line in lines if line.strip()]
    if len(prompts) < MIN_PROMPTS:
        raise InputError(
            f"--prompts {source} has {len(prompts)} prompts",
            f"At least {MIN_PROMPTS} were expected, and some hundreds give a useful threshold",
        )
    return prompts


def is_right(answer: str, references: tuple[str, ...]) -> bool:
    """Whether an answer has one of the references as whole words, whatever their case."""
    text = f" {normalized(answer)} "
    return any(f" {normalized(reference)} " in text for reference in references)


def normalized(text: str) -> str:
    """Lower case, without punctuation, blanks as one."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def _question(text: str, references: tuple[str, ...] = ()) -> RoutePrompt:
    return RoutePrompt(({"role": "user", "content": text},), references)


def _record(place: str, record: Any) -> RoutePrompt:
    """One line of JSONL. Raises InputError with the place."""
    if not isinstance(record, dict):
        raise InputError(f"{place} is not an object")
    given = record.get("reference", [])
    references = [given] if isinstance(given, str) else given
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise InputError(f"{place}: reference is wrong", "A text or a list of texts was expected")
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return RoutePrompt(tuple(messages), tuple(references))
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt:
        return _question(prompt, tuple(references))
    raise InputError(
        f"{place} has neither `prompt` nor `messages`", f"Its keys are {', '.join(record)}"
    )
