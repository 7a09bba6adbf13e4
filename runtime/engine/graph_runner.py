"""What runs decode steps that were recorded or captured before: the interface, and none at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NoReturn, Protocol

import torch

from llmkit.runtime.engine.sampling_tensors import SamplingTensors
from llmkit.runtime.engine.slot_block_tables import BlockTables
from llmkit.runtime.engine.state_scheduler import StateRows

Sampler = Callable[..., torch.Tensor]


class GraphRunner(Protocol):
    """Runs steps again that are as large as earlier ones, without Python between the kernels.

    hidden_states: what a draft head reads of the tokens of the last step, [T, C].
    """

    hidden_states: torch.Tensor

    @property
    def samples_tokens(self) -> bool:
        """Whether `run` returns sampled token ids."""
        ...

    @property
    def sampler(self) -> Sampler | None:
        """What samples in graphs, and in steps without them; None: the model runner samples."""
        ...

    @property
    def num_graphs(self) -> int:
        """How many graphs there are."""
        ...

    def should_run(self, query_lens: Sequence[int], adapter_ids: Collection[int] = ()) -> bool:
        """Whether `run` shall run a decode step. Call it once a step: it may remember the size.

        query_lens: the new tokens of each sequence, 1 or more to verify drafts. adapter_ids: those
        of the sequences, 0 for none.
        """
        ...

    def run(
        self,
        token_ids: torch.Tensor,
        positions: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: BlockTables,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
        query_lens: Sequence[int] | None = None,
        adapter_ids: Sequence[int] = (),
        slots: Sequence[int] | None = None,
        state_rows: Sequence[StateRows] = (),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One decode step: the logits [tokens, V], and the sampled token ids [tokens] or None.

        token_ids: int64 [tokens], the last known token of each sequence and its drafts. seq_lens:
        tokens of each sequence, those included. sampling, num_sampled: of each token; the output
        tokens before the one that is sampled. query_lens: tokens of each sequence in this step;
        None: one each. adapter_ids: the adapter of each token, 0 for none; (): no token has one.
        slots, state_rows: of each sequence, see `StaticDecodeBatch.fill`.
        """
        ...

    def should_run_mixed(self, num_rows: int, num_tokens: int) -> bool:
        """Whether `run_mixed` can run a step of this many sequences and tokens."""
        ...

    def run_mixed(
        self,
        token_ids: torch.Tensor,
        positions: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: BlockTables,
        sampling: SamplingTensors,
        num_sampled: Sequence[int],
        query_lens: Sequence[int],
        slots: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A step with prompts beside decodes: logits [rows, V] and sampled token ids [rows].

        token_ids: int64 [tokens], those of each sequence after those of the one before. sampling,
        num_sampled: of each sequence, after whose last token is sampled. For the others see `run`.
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


class NoMixedGraphs:
    """The part of a `GraphRunner` that has nothing for prompts, adapters and the start."""

    def should_run_mixed(self, num_rows: int, num_tokens: int) -> bool:
        """See `GraphRunner.should_run_mixed`."""
        return False

    def run_mixed(self, *_: object) -> NoReturn:
        """See `GraphRunner.run_mixed`."""
        raise AssertionError("a step that should_run_mixed refuses")

    def capture_all(self, captured: Callable[[int, int], None] = lambda *_: None) -> None:
        """See `GraphRunner.capture_all`."""

    def update_adapters(self) -> None:
        """See `GraphRunner.update_adapters`."""


class NoGraphRunner(NoMixedGraphs):
    """For a model whose steps cannot be recorded: every step runs operator by operator."""

    samples_tokens = False
    sampler: Sampler | None = None
    num_graphs = 0

    def __init__(self) -> None:
        self.hidden_states = torch.empty(0)

    def should_run(self, query_lens: Sequence[int], adapter_ids: Collection[int] = ()) -> bool:
        """See `GraphRunner.should_run`."""
        return False

    def run(self, *_: object) -> NoReturn:
        """See `GraphRunner.run`."""
        raise AssertionError("a step that should_run refuses")
