"""What replays steps that were recorded or captured before: the interface, and none at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NoReturn, Protocol

import torch

from llmkit.runtime.engine.paged_model import ForwardInputs
from llmkit.runtime.engine.sampling_tensors import SamplingTensors

Sampler = Callable[..., torch.Tensor]


class GraphRunner(Protocol):
    """Runs steps again that are as large as earlier ones, without Python between the kernels.

    hidden_states: what a draft head reads of the tokens of the last step, [T, C].
    """

    hidden_states: torch.Tensor

    @property
    def samples_tokens(self) -> bool:
        """Whether `replay` returns sampled token ids."""
        ...

    @property
    def sampler(self) -> Sampler | None:
        """What samples in graphs, and in steps without them; None: the model runner samples."""
        ...

    @property
    def num_graphs(self) -> int:
        """How many graphs there are."""
        ...

    def can_replay(
        self,
        query_lens: Sequence[int],
        adapter_ids: Collection[int] = (),
        is_mixed: bool = False,
    ) -> bool:
        """Whether `replay` shall run a step. Call it once a step: it may remember the size.

        query_lens: the new tokens of each sequence. adapter_ids: those of the sequences, 0 for
        none. is_mixed: prompts are beside decodes, so that not all tokens are sampled from.
        """
        ...

    def replay(
        self,
        token_ids: torch.Tensor,
        inputs: ForwardInputs,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
        logits_indices: Sequence[int] | None = None,
        adapter_ids: Sequence[int] = (),
        changes_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a step: the logits [L, V], and the sampled token ids [L] or None.

        token_ids: int64 [T], on the device. logits_indices: the L tokens that are sampled from;
        None: all T, because each sequence has its last known token and drafts after it. sampling,
        num_sampled: of each of the L tokens; the output tokens before the one that is sampled.
        adapter_ids: the adapter of each sequence, 0 for none; (): no sequence has one.
        changes_logits: whether rows have logits processors. The token ids then are those after
        them, if the runner samples, and the logits are those before.
        """
        ...

    def capture_all(self, captured: Callable[[int, int], None] = lambda *_: None) -> None:
        """Capture the graphs that are captured at the start.

        captured: called with the number of graphs that exist and of those that will.
        """
        ...

    def update_adapters(self) -> None:
        """Capture the graphs with adapters again if an adapter was added that they do not have."""
        ...


class WithoutCapture:
    """The part of a `GraphRunner` that captures nothing at the start and applies no adapters."""

    def capture_all(self, captured: Callable[[int, int], None] = lambda *_: None) -> None:
        """See `GraphRunner.capture_all`."""

    def update_adapters(self) -> None:
        """See `GraphRunner.update_adapters`."""


class NoGraphRunner(WithoutCapture):
    """For a model whose steps cannot be recorded: every step runs operator by operator."""

    samples_tokens = False
    sampler: Sampler | None = None
    num_graphs = 0

    def __init__(self) -> None:
        self.hidden_states = torch.empty(0)

    def can_replay(
        self,
        query_lens: Sequence[int],
        adapter_ids: Collection[int] = (),
        is_mixed: bool = False,
    ) -> bool:
        """See `GraphRunner.can_replay`."""
        return False

    def replay(self, *_: object) -> NoReturn:
        """See `GraphRunner.replay`."""
        raise AssertionError("a step that can_replay refuses")
