"""When the answer of a tier is given up: a calibrated limit of its own uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmkit.runtime.server.tiers.signals import logistic

Probability = Annotated[float, Field(ge=0, le=1)]
SignalName = Literal["mean_logprob", "min_logprob", "first_entropy", "min_margin"]


class Settings(BaseModel):
    """A part of a route's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(Settings):
    """A logistic regression from the signals of an answer to the probability that it will do."""

    bias: float
    weights: dict[SignalName, float] = Field(min_length=1)
    # An answer with a lower probability goes to the next tier.
    threshold: Probability

    def probability(self, signals: Mapping[str, float] | None) -> float:
        """The probability that an answer with `signals` will do; 0 without signals."""
        if signals is None:
            return 0.0
        return logistic(self.bias, self.weights, signals)


class Uncertainty(Settings):
    """When the answer of a tier is given up for that of the next tier."""

    # The first tokens of an answer decide; a stream is held back until there are so many.
    tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    first: Calibration
    # For responses that are not streamed: the whole answer decides. None: `first` does.
    whole: Calibration | None = None

    def with_threshold(self, threshold: float) -> Uncertainty:
        """The same with another threshold."""
        update = {"threshold": threshold}
        whole = self.whole and self.whole.model_copy(update=update)
        return self.model_copy(
            update={"first": self.first.model_copy(update=update), "whole": whole}
        )


# What `bench route --agreement likelihood` found for SmolLM2-135M in 4 bits beside bfloat16 at 50 %
# large calls (docs/benchmarks.md). Any other model needs its own calibration.
UNCALIBRATED = Uncertainty(
    tokens=16,
    first=Calibration(
        bias=2.37,
        weights={"mean_logprob": 0.71, "min_logprob": 0.38, "first_entropy": -0.10},
        threshold=0.74,
    ),
)
