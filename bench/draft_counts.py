"""How many draft tokens a server or an engine accepts, from its counters before and after a run."""

from __future__ import annotations

import re
from typing import NamedTuple

# The counters on /metrics, of llmkit and of vLLM. A server may have several of each, by labels.
_COUNTER = re.compile(
    r"^(?:llmkit|vllm):spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total(?:\{.*\})?"
    r" ([0-9.e+]+)$",
    re.MULTILINE,
)


class DraftCounts(NamedTuple):
    """The counters of speculative decoding."""

    drafts: float = 0.0  # steps of a request that verified draft tokens
    draft_tokens: float = 0.0
    accepted_tokens: float = 0.0

    def since(self, before: DraftCounts) -> DraftCounts:
        """What was counted since `before`."""
        return DraftCounts(*(now - then for now, then in zip(self, before, strict=True)))


def parse_draft_counts(text: str) -> DraftCounts:
    """The sums of the counters in an answer of /metrics."""
    sums = dict.fromkeys(DraftCounts._fields, 0.0)
    for name, value in _COUNTER.findall(text):
        sums[name] += float(value)
    return DraftCounts(**sums)


def acceptance_metrics(counts: DraftCounts | None) -> dict[str, float]:
    """The SPEED_METRICS of speculative decoding; {} for a run without drafts."""
    if counts is None or counts.drafts <= 0 or counts.draft_tokens <= 0:
        return {}
    return {
        "acceptance": counts.accepted_tokens / counts.draft_tokens,
        "acceptance_length": 1 + counts.accepted_tokens / counts.drafts,
    }
