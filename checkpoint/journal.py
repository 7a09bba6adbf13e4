"""The journal of a writer: one JSON line per tensor, appended after the tensor is on disk.

An interrupted run continues from it.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # file, tensor


@dataclass
class RunClock:
    """The time of a run, and of the interrupted runs that it continues."""

    earlier_s: float = 0.0  # of earlier runs; set by `Journal.load`
    started: float = field(default_factory=time.perf_counter)

    @property
    def total_s(self) -> float:
        """The time of all runs until now."""
        return self.earlier_s + time.perf_counter() - self.started


class Journal:
    """The tensors on disk and their SHA-256, for a run with one `identity`; and its time."""

    def __init__(self, path: Path, identity: dict[str, Any], clock: RunClock) -> None:
        self._path = path
        self._first_line = json.dumps({"identity": identity}, sort_keys=True)
        self._clock = clock
        self.entries: dict[Key, str] = {}

    def changed_settings(self) -> list[str]:
        """The entries of the identity in which the journal of an earlier run differs."""
        old: dict[str, Any] = {}
        with suppress(OSError, ValueError, KeyError, TypeError), self._path.open() as file:
            old = dict(json.loads(file.readline())["identity"])
        # The identity as JSON gives it back: lists in the place of tuples.
        new = json.loads(self._first_line)["identity"]
        return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))

    def load(self) -> bool:
        """Read the journal of an earlier run; False when there is none with the same identity."""
        try:
            text = self._path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return False
        lines = text.splitlines(keepends=True)
        if not lines or lines[0] != self._first_line + "\n":
            return False
        valid_bytes = len(lines[0].encode())
        for line in lines[1:]:
            seconds = _parse_seconds(line)
            if seconds is None:
                entry = _parse_line(line)
                if entry is None:  # the machine stopped while this line was written
                    break
                self.entries[entry[0]] = entry[1]
            else:
                self._clock.earlier_s = max(self._clock.earlier_s, seconds)
            valid_bytes += len(line.encode())
        os.truncate(self._path, valid_bytes)
        return True

    def start(self) -> None:
        """Create an empty journal; an old one is replaced."""
        self.entries.clear()
        self._write("w", self._first_line + "\n")

    def append(self, entries: dict[Key, str]) -> None:
        """Record tensors that are on disk, and the time until now."""
        lines = [json.dumps([*key, digest]) + "\n" for key, digest in entries.items()]
        lines.append(json.dumps({"seconds": round(self._clock.total_s, 3)}) + "\n")
        self._write("a", "".join(lines))
        self.entries |= entries

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)

    def _write(self, mode: str, text: str) -> None:
        with self._path.open(mode, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _parse_seconds(line: str) -> float | None:
    """The time in a complete line `{"seconds": 12.5}`; None for any other line."""
    try:
        return float(json.loads(line)["seconds"]) if line.endswith("\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def _parse_line(line: str) -> tuple[Key, str] | None:
    try:
        file, name, digest = json.loads(line)
    except ValueError:
        return None
    return ((file, name), digest) if line.endswith("\n") else None
