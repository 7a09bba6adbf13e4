"""Log probabilities in OpenAI's responses: asked for, read, and taken out again.

The client gets what its own request asks for and nothing else.
"""

from __future__ import annotations

import json
from typing import Any

from llmkit.runtime.server.tiers.confidence import Confidence
from llmkit.runtime.server.tiers.signals import TOP_LOGPROBS, AnswerSignals
from llmkit.runtime.server.tiers.uncertainty import Uncertainty

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_UNKNOWN_LOGPROB = -100.0


class LogprobsFilter:
    """For one request of a path that has log probabilities."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        """body: as the client sent it."""
        self._is_chat = path == CHAT
        field = "top_logprobs" if self._is_chat else "logprobs"
        count = body.get(field)
        has_count = type(count) is int
        wanted = body.get("logprobs") is True if self._is_chat else has_count
        # Alternatives of each token that the client gets; None: no log probabilities.
        self._shown = (count if has_count else 0) if wanted else None
        self.body = {**body, field: max(TOP_LOGPROBS, self._shown or 0)}
        if self._is_chat:
            self.body["logprobs"] = True

    @staticmethod
    def supports(path: str) -> bool:
        """Whether responses of a path can have log probabilities."""
        return path in (CHAT, COMPLETIONS)

    def tokens(self, choice: dict[str, Any]) -> list[tuple[float, list[float]]]:
        """The log probability of each token of a choice, and those of its alternatives."""
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict):
            return []
        if self._is_chat:
            return [
                (
                    _number(entry.get("logprob")),
                    [_number(top.get("logprob")) for top in objects(entry.get("top_logprobs"))],
                )
                for entry in objects(logprobs.get("content"))
            ]
        values = _list(logprobs.get("token_logprobs"))
        tops = _list(logprobs.get("top_logprobs")) or [{}] * len(values)
        return [
            (float(value), [_number(other) for other in _values(top)])
            for value, top in zip(values, tops, strict=False)
            if isinstance(value, int | float)
        ]

    def clean(self, document: Any) -> Any:
        """The response or chunk with the log probabilities that the client asked for."""
        for choice in choices_of(document):
            logprobs = choice.get("logprobs")
            if logprobs is None:
                continue
            if self._shown is None or not isinstance(logprobs, dict):
                choice["logprobs"] = None
            elif self._is_chat:
                for entry in objects(logprobs.get("content")):
                    entry["top_logprobs"] = objects(entry.get("top_logprobs"))[: self._shown]
            else:
                tops = _list(logprobs.get("top_logprobs"))
                logprobs["top_logprobs"] = [self._fewest(top) for top in tops]
        return document

    def _fewest(self, top: Any) -> Any:
        if not isinstance(top, dict):
            return top
        ranked = sorted(top.items(), key=lambda item: -_number(item[1]))
        return dict(ranked[: max(1, self._shown or 0)])


class UrlConfidence:
    """Collects the signals of all choices of a response, full or streamed."""

    def __init__(
        self, gate: Uncertainty, logprobs: LogprobsFilter, num_choices: int, stream: bool
    ) -> None:
        self._is_whole = not stream and gate.whole is not None
        self._calibration = gate.whole if gate.whole and self._is_whole else gate.first
        self._limit = gate.tokens
        self._logprobs = logprobs
        self._signals = [AnswerSignals() for _ in range(num_choices)]
        self._finished: set[int] = set()
        self._usage: dict[str, Any] = {}

    def add(self, document: Any) -> None:
        """Add the tokens of a response or chunk, before it is cleaned."""
        if isinstance(document, dict) and isinstance(document.get("usage"), dict):
            self._usage = document["usage"]
        for choice in choices_of(document):
            index = choice.get("index")
            if not isinstance(index, int) or not 0 <= index < len(self._signals):
                continue
            signals = self._signals[index]
            for logprob, top in self._logprobs.tokens(choice):
                if self._is_whole or signals.num_tokens < self._limit:
                    signals.add(logprob, top)
            if choice.get("finish_reason") is not None:
                self._finished.add(index)

    @property
    def is_ready(self) -> bool:
        """Whether every choice has enough tokens, or is complete."""
        return all(
            index in self._finished or signals.num_tokens >= self._limit
            for index, signals in enumerate(self._signals)
        )

    def result(self) -> Confidence:
        """What the tokens so far say; without log probabilities it is not sure."""
        probability = min(
            self._calibration.probability(signals.values()) for signals in self._signals
        )
        num_tokens = sum(signals.num_tokens for signals in self._signals)
        return Confidence(
            round(probability, 4),
            _count(self._usage.get("completion_tokens")) or num_tokens,
            _count(self._usage.get("prompt_tokens")),
            probability >= self._calibration.threshold,
        )


def num_choices(body: dict[str, Any]) -> int:
    """The number of answers that a body asks for, 1 where that is not clear."""
    n = body.get("n")
    prompts = body.get("prompt")
    num_prompts = 1
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        num_prompts = len(prompts)
    count = (n if type(n) is int and n > 0 else 1) * num_prompts
    return min(count, 1024)


def parse_json(data: str | bytes) -> Any:
    """JSON of a server; None for what is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def choices_of(document: Any) -> list[dict[str, Any]]:
    """The choices of a response or chunk; none in anything else."""
    return objects(document.get("choices")) if isinstance(document, dict) else []


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; none in anything else."""
    return [entry for entry in _list(value) if isinstance(entry, dict)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else _UNKNOWN_LOGPROB


def _count(value: Any) -> int:
    return value if type(value) is int else 0
