"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import ModelSpec

Result = TypeVar("Result")
TIMEOUT_S = 60


class ThreadGroup(ParallelGroup):
    """A rank whose peers are threads of this process."""

    def __init__(self, spec: ModelSpec, barrier: threading.Barrier, shared: dict[int, Any]) -> None:
        """barrier, shared: those of all ranks."""
        assert spec.rank is not None
        self.tp_size = spec.rank.tp_size
        self.is_split = self.tp_size > 1
        self.vocab_start = spec.rank.tp_rank * spec.vocab_size
        self._rank = spec.rank.tp_rank
        self._barrier = barrier
        self._shared = shared

    @property
    def reduces_in_kernels(self) -> bool:
        return False

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._shared[self._rank] = x.clone()
        self._barrier.wait(TIMEOUT_S)
        found = [self._shared[rank] for rank in range(self.tp_size)]
        self._barrier.wait(TIMEOUT_S)
        return found

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_gather(x).argmax(-1)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).amax(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), -1)


def run_ranks(
    specs: list[ModelSpec], function: Callable[[int, ThreadGroup], Result]
) -> list[Result]:
    """The results of all ranks, which run on a thread each. One that fails ends all."""
    barrier = threading.Barrier(len(specs))
    shared: dict[int, Any] = {}
    found: dict[int, Result] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = function(rank, ThreadGroup(specs[rank], barrier, shared))
        finally:
            if rank not in found:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(specs), "a rank has failed"
    return [found[rank] for rank in range(len(specs))]
