"""Takes the place of recorded decode steps for a model whose steps cannot be recorded."""

from __future__ import annotations

from typing import Any, NoReturn


class NoGraphRunner:
    """Runs no step: every step runs operator by operator."""

    samples_tokens = False
    sampler = None

    def should_run(self, num_rows: int, num_tokens: int) -> bool:
        """Whether `run` shall run a decode step of this size."""
        return False

    def run(self, *_: Any) -> NoReturn:
        """Is never called."""
        raise AssertionError("no step is recorded")
