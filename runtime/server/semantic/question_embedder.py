"""Embeds questions for the semantic cache, by the served model or by a small one beside it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence

import numpy as np

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import Pooling, SamplingParams
from llmkit.runtime.server.engines.engine_messages import Refused
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.semantic.semantic_cache import Vector
from llmkit.runtime.server.semantic.semantic_question import SemanticQuestion

TIMEOUT_S = 30.0  # without an embedding by then, the answer is computed


class QuestionEmbedder:
    """Embeds texts with the model of `engines`.

    max_tokens: of a text; the rest is left out. has_adapters: whether the model has the adapters
    of the served one.
    """

    def __init__(
        self,
        engines: Replicas,
        tokenizer: Tokenizer,
        pooling: Pooling,
        max_tokens: int,
        has_adapters: bool,
    ) -> None:
        self._engines = engines
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._max_tokens = max_tokens
        self._has_adapters = has_adapters

    async def embed(self, question: SemanticQuestion) -> Vector | None:
        """Return the embedding, of length 1; None where the engine does not compute one."""
        request = EngineRequest(
            f"semantic-{uuid.uuid4().hex}",
            self._tokenizer.encode(question.text, True, self._max_tokens, keep="first"),
            SamplingParams(max_tokens=1, temperature=0.0),
            cache_salt=question.cache_salt,
            adapter=question.adapter if self._has_adapters else None,
            pooling=self._pooling,
        )
        receiver = _EmbeddingReceiver()
        self._engines.add(request, receiver)
        try:
            data = await asyncio.wait_for(receiver.embedding, TIMEOUT_S)
        except TimeoutError:
            data = None
        finally:
            self._engines.abort(request.request_id)
        if data is None:
            return None
        vector = np.frombuffer(data, np.float32)
        norm = float(np.linalg.norm(vector))
        if not 0 < norm < float("inf"):
            return None
        unit: Vector = vector / np.float32(norm)
        return unit


class _EmbeddingReceiver:
    """The `OutputReceiver` of one embedding; `embedding` resolves to None where there is none."""

    def __init__(self) -> None:
        self.embedding: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def on_outputs(
        self, outputs: Sequence[EngineOutput], queue_times_s: Mapping[str, float]
    ) -> None:
        self._resolve(outputs[0].embedding)

    def on_refused(self, refused: Refused) -> None:
        self._resolve(None)

    def on_engine_dead(self) -> None:
        self._resolve(None)

    def _resolve(self, data: bytes | None) -> None:
        if not self.embedding.done():
            self.embedding.set_result(data)
