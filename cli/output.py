"""Printing: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

from llmkit.common.formatting import bytes_text, count_text, finite
from llmkit.common.progress import Progress

# Columns of a table that is not printed on a terminal.
PLAIN_WIDTH = 120


class Output:
    """Prints a command's result, its messages and its progress."""

    def __init__(self, as_json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug
        self.has_result = False  # set by `result`
        self._progress: Progress | None = None

    @cached_property
    def console(self) -> Console:
        """Stdout, for results as text."""
        return _console(stderr=False)

    @cached_property
    def notes(self) -> Console:
        """Stderr, for everything that is not the result."""
        return _console(stderr=True)

    def result(self, document: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Prints the result: `document` as one JSON document with `--json`, else what `show`
        prints.
        """
        self.has_result = True
        if self.as_json:
            write_json(document)
        else:
            show(self.console)

    def message(self, text: str) -> None:
        """A line for the user that is not the result; `--quiet` drops it."""
        if not self.quiet:
            self.notes.print(text, highlight=False, markup=False, soft_wrap=True)

    def progress(self) -> Progress:
        """Bars on a terminal, one line a stage elsewhere, nothing with `--quiet`."""
        from llmkit.cli.progress_bars import Bars, StageLines
        from llmkit.common.progress import SilentProgress

        if self.quiet:
            self._progress = SilentProgress()
        else:
            terminal = self.notes.is_terminal
            self._progress = Bars(self.notes) if terminal else StageLines(self.message)
        return self._progress

    def close(self) -> None:
        """Closes a bar that an error left open, so that the terminal shows its cursor again."""
        if self._progress is not None:
            self._progress.finish()


def write_json(document: Mapping[str, Any]) -> None:
    """Prints one JSON document on stdout."""
    text = json.dumps(finite(document), indent=2, ensure_ascii=False, default=str) + "\n"
    # A file's name may have bytes that are not UTF-8. JSON's own escapes stand for them.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())
    sys.stdout.flush()


def _console(stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, width=max(console.width, PLAIN_WIDTH))


def seconds_text(seconds: float) -> str:
    """A duration for people: 45 s, 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def carried_text(carried: Mapping[str, Any]) -> str:
    """The tensors that do not run: "12 tensors, 1.5 MiB (vision_tower, multi_modal_projector)"."""
    number = count_text(carried["tensors"], "tensors")
    parts = ", ".join(carried["prefixes"])
    return f"{number}, {bytes_text(carried['bytes'])} ({parts})"
