"""docs/security.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_threat_model_names_exists() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    assert len(named) > 25
    assert {name for name in named if f"def {name}(" not in sources} == set()
