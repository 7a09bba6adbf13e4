"""The input of a step, made by the scheduler, and its result, returned by the model runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.state_scheduler import NO_STATE_ROWS, StateRows


class ScheduledRequest(NamedTuple):
    """A request's share of a step: the positions [start, stop) of one sequence."""

    sequence: Sequence  # for reading only
    start: int  # first position; the tokens before it are in the KV cache
    num_tokens: int  # tokens that the step computes, draft tokens included
    samples_next_token: (
        bool  # the step computes all known tokens, so that it can sample the next one
    )
    num_sampled: int  # output tokens before the sampled one; the counter of its random draw
    # The tokens to compute. The last one is missing when only the device knows it yet.
    token_ids: list[int]
    num_draft_tokens: int = 0  # how many of the last tokens are drafts
    state_rows: StateRows = NO_STATE_ROWS  # of a model with recurrent layers
    forced_token_id: int | None = None  # takes the place of the sampled token

    @property
    def stop(self) -> int:
        """The position after its last token."""
        return self.start + self.num_tokens

    @property
    def num_sampled_rows(self) -> int:
        """How many of its last tokens need logits: the last known token and the draft tokens."""
        return 1 + self.num_draft_tokens

    @property
    def returns_embedding(self) -> bool:
        """Whether the step completes the pooled hidden states of the request."""
        return self.samples_next_token and self.sequence.request.pooling is not None


@dataclass(frozen=True)
class SchedulerOutput:
    """What the next step computes. Requests with one token come first."""

    requests: list[ScheduledRequest]


@dataclass(frozen=True)
class ModelRunnerOutput:
    """The result of a step, on the host. Each list has one entry per scheduled request."""

    # The accepted draft tokens and the token after them; -1 where logits are not finite. A request
    # that does not sample has one entry too, which only says whether its logits are finite.
    token_ids: list[list[int]]
    logprobs: list[list[Logprobs]] | None  # of the sampled tokens; None: not requested
    prompt_logprobs: list[list[Logprobs]] | None  # of the prompt tokens in this step
    embeddings: dict[str, bytes]  # completed in this step, by request id; float32 [H]
    # The draft tokens for the next step of each request; None: they do not come with results.
    next_draft_token_ids: list[list[int]] | None = None
