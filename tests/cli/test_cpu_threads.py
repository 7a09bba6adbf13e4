"""The threads that compute on a CPU: affinity, cgroup quotas, OMP_NUM_THREADS and --threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.common import cpu_threads
from llmkit.common.cpu_threads import ThreadCount, cgroup_quota, choose_threads


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def quota(tmp_path: Path, root: Path, membership: str) -> float | None:
    write(tmp_path / "self", membership)
    return cgroup_quota(tmp_path / "self", root)


def test_cgroup_v2_quota_is_the_smallest_of_nested_groups(tmp_path: Path, root: Path) -> None:
    assert quota(tmp_path, root, "0::/a/b/c\n") is None  # no such groups
    write(root / "a/b/c/cpu.max", "max 100000\n")
    assert quota(tmp_path, root, "0::/a/b/c\n") is None
    write(root / "a/cpu.max", "150000 100000\n")
    assert quota(tmp_path, root, "0::/a/b/c\n") == 1.5
    write(root / "a/b/cpu.max", "25000 50000\n")
    assert quota(tmp_path, root, "0::/a/b/c\n") == 0.5
    assert quota(tmp_path, root, "0::/a\n") == 1.5
    assert quota(tmp_path, root, "0::/other\n") is None


def test_cgroup_v2_quota_of_a_container_is_in_the_top_folder(tmp_path: Path, root: Path) -> None:
    write(root / "cpu.max", "300000 100000\n")
    assert quota(tmp_path, root, "0::/\n") == 3
    assert quota(tmp_path, root, "0::/docker/0123\n") == 3  # the host's path


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_cgroup_v1_quota(tmp_path: Path, root: Path, folder: str) -> None:
    membership = "12:memory:/m\n4:cpu,cpuacct:/jobs/one\n1:name=systemd:/x\n"
    write(root / folder / "cpu.cfs_quota_us", "-1\n")
    write(root / folder / "cpu.cfs_period_us", "100000\n")
    assert quota(tmp_path, root, membership) is None
    write(root / folder / "jobs/one/cpu.cfs_quota_us", "220000\n")
    write(root / folder / "jobs/one/cpu.cfs_period_us", "100000\n")
    assert quota(tmp_path, root, membership) == pytest.approx(2.2)


def test_cgroup_quota_without_cgroups_or_with_odd_files(tmp_path: Path, root: Path) -> None:
    assert cgroup_quota(tmp_path / "absent", root) is None
    write(root / "cpu.max", "100000\n")
    assert quota(tmp_path, root, "0::/\n") is None
    write(root / "cpu.max", "100000 0\n")
    assert quota(tmp_path, root, "0::/\n") is None


@pytest.mark.parametrize(
    ("cpu_quota", "omp_threads", "expected"),
    [
        (None, None, ThreadCount(8, "the CPU affinity")),
        (1.5, None, ThreadCount(2, "the cgroup's quota of 1.5 CPUs")),
        (0.1, None, ThreadCount(1, "the cgroup's quota of 0.1 CPUs")),
        (64.0, None, ThreadCount(8, "the CPU affinity")),
        (6.0, "3,2", ThreadCount(3, "OMP_NUM_THREADS")),
        (6.0, "20", ThreadCount(6, "the cgroup's quota of 6 CPUs")),
        (None, "many", ThreadCount(8, "the CPU affinity")),
        (None, "0", ThreadCount(8, "the CPU affinity")),
    ],
)
def test_auto_threads_are_the_smallest_limit(
    monkeypatch: pytest.MonkeyPatch,
    cpu_quota: float | None,
    omp_threads: str | None,
    expected: ThreadCount,
) -> None:
    monkeypatch.setattr(cpu_threads, "_affinity_cpus", lambda: 8)
    monkeypatch.setattr(cpu_threads, "cgroup_quota", lambda: cpu_quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_threads)
    assert choose_threads() == expected
    assert choose_threads(12) == ThreadCount(12, "--threads")
