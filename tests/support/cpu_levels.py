"""Tests at each level of the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llmkit.kernels.cpu import cpu_kernels


@contextmanager
def computing_at(level: str) -> Iterator[None]:
    """Compute at a level of the compiled kernels, if there are any, or without them ("torch")."""
    library = cpu_kernels.library
    if library is None:
        yield
        return
    if level == "torch":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_kernels, "library", None)
            yield
        return
    library.set_level(level)
    try:
        yield
    finally:
        library.set_level(cpu_kernels.levels()[-1])
