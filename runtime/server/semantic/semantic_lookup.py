"""Looks a question up in the semantic cache, and keeps its answer there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.server.semantic.question_embedder import QuestionEmbedder
from llmkit.runtime.server.semantic.semantic_cache import Hit, SemanticCache, Vector
from llmkit.runtime.server.semantic.semantic_question import SemanticQuestion

BODY_FIELD = "semantic_cache"  # of a response in full


class SemanticLookup:
    """What the cache has for one question."""

    def __init__(
        self, cache: SemanticCache, question: SemanticQuestion, vector: Vector, hit: Hit | None
    ) -> None:
        self.hit = hit
        self._cache = cache
        self._question = question
        self._vector = vector

    @property
    def similarity(self) -> str:
        """The similarity of the question whose answer this is, in four digits; "" without one."""
        return "" if self.hit is None else f"{self.hit.similarity:.4f}"

    def put(self, outputs: Sequence[EngineOutput]) -> None:
        """Keep the answer that was computed."""
        question = self._question
        self._cache.put(question.namespace, question.text, self._vector, outputs)

    def marked(self, body: bytes) -> bytes:
        """A response in full; one from the cache says so in a field of its own."""
        if self.hit is None:
            return body
        document: dict[str, Any] = msgspec.json.decode(body)
        document[BODY_FIELD] = {"similarity": round(self.hit.similarity, 4)}
        return msgspec.json.encode(document)


class SemanticAnswers:
    """The semantic cache of a server, and the model that embeds its questions."""

    def __init__(self, cache: SemanticCache, embedder: QuestionEmbedder) -> None:
        self.cache = cache
        self._embedder = embedder

    def emptied(self) -> SemanticAnswers:
        """The same without an answer: other weights give others. Running requests fill this one."""
        return SemanticAnswers(self.cache.emptied(), self._embedder)

    async def look_up(self, question: SemanticQuestion) -> SemanticLookup | None:
        """Embed the question and find an answer to it; None where there is no embedding."""
        vector = await self._embedder.embed(question)
        if vector is None:
            return None
        hit = self.cache.find(question.namespace, question.text, vector)
        return SemanticLookup(self.cache, question, vector, hit)
