"""The routes that score texts: /score, /rerank and /classify, at the paths that vLLM has."""

from __future__ import annotations

import uuid

from fastapi import FastAPI, Request, Response

from llmkit.runtime.server.classify_requests import (
    ClassifyResponseBuilder,
    prepare_classification,
)
from llmkit.runtime.server.http_response import respond_full
from llmkit.runtime.server.read_request import check_ready, client_salt, read_request
from llmkit.runtime.server.schemas.score_request import (
    ClassifyRequest,
    RerankRequest,
    ScoreRequest,
)
from llmkit.runtime.server.score_requests import (
    RerankResponseBuilder,
    ScoreResponseBuilder,
    prepare_pairs,
)
from llmkit.runtime.server.server_state import ServerState

_SCORE = ("/score", "/v1/score")
_RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")
_CLASSIFY = ("/classify",)
SCORE_PATHS = (*_SCORE, *_RERANK, *_CLASSIFY)


def add_score_routes(app: FastAPI, state: ServerState) -> None:
    """Add the routes to `app`."""
    routes = ScoreRoutes(state)
    for paths, endpoint in (
        (_SCORE, routes.score),
        (_RERANK, routes.rerank),
        (_CLASSIFY, routes.classify),
    ):
        for path in paths:
            app.add_api_route(path, endpoint, methods=["POST"], response_model=None)


class ScoreRoutes:
    """One method per route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def score(self, request: Request) -> Response:
        state = self._state
        body = await read_request(state, ScoreRequest, request)
        request_id = _new_id("score")
        first, second = body.pairs
        salt = client_salt(request)
        pairs = await prepare_pairs(state, body, request_id, salt, first, second, body.second_side)
        check_ready(state)  # again: the engine may have ended while this request was prepared
        builder = ScoreResponseBuilder(request_id, body, pairs)
        return await respond_full(state, request, builder, pairs.choices, body.timeout)

    async def rerank(self, request: Request) -> Response:
        state = self._state
        body = await read_request(state, RerankRequest, request)
        request_id = _new_id("rerank")
        documents = body.texts
        queries = [body.query] * len(documents)
        salt = client_salt(request)
        pairs = await prepare_pairs(state, body, request_id, salt, queries, documents, "documents")
        check_ready(state)
        builder = RerankResponseBuilder(request_id, body, pairs)
        return await respond_full(state, request, builder, pairs.choices, body.timeout)

    async def classify(self, request: Request) -> Response:
        state = self._state
        body = await read_request(state, ClassifyRequest, request)
        request_id = _new_id("classify")
        choices = await prepare_classification(state, body, request_id, client_salt(request))
        check_ready(state)
        builder = ClassifyResponseBuilder(request_id, body, state)
        return await respond_full(state, request, builder, choices, body.timeout)


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
