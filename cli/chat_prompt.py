"""Reads a user's messages from the terminal: several lines, line editing, a history."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from llmkit.common.user_folders import make_private_folder

try:
    import readline  # gives input() line editing
except ImportError:  # Python was built without it
    readline = None  # type: ignore[assignment]

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'
MAX_HISTORY = 1000  # lines


class Prompt:
    """The prompt of a terminal. history: the file with the lines of earlier chats; None: none."""

    def __init__(self, history: Path | None) -> None:
        self._history = history if readline is not None else None
        # input() edits lines only where both are a terminal.
        self._edits = sys.stdout.isatty()
        if self._history is not None:
            try:
                _open_history(self._history)
            except OSError:  # a home that cannot be written: a chat without a history
                self._history = None

    def read(self) -> str:
        """The next message. Raises EOFError at the end of the input, KeyboardInterrupt on Ctrl-C.

        A line that ends with a backslash goes on in the next line. Lines between two triple quotes
        are one message.
        """
        line = self._line(PROMPT)
        if line.lstrip().startswith(QUOTES):
            return self._quoted(line.lstrip().removeprefix(QUOTES))
        lines = []
        while line.endswith("\\"):
            lines.append(line.removesuffix("\\"))
            line = self._line(CONTINUED)
        return "\n".join([*lines, line])

    def _quoted(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(QUOTES):
            lines.append(line)
            line = self._line(CONTINUED)
        lines.append(line.rstrip().removesuffix(QUOTES))
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        if self._edits:
            line = input(prompt)
        else:
            sys.stderr.write(prompt)
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            line = line.removesuffix("\n")
        # A terminal's bytes that are not UTF-8 arrive as surrogates.
        line = line.encode("utf-8", "replace").decode()
        if self._history is not None and line.strip():
            with contextlib.suppress(OSError):  # the disk is full
                _add_to_history(self._history)
        return line


def _add_to_history(path: Path) -> None:
    """Write the last line. Appending keeps the lines of a chat in another terminal."""
    if hasattr(readline, "append_history_file"):
        readline.append_history_file(1, path)
    else:  # libedit
        readline.write_history_file(path)


def _open_history(path: Path) -> None:
    """Read the history into readline; create a private file where there is none."""
    make_private_folder(path.parent)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    readline.set_history_length(MAX_HISTORY)
    readline.read_history_file(path)
