"""From the engine's logits of labels to scores."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from llmkit.checkpoint.classifier_config import Activation
from llmkit.runtime.server.choice import Delta


def label_logits(answer: Delta) -> list[float]:
    """The logits of an answer's labels."""
    assert answer.embedding is not None
    return array("f", answer.embedding).tolist()


def activated(logits: Sequence[float], activation: Activation) -> list[float]:
    """The scores of the labels of one text."""
    if activation == "none":
        return list(logits)
    if activation == "sigmoid" or len(logits) == 1:
        return [_sigmoid(logit) for logit in logits]
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _sigmoid(x: float) -> float:
    # Neither form overflows on its side.
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))
