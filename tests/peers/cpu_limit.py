"""A CPU limit for a server of a benchmark: a cgroup of its own with a quota, as containers have.

Both versions of cgroups are used: `cpu.max` of v2, and `cpu.cfs_quota_us` of v1. A machine that
lets no group be made gives an error: there is no other limit that servers could read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
PERIOD_US = 100_000
REMOVE_TIMEOUT_S = 10.0
# Moves the shell to the group, and replaces it by the server, which keeps the process id.
JOIN_AND_RUN = 'echo $$ > "$0" && exec "$@"'


class CpuLimit:
    """A cgroup whose processes together use at most so many CPUs."""

    def __init__(
        self, cpus: float, name: str, root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP
    ) -> None:
        """Make the group. Exits with the reasons where the machine does not allow it.

        name: of the group, which must not exist.
        """
        self.cpus = cpus
        reasons = []
        for parent, version in _parents(root, membership):
            self.folder = parent / name
            try:
                self.folder.mkdir()
            except OSError as error:
                reasons.append(f"{error.strerror} ({error.filename})")
                continue
            try:
                self._set_quota(version)
                break
            except OSError as error:
                reasons.append(f"{error.strerror} ({error.filename})")
                self.folder.rmdir()
        else:
            why = "; ".join(reasons) or f"no group below {root} has the cpu controller"
            raise SystemExit(f"--cpus {cpus:g}: no cgroup with a CPU quota can be made: {why}")

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs another one inside the group."""
        return ["/bin/sh", "-c", JOIN_AND_RUN, str(self.folder / "cgroup.procs"), *words]

    def statistics(self) -> dict[str, int]:
        """The group's cpu.stat: how many periods there were, how many were throttled, and times."""
        lines = (self.folder / "cpu.stat").read_text().splitlines()
        return {name: int(value) for name, value in map(str.split, lines)}

    def remove(self) -> None:
        """Remove the group, whose processes have ended."""
        deadline_s = time.monotonic() + REMOVE_TIMEOUT_S
        while True:
            try:
                self.folder.rmdir()
                return
            except OSError:  # the system has not yet cleared away the last process
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)

    def _set_quota(self, version: int) -> None:
        quota_us = round(self.cpus * PERIOD_US)
        if version == 2:
            (self.folder / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        else:
            (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self.folder / "cpu.cfs_quota_us").write_text(str(quota_us))


def _parents(root: Path, membership: Path) -> Iterator[tuple[Path, int]]:
    """The groups in which one with a quota may be possible, and the version of each.

    They are this process's own groups and those around them, the nearest first.
    """
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        inner = Path(path.lstrip("/"))
        if controllers == "":
            tops, version = [root, root / "unified"], 2
        elif "cpu" in controllers.split(","):
            tops, version = [root / controllers], 1
        else:
            continue
        for top in tops:
            for group in (top / inner, *(top / outer for outer in inner.parents)):
                if _has_cpu_controller(group, version):
                    yield group, version


def _has_cpu_controller(group: Path, version: int) -> bool:
    """Whether groups inside this one have CPU quotas."""
    if version == 1:
        return (group / "cpu.cfs_quota_us").exists()
    try:
        return "cpu" in (group / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False
