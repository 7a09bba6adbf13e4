"""docs/api.md lists every field that a request may have, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmkit.runtime.server.kserve.kserve_tensors import INPUTS, OUTPUTS
from llmkit.runtime.server.ollama.ollama_options import OllamaOptions
from llmkit.runtime.server.ollama.ollama_request import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from llmkit.runtime.server.schemas.base_request import BaseRequest, StrictModel
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest
from llmkit.runtime.server.schemas.messages_request import MessagesRequest
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.schemas.score_request import (
    ClassifyRequest,
    RerankRequest,
    ScoreRequest,
)
from llmkit.runtime.server.schemas.tokenize_request import DetokenizeRequest, TokenizeRequest
from llmkit.runtime.server.tgi.tgi_request import (
    TgiCompatRequest,
    TgiGenerateRequest,
    TgiParameters,
    TgiStreamRequest,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
COLUMNS: dict[type[BaseRequest], int] = {
    CompletionRequest: 1,
    ChatCompletionRequest: 2,
    MessagesRequest: 3,
    ResponsesRequest: 4,
}


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:3] == "| `"
    ]


@pytest.mark.parametrize("kind", COLUMNS)
def test_api_docs_list_a_test_for_every_request_field(kind: type[BaseRequest]) -> None:
    named: set[str] = set()
    for row in rows("Text generation"):
        cell = row[COLUMNS[kind]]
        names = set(re.findall(r"`(\w+)`", row[0]))
        if cell not in ("", "no", "no effect"):
            named |= names | set(re.findall(r"`(\w+)`", cell))
            assert row[5].startswith("test_")
            assert cell != "✓" or names <= kind.model_fields.keys() | {"strict"}  # of a tool
        elif cell == "no effect":
            assert names <= kind.no_effect_fields | {"user"}
        elif cell == "no":
            assert not names & kind.model_fields.keys()
            assert names <= kind.neutral_values.keys() | kind.no_effect_fields
    assert kind.model_fields.keys() - {"user"} <= named, "fields that the page does not tell of"


@pytest.mark.parametrize("kind", [TokenizeRequest, DetokenizeRequest])
def test_api_docs_list_the_fields_of_the_token_endpoints(kind: type[BaseRequest]) -> None:
    path = "`/tokenize`" if kind is TokenizeRequest else "`/detokenize`"
    named = {
        name for row in rows("Tokens") if row[0] == path for name in re.findall(r"`(\w+)`", row[1])
    }
    assert kind.model_fields.keys() <= named


def test_api_docs_list_the_fields_of_embeddings_and_tensors() -> None:
    named = {name for row in rows("Embeddings") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(EmbeddingRequest.model_fields)
    section = PAGE.split("## Open Inference Protocol\n")[1].split("\n## ")[0]
    assert set(INPUTS) | set(OUTPUTS) <= set(re.findall(r"`(\w+)`", section))


@pytest.mark.parametrize("kind", [RerankRequest, ScoreRequest, ClassifyRequest])
def test_api_docs_list_the_fields_of_scores(kind: type[BaseRequest]) -> None:
    section = "Rerank, score and classify"
    named = {name for row in rows(section) for name in re.findall(r"`(\w+)`", row[0])}
    assert kind.model_fields.keys() <= named


@pytest.mark.parametrize(
    ("heading", "kinds"),
    [
        (
            "Ollama",
            (
                OllamaChatRequest,
                OllamaGenerateRequest,
                OllamaEmbedRequest,
                OllamaEmbeddingsRequest,
                OllamaShowRequest,
                OllamaOptions,
            ),
        ),
        ("TGI", (TgiGenerateRequest, TgiStreamRequest, TgiCompatRequest, TgiParameters)),
    ],
)
def test_api_docs_list_a_test_for_every_field_of_other_apis(
    heading: str, kinds: tuple[type[StrictModel], ...]
) -> None:
    named: set[str] = set()
    for row in rows(heading):
        named |= {name for cell in row[:2] for name in re.findall(r"`(\w+)`", cell)}
        assert row[2].startswith("test_") or row[1] == "below"
    for kind in kinds:
        shown = {name for name in kind.neutral_values if not name.startswith("_")}
        assert kind.model_fields.keys() | shown <= named


def test_api_docs_name_tests_that_exist() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    named = set(re.findall(r"\btest_\w+", PAGE))
    assert len(named) > 40
    assert {name for name in named if f"def {name}(" not in sources} == set()
