"""In a model's server: gives up an answer of which the model is not sure, before its first byte.

The router asks for it with a header, and another tier answers instead. The client gets nothing of
an answer that was given up, and its own request decides whether log probabilities are returned.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.requests import Request

from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.generation import Take
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.tiers.confidence import (
    CONFIDENCE_HEADER,
    GATE_HEADER,
    UNSURE,
    Confidence,
)
from llmkit.runtime.server.tiers.signals import TOP_LOGPROBS, AnswerSignals
from llmkit.runtime.server.tiers.uncertainty import Uncertainty


class UncertaintyGate:
    """Decides once for all choices of a request; the least sure one counts."""

    def __init__(self, uncertainty: Uncertainty, choices: Sequence[Choice], stream: bool) -> None:
        self._choices = choices
        self._is_whole = not stream and uncertainty.whole is not None
        whole = uncertainty.whole
        self._calibration = whole if whole and self._is_whole else uncertainty.first
        self._tokens = uncertainty.tokens
        self._signals = [AnswerSignals() for _ in choices]
        self.confidence: Confidence | None = None  # None: not decided yet
        for choice, signals in zip(choices, self._signals, strict=True):
            choice.watch_logprobs(self._recorder(signals), TOP_LOGPROBS)

    @classmethod
    def of(
        cls, options: ServeOptions, request: Request, choices: Sequence[Choice], stream: bool
    ) -> UncertaintyGate | None:
        """The gate that the router asks for; None for other requests."""
        header = request.headers.get(GATE_HEADER) if options.behind_router else None
        if header is None:
            return None
        return cls(Uncertainty.model_validate_json(header), choices, stream)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        if self.confidence is None:
            return {}
        return {CONFIDENCE_HEADER: msgspec.json.encode(self.confidence).decode()}

    def update(self) -> None:
        """Decide, if there are enough tokens. Raises the ApiError that gives the answer up."""
        if self.confidence is not None or not all(map(self._is_ready, range(len(self._choices)))):
            return
        probability = min(
            self._calibration.probability(signals.values()) for signals in self._signals
        )
        is_sure = probability >= self._calibration.threshold
        self.confidence = Confidence(
            round(probability, 4),
            sum(choice.completion_tokens for choice in self._choices),
            sum(len(choice.request.prompt_token_ids) for choice in self._choices),
            is_sure,
        )
        if not is_sure:
            message = "The answer is given up for that of the next tier."
            raise ApiError(409, message, code=UNSURE, headers=self.headers)

    def hold(self, take: Take) -> Take:
        """Return a function that passes deltas to `take`, the first ones once they are decided on.

        It raises the ApiError that gives the answer up.
        """
        held: list[Delta] = []

        def hold_or_take(deltas: list[Delta]) -> bool:
            held.extend(deltas)
            self.update()
            if self.confidence is None:
                return True
            decided = held.copy()
            held.clear()
            return take(decided)

        return hold_or_take

    def _is_ready(self, index: int) -> bool:
        if self._choices[index].finish_reason is not None:
            return True
        return not self._is_whole and self._signals[index].num_tokens >= self._tokens

    def _recorder(self, signals: AnswerSignals) -> _Recorder:
        limit = None if self._is_whole else self._tokens
        return _Recorder(signals, limit)


class _Recorder:
    """Adds the log probabilities of up to `limit` tokens to `signals`; None: of all tokens."""

    def __init__(self, signals: AnswerSignals, limit: int | None) -> None:
        self._signals = signals
        self._limit = limit

    def __call__(self, logprobs: Logprobs) -> None:
        if self._limit is None or self._signals.num_tokens < self._limit:
            self._signals.add(logprobs.logprob, (logprob for _, logprob in logprobs.top))
