"""Synthetic acceptance: draft tokens are accepted by a draw, whatever the model samples.

It measures the speed of speculative decoding at a known acceptance, as vLLM's synthetic rejection
sampling and SGLang's simulated acceptance length do. The output is not the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llmkit.common.errors import UsageError

HEADER = "x-llmkit-synthetic-acceptance"  # of every response of a server that accepts so
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # of SplitMix64 (Steele, Lea and Flood, 2014), as are the factors below


def acceptance_rates(
    rates: Sequence[float], length: float | None, num_drafts: int
) -> tuple[float, ...]:
    """For each place in a draft, the share of drafts whose tokens up to there are all accepted.

    rates: these shares themselves, or one number, the share of all draft tokens that is accepted.
    length: the mean tokens of a step with drafts, the model's own included. A share or a length
    becomes whole places that are always accepted and at most one that sometimes is, which is the
    least variance. () without either.

    Raises UsageError for numbers that no draft of `num_drafts` tokens can have.
    """
    if not rates and length is None:
        return ()
    if rates and length is not None:
        raise UsageError(
            "--synthetic-accept-rates and --synthetic-accept-length exclude each other",
            todo="Leave out one of them",
        )
    if not num_drafts:
        raise UsageError(
            "synthetic acceptance without draft tokens", todo="Give --speculate or --draft-model"
        )
    if length is not None:
        if not 1 <= length <= num_drafts + 1:
            raise UsageError(
                f"--synthetic-accept-length: {length:g} is out of range",
                f"From 1 to {num_drafts + 1}, as a step has {num_drafts} draft tokens",
            )
        return _spread(length - 1, num_drafts)
    text = ",".join(f"{rate:g}" for rate in rates)
    if not all(0 <= rate <= 1 for rate in rates):
        raise UsageError(f"--synthetic-accept-rates: {text} is out of range", "Shares from 0 to 1")
    if len(rates) == 1:
        return _spread(rates[0] * num_drafts, num_drafts)
    if len(rates) != num_drafts or any(before < after for before, after in pairwise(rates)):
        raise UsageError(
            f"--synthetic-accept-rates: {text} do not fit {num_drafts} draft tokens",
            f"One share of all draft tokens, or {num_drafts} that do not rise: a draft token is"
            " accepted only after those before it",
        )
    return tuple(rates)


def _spread(mean: float, num_drafts: int) -> tuple[float, ...]:
    """The rates with this mean number of accepted tokens and the least variance."""
    return tuple(min(1.0, max(0.0, mean - place)) for place in range(num_drafts))


def synthetic_tokens(
    rates: Sequence[float],
    draft_token_ids: Sequence[int],
    sampled: Sequence[int],
    arrival: int,
    position: int,
) -> list[int]:
    """The draft tokens that a draw accepts, and the sampled token after them.

    arrival: the request's number in the order of arrival. position: the output tokens before the
    draft. Both decide the draw, so that all ranks and repeated runs accept the same. A sampled
    token of -1, where logits are not finite, ends the draft.
    """
    draw = _uniform(arrival, position)
    num_accepted = 0
    while (
        num_accepted < len(draft_token_ids)
        and draw < rates[num_accepted]
        and sampled[num_accepted] >= 0
    ):
        num_accepted += 1
    return [*draft_token_ids[:num_accepted], sampled[num_accepted]]


def _uniform(arrival: int, position: int) -> float:
    """A number in [0, 1) by two rounds of SplitMix64's finalizer."""
    value = 0
    for word in (arrival, position):
        value = (value + word + 1) * _STEP & _MASK
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
        value ^= value >> 31
    return (value >> 11) / (1 << 53)
