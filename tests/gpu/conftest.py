"""The smoke tests: only those of smoke.txt, where the part `ceilings` of `make gpu` wants them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of smoke.txt. A name that no test has any more selects nothing."""
    if os.environ.get("LLMKIT_SMOKE_TESTS"):
        lines = Path(__file__).with_name("smoke.txt").read_text(encoding="utf-8").splitlines()
        items[:] = [item for item in items if item.nodeid in set(lines)]
