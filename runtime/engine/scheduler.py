"""Which tokens the next step computes, and what its result means for each request.

There is one kind of step. A sequence has `total` tokens, of which `computed` are in the KV cache; a step first
advances the running sequences that decode (one token each), then spends what is left of its token budget on the
prompts of running and then of waiting ones. A sequence whose tokens are all computed by a step samples the next.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llmkit.runtime.engine.blocks import BlockPool
from llmkit.runtime.engine.types import EngineConfig, FinishReason, Request, RequestError, TokenOutput


@dataclass(eq=False)
class Sequence:
    """A request on its way. `tokens` is the prompt and what was generated so far."""

    request: Request
    seed: int
    tokens: list[int] = field(init=False)
    computed: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)  # none while it waits

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def total(self) -> int:
        """Tokens known so far."""
        return len(self.tokens)

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def longest(self) -> int:
        """The most tokens it may come to have."""
        return len(self.request.prompt) + self.request.sampling.max_tokens


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step knows enough to choose the sequence's next token."""
        return self.start + self.count == self.sequence.total


class Scheduler:
    """Waiting and running sequences over one block pool."""

    def __init__(self, config: EngineConfig, eos_ids: tuple[int, ...]) -> None:
        self.config, self.eos_ids = config, frozenset(eos_ids)
        self.pool = BlockPool(config.num_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of their admission
        self.prompt_tokens = self.generation_tokens = self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError when it could never run to its end."""
        prompt, wanted = len(sequence.request.prompt), sequence.request.sampling.max_tokens
        limit = min(self.config.max_model_len, self.config.num_blocks * self.config.block_size)
        if not prompt:
            raise RequestError("invalid_value", "the prompt is empty; at least one token was expected", "prompt")
        if sequence.longest > limit:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {prompt} tokens and {wanted} were asked for, {sequence.longest} together; "
                f"at most {limit} fit",
                "prompt" if prompt >= limit else "max_tokens",
            )
        self.waiting.append(sequence)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its blocks; False when it is not under way."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.id == request_id:
                self._remove(sequence)
                return True
        return False

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; their sequences have blocks for them."""
        self._grow()
        self._admit()
        budget = self.config.max_num_batched_tokens
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.total - s.computed > 1):  # decodes first
            count = min(sequence.total - sequence.computed, budget)
            if not count:
                break
            chunks.append(Chunk(sequence, sequence.computed, count))
            budget -= count
        return chunks

    def commit(self, chunks: list[Chunk], sampled: list[int]) -> list[TokenOutput]:
        """Record a step. `sampled`: the token after each chunk, wanted or not; -1 where its logits are not finite."""
        outputs = []
        for chunk, token in zip(chunks, sampled, strict=True):
            sequence, samples = chunk.sequence, chunk.samples
            sequence.computed += chunk.count
            if not samples and token >= 0:
                continue
            if samples and not sequence.generated:  # its prompt is done; a recomputed one is not counted again
                self.prompt_tokens += len(sequence.request.prompt)
            reason = self._accept(sequence, token)
            error = "the model's logits were not finite" if reason == "error" else None
            new = [] if reason == "error" else [token]
            self.generation_tokens += len(new)
            outputs.append(
                TokenOutput(sequence.request.id, new, reason, error, len(sequence.request.prompt), cached_tokens=0)
            )
            if reason is not None:
                self._remove(sequence)
        return outputs

    def _accept(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token < 0:
            return "error"
        sampling = sequence.request.sampling
        sequence.tokens.append(token)
        if token in sampling.stop_token_ids or (token in self.eos_ids and not sampling.ignore_eos):
            return "stop"
        return "length" if sequence.generated >= sampling.max_tokens else None

    def _grow(self) -> None:
        """Give every running sequence, oldest first, the block its next token needs.

        When none is free, the newest one gives up its own and is computed again later.
        """
        for sequence in list(self.running):
            while sequence.blocks and self._missing(sequence) > self.pool.free:
                self._preempt(self.running[-1])
            if sequence.blocks:
                sequence.blocks += self.pool.allocate(self._missing(sequence))

    def _admit(self) -> None:
        """Let waiting sequences run, first come first served, while their whole prompt finds blocks."""
        unscheduled = sum(s.total - s.computed for s in self.running)
        while (
            self.waiting
            and unscheduled < self.config.max_num_batched_tokens
            and len(self.running) < self.config.max_num_seqs
            and self._missing(self.waiting[0]) <= self.pool.free
        ):
            sequence = self.waiting.popleft()
            sequence.blocks = self.pool.allocate(self._missing(sequence))
            self.running.append(sequence)
            unscheduled += sequence.total

    def _missing(self, sequence: Sequence) -> int:
        return -(-sequence.total // self.config.block_size) - len(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        self._remove(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _remove(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        (self.running if sequence in self.running else self.waiting).remove(sequence)
