"""A program in a terminal of its own, as a user runs it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

CTRL_C = "\x03"
CTRL_D = "\x04"
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]|\r")


class Terminal:
    """The user's end of a program's terminal."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.raw = ""  # all that the program has written
        self._master = master
        self._seen = 0  # characters of `text` before the last match

    @property
    def text(self) -> str:
        """What was written, without the sequences of colours and cursor movements."""
        return _SEQUENCE.sub("", self.raw)

    def write(self, text: str) -> None:
        """Type a text; "\\n" is Enter."""
        os.write(self._master, text.replace("\n", "\r").encode())

    def wait_for(self, text: str, timeout_s: float = 120) -> str:
        """Wait until the program has written a text after that of the last call.

        Returns what it wrote up to there.
        """
        deadline = time.monotonic() + timeout_s
        while text not in self.text[self._seen :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.text[self._seen :]!r}"
            assert self._read(), f"it ended without {text!r}: {self.text[self._seen :]!r}"
        start = self._seen
        self._seen = self.text.index(text, start) + len(text)
        return self.text[start : self._seen]

    def wait_end(self) -> int:
        """Wait until the program ends. Returns its exit code."""
        while self._read():
            pass
        return self.process.wait(60)

    def interrupt_prompt(self, text: str) -> None:
        """Press Ctrl-C at a prompt, and wait until the program has written a text.

        CPython misses a signal in the moment after it has shown the prompt and before it waits for
        a key. The next signal is noticed, so Ctrl-C is pressed once more when nothing comes.
        """
        for _ in range(5):
            self.write(CTRL_C)
            with suppress(TimeoutError):
                self._read(20)
                break
        self.wait_for(text)

    def _read(self, timeout_s: float = 120) -> bool:
        """Read what has come. False at the end of the program."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            raise TimeoutError(f"nothing came for {timeout_s} s after {self.text!r}")
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # EIO: the program has ended
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)


@contextmanager
def llmkit_terminal(
    arguments: Sequence[str], variables: Mapping[str, str], columns: int = 80
) -> Iterator[Terminal]:
    """Run `llmkit ARGUMENTS` in a terminal. It is killed at the end of the context."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C then sends SIGINT

    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit.cli.start", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", **variables},
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)
