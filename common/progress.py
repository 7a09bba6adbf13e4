"""The interface through which long-running work reports progress.

Libraries call it; the command line implements it.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one stage at a time. Each stage has a known amount of work."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage of `total` units begins ("quantize", 30, "layers"); the previous one ends."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done. note: what is in progress now."""

    def finish(self) -> None:
        """The stage ends."""

    def message(self, text: str) -> None:
        """A sentence for the user that stays on the screen."""


class SilentProgress:
    """Reports nothing."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """See `Progress.start`."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """See `Progress.advance`."""

    def finish(self) -> None:
        """See `Progress.finish`."""

    def message(self, text: str) -> None:
        """See `Progress.message`."""
