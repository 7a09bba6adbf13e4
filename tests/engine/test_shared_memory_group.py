"""Collective operations over shared memory, with a thread for each rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from llmkit.runtime.parallel.shared_memory_group import (
    SharedMemoryGroup,
    can_share_memory,
    create_shared_memory,
)

pytestmark = pytest.mark.skipif(not can_share_memory(), reason="no compiled kernels")
TP = 3
STAGES = 2
T = TypeVar("T")


@pytest.fixture
def groups() -> Iterator[list[SharedMemoryGroup]]:
    """All ranks, each with its own view of the memory, by stage."""
    descriptor = create_shared_memory(TP, STAGES)
    file = Path(f"/proc/self/fd/{descriptor}")
    ranks = [SharedMemoryGroup(file, rank, TP, STAGES) for rank in range(TP * STAGES)]
    os.close(descriptor)
    yield ranks
    ranks[0].stop()


def run_ranks(run: Callable[[int], T], num_ranks: int = TP) -> list[T]:
    """Call `run` with each rank's number, at the same time."""
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))


@pytest.mark.parametrize("size", [1, 577, 65_536, 150_001])
def test_shared_memory_sums_in_the_order_of_ranks(
    groups: list[SharedMemoryGroup], size: int
) -> None:
    """The last size takes three rounds of slots; each call is repeated, so slots are used again."""
    generator = torch.Generator().manual_seed(3)
    calls = [torch.randn(TP, size, generator=generator) * 10.0**call for call in range(5)]

    def run(rank: int) -> list[torch.Tensor]:
        sums = [call[rank].clone() for call in calls]
        for x in sums:
            groups[rank].all_reduce_(x)
        return sums

    for found in run_ranks(run):
        for call, x in zip(calls, found, strict=True):
            assert torch.equal(x, call[0] + call[1] + call[2])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (90_001, 2)])
def test_shared_memory_gathers_any_dtype(
    groups: list[SharedMemoryGroup], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(4)
    expected = torch.randint(0, 100, (TP, *shape), generator=generator).to(dtype)
    for found in run_ranks(lambda rank: groups[rank].all_gather(expected[rank])):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_shared_memory_keeps_stages_apart(groups: list[SharedMemoryGroup]) -> None:
    """The second stage makes its calls while the first one has made none."""

    def run(rank: int) -> float:
        x = torch.full((4,), float(rank))
        groups[rank].all_reduce_(x)
        return float(x[0])

    assert run_ranks(lambda rank: run(TP + rank)) == [3.0 + 4.0 + 5.0] * TP
    assert run_ranks(run) == [0.0 + 1.0 + 2.0] * TP


def test_shared_memory_does_not_wait_for_a_rank_that_has_ended(
    groups: list[SharedMemoryGroup],
) -> None:
    """Rank 2 never comes. Ranks 0 and 1 and the other stage wait until somebody says so."""
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(groups[rank].all_reduce_, torch.ones(4)) for rank in (0, 1, TP)]
        groups[1].stop()
        for result in waiting:
            with pytest.raises(RuntimeError, match="another rank has ended"):
                result.result(20)
    with pytest.raises(RuntimeError, match="another rank has ended"):
        groups[0].all_gather(torch.ones(4))


def test_shared_memory_of_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        SharedMemoryGroup(tmp_path / "missing", 0, 2, 1)
