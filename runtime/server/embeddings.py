"""Vectors of texts: what is asked of the engine for /v1/embeddings, and the answer."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from llmkit.runtime.engine.types import Pooling
from llmkit.runtime.server.bodies.embeddings import EmbeddingsBody
from llmkit.runtime.server.engines.messages import Add
from llmkit.runtime.server.generation import Choice, Delta
from llmkit.runtime.server.http.errors import ApiError, invalid
from llmkit.runtime.server.prepare import check_ids, tokenized
from llmkit.runtime.server.state import State

POOLINGS: dict[str, Pooling] = {"last": "last", "mean": "mean"}


async def prepare_embeddings(state: State, body: EmbeddingsBody, request_id: str, salt: str) -> list[Choice]:
    """A choice for each input, whose answer is a vector. ApiError 400 for what can never be run."""
    given, text, facts = body.inputs, state.text, state.facts
    state.check_room(len(given), param="input")
    pooling = _pooling(state)
    _check_dimensions(state, body.dimensions)
    adapter = None if body.model in state.names else body.model
    choices = []
    for index, one in enumerate(given):
        tokens = await tokenized(text.tokenizer, one) if isinstance(one, str) else one
        check_ids(tokens, facts.vocab_size, "input")
        if len(tokens) > facts.max_model_len:
            message = f"The context of {facts.max_model_len} tokens is too short for an input of {len(tokens)} tokens."
            raise invalid("input", message, "context_length_exceeded")
        request = Add(
            f"{request_id}-{index}",
            tokens,
            max_tokens=1,
            temperature=0.0,
            priority=body.priority or 0,
            salt=salt,
            adapter=adapter,
            pooling=pooling,
        )
        choices.append(Choice(request, index, text.tokenizer.stream()))
    return choices


def _pooling(state: State) -> Pooling:
    asked = state.options.pooling or state.text.embeddings.pooling
    if asked not in POOLINGS:
        message = (
            f"The checkpoint makes embeddings in a way that llmkit does not know ({asked}); serve it with --pooling "
            "last or --pooling mean."
        )
        raise ApiError(400, message, code="unsupported", param="model")
    return POOLINGS[asked]


def _check_dimensions(state: State, dimensions: int | None) -> None:
    facts = state.text.embeddings
    if dimensions in (None, facts.size) or dimensions in facts.sizes:
        return
    if facts.any_size and dimensions is not None and dimensions < facts.size:
        return
    known = ", ".join(map(str, sorted({*facts.sizes, facts.size})))
    message = f"dimensions ({dimensions}) is not supported: this model's vectors have {known} numbers."
    if not facts.sizes and not facts.any_size:
        message += " Its config does not say that they may be cut (is_matryoshka)."
    raise invalid("dimensions", message, "unsupported")


class EmbeddingsShape:
    """Answers of /v1/embeddings; they come whole."""

    def __init__(self, body: EmbeddingsBody) -> None:
        self.id = f"embd-{uuid.uuid4().hex}"
        self._body = body

    def whole(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        tokens = sum(len(choice.request.prompt) for choice in choices)
        cached = sum(choice.cached_tokens for choice in choices)
        document = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": answer.index, "embedding": self._vector(answer)} for answer in answers
            ],
            "model": self._body.model,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }
        return msgspec.json.encode(document)

    def _vector(self, answer: Delta) -> Any:
        """Cut, then of length 1; float32 in base64, or numbers."""
        import numpy as np

        assert answer.embedding is not None
        vector = np.frombuffer(answer.embedding, np.float32)[: self._body.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        if self._body.encoding_format == "base64":
            return base64.b64encode(vector.tobytes()).decode()
        return vector.tolist()
