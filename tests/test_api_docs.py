"""docs/api.md against the code: no field is taken that it does not name, and no test is named that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmkit.runtime.server.bodies.base import Body
from llmkit.runtime.server.bodies.chat import ChatBody
from llmkit.runtime.server.bodies.completions import CompletionBody
from llmkit.runtime.server.bodies.embeddings import EmbeddingsBody
from llmkit.runtime.server.bodies.messages import MessagesBody
from llmkit.runtime.server.bodies.responses import ResponsesBody
from llmkit.runtime.server.bodies.tokens import DetokenizeBody, TokenizeBody
from llmkit.runtime.server.kserve.tensors import INPUTS, OUTPUTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
COLUMNS: dict[type[Body], int] = {CompletionBody: 1, ChatBody: 2, MessagesBody: 3, ResponsesBody: 4}


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_field_that_is_taken_has_a_cell_with_a_test(kind: type[Body]) -> None:
    named: set[str] = set()
    for row in rows("Generating"):
        cell, names = row[COLUMNS[kind]], set(re.findall(r"`(\w+)`", row[0]))
        if cell not in ("", "no", "no effect"):
            named |= names | set(re.findall(r"`(\w+)`", cell))
            assert row[5].startswith("test_")
            assert cell != "✓" or names <= kind.model_fields.keys() | {"strict"}  # of a tool
        elif cell == "no effect":
            assert names <= kind.no_effect | {"user"}
        elif cell == "no":
            assert not names & kind.model_fields.keys()
    assert kind.model_fields.keys() - {"user"} <= named, "fields that the page does not tell of"


@pytest.mark.parametrize("kind", [TokenizeBody, DetokenizeBody])
def test_fields_of_the_token_endpoints(kind: type[Body]) -> None:
    path = "`/tokenize`" if kind is TokenizeBody else "`/detokenize`"
    named = {name for row in rows("Tokens") if row[0] == path for name in re.findall(r"`(\w+)`", row[1])}
    assert kind.model_fields.keys() <= named


def test_fields_of_embeddings_and_tensors() -> None:
    named = {name for row in rows("Embeddings") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(EmbeddingsBody.model_fields)
    section = PAGE.split("## Open Inference Protocol\n")[1].split("\n## ")[0]
    assert set(INPUTS) | set(OUTPUTS) <= set(re.findall(r"`(\w+)`", section))


def test_every_test_that_is_named_exists() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"\btest_\w+", PAGE))
    assert len(named) > 40
    assert {name for name in named if f"def {name}(" not in sources} == set()
