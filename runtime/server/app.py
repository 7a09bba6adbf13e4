"""The API server's routes."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.common.version import version
from llmkit.runtime.engine.synthetic_acceptance import HEADER as SYNTHETIC_HEADER
from llmkit.runtime.server.embedding_requests import EmbeddingResponseBuilder, prepare_embeddings
from llmkit.runtime.server.engine_change_routes import add_engine_change_routes
from llmkit.runtime.server.http.api_keys import Client
from llmkit.runtime.server.http.assets import page_routes
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http.security_middleware import SecurityMiddleware
from llmkit.runtime.server.http_response import respond, respond_full
from llmkit.runtime.server.kserve.kserve_routes import add_kserve_routes
from llmkit.runtime.server.lora_adapters import LoraAdapterRoutes
from llmkit.runtime.server.ollama.ollama_routes import add_ollama_routes
from llmkit.runtime.server.openapi import openapi
from llmkit.runtime.server.prepare import (
    check_token_ids,
    encode_chat,
    prepare_chat,
    prepare_completion,
    template_variables,
    tokenize_text,
)
from llmkit.runtime.server.read_request import (
    check_model,
    check_ready,
    client_salt,
    read_request,
)
from llmkit.runtime.server.refused_routes import add_refused_routes
from llmkit.runtime.server.responses.messages_response import MessagesResponseBuilder
from llmkit.runtime.server.responses.openai_response import (
    ChatCompletionResponseBuilder,
    CompletionResponseBuilder,
)
from llmkit.runtime.server.responses.response_builder import ResponseBuilder
from llmkit.runtime.server.sagemaker.invocations import (
    add_adapter_routes,
    add_invocation_routes,
)
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest, tool_dicts
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest
from llmkit.runtime.server.schemas.ignored_fields import HEADER, IgnoredFields
from llmkit.runtime.server.schemas.messages_request import CountTokensRequest, MessagesRequest
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.schemas.tokenize_request import DetokenizeRequest, TokenizeRequest
from llmkit.runtime.server.score_routes import add_score_routes
from llmkit.runtime.server.semantic.semantic_question import HEADER as SEMANTIC_HEADER
from llmkit.runtime.server.semantic.semantic_question import semantic_question
from llmkit.runtime.server.server_metrics import CONTENT_TYPE
from llmkit.runtime.server.server_state import Phase, ServerState
from llmkit.runtime.server.stored_responses.background_runs import BACKGROUND_HEADER
from llmkit.runtime.server.stored_responses.response_routes import (
    StoredResponses,
    add_response_routes,
)
from llmkit.runtime.server.tgi.tgi_routes import add_tgi_routes, tgi_info


def build_app(state: ServerState, clients: Sequence[Client]) -> ASGIApp:
    """Return the ASGI application of one model's server.

    With `clients`, every route except the health checks and the web page needs an API key of one of
    them.
    """
    app = new_app()
    routes = ApiRoutes(state)
    for path, method, endpoint in (
        ("/v1/completions", "POST", routes.completions),
        ("/v1/chat/completions", "POST", routes.chat_completions),
        ("/v1/responses", "POST", routes.responses),
        ("/v1/embeddings", "POST", routes.embeddings),
        ("/v1/messages", "POST", routes.messages),
        ("/v1/messages/count_tokens", "POST", routes.count_tokens),
        ("/tokenize", "POST", routes.tokenize),
        ("/detokenize", "POST", routes.detokenize),
        ("/tokenizer_info", "GET", routes.tokenizer_info),
        ("/v1/models", "GET", routes.models),
        ("/v1/models/{name:path}", "GET", routes.model),
        ("/health", "GET", routes.health),
        ("/ready", "GET", routes.ready),
        ("/metrics", "GET", routes.metrics),
        ("/version", "GET", routes.version),
        ("/info", "GET", routes.info),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    options = state.options
    if options.lora_dir is not None:
        adapters = LoraAdapterRoutes(state, options.lora_dir)
        for path, adapter_endpoint in (
            ("/v1/load_lora_adapter", adapters.load),
            ("/v1/unload_lora_adapter", adapters.unload),
        ):
            app.add_api_route(path, adapter_endpoint, methods=["POST"], response_model=None)
        add_adapter_routes(app, options)
    add_response_routes(app, routes.stored_responses)
    add_score_routes(app, state)
    add_engine_change_routes(app, state)
    add_kserve_routes(app, state)
    add_ollama_routes(app, state)
    add_tgi_routes(app, state)
    add_invocation_routes(app, options, routes.ready)
    add_refused_routes(app)
    for path, page_endpoint in page_routes().items():
        app.add_api_route(path, page_endpoint, methods=["GET"], response_model=None)

    @functools.cache
    def openapi_response() -> Response:
        document = openapi(app.routes, bool(clients), options.strict_fields)
        return _json_response(document)

    async def openapi_endpoint() -> Response:
        return openapi_response()

    app.add_api_route("/openapi.json", openapi_endpoint, methods=["GET"], response_model=None)
    guarded = SecurityMiddleware(
        _with_request_tracking(app, state),
        options.host,
        clients,
        options.debug,
        options.open_metrics,
        options.allowed_hosts,
        options.allowed_origins,
    )
    rates = options.engine.acceptance_rates
    return _with_synthetic_acceptance(guarded, rates) if rates else guarded


def new_app() -> FastAPI:
    """Return an application without routes that answers errors in llmkit's JSON format."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(ApiError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(Exception, _internal_error_response)
    return app


class ApiRoutes:
    """One method per route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self.stored_responses = StoredResponses(state)

    async def health(self) -> Response:
        if self._state.phase is Phase.SLEEPING:  # it is well, and needs no restart
            return _json_response({"status": "sleeping"})
        response = await self.ready()
        if self._state.options.behind_router:
            response.headers[BACKGROUND_HEADER] = str(self._state.num_background_responses)
        return response

    async def ready(self) -> Response:
        check_ready(self._state)
        return _json_response({"status": "ok"})

    async def version(self) -> Response:
        return _json_response({"version": version()})

    async def info(self) -> Response:
        check_ready(self._state)
        return _json_response(self._state.info | tgi_info(self._state))

    async def metrics(self) -> Response:
        text = await asyncio.to_thread(self._state.metrics.render)
        return Response(text, media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        check_ready(self._state)
        entries = [self._model_entry(name) for name in self._state.models]
        return _json_response({"object": "list", "data": entries})

    async def model(self, name: str) -> Response:
        check_ready(self._state)
        check_model(self._state, name)
        return _json_response(self._model_entry(name))

    async def completions(self, request: Request) -> Response:
        body = await read_request(self._state, CompletionRequest, request)
        builder = CompletionResponseBuilder(body, self._state.text.tokenizer)
        choices = await prepare_completion(self._state, body, builder.id, client_salt(request))
        check_ready(self._state)  # again: the engine may have ended while this request was prepared
        return await respond(
            self._state, request, builder, choices, bool(body.stream), body.timeout
        )

    async def chat_completions(self, request: Request) -> Response:
        body = await read_request(self._state, ChatCompletionRequest, request)
        builder = ChatCompletionResponseBuilder(body, self._state.text.tokenizer)
        return await self._chat(request, body, builder)

    async def responses(self, request: Request) -> Response:
        body = await read_request(self._state, ResponsesRequest, request)
        if body.background:
            return await self.stored_responses.start_in_background(request, body)
        builder = await self.stored_responses.builder(request, body)
        return await self._chat(request, body.chat, builder)

    async def embeddings(self, request: Request) -> Response:
        body = await read_request(self._state, EmbeddingRequest, request)
        builder = EmbeddingResponseBuilder(body)
        choices = await prepare_embeddings(self._state, body, builder.id, client_salt(request))
        check_ready(self._state)
        return await respond_full(self._state, request, builder, choices, body.timeout)

    async def messages(self, request: Request) -> Response:
        body = await read_request(self._state, MessagesRequest, request)
        if not self._state.options.keep_client_nonce:
            body.strip_client_nonces()
        return await self._chat(request, body.chat, MessagesResponseBuilder(body.model))

    async def count_tokens(self, request: Request) -> Response:
        body = await read_request(self._state, CountTokensRequest, request)
        if not self._state.options.keep_client_nonce:
            body.strip_client_nonces()
        chat = body.chat
        token_ids, _ = await encode_chat(
            self._state,
            chat.conversation,
            chat.offered_tools,
            template_variables(self._state.text, chat),
            chat.adds_generation_prompt,
            continue_final_message=bool(chat.continue_final_message),
        )
        return _json_response({"input_tokens": len(token_ids)})

    async def tokenize(self, request: Request) -> Response:
        body = await read_request(self._state, TokenizeRequest, request)
        tokenizer = self._state.text.tokenizer
        if body.messages is None:
            add_special_tokens = body.add_special_tokens is not False
            token_ids = await tokenize_text(tokenizer, body.prompt or "", add_special_tokens)
        else:
            token_ids, _ = await encode_chat(
                self._state,
                body.conversation,
                tool_dicts(body.tools or []),
                body.chat_template_kwargs or {},
                body.adds_generation_prompt,
                continue_final_message=bool(body.continue_final_message),
                add_special_tokens=bool(body.add_special_tokens),
            )
        token_strs = None
        if body.return_token_strs:
            token_strs = [tokenizer.id_to_token(token_id) for token_id in token_ids]
        return _json_response(
            {
                "count": len(token_ids),
                "max_model_len": self._state.engine_info.max_model_len,
                "tokens": token_ids,
                "token_strs": token_strs,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = await read_request(self._state, DetokenizeRequest, request)
        check_token_ids(body.tokens, self._state.engine_info.vocab_size, "tokens")
        prompt = self._state.text.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return _json_response({"prompt": prompt})

    async def tokenizer_info(self, model: str = "") -> Response:
        """Return the tokenizer's config with the chat template, as vLLM does."""
        check_ready(self._state)
        check_model(self._state, model or self._state.model_name)
        tokenizer = self._state.text.tokenizer
        return _json_response(
            {
                "bos_token": None,
                "eos_token": None,
                "pad_token": None,
                **tokenizer.settings,
                **tokenizer.special_tokens,
                "chat_template": tokenizer.chat_template,
            }
        )

    async def _chat(
        self, request: Request, body: ChatCompletionRequest, builder: ResponseBuilder
    ) -> Response:
        state = self._state
        choices = await prepare_chat(state, body, builder.id, client_salt(request))
        check_ready(state)  # again: the engine may have ended while this request was prepared
        question = None
        if state.semantic is not None:
            question = semantic_question(
                body,
                request.headers.get(SEMANTIC_HEADER),
                choices,
                state.options.semantic_cache_requests,
                state.options.engine.adapters,
            )
        elif body.semantic_cache:
            body.ignored.add(("semantic_cache",))
        return await respond(
            state, request, builder, choices, bool(body.stream), body.timeout, question
        )

    def _model_entry(self, name: str) -> dict[str, Any]:
        state = self._state
        return {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "llmkit",
            "max_model_len": state.engine_info.max_model_len,
            "root": state.adapter_paths.get(name, state.root),
            "parent": None if name in state.base_model_names else state.model_name,
        }


def _with_request_tracking(app: ASGIApp, state: ServerState) -> ASGIApp:
    """Return `app`, which counts its requests in `state`, so that a graceful stop waits for them.

    It sets "llmkit.arrival_time" in the scope: time.perf_counter() when the request arrived.
    """

    async def tracked_app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await state.open_sockets.serve(scope, receive, send)
            return
        scope["llmkit.arrival_time"] = time.perf_counter()
        with state.track_request():
            await app(scope, receive, _with_ignored_fields(scope, send, state))

    return tracked_app


def _with_synthetic_acceptance(app: ASGIApp, rates: Sequence[float]) -> ASGIApp:
    """Return `app` with a header in each response that says that answers are not the model's."""
    header = (SYNTHETIC_HEADER.encode(), ",".join(f"{rate:g}" for rate in rates).encode())

    async def marking_app(scope: Scope, receive: Receive, send: Send) -> None:
        async def marking_send(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await app(scope, receive, marking_send)

    return marking_app


def _with_ignored_fields(scope: Scope, send: Send, state: ServerState) -> Send:
    """Return `send`, which names the ignored fields of the request in a header and in the log.

    It sets "llmkit.ignored_fields" in the scope: a list to which the route adds IgnoredFields.
    """
    of_request: list[IgnoredFields] = []
    scope["llmkit.ignored_fields"] = of_request

    async def naming_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            for ignored in of_request:
                if ignored.header:
                    value = ignored.header.encode("ascii")
                    message["headers"] = [*message["headers"], (HEADER.encode(), value)]
                    state.ignored_fields_log.record(ignored, scope["path"])
        await send(message)

    return naming_send


def _json_response(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


async def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # 404 and 405 of Starlette's router
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: {request.method} {request.scope['path']}"
        headers = dict(error.headers or {})
        if "GET" in headers.get("Allow", ""):
            headers["Allow"] += ", HEAD"  # SecurityMiddleware makes it a GET
        error = ApiError(error.status_code, message, code=code, headers=headers)
    assert isinstance(error, ApiError)
    return Response(
        error.body(request.scope["path"]), error.status, error.headers, "application/json"
    )


async def _internal_error_response(request: Request, _error: Exception) -> Response:
    # Starlette raises the error again after this response, and uvicorn logs the traceback.
    return await _error_response(
        request, ApiError(500, "The server failed; its log says why.", code="internal_error")
    )
