"""What an interrupted run has written: one JSON line per tensor, appended only after the tensor is on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # file, tensor


class Journal:
    """Belongs to one identity. `entries` are the tensors known to be on disk and their SHA-256."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._first = json.dumps({"identity": identity}, sort_keys=True)
        self.entries: dict[Key, str] = {}

    def load(self) -> bool:
        """Read what an earlier run of the same identity left; False when there is nothing of it."""
        try:
            text = self._path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return False
        lines = text.splitlines(keepends=True)
        if not lines or lines[0] != self._first + "\n":
            return False
        kept = len(lines[0].encode())
        for line in lines[1:]:
            entry = _entry(line)
            if entry is None:  # the machine stopped while this line was written
                break
            self.entries[entry[0]] = entry[1]
            kept += len(line.encode())
        os.truncate(self._path, kept)
        return True

    def start(self) -> None:
        """Begin an empty journal in place of any other."""
        self.entries.clear()
        self._write("w", self._first + "\n")

    def append(self, entries: dict[Key, str]) -> None:
        """Record tensors that are on disk."""
        self._write("a", "".join(json.dumps([*key, digest]) + "\n" for key, digest in entries.items()))
        self.entries |= entries

    def remove(self) -> None:
        """Forget everything, on disk too."""
        self._path.unlink(missing_ok=True)

    def _write(self, mode: str, text: str) -> None:
        with self._path.open(mode, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _entry(line: str) -> tuple[Key, str] | None:
    try:
        file, name, digest = json.loads(line)
    except ValueError:
        return None
    return ((file, name), digest) if line.endswith("\n") else None
