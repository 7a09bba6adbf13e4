"""How good the small tier's answers are: measures from 0 to 1, where the large tier's own are 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.bench.routing.ask_tiers import TierClient, TierReply
from llmkit.bench.routing.fit_logistic import Array
from llmkit.bench.routing.route_options import AUTO
from llmkit.bench.routing.route_prompts import RoutePrompt, is_right, normalized
from llmkit.common.errors import InputError


@dataclass(frozen=True)
class Qualities:
    """The quality of both tiers' answers by one measure."""

    small: Array  # [n]
    large: Array  # [n]


def exact(small: Sequence[TierReply], large: Sequence[TierReply]) -> Qualities:
    """1 where both texts are the same but for case, blanks and punctuation."""
    same = [
        float(normalized(a.text) == normalized(b.text)) for a, b in zip(small, large, strict=True)
    ]
    return Qualities(np.array(same), np.ones(len(same)))


def reference(
    prompts: Sequence[RoutePrompt], small: Sequence[TierReply], large: Sequence[TierReply]
) -> Qualities | None:
    """1 where an answer has the right one in it; None unless all prompts have one."""
    if not all(prompt.references for prompt in prompts):
        return None

    def rights(replies: Sequence[TierReply]) -> Array:
        pairs = zip(prompts, replies, strict=True)
        return np.array([float(is_right(reply.text, prompt.references)) for prompt, reply in pairs])

    return Qualities(rights(small), rights(large))


def likelihood(
    client: TierClient,
    prompts: Sequence[RoutePrompt],
    small: Sequence[TierReply],
    large: Sequence[TierReply],
) -> Qualities | None:
    """How likely the small tier's answer is under the large tier, beside the large tier's own.

    It is the ratio of the geometric means of the tokens' probabilities, at most 1. None where the
    large tier does not return the log probabilities of a prompt.
    """
    scores = client.mean_logprobs(prompts, [reply.text for reply in small])
    if scores is None or any(math.isinf(reply.mean_logprob) for reply in large):
        return None
    ratios = [
        1.0 if a.text == b.text else math.exp(min(0.0, score - b.mean_logprob))
        for a, b, score in zip(small, large, scores, strict=True)
    ]
    return Qualities(np.array(ratios), np.ones(len(ratios)))


def embedding(
    client: TierClient, small: Sequence[TierReply], large: Sequence[TierReply]
) -> Qualities | None:
    """The cosine of both answers' embeddings by the large tier, 0 where it is negative."""
    ours = client.embeddings([reply.text for reply in small])
    theirs = client.embeddings([reply.text for reply in large]) if ours is not None else None
    if ours is None or theirs is None:
        return None
    a, b = np.array(ours), np.array(theirs)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(1) / np.maximum(norms, 1e-12)
    return Qualities(np.clip(cosines, 0.0, 1.0), np.ones(len(cosines)))


def choose(wanted: str, measured: dict[str, Qualities]) -> str:
    """The measure to calibrate for. Raises InputError for one that could not be measured."""
    if wanted == AUTO:
        return next(
            name for name in ("reference", "likelihood", "embedding", "exact") if name in measured
        )
    if wanted not in measured:
        raise InputError(
            f"--agreement {wanted} could not be measured",
            "It needs `reference` in every prompt"
            if wanted == "reference"
            else "The large tier's server has no such API",
            f"Measured were {', '.join(measured)}",
        )
    return wanted
