"""NUMA nodes as the system describes them, and the CPUs of ranks on them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmkit.common.numa_nodes import (
    move_process,
    numa_nodes,
    parse_cpu_list,
    place_ranks,
    started_threads_on,
    threads_of_rank,
)

LEFT = frozenset(range(4))
RIGHT = frozenset(range(4, 8))


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,8\n", {0, 1, 2, 8}), ("5\n", {5}), ("\n", set()), ("1,3", {1, 3})]
)
def test_numa_cpu_list_is_parsed(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


def test_numa_nodes_are_those_with_usable_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 1 has memory alone, and the process may not use node 10's CPUs."""
    for name, cpus in (("node0", "0-3"), ("node1", ""), ("node2", "4-7"), ("node10", "8-9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(f"{cpus}\n")
    (tmp_path / "online").write_text("0-2,10\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 4, 5})
    assert numa_nodes(tmp_path) == [{1, 2, 3}, {4, 5}]
    (tmp_path / "node2" / "cpulist").write_text("?\n")
    assert numa_nodes(tmp_path) == []
    assert numa_nodes(tmp_path / "missing") == []


def test_numa_ranks_are_spread_over_nodes() -> None:
    assert place_ranks([], 2) == place_ranks([LEFT], 2) == [None, None]
    assert place_ranks([LEFT, RIGHT], 2) == [LEFT, RIGHT]
    assert place_ranks([LEFT, RIGHT], 3) == [LEFT, LEFT, RIGHT]
    assert place_ranks([LEFT, RIGHT], 4) == [LEFT, LEFT, RIGHT, RIGHT]
    four = [frozenset({cpu}) for cpu in range(4)]
    assert place_ranks(four, 2) == [{0, 1}, {2, 3}]
    assert place_ranks(four, 3) == [{0}, {1}, {2, 3}]


def test_numa_ranks_have_no_more_threads_than_cpus() -> None:
    assert threads_of_rank([None, None], 5) == 5
    assert threads_of_rank([None] * 3, 0) == 1
    assert threads_of_rank([LEFT, RIGHT], 4) == 4
    assert threads_of_rank([LEFT, RIGHT], 6) == 4
    assert threads_of_rank([LEFT, LEFT, RIGHT], 3) == 2, "two ranks share the first node's CPUs"


def test_numa_affinity_is_inherited_in_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 9})
    monkeypatch.setattr(os, "sched_setaffinity", lambda *call: calls.append(call))
    with started_threads_on(None):
        assert not calls
    with started_threads_on(LEFT):
        assert calls == [(0, LEFT)]
    assert calls == [(0, LEFT), (0, {0, 1, 9})]


def test_numa_move_takes_all_threads_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    def move(thread: int, cpus: object) -> None:
        moved.append(thread)
        if len(moved) == 1:
            raise ProcessLookupError

    monkeypatch.setattr(os, "sched_setaffinity", move)
    move_process(LEFT)
    assert os.getpid() in moved
