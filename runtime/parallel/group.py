"""`Ranks` over torch.distributed: NCCL between GPUs, gloo between processes on a CPU."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from llmkit.model.ranks import Ranks, Waitable
from llmkit.model.spec import ModelSpec

_NEVER = torch.iinfo(torch.int64).max


class Group(Ranks):
    """A rank's side of it. Ranks are numbered by stage, then by tensor-parallel rank."""

    def __init__(self, spec: ModelSpec, index: int, stages: int) -> None:
        """spec: the rank's part; index: its number among all; nobody is met before `join`."""
        assert spec.rank is not None
        self.size, self.stages, self.index = spec.rank.tp, stages, index
        self.first = spec.rank.rank * spec.vocab
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()  # with what must live until it has gone

    def join(self, store: Path, device: torch.device) -> None:
        """Meet the other ranks; returns when all are there. store: a file that only they know."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: nothing leaves it
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")  # what looks into the store all the time
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")  # stages' order is that
        gpu = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None
        world, backend, where = self.size * self.stages, "nccl" if gpu else "gloo", f"file://{store}"
        # With its GPU named NCCL connects now, and not when the store is gone, with the first sum.
        dist.init_process_group(backend, init_method=where, rank=self.index, world_size=world, device_id=gpu)
        stages = [list(range(first, first + self.size)) for first in range(0, world, self.size)]
        groups = [dist.new_group(ranks) for ranks in stages]  # every rank must make every group
        self._stage = groups[self.index // self.size]
        self._results = dist.new_group(backend="gloo")  # schedulers need them on the host
        dist.all_reduce(torch.zeros(1), group=self._results)  # from now on nobody needs the store

    def leave(self) -> None:
        """Let go of the other ranks, which have ended: NCCL would wait for them otherwise."""
        if dist.is_initialized():
            (_abort_process_group if dist.get_backend() == "nccl" else dist.destroy_process_group)()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`; over the ranks of the stage."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`: the ranks compare their best, whatever the size of the vocabulary."""
        ids = x.argmax(-1)
        if self.size == 1:
            return ids
        own = x.gather(-1, ids[:, None])[:, 0]
        ids = (ids + self.first).where(own == self.max(own.clone()), _NEVER)
        return self._reduced(ids, dist.ReduceOp.MIN)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """See `Vocabulary`."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), self._stage)
        return torch.cat(parts, -1)

    def receive(self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Ranks`."""
        x = torch.empty(tokens, hidden, dtype=dtype, device=device)
        dist.recv(x, self.index - self.size)
        return x

    def send(self, hidden: torch.Tensor) -> None:
        """See `Ranks`. On a CPU it goes while the next step is computed."""
        if hidden.is_cuda:
            dist.send(hidden, self.index + self.size)
        else:
            self._post(hidden, self.index + self.size, None)

    def publish(self, results: list[torch.Tensor]) -> None:
        """See `Ranks`."""
        for stage in range(self.stages - 1):
            for result in results:
                self._post(result, stage * self.size + self.index % self.size, self._results)

    def expect(self, results: list[torch.Tensor]) -> Waitable:
        """See `Ranks`."""
        last = (self.stages - 1) * self.size + self.index % self.size
        return _Arrival([dist.irecv(result, last, self._results) for result in results])

    def _reduced(self, x: torch.Tensor, how: Any) -> torch.Tensor:
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x, how, self._stage)
        return x

    def _post(self, x: torch.Tensor, to: int, group: Any) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        self._sending.append((dist.isend(x.contiguous(), to, group), x))


class _Arrival:
    """What is being received."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def synchronize(self) -> None:
        """Wait until it is there."""
        while self._works:
            self._works.pop(0).wait()
