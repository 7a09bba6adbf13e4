"""/v1/embeddings: from a request to the engine's pooled hidden states, and to the response."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence

import msgspec

from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import Pooling, SamplingParams
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.prepare import (
    check_token_ids,
    combined_salt,
    prompt_limit,
    tokenize_text,
)
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest
from llmkit.runtime.server.server_state import ServerState

POOLINGS: dict[str, Pooling] = {"last": "last", "mean": "mean"}
_MIN_NORM = 1e-12  # prevents a division by zero for a vector of zeros


async def prepare_embeddings(
    state: ServerState, request: EmbeddingRequest, request_id: str, cache_salt: str
) -> list[Choice]:
    """Return a choice for each input. Raises ApiError 400 for a request that can never run."""
    inputs = request.inputs
    tokenizer = state.text.tokenizer
    engine_info = state.engine_info
    state.check_queue_capacity(len(inputs), param="input")
    pooling = _pooling(state)
    _check_dimensions(state, request.dimensions)
    adapter = None if request.model in state.base_model_names else request.model
    max_tokens = prompt_limit(state, request.truncate_prompt_tokens, num_new_tokens=0)
    cache_salt = combined_salt(cache_salt, request.cache_salt)
    choices = []
    for index, text in enumerate(inputs):
        if isinstance(text, str):
            token_ids = await tokenize_text(
                tokenizer, text, request.add_special_tokens is not False, max_tokens, keep="first"
            )
        else:
            token_ids = text if max_tokens is None else text[:max_tokens]
        check_token_ids(token_ids, engine_info.vocab_size, "input")
        if len(token_ids) > engine_info.max_model_len:
            message = (
                f"The context of {engine_info.max_model_len} tokens is too short for an input of "
                f"{len(token_ids)} tokens."
            )
            raise invalid("input", message, "context_length_exceeded")
        engine_request = EngineRequest(
            f"{request_id}-{index}",
            token_ids,
            SamplingParams(max_tokens=1, temperature=0.0),
            priority=request.priority or 0,
            cache_salt=cache_salt,
            adapter=adapter,
            pooling=pooling,
        )
        choices.append(Choice(engine_request, index, tokenizer.stream()))
    return choices


def _pooling(state: ServerState) -> Pooling:
    name = state.options.pooling or state.text.embeddings.pooling
    if name not in POOLINGS:
        message = (
            f"The checkpoint makes embeddings in a way that llmkit does not know ({name}); serve "
            "it with --pooling last or --pooling mean."
        )
        raise ApiError(400, message, code="unsupported", param="model")
    return POOLINGS[name]


def _check_dimensions(state: ServerState, dimensions: int | None) -> None:
    """Raise ApiError for a size of vectors that the model was not trained for."""
    config = state.text.embeddings
    if dimensions in (None, config.size) or dimensions in config.sizes:
        return
    if config.any_size and dimensions is not None and dimensions < config.size:
        return
    sizes = ", ".join(map(str, sorted({*config.sizes, config.size})))
    message = (
        f"dimensions ({dimensions}) is not supported: this model's vectors have {sizes} numbers."
    )
    if not config.sizes and not config.any_size:
        message += " Its config does not say that they may be cut (is_matryoshka)."
    raise invalid("dimensions", message, "unsupported")


class EmbeddingResponseBuilder:
    """Builds responses of /v1/embeddings, which cannot be streamed."""

    def __init__(self, request: EmbeddingRequest) -> None:
        self.id = f"embd-{uuid.uuid4().hex}"
        self._request = request

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        tokens = sum(len(choice.request.prompt_token_ids) for choice in choices)
        cached = sum(choice.cached_tokens for choice in choices)
        document = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": answer.index, "embedding": self._vector(answer)}
                for answer in answers
            ],
            "model": self._request.model,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }
        return msgspec.json.encode(document)

    def _vector(self, answer: Delta) -> str | list[float]:
        """The vector, cut to `dimensions` and normalized: float32 in base64, or numbers."""
        import numpy as np  # the API process starts without numpy

        assert answer.embedding is not None
        vector = np.frombuffer(answer.embedding, np.float32)[: self._request.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), _MIN_NORM)
        if self._request.encoding_format == "base64":
            return base64.b64encode(vector.tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers
