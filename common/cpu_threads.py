"""How many threads compute on a CPU: what this process may use, not what the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ThreadCount:
    """A number of threads, and what decided it."""

    count: int
    why: str


def choose_threads(wanted: int | None = None) -> ThreadCount:
    """The threads of `--threads`; for None (auto), as many as this process has CPUs.

    These are the CPUs of its affinity mask, at most the CPU quota of its cgroups, rounded up, and
    at most OMP_NUM_THREADS.
    """
    if wanted is not None:
        return ThreadCount(wanted, "--threads")
    num_cpus = _affinity_cpus()
    limits = [ThreadCount(num_cpus, "the CPU affinity")]
    quota = cgroup_quota()
    if quota is not None:
        count = max(1, math.ceil(quota))
        limits.append(ThreadCount(count, f"the cgroup's quota of {quota:.3g} CPUs"))
    # The variable may have a number for each level of nested loops: "4,2".
    omp_threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if omp_threads.isdigit() and int(omp_threads):
        limits.append(ThreadCount(int(omp_threads), "OMP_NUM_THREADS"))
    return min(limits, key=lambda limit: limit.count)


def cgroup_quota(membership: Path = CGROUP_MEMBERSHIP, root: Path = CGROUP_ROOT) -> float | None:
    """The CPUs that the cgroups (v1 or v2) of this process may use; None: as many as there are.

    A group's limit holds for all groups inside it, so the smallest one counts.
    """
    quotas = (_group_quota(group) for group in _cgroups(membership, root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _cgroups(membership: Path, root: Path) -> Iterator[Path]:
    """The folders of this process's CPU cgroups and of the groups around them.

    In a container, the path may be the host's, whose folders are not there; the top folder is then
    the container's own.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [root / controllers, root / "cpu"]
        else:
            continue
        inner = Path(path.lstrip("/"))
        for top in tops:
            yield top / inner
            yield from (top / parent for parent in inner.parents)


def _group_quota(group: Path) -> float | None:
    """The CPUs of one cgroup's own limit; None: it has none."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return cpus if cpus > 0 else None  # v1 has -1 for no limit


def _affinity_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
