"""What the engine returns: the new tokens of a request, and the engine's statistics."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "error"]


class Logprobs(NamedTuple):
    """Log probabilities at one position, from the model's unchanged logits."""

    logprob: float  # of the token at this position
    top: list[tuple[int, float]]  # the most probable tokens and their logprobs, falling


class EngineOutput(NamedTuple):
    """What one step did for one request. Plain data, which msgspec can encode."""

    request_id: str
    # The new tokens, several after speculation. A token that ends the request is included.
    token_ids: list[int]
    finish_reason: FinishReason | None  # None: the request continues
    error: str | None  # with finish_reason "error"
    prompt_tokens: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    logprobs: list[Logprobs] | None = None  # one for each new token
    # With the first tokens: one for each prompt token except the first.
    prompt_logprobs: list[Logprobs] | None = None
    # Of a pooled request, with finish_reason "stop": pooled hidden states, float32 [H], or the
    # logits of labels, float32 [labels].
    embedding: bytes | None = None


@dataclass(frozen=True)
class EngineStats:
    """Gauges at this moment, and counters (`_total`) since the start."""

    running: int = 0  # requests
    waiting: int = 0  # requests
    kv_used_blocks: int = 0
    kv_cached_blocks: int = 0  # not in use, with a cached prefix
    kv_total_blocks: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    prefix_queries_total: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits_total: int = 0  # prompt tokens found there, in host memory too
    # Host memory behind the prefix cache (--kv-offload): blocks, and recurrent states.
    host_used_blocks: int = 0
    host_total_blocks: int = 0
    host_hits_total: int = 0  # prompt tokens found in host memory and not on the device
    host_saves_total: int = 0  # blocks copied to host memory
    host_loads_total: int = 0  # blocks copied back
    host_saved_bytes_total: int = 0  # of this rank
    host_loaded_bytes_total: int = 0  # of this rank
    # Recurrent states that are kept at the ends of cached prefixes.
    state_snapshots: int = 0
    state_snapshot_bytes: int = 0
    state_total_snapshots: int = 0
    # Prompt tokens whose blocks were cached, but that were computed: no state was kept after them.
    prefix_stateless_total: int = 0
    drafts_total: int = 0  # steps of a sequence that verified draft tokens
    drafted_total: int = 0  # draft tokens proposed
    accepted_total: int = 0  # draft tokens accepted
    accepted_per_pos_total: tuple[int, ...] = ()  # by place in the draft
    # The prefix cache on disk; set by PrefixStoreEngine only.
    store_queries_total: int = 0  # prompt tokens looked up, after a miss in memory
    store_hits_total: int = 0  # prompt tokens found
    store_damaged_total: int = 0  # damaged files

    def counters(self) -> EngineStats:
        """Only the counters; they are kept after an engine's process has ended."""
        values = vars(self).items()
        return EngineStats(**{name: value for name, value in values if name.endswith("_total")})

    def __add__(self, other: EngineStats) -> EngineStats:
        theirs = vars(other)
        per_pos = [self.accepted_per_pos_total, other.accepted_per_pos_total]
        sums = {
            name: value + theirs[name] for name, value in vars(self).items() if type(value) is int
        }
        return EngineStats(
            **sums,
            accepted_per_pos_total=tuple(map(sum, zip_longest(*per_pos, fillvalue=0))),
        )
