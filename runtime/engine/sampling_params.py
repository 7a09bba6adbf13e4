"""How the tokens of a request are sampled, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmkit.runtime.engine.thinking_budget import ThinkingBudget

Pooling = Literal["last", "mean"]  # of an embedding
# What a request returns in place of tokens: an embedding, or the logits of labels.
PoolingTask = Literal["last", "mean", "classify"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are sampled, and when it ends."""

    temperature: float = 1.0  # 0: greedy, the most probable token
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the probability of the most probable token
    seed: int | None = None  # None: the engine draws one
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # output tokens before a stop or end token may be sampled
    # Divides the positive logits of tokens in the prompt or output, and multiplies the negative
    # ones.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to logits, by token id
    # How many alternatives to return with each output token; 0: only the token's own logprob; None:
    # no logprobs.
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    thinking_budget: ThinkingBudget | None = None  # None: thoughts have no limit of their own

    @property
    def has_penalties(self) -> bool:
        """Whether the logits of a token depend on the tokens before it through a penalty."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def needs_logits_processors(self) -> bool:
        """Whether logits are changed before a token is sampled."""
        return self.has_penalties or bool(self.logit_bias or self.min_tokens)
