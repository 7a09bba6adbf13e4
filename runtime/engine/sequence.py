"""A request on its way through the engine."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.grammar_matcher import GrammarMatcher
from llmkit.runtime.engine.thinking_budget import ThinkingState

# In a block table: the block was freed because it left a sliding window. Kernels read block 0 in
# its place; see block_pool.py.
NULL_BLOCK = -1
HOST_BLOCK = -2  # in a table that is being made: the block is in host memory


@dataclass(eq=False)
class Sequence:
    """A request and its progress. Only the scheduler changes it."""

    request: EngineRequest
    seed: int  # of its random draws
    adapter_id: int = 0  # its LoRA adapter's id in the LoraManager; 0: the base model
    grammar_matcher: GrammarMatcher | None = None
    # `ModelSpec.rope_offset` of its length: keys of another offset are rotated differently.
    rope_offset: int = 0
    arrival: int = 0  # its number in the order of arrival, set by Scheduler.add
    # Sampled tokens that end it: its own stop tokens and the model's, set by Scheduler.add.
    end_token_ids: frozenset[int] = frozenset()
    # Whether its next step must wait until the host knows its last token, set by Scheduler.add.
    waits_for_last_token: bool = False

    # What every step asks of the request.
    num_prompt_tokens: int = field(init=False)  # tokens of the prompt
    max_num_tokens: int = field(init=False)  # the most that it can have, prompt and output
    # Whether the host must know all tokens before it can sample the next one.
    needs_known_tokens: bool = field(init=False)
    # Whether it wants tokens only: no logprobs, no pooling, no grammar and no thinking budget.
    is_plain: bool = field(init=False)
    thinking: ThinkingState | None = field(init=False)  # None: it has no thinking budget

    token_ids: list[int] = field(init=False)  # the prompt and the known output tokens
    # Tokens whose keys and values are in the KV cache once the steps in flight are done.
    num_computed_tokens: int = 0
    num_in_flight: int = 0  # tokens that steps in flight sample; 0 or 1
    # Prompt tokens found in the prefix cache; None: not admitted yet.
    num_cached_tokens: int | None = None
    # Tokens whose keys and values are in the draft model's KV cache.
    num_draft_computed_tokens: int = 0
    # Block ids, one table per attention window; empty while the sequence waits.
    block_tables: list[list[int]] = field(default_factory=list)
    num_block_tokens: int = 0  # tokens that fit in the blocks of each of its block tables
    num_hashed_blocks: int = 0  # full blocks that the prefix cache already knows
    slot: int = -1  # its row in the runner's per-sequence tensors while it runs
    skip_count: int = 0  # sequences admitted before it while it waited
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # so far, when requested
    is_finished: bool = False
    _block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.request.sampling_params
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        # A pooled request samples a token that is not kept.
        self._num_tokens_at_end = self.num_prompt_tokens + params.max_tokens
        self.max_num_tokens = (
            self.num_prompt_tokens if self.request.pooling else self._num_tokens_at_end
        )
        self.needs_known_tokens = self.grammar_matcher is not None or params.has_penalties
        wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
        self.thinking = None
        if params.thinking_budget is not None:
            self.thinking = ThinkingState(params.thinking_budget)
        self.is_plain = not (
            wants_logprobs or self.request.pooling or self.grammar_matcher or self.thinking
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those that steps in flight sample included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, those that steps in flight sample included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the next step could compute.

        0 when a step in flight samples the last token that the request may have.
        """
        num_tokens = len(self.token_ids) + self.num_in_flight
        if num_tokens >= self._num_tokens_at_end:
            return 0
        return num_tokens - self.num_computed_tokens

    @property
    def priority_key(self) -> tuple[int, int]:
        """The order of sequences: the smallest key runs first, the largest is preempted first."""
        return self.request.priority, self.arrival

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The hashes of its first blocks.

        A hash covers all tokens up to the end of the block, the adapter, the RoPE offset and the
        salt.
        """
        if self._block_hashes:
            parent = self._block_hashes[-1]
        else:
            keys = f"{self.adapter_id}+{self.rope_offset}" if self.rope_offset else self.adapter_id
            root = f"{keys} {self.request.cache_salt}"
            parent = hashlib.sha256(root.encode()).digest()
        first = len(self._block_hashes) * block_size
        for start in range(first, num_blocks * block_size, block_size):
            content = array("q", self.token_ids[start : start + block_size]).tobytes()
            parent = hashlib.sha256(parent + content).digest()
            self._block_hashes.append(parent)
        return self._block_hashes[:num_blocks]
