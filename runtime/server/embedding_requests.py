"""/v1/embeddings: from a request to the engine's pooled hidden states, and to the response."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.pooled_requests import (
    embedding_pooling,
    input_token_ids,
    pooled_choices,
    pooled_usage,
)
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest
from llmkit.runtime.server.server_state import ServerState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MIN_NORM = 1e-12  # prevents a division by zero for a vector of zeros


async def prepare_embeddings(
    state: ServerState, request: EmbeddingRequest, request_id: str, cache_salt: str
) -> list[Choice]:
    """Return a choice for each input. Raises ApiError 400 for a request that can never run."""
    state.require_text_model()
    inputs = request.inputs
    state.check_queue_capacity(len(inputs), param="input")
    pooling = embedding_pooling(state)
    _check_dimensions(state, request.dimensions)
    prompts = await input_token_ids(
        state, inputs, request.add_special_tokens is not False, request.truncate_prompt_tokens
    )
    return pooled_choices(state, request, request_id, cache_salt, prompts, pooling, "input")


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
        document = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": answer.index, "embedding": self._vector(answer)}
                for answer in answers
            ],
            "model": self._request.model,
            "usage": pooled_usage(choices),
        }
        return msgspec.json.encode(document)

    def _vector(self, answer: Delta) -> str | list[float]:
        """The vector: float32 in base64, or numbers."""
        vector = embedding_vector(answer, self._request.dimensions)
        if self._request.encoding_format == "base64":
            return base64.b64encode(vector.tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers


def embedding_vector(answer: Delta, dimensions: int | None) -> NDArray[np.float32]:
    """Return the vector of an answer, cut to `dimensions` and normalized."""
    import numpy as np  # the API process starts without numpy

    assert answer.embedding is not None
    vector = np.frombuffer(answer.embedding, np.float32)[:dimensions]
    return vector / max(float(np.linalg.norm(vector)), _MIN_NORM)
