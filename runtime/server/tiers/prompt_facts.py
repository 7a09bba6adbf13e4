"""What rules look at in a request's body, whichever API it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.runtime.server.tiers.route_config import Condition, Rule

_CHARS_OF_TOKEN = 4  # for prompts of token ids
_TEXT_FIELDS = ("messages", "prompt", "input", "system", "instructions")
# Where texts are inside messages and their parts.
_INNER_FIELDS = ("content", "text", "output", "input_text")
_MAX_DEPTH = 8
_MAX_QUESTION_CHARS = 2000


@dataclass(frozen=True)
class PromptFacts:
    """What is known of a request before a model has seen it."""

    prompt_chars: int  # of all messages together
    has_tools: bool
    model: str  # the name that the client wrote
    key: str  # the name of the client's key; "": none
    headers: Callable[[str], str | None]
    question: str  # the end of the last message or prompt

    @classmethod
    def of(
        cls, body: Mapping[str, Any], key: str, headers: Callable[[str], str | None]
    ) -> PromptFacts:
        """The facts of a body that is JSON, valid or not for its API."""
        texts = [text for field in _TEXT_FIELDS for text in _texts(body.get(field), 0)]
        last = body.get("messages") or body.get("input") or body.get("prompt") or ""
        if isinstance(last, list) and last and not isinstance(last[-1], int):
            last = last[-1]
        question = " ".join(text for text in _texts(last, 0) if isinstance(text, str))
        return cls(
            sum(text if isinstance(text, int) else len(text) for text in texts),
            bool(body.get("tools") or body.get("functions")),
            str(body.get("model") or ""),
            key,
            headers,
            question[-_MAX_QUESTION_CHARS:],
        )


def first_rule(rules: list[Rule], facts: PromptFacts) -> Rule | None:
    """The first rule whose condition holds."""
    return next((rule for rule in rules if holds(rule.when, facts)), None)


def holds(condition: Condition, facts: PromptFacts) -> bool:
    """Whether all that a condition names holds."""
    least = condition.min_prompt_chars
    most = condition.max_prompt_chars
    return (
        (least is None or facts.prompt_chars >= least)
        and (most is None or facts.prompt_chars <= most)
        and (condition.tools is None or facts.has_tools == condition.tools)
        and (condition.key is None or facts.key == condition.key)
        and (condition.model is None or facts.model == condition.model)
        and all(
            facts.headers(name) is not None and value in ("*", facts.headers(name))
            for name, value in condition.headers.items()
        )
    )


def _texts(value: Any, depth: int) -> Iterator[str | int]:
    """The texts in a message, a list or a part; a token id counts as _CHARS_OF_TOKEN."""
    if isinstance(value, str):
        yield value
    elif depth > _MAX_DEPTH:
        return
    elif isinstance(value, list):
        for item in value:
            if type(item) is int:
                yield _CHARS_OF_TOKEN
            else:
                yield from _texts(item, depth + 1)
    elif isinstance(value, dict):
        for field in _INNER_FIELDS:
            yield from _texts(value.get(field), depth + 1)
