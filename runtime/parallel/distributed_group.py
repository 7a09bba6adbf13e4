"""`ParallelGroup` over torch.distributed: NCCL between GPUs, gloo between processes on a CPU.

On a CPU with compiled kernels, the ranks of a stage reduce through shared memory instead.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from llmkit.model.parallel_group import ParallelGroup, Waitable
from llmkit.model.spec import ModelSpec
from llmkit.runtime.parallel.shared_memory_group import (
    SharedMemoryGroup,
    can_share_memory,
    create_shared_memory,
)

# What replaces gloo's operations when a rank has the values of all, [ranks, ...].
_REDUCTIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: lambda gathered: gathered.sum(0, dtype=gathered.dtype),
    dist.ReduceOp.MAX: lambda gathered: gathered.amax(0),
    dist.ReduceOp.MIN: lambda gathered: gathered.amin(0),
}
_NO_TOKEN = torch.iinfo(torch.int64).max  # larger than every token id


class DistributedGroup(ParallelGroup):
    """The other ranks, as one rank sees them.

    Ranks are numbered by stage, then by tensor parallel rank.
    """

    def __init__(self, spec: ModelSpec, rank: int, num_stages: int) -> None:
        """spec: the rank's part of the model. rank: its number among all ranks.

        Call `connect` before any other method.
        """
        assert spec.rank is not None
        self.tp_size = spec.rank.tp_size
        self.pp_size = num_stages
        self.rank = rank
        self.vocab_start = spec.rank.tp_rank * spec.vocab_size
        self.is_split = self.tp_size > 1
        self._shared: SharedMemoryGroup | None = None  # set by `connect`
        # Sends under way, with the tensors that must live until they are done.
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()

    def connect(self, store_path: Path, device: torch.device) -> None:
        """Connect to the other ranks; returns when all are connected.

        store_path: a private file through which the ranks find each other.
        """
        # All ranks are on one machine, so that no traffic leaves it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        # The dump on a timeout would poll the store file, which is removed after the start.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        # PyTorch warns about the order of sends and receives; here the stages fix that order.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
        gpu = None
        if device.type == "cuda":
            gpu = torch.device("cuda", torch.cuda.current_device())
        world_size = self.tp_size * self.pp_size
        # With a device id, NCCL connects now. Otherwise it would connect in the first collective
        # operation, when the store file is gone.
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"file://{store_path}",
            rank=self.rank,
            world_size=world_size,
            device_id=gpu,
        )
        # Every rank must create every group.
        first_ranks = range(0, world_size, self.tp_size)
        stages = [list(range(first, first + self.tp_size)) for first in first_ranks]
        stage_groups = [dist.new_group(stage) for stage in stages]
        self._stage_group = stage_groups[self.rank // self.tp_size]
        self._results_group = dist.new_group(backend="gloo")  # results are on the host
        if gpu is None and self.tp_size > 1:
            self._share_memory()
        # After this, no rank needs the store any more.
        dist.all_reduce(torch.zeros(1), group=self._results_group)

    def _share_memory(self) -> None:
        """Let the ranks of each stage share memory, if all ranks can."""
        descriptor = -1
        if self.rank == 0 and can_share_memory():
            descriptor = create_shared_memory(self.tp_size, self.pp_size)
        owner = torch.tensor([os.getpid(), descriptor])
        dist.broadcast(owner, 0, self._results_group)
        pid, number = owner.tolist()
        shared = None
        if number >= 0 and can_share_memory():
            with contextlib.suppress(OSError):
                file = Path(f"/proc/{pid}/fd/{number}")
                shared = SharedMemoryGroup(file, self.rank, self.tp_size, self.pp_size)
        num_sharing = torch.tensor(int(shared is not None))
        dist.all_reduce(num_sharing, group=self._results_group)
        if num_sharing == self.tp_size * self.pp_size:
            self._shared = shared
        if descriptor >= 0:
            os.close(descriptor)

    @property
    def reduces_in_kernels(self) -> bool:
        """See `ParallelGroup`."""
        return self.tp_size == 1 or self._shared is not None

    def stop(self) -> None:
        """Let reductions fail, on all ranks, since one of them has ended.

        NCCL and gloo find that out by themselves.
        """
        if self._shared is not None:
            self._shared.stop()

    def disconnect(self) -> None:
        """Disconnect from the other ranks, which have ended.

        NCCL would wait for them, so it is aborted.
        """
        if not dist.is_initialized():
            return
        if dist.get_backend() == "nccl":
            _abort_process_group()
        else:
            dist.destroy_process_group()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `VocabParallel`; over the ranks of the stage."""
        if self._shared is not None and x.dtype is torch.float32:
            x = x.contiguous()
            self._shared.all_reduce_(x)
            return x
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        """See `VocabParallel`."""
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """See `VocabParallel`: each rank compares its best token with the others' best."""
        ids = x.argmax(-1)
        if self.tp_size == 1:
            return ids
        own = x.gather(-1, ids[:, None])[:, 0]
        ids = (ids + self.vocab_start).where(own == self.all_reduce_max(own.clone()), _NO_TOKEN)
        return self._all_reduce(ids, dist.ReduceOp.MIN)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See `VocabParallel`."""
        if self.tp_size == 1:
            return x
        if self._shared is not None:
            return torch.cat(self._shared.all_gather(x.contiguous()).unbind(), -1)
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        dist.all_gather(parts, x.contiguous(), self._stage_group)
        return torch.cat(parts, -1)

    def receive(
        self, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """See `ParallelGroup`."""
        x = torch.empty(tokens, hidden, dtype=dtype, device=device)
        dist.recv(x, self.rank - self.tp_size)
        return x

    def send(self, hidden: torch.Tensor) -> None:
        """See `ParallelGroup`. On a CPU the next step does not wait until it is sent."""
        if hidden.is_cuda:
            dist.send(hidden, self.rank + self.tp_size)
        else:
            self._start_send(hidden, self.rank + self.tp_size, None)

    def broadcast_results(self, results: list[torch.Tensor]) -> None:
        """See `ParallelGroup`."""
        for stage in range(self.pp_size - 1):
            for result in results:
                rank = stage * self.tp_size + self.rank % self.tp_size
                self._start_send(result, rank, self._results_group)

    def receive_results(self, results: list[torch.Tensor]) -> Waitable:
        """See `ParallelGroup`."""
        last = (self.pp_size - 1) * self.tp_size + self.rank % self.tp_size
        return _Receives([dist.irecv(result, last, self._results_group) for result in results])

    def _all_reduce(self, x: torch.Tensor, operation: Any) -> torch.Tensor:
        if self._shared is not None:
            return _REDUCTIONS[operation](self._shared.all_gather(x.contiguous()))
        if self.tp_size > 1:
            x = x.contiguous()
            dist.all_reduce(x, operation, self._stage_group)
        return x

    def _start_send(self, x: torch.Tensor, rank: int, group: Any) -> None:
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        self._sends.append((dist.isend(x.contiguous(), rank, group), x))


class _Receives:
    """Tensors that are being received."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def synchronize(self) -> None:
        """Wait until all are received."""
        while self._works:
            self._works.pop(0).wait()
