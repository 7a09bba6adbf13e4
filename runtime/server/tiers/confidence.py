"""What the router and the servers of its models say to each other in headers."""

from __future__ import annotations

import msgspec

# Of a request: the Uncertainty as JSON. Only a server of a router reads it, and the router removes
# it from clients' requests.
GATE_HEADER = "x-llmkit-uncertainty"
# Of a response: the Confidence as JSON.
CONFIDENCE_HEADER = "x-llmkit-confidence"
UNSURE = "unsure"  # the code of the error that stands for an answer that was given up


class Confidence(msgspec.Struct, frozen=True):
    """What a tier's own signals say about its answer, and what the answer has cost so far."""

    probability: float  # that the answer will do
    completion_tokens: int
    prompt_tokens: int
    is_sure: bool  # the probability reaches the threshold
