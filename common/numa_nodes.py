"""The NUMA nodes of this machine: CPUs with memory of their own, for example two sockets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path

NODES_FOLDER = Path("/sys/devices/system/node")
TASKS_FOLDER = Path("/proc/self/task")


def numa_nodes(folder: Path = NODES_FOLDER) -> list[frozenset[int]]:
    """The CPUs of each node that this process may use; nodes without such CPUs are left out.

    Empty where the system does not say.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    usable = os.sched_getaffinity(0)
    paths = sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[len("node") :]))
    nodes = []
    for path in paths:
        try:
            cpus = parse_cpu_list((path / "cpulist").read_text())
        except (OSError, ValueError):
            return []
        nodes.append(frozenset(cpus & usable))
    return [cpus for cpus in nodes if cpus]


def parse_cpu_list(text: str) -> set[int]:
    """`0-2,8` -> {0, 1, 2, 8}"""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def place_ranks(nodes: Sequence[frozenset[int]], num_ranks: int) -> list[frozenset[int] | None]:
    """The CPUs of each rank: those of its nodes; None on a machine with one node: all.

    Neighbouring ranks share a node where there are more ranks than nodes. With fewer, each rank has
    several nodes.
    """
    if len(nodes) < 2:
        return [None] * num_ranks
    places: list[frozenset[int] | None] = []
    for rank in range(num_ranks):
        first = rank * len(nodes) // num_ranks
        end = max(first + 1, (rank + 1) * len(nodes) // num_ranks)
        places.append(frozenset[int]().union(*nodes[first:end]))
    return places


def threads_of_rank(places: Sequence[frozenset[int] | None], num_threads: int) -> int:
    """`num_threads`, or fewer where some rank's share of its CPUs is smaller."""
    shares = [len(cpus) // places.count(cpus) for cpus in places if cpus is not None]
    return max(1, min([num_threads, *shares]))


@contextmanager
def started_threads_on(cpus: Set[int] | None) -> Iterator[None]:
    """Let threads and processes that the calling thread starts in the block run on these CPUs.

    None: on all, as before.
    """
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def move_process(cpus: Set[int]) -> None:
    """Let all threads of this process, and those that they start, run on these CPUs."""
    for task in TASKS_FOLDER.iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task.name), cpus)
