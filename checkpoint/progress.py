"""How long-running work reports where it is. The command line implements it; libraries only call it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of one stage at a time, each with a known amount of work."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage of `total` units begins ("quantize", 30, "layers"); the one before it is over."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done; `note` says what is being worked on now."""

    def finish(self) -> None:
        """The stage is over."""

    def message(self, text: str) -> None:
        """A sentence the user should see and keep."""


class SilentProgress:
    """Says nothing."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """See `Progress.start`."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """See `Progress.advance`."""

    def finish(self) -> None:
        """See `Progress.finish`."""

    def message(self, text: str) -> None:
        """See `Progress.message`."""
