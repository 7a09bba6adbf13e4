"""A request on its way through the engine, and the piece of it that one step computes."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from llmkit.runtime.engine.speculate import NgramIndex
from llmkit.runtime.engine.types import Logprobs, Request

if TYPE_CHECKING:
    import torch

GONE = -1  # in a block table: the block has left a sliding window


class Guide(Protocol):
    """Says which tokens may come next in an answer."""

    def allowed(self) -> torch.Tensor:
        """bool [vocab], at least one of them; the end of the answer is a token, too."""

    def advance(self, token: int) -> bool:
        """Take in the answer's next token; whether nothing can follow it."""


@dataclass(eq=False)
class Sequence:
    """A request and how far it has come. `tokens` is the prompt and what is known of the answer."""

    request: Request
    seed: int
    adapter: int = 0  # its key among the runner's adapters; 0: none
    guide: Guide | None = None
    arrival: int = 0
    tokens: list[int] = field(init=False)
    scheduled: int = 0  # tokens whose keys and values are in the cache once the steps under way are done
    pending: int = 0  # tokens that steps under way will have sampled; 0 or 1
    tables: list[list[int]] = field(default_factory=list)  # blocks, one table for each window; none while it waits
    slot: int = -1  # its row in the runner's tables while it runs
    named: int = 0  # blocks that were offered to the prefix cache
    cached: int | None = None  # prompt tokens found in the prefix cache when it was first admitted
    overtaken: int = 0  # how many were admitted before it while it waited
    drafted: int = 0  # tokens whose keys and values are in the draft model's cache
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of its prompt so far, where it asks for them
    pooled: torch.Tensor = field(init=False)  # where it asks for that: the sum until now, at its end the result
    ended: bool = False
    index: NgramIndex | None = None
    _names: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def needs_tokens(self) -> bool:
        """Whether its next token cannot be chosen before the host knows those before it."""
        return self.guide is not None or self.request.sampling.penalizes

    @property
    def total(self) -> int:
        """Tokens it has once the steps under way are done."""
        return len(self.tokens) + self.pending

    @property
    def left(self) -> int:
        """Tokens that the next step could compute; 0 when the last one it may have is under way."""
        return 0 if self.generated >= self.request.sampling.max_tokens else self.total - self.scheduled

    @property
    def generated(self) -> int:
        """Tokens sampled once the steps under way are done."""
        return self.total - len(self.request.prompt)

    @property
    def longest(self) -> int:
        """The most tokens it may come to have."""
        return len(self.request.prompt) + (0 if self.request.pooling else self.request.sampling.max_tokens)

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among all: the least goes first, the greatest is preempted first."""
        return self.request.priority, self.arrival

    def names(self, count: int, block_size: int) -> list[bytes]:
        """Names of its first `count` blocks: each stands for all tokens up to the block's end, adapter and salt."""
        root = f"{self.adapter} {self.request.salt}"
        parent = self._names[-1] if self._names else hashlib.sha256(root.encode()).digest()
        for start in range(len(self._names) * block_size, count * block_size, block_size):
            content = array("q", self.tokens[start : start + block_size]).tobytes()
            parent = hashlib.sha256(parent + content).digest()
            self._names.append(parent)
        return self._names[:count]


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence, computed in one step; the last `drafts` of them are guesses."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # the step knows enough to choose the sequence's next token
    counter: int  # how many tokens were sampled before that one
    tokens: list[int]  # `count` of them, or fewer when the runner finds the rest on its device
    drafts: int = 0

    @property
    def stop(self) -> int:
        """The position after its last token."""
        return self.start + self.count

    @property
    def pools(self) -> bool:
        """Whether it is the last of a sequence whose hidden states are asked for."""
        return self.samples and self.sequence.request.pooling is not None
