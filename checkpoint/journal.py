"""The journal of a writer: one JSON line per tensor, appended after the tensor is on disk.

An interrupted run continues from it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # file, tensor


class Journal:
    """The tensors on disk and their SHA-256, for a run with one `identity`."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._first_line = json.dumps({"identity": identity}, sort_keys=True)
        self.entries: dict[Key, str] = {}

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
            entry = _parse_line(line)
            if entry is None:  # the machine stopped while this line was written
                break
            self.entries[entry[0]] = entry[1]
            valid_bytes += len(line.encode())
        os.truncate(self._path, valid_bytes)
        return True

    def start(self) -> None:
        """Create an empty journal; an old one is replaced."""
        self.entries.clear()
        self._write("w", self._first_line + "\n")

    def append(self, entries: dict[Key, str]) -> None:
        """Record tensors that are on disk."""
        lines = [json.dumps([*key, digest]) + "\n" for key, digest in entries.items()]
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


def _parse_line(line: str) -> tuple[Key, str] | None:
    try:
        file, name, digest = json.loads(line)
    except ValueError:
        return None
    return ((file, name), digest) if line.endswith("\n") else None
