"""The routes of Ollama's API on one model's server."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from llmkit.common.version import version
from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.embedding_requests import prepare_embeddings
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.http_response import respond, respond_full
from llmkit.runtime.server.ollama.context_window import (
    context_length,
    limited,
    prepare_ollama_chat,
)
from llmkit.runtime.server.ollama.model_facts import FOREVER, ModelFacts, untagged
from llmkit.runtime.server.ollama.ollama_options import OllamaOptions
from llmkit.runtime.server.ollama.ollama_request import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaRequest,
    OllamaShowRequest,
)
from llmkit.runtime.server.ollama.ollama_response import (
    OllamaChatResponseBuilder,
    OllamaEmbedResponseBuilder,
    OllamaGenerateResponseBuilder,
    empty_response,
)
from llmkit.runtime.server.prepare import prepare_chat, prepare_completion
from llmkit.runtime.server.read_request import check_model, check_ready, client_salt, read_body
from llmkit.runtime.server.schemas.base_request import BaseRequest, RequestT
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest
from llmkit.runtime.server.server_state import ServerState, TextResources

OllamaRequestT = TypeVar("OllamaRequestT", bound=OllamaRequest)
# The version of Ollama whose API this is. Clients refuse to work with one that is too old.
API_VERSION = "0.32.15"
# Ollama does not look at the content type, and its documentation sends JSON with curl's default.
# Requests of other sites' pages are refused by their Origin, whatever their content type is.
MEDIA_TYPES = frozenset({"application/json", "application/x-www-form-urlencoded", ""})


def add_ollama_routes(app: FastAPI, state: ServerState) -> None:
    """Add the routes to `app`."""
    routes = OllamaRoutes(state)
    for path, method, endpoint in (
        ("/api/chat", "POST", routes.chat),
        ("/api/generate", "POST", routes.generate),
        ("/api/embed", "POST", routes.embed),
        ("/api/embeddings", "POST", routes.embeddings),
        ("/api/show", "POST", routes.show),
        ("/api/tags", "GET", routes.tags),
        ("/api/ps", "GET", routes.ps),
        ("/api/version", "GET", ollama_version),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)


async def ollama_version() -> Response:
    """The version of the API, and llmkit's own."""
    return _json_response({"version": API_VERSION, "llmkit": version()})


class OllamaRoutes:
    """One method per route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._facts: ModelFacts | None = None  # read when they are asked for first
        self._facts_of: TextResources | None = None  # whose facts they are

    async def tags(self) -> Response:
        facts = await self._model_facts()
        state = self._state
        names = state.base_model_names
        entries = [facts.tag(name) for name in names]
        entries += [facts.tag(name, parent=state.model_name) for name in state.adapter_paths]
        return _json_response({"models": entries})

    async def ps(self) -> Response:
        facts = await self._model_facts()
        info = self._state.engine_info
        entry = facts.running(self._state.model_name, info.device, info.max_model_len, FOREVER)
        return _json_response({"models": [entry]})

    async def show(self, request: Request) -> Response:
        body = await self._read(OllamaShowRequest, request)
        facts = await self._model_facts()
        return _json_response(facts.show(body.model, self._state.engine_info.max_model_len))

    async def chat(self, request: Request) -> Response:
        body = await self._read_generation(OllamaChatRequest, request)
        if body.is_empty:
            return self._loaded(request, body.model)
        body.chat.model = self._known_name(body.model)
        builder = OllamaChatResponseBuilder(
            body.model, self._state.text.tokenizer, body.num_logprobs, _arrival_time(request)
        )
        choices = await prepare_ollama_chat(self._state, body, builder.id, client_salt(request))
        self._name_think(body)
        return await self._respond(request, body, builder, choices)

    async def generate(self, request: Request) -> Response:
        body = await self._read_generation(OllamaGenerateRequest, request)
        if body.is_empty:
            return self._loaded(request, body.model)
        builder = OllamaGenerateResponseBuilder(
            body.model,
            self._state.text.tokenizer,
            body.num_logprobs,
            _arrival_time(request),
            returns_context=not body.raw,
        )
        choices = limited(
            self._state,
            await self._generate_choices(body, builder.id, client_salt(request)),
            body.given_options,
            "prompt",
            body.context or (),
            truncate=body.truncate is not False,
        )
        return await self._respond(request, body, builder, choices)

    async def embed(self, request: Request) -> Response:
        body = await self._read(OllamaEmbedRequest, request)
        self._settle_options(body, body.options, body.keep_alive)
        if not body.input:
            return self._loaded(request, body.model)
        embedding = body.embedding
        if body.truncate is not False:
            limit = context_length(self._state, body.options or OllamaOptions())
            embedding.truncate_prompt_tokens = limit
        builder = OllamaEmbedResponseBuilder(
            body.model, embedding.dimensions, _arrival_time(request)
        )
        return await self._respond_embedding(request, body.model, embedding, builder)

    async def embeddings(self, request: Request) -> Response:
        body = await self._read(OllamaEmbeddingsRequest, request)
        self._settle_options(body, body.options, body.keep_alive)
        if not body.prompt:
            return self._loaded(request, body.model)
        builder = OllamaEmbedResponseBuilder(body.model, None, _arrival_time(request), single=True)
        return await self._respond_embedding(request, body.model, body.embedding, builder)

    async def _generate_choices(
        self, body: OllamaGenerateRequest, request_id: str, salt: str
    ) -> list[Choice]:
        has_template = self._state.text.tokenizer.template(tools=False) is not None
        if has_template and not body.raw:
            body.chat.model = self._known_name(body.model)
            choices = await prepare_chat(self._state, body.chat, request_id, salt)
            self._name_think(body)
            return choices
        if body.system:
            message = "The model has no chat template, so there is no place for a system message."
            raise ApiError(400, message, code="no_chat_template", param="system")
        body.completion.model = self._known_name(body.model)
        return await prepare_completion(self._state, body.completion, request_id, salt)

    async def _respond(
        self,
        request: Request,
        body: OllamaRequest,
        builder: OllamaChatResponseBuilder,
        choices: list[Choice],
    ) -> Response:
        check_ready(self._state)  # again: the engine may have ended while this request was prepared
        return await respond(self._state, request, builder, choices, body.streams)

    async def _respond_embedding(
        self,
        request: Request,
        model: str,
        embedding: EmbeddingRequest,
        builder: OllamaEmbedResponseBuilder,
    ) -> Response:
        embedding.model = self._known_name(model)
        choices = await prepare_embeddings(self._state, embedding, builder.id, client_salt(request))
        check_ready(self._state)
        return await respond_full(self._state, request, builder, choices)

    def _loaded(self, request: Request, model: str) -> Response:
        """The response to a request that only loads the model, which is loaded already."""
        return _json_response(empty_response(request.scope["path"], model, "load"))

    async def _read(self, schema: type[RequestT], request: Request) -> RequestT:
        body = await read_body(self._state, schema, request, MEDIA_TYPES)
        if isinstance(body, OllamaShowRequest) and body.name is not None:
            body.model = body.name
        check_model(self._state, self._known_name(body.model))
        return body

    async def _read_generation(
        self, schema: type[OllamaRequestT], request: Request
    ) -> OllamaRequestT:
        body = await self._read(schema, request)
        self._settle_options(body, body.options, body.keep_alive)
        if body.thinks and not self._state.text.dialect.has_reasoning:
            raise invalid("think", f"{body.model!r} does not support thinking.", "unsupported")
        return body

    def _name_think(self, body: OllamaChatRequest | OllamaGenerateRequest) -> None:
        """Add `think` to the ignored fields if the model's chat template cannot turn it off."""
        has_effect = "enable_thinking" not in body.chat.ignored.names()
        if not has_effect and self._state.text.dialect.has_reasoning:
            body.ignored.add(("think",))

    def _settle_options(
        self, body: BaseRequest, options: OllamaOptions | None, keep_alive: Any
    ) -> None:
        """Add what has no effect on this server to the ignored fields."""
        # Behind a router `keep_alive` has an effect, there.
        if keep_alive is not None and not self._state.options.behind_router:
            body.ignored.add(("keep_alive",))
        num_ctx = None if options is None else options.num_ctx
        if num_ctx is not None and num_ctx > self._state.engine_info.max_model_len:
            body.ignored.add(("options", "num_ctx"))

    def _known_name(self, model: str) -> str:
        return untagged(model, self._state.models)

    async def _model_facts(self) -> ModelFacts:
        check_ready(self._state)
        text = self._state.text
        if self._facts is None or self._facts_of is not text:  # other weights were loaded
            self._facts = await asyncio.to_thread(self._read_facts, text)
            self._facts_of = text
        return self._facts

    def _read_facts(self, text: TextResources) -> ModelFacts:
        assert text.files is not None
        info = self._state.engine_info
        return ModelFacts.read(
            text.files, text.tokenizer, text.dialect, info.card, info.dtype, vars(text.defaults)
        )


def _arrival_time(request: Request) -> float:
    arrival_time: float = request.scope["llmkit.arrival_time"]
    return arrival_time


def _json_response(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
