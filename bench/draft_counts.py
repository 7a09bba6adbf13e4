"""How many draft tokens a server or an engine accepts, from its counters before and after a run."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import NamedTuple

# The counters on /metrics, of llmkit and of vLLM. A server may have several of each, by labels.
_COUNTER = re.compile(
    r"^(?:llmkit|vllm):spec_decode_num_"
    r"(drafts|draft_tokens|accepted_tokens|accepted_tokens_per_pos)_total"
    r"(?:\{(.*)\})? ([0-9.e+]+)$",
    re.MULTILINE,
)
_POSITION = re.compile(r'(?:^|,)position="([0-9]{1,3})"')
POSITION_PREFIX = "acceptance_pos"  # of the metrics of places in a draft: "acceptance_pos0"


class DraftCounts(NamedTuple):
    """The counters of speculative decoding."""

    drafts: float = 0.0  # steps of a request that verified draft tokens
    draft_tokens: float = 0.0
    accepted_tokens: float = 0.0
    accepted_per_pos: tuple[float, ...] = ()  # accepted tokens, by place in the draft

    def since(self, before: DraftCounts) -> DraftCounts:
        """What was counted since `before`."""
        places = zip_longest(self.accepted_per_pos, before.accepted_per_pos, fillvalue=0.0)
        return DraftCounts(
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            tuple(now - then for now, then in places),
        )


def parse_draft_counts(text: str) -> DraftCounts:
    """The sums of the counters in an answer of /metrics."""
    sums = {"drafts": 0.0, "draft_tokens": 0.0, "accepted_tokens": 0.0}
    of_places: dict[int, float] = {}
    for name, labels, value in _COUNTER.findall(text):
        if name in sums:
            sums[name] += float(value)
            continue
        position = _POSITION.search(labels)
        if position is not None:
            place = int(position[1])
            of_places[place] = of_places.get(place, 0.0) + float(value)
    places = range(max(of_places, default=-1) + 1)
    return DraftCounts(
        **sums, accepted_per_pos=tuple(of_places.get(place, 0.0) for place in places)
    )


def acceptance_metrics(counts: DraftCounts | None) -> dict[str, float]:
    """The SPEED_METRICS of speculative decoding; {} for a run without drafts.

    The acceptance at a place is the share of drafts whose tokens up to there were all accepted.
    """
    if counts is None or counts.drafts <= 0 or counts.draft_tokens <= 0:
        return {}
    metrics = {
        "acceptance": counts.accepted_tokens / counts.draft_tokens,
        "acceptance_length": 1 + counts.accepted_tokens / counts.drafts,
        "drafts": counts.drafts,
    }
    for place, accepted in enumerate(counts.accepted_per_pos):
        metrics[f"{POSITION_PREFIX}{place}"] = accepted / counts.drafts
    return metrics
