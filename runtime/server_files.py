"""The file that each running server of this user writes, so that `llmkit ps` finds it.

A server writes it when it is ready and removes it when it ends. The file of a process that has
ended otherwise is removed by whoever finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llmkit.common.terminal_text import clean_line
from llmkit.common.user_folders import make_private_folder, state_folder

_FOLDER = "servers"
# Two readings of the start of a process differ by less.
_SAME_START_S = 1.0


@dataclass(frozen=True)
class ServerEntry:
    """A server that runs on this machine, as its file describes it."""

    pid: int
    url: str  # "http://127.0.0.1:8000", or "unix:PATH"
    models: tuple[str, ...]
    ready_at: float  # Unix seconds


@contextlib.contextmanager
def server_file() -> Iterator[ServerFile]:
    """A file of this process, which is removed at the end of the context."""
    file = ServerFile(state_folder() / _FOLDER)
    try:
        yield file
    finally:
        file.remove()


class ServerFile:
    """The file that says that this process serves. A file that cannot be written is left out."""

    def __init__(self, folder: Path) -> None:
        # Several machines may share the user's home.
        self._path = folder / f"{platform.node()}-{os.getpid()}.json"

    def write(self, facts: Mapping[str, Any]) -> None:
        """Announce a server. facts: what `run_server` and `run_models` report when it is ready."""
        models = list(facts["models"]) if "models" in facts else [facts["model"]]
        document = {
            "pid": os.getpid(),
            "host": platform.node(),
            "process_started": psutil.Process().create_time(),
            "url": facts["url"],
            "models": models,
            "ready_at": time.time(),
        }
        partial = self._path.with_suffix(".partial")
        with contextlib.suppress(OSError):
            make_private_folder(self._path.parent)
            server_entries()  # removes the files of servers that were killed
            partial.write_text(json.dumps(document), encoding="utf-8")
            partial.replace(self._path)

    def remove(self) -> None:
        """Remove the file, if there is one."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def server_entries() -> list[ServerEntry]:
    """The running servers of this user on this machine, the oldest first."""
    entries = []
    for path in (state_folder() / _FOLDER).glob("*.json"):
        entry = _read(path)
        if entry is not None:
            entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.ready_at, entry.pid))


def _read(path: Path) -> ServerEntry | None:
    """The server of a file, or None. The file of a process that has ended is removed."""
    try:
        document = json.loads(path.read_bytes())
        if document["host"] != platform.node():
            return None
        pid = int(document["pid"])
        # A process id is given again to a later process.
        same_process = (
            abs(psutil.Process(pid).create_time() - float(document["process_started"]))
            < _SAME_START_S
        )
        if same_process:
            models = tuple(clean_line(str(name)) for name in document["models"])
            url = clean_line(str(document["url"]))
            return ServerEntry(pid, url, models, float(document["ready_at"]))
    except psutil.NoSuchProcess:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError, psutil.Error):
        return None  # being written, or another version's
    with contextlib.suppress(OSError):
        path.unlink()
    return None
