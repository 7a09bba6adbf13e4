"""/score and /rerank: from pairs of texts to the engine's results, and to the responses.

Three kinds of models score pairs. A cross-encoder, which has a classification head of one label,
reads both texts in one prompt. So does a model that says "no" or "yes" with its next token
(`ClassifierConfig.label_tokens`). Every other model embeds both texts, and the score is the cosine
of their embeddings.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from llmkit.checkpoint.classifier_config import Activation, ClassifierConfig
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.label_scores import activated, label_logits
from llmkit.runtime.server.pooled_requests import (
    check_input_length,
    embedding_pooling,
    input_token_ids,
    pooled_choices,
    pooled_usage,
)
from llmkit.runtime.server.prepare import encode_chat, in_thread_if_long, prompt_limit
from llmkit.runtime.server.schemas.score_request import (
    PairFields,
    RerankRequest,
    ScoreRequest,
)
from llmkit.runtime.server.server_state import ServerState

_Request = TypeVar("_Request", ScoreRequest, RerankRequest)
_MIN_NORM = 1e-12  # prevents a division by zero for a vector of zeros
_SCORE_ACTIVATIONS: dict[str, Activation] = {
    "classify": "classify",
    "sigmoid": "sigmoid",
    "none": "none",
}


@dataclass(frozen=True)
class ScoredPairs:
    """The choices that the engine computes for pairs of texts, and how they become scores."""

    choices: list[Choice]
    scores: Callable[[Sequence[Delta]], list[float]]  # one for each pair, from the answers


async def prepare_pairs(
    state: ServerState,
    request: PairFields,
    request_id: str,
    cache_salt: str,
    first: Sequence[str],
    second: Sequence[str],
    param: str,
) -> ScoredPairs:
    """Prepare the scores of the pairs of `first` and `second`, which have the same length.

    param: the request's field that `second` comes from.
    Raises ApiError 400 for a model that scores no pairs and for a request that can never run.
    """
    classifier = state.text.classifier
    if len(classifier.labels) > 1:
        message = (
            f"The model has {len(classifier.labels)} labels; a score needs a model with one. Use "
            "/classify."
        )
        raise ApiError(400, message, code="unsupported", param="model")
    first = await _shortened(state, first, request.max_tokens_per_query)
    second = await _shortened(state, second, request.max_tokens_per_doc)
    if not classifier.all_labels:
        return await _embedded_pairs(state, request, request_id, cache_salt, first, second, param)
    return await _joined_pairs(state, request, request_id, cache_salt, first, second, param)


async def _embedded_pairs(
    state: ServerState,
    request: PairFields,
    request_id: str,
    cache_salt: str,
    first: Sequence[str],
    second: Sequence[str],
    param: str,
) -> ScoredPairs:
    """Scores that are the cosines of embeddings. Equal texts are embedded once."""
    pooling = embedding_pooling(state)
    texts = list(dict.fromkeys([*first, *second]))
    state.check_queue_capacity(len(texts), param=param)
    prompts = await input_token_ids(state, texts, True, request.truncate_prompt_tokens)
    choices = pooled_choices(state, request, request_id, cache_salt, prompts, pooling, param)
    place = {text: index for index, text in enumerate(texts)}

    def scores(answers: Sequence[Delta]) -> list[float]:
        import numpy as np  # the API process starts without numpy

        vectors = np.stack([_vector(answer) for answer in answers])
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _MIN_NORM)
        rows = [place[text] for text in first]
        columns = [place[text] for text in second]
        cosines: list[float] = np.einsum("ij,ij->i", vectors[rows], vectors[columns]).tolist()
        return cosines

    return ScoredPairs(choices, scores)


async def _joined_pairs(
    state: ServerState,
    request: PairFields,
    request_id: str,
    cache_salt: str,
    first: Sequence[str],
    second: Sequence[str],
    param: str,
) -> ScoredPairs:
    """Scores of a model that reads both texts of a pair in one prompt."""
    classifier = state.text.classifier
    activation: Activation = "none"
    if request.applies_activation:
        activation = _score_activation(classifier)
    state.check_queue_capacity(len(second), param=param)
    prompts = await _pair_token_ids(state, request, first, second, param)
    choices = pooled_choices(state, request, request_id, cache_salt, prompts, "classify", param)

    def scores(answers: Sequence[Delta]) -> list[float]:
        found = []
        for answer in answers:
            logits = label_logits(answer)
            logit = logits[0] if classifier.labels else logits[1] - logits[0]  # "yes" over "no"
            found += activated([logit], activation)
        return found

    return ScoredPairs(choices, scores)


def _score_activation(classifier: ClassifierConfig) -> Activation:
    """How the logit of a pair becomes its score. Raises ApiError 400 where that is not known."""
    if classifier.label_tokens:
        return "sigmoid"
    activation = _SCORE_ACTIVATIONS.get(classifier.score_activation)
    if activation is None:
        message = (
            "The checkpoint makes scores in a way that llmkit does not know "
            f"({classifier.score_activation}); send use_activation: false for its logits."
        )
        raise ApiError(400, message, code="unsupported", param="use_activation")
    return activation


async def _pair_token_ids(
    state: ServerState,
    request: PairFields,
    first: Sequence[str],
    second: Sequence[str],
    param: str,
) -> list[list[int]]:
    """The prompts of pairs: by the chat template if it is one for pairs, else both texts.

    The first one that is too long ends it: one long query could be tokenized for each document.
    """
    tokenizer = state.text.tokenizer
    max_tokens = prompt_limit(state, request.truncate_prompt_tokens, num_new_tokens=0)
    pairs = list(zip(first, second, strict=True))
    prompts = []
    if is_score_template(tokenizer.template(tools=False)):
        for query, document in pairs:
            messages = [
                {"role": "query", "content": query},
                {"role": "document", "content": document},
            ]
            token_ids, _ = await encode_chat(
                state, messages, [], request.template_variables, max_prompt_tokens=max_tokens
            )
            check_input_length(state, token_ids, param)
            prompts.append(token_ids)
        return prompts
    for name in ("instruction", "chat_template_kwargs"):
        if getattr(request, name):
            request.ignored.add((name,))

    def tokenize() -> list[list[int]]:
        for token_ids in tokenizer.encode_pairs(pairs, max_tokens):
            check_input_length(state, token_ids, param)
            prompts.append(token_ids)
        return prompts

    return await in_thread_if_long(sum(map(len, (*first, *second))), tokenize)


def is_score_template(template: str | None) -> bool:
    """Whether a chat template has places for the roles `query` and `document`, as vLLM's have."""
    return template is not None and all(
        re.search(f"""["']{role}["']""", template) for role in ("query", "document")
    )


async def _shortened(
    state: ServerState, texts: Sequence[str], max_tokens: int | None
) -> Sequence[str]:
    """The first `max_tokens` tokens of each text; None or 0: all."""
    if not max_tokens:
        return texts
    tokenizer = state.text.tokenizer

    def shortened(text: str) -> str:
        token_ids = tokenizer.encode(text, False, max_tokens, keep="first")
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    different = list(dict.fromkeys(texts))
    found = await in_thread_if_long(
        sum(map(len, different)), lambda: {text: shortened(text) for text in different}
    )
    return [found[text] for text in texts]


def _vector(answer: Delta) -> Any:
    """The embedding of an answer, float32 [H]."""
    import numpy as np  # the API process starts without numpy

    assert answer.embedding is not None
    return np.frombuffer(answer.embedding, np.float32)


class _PairsResponseBuilder(Generic[_Request]):
    """The base of builders of responses from scored pairs, which cannot be streamed."""

    def __init__(self, request_id: str, request: _Request, pairs: ScoredPairs) -> None:
        self.id = request_id
        self._request: _Request = request
        self._pairs = pairs


class ScoreResponseBuilder(_PairsResponseBuilder[ScoreRequest]):
    """Builds responses of /score."""

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        scores = self._pairs.scores(answers)
        document = {
            "id": self.id,
            "object": "list",
            "created": int(time.time()),
            "model": self._request.model,
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(scores)
            ],
            "usage": pooled_usage(choices),
        }
        return msgspec.json.encode(document)


class RerankResponseBuilder(_PairsResponseBuilder[RerankRequest]):
    """Builds responses of /rerank: the best documents first."""

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        request = self._request
        scores = self._pairs.scores(answers)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable for ties
        texts = request.texts
        results = []
        for index in order[: request.top_n or None]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if request.return_documents is not False:
                result["document"] = {"text": texts[index]}
            results.append(result)
        document = {
            "id": self.id,
            "model": request.model,
            "usage": pooled_usage(choices),
            "results": results,
        }
        return msgspec.json.encode(document)
