"""The routes."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.checkpoint.version import version
from llmkit.runtime.server.adapters import Adapters
from llmkit.runtime.server.answer import answer, answer_whole
from llmkit.runtime.server.bodies.base import Kind, parse
from llmkit.runtime.server.bodies.chat import ChatBody, conversation, described
from llmkit.runtime.server.bodies.completions import CompletionBody
from llmkit.runtime.server.bodies.embeddings import EmbeddingsBody
from llmkit.runtime.server.bodies.messages import CountBody, MessagesBody
from llmkit.runtime.server.bodies.responses import ResponsesBody
from llmkit.runtime.server.bodies.tokens import DetokenizeBody, TokenizeBody
from llmkit.runtime.server.embeddings import EmbeddingsShape, prepare_embeddings
from llmkit.runtime.server.http.assets import page_routes
from llmkit.runtime.server.http.body import read_json_body
from llmkit.runtime.server.http.errors import ApiError, unknown_model
from llmkit.runtime.server.http.guard import Guard
from llmkit.runtime.server.http.keys import Client
from llmkit.runtime.server.kserve.routes import add_routes as add_kserve_routes
from llmkit.runtime.server.metrics import CONTENT_TYPE
from llmkit.runtime.server.openapi import openapi
from llmkit.runtime.server.prepare import check_ids, encode_chat, prepare_chat, prepare_completion, tokenized
from llmkit.runtime.server.shapes.messages import MessagesShape
from llmkit.runtime.server.shapes.openai import ChatShape, CompletionShape, Shape
from llmkit.runtime.server.shapes.responses import ResponsesShape
from llmkit.runtime.server.state import State


def build_app(state: State, api_keys: tuple[Client, ...]) -> ASGIApp:
    """The ASGI application on `state`; with `api_keys` every route but health needs one of them."""
    app = new_app()
    routes = Routes(state)
    for path, method, endpoint in (
        ("/v1/completions", "POST", routes.completions),
        ("/v1/chat/completions", "POST", routes.chat_completions),
        ("/v1/responses", "POST", routes.responses),
        ("/v1/embeddings", "POST", routes.embeddings),
        ("/v1/messages", "POST", routes.messages),
        ("/v1/messages/count_tokens", "POST", routes.count_tokens),
        ("/tokenize", "POST", routes.tokenize),
        ("/detokenize", "POST", routes.detokenize),
        ("/v1/models", "GET", routes.models),
        ("/v1/models/{name:path}", "GET", routes.model),
        ("/health", "GET", routes.health),
        ("/ready", "GET", routes.health),
        ("/metrics", "GET", routes.metrics),
        ("/version", "GET", routes.version),
        ("/info", "GET", routes.info),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    if state.options.lora_dir is not None:
        adapters = Adapters(state, state.options.lora_dir)
        app.add_api_route("/v1/load_lora_adapter", adapters.load, methods=["POST"], response_model=None)
        app.add_api_route("/v1/unload_lora_adapter", adapters.unload, methods=["POST"], response_model=None)
    add_kserve_routes(app, state)
    for path, page in page_routes().items():
        app.add_api_route(path, page, methods=["GET"], response_model=None)

    document = functools.cache(lambda: _json(openapi(app.routes, bool(api_keys))))

    async def description() -> Response:
        return document()

    app.add_api_route("/openapi.json", description, methods=["GET"], response_model=None)
    options = state.options
    return Guard(_counted(app, state), options.host, api_keys, options.debug, options.open_metrics)


def new_app() -> FastAPI:
    """An application without routes, whose errors are ours."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_bug)
    return app


class Routes:
    """One method per route."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def health(self) -> Response:
        self._check_ready()
        return _json({"status": "ok"})

    async def version(self) -> Response:
        return _json({"version": version()})

    async def info(self) -> Response:
        self._check_ready()
        return _json(self._state.info)

    async def metrics(self) -> Response:
        return Response(await asyncio.to_thread(self._state.metrics.render), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        self._check_ready()
        return _json({"object": "list", "data": [self._model(name) for name in self._state.models]})

    async def model(self, name: str) -> Response:
        self._check_ready()
        self._check_model(name)
        return _json(self._model(name))

    async def completions(self, request: Request) -> Response:
        body = await self._body(CompletionBody, request)
        shape = CompletionShape(body, self._state.text.tokenizer)
        choices = await prepare_completion(self._state, body, shape.id, _salt(request))
        self._check_ready()  # reading and tokenizing took a while
        return await answer(self._state, request, shape, choices, bool(body.stream), body.timeout)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._body(ChatBody, request)
        return await self._chat(request, body, ChatShape(body, self._state.text.tokenizer))

    async def responses(self, request: Request) -> Response:
        body = await self._body(ResponsesBody, request)
        return await self._chat(request, body.chat, ResponsesShape(body))

    async def embeddings(self, request: Request) -> Response:
        body = await self._body(EmbeddingsBody, request)
        shape = EmbeddingsShape(body)
        choices = await prepare_embeddings(self._state, body, shape.id, _salt(request))
        self._check_ready()
        return await answer_whole(self._state, request, shape, choices, body.timeout)

    async def messages(self, request: Request) -> Response:
        body = await self._body(MessagesBody, request)
        return await self._chat(request, body.chat, MessagesShape(body.model))

    async def count_tokens(self, request: Request) -> Response:
        chat = (await self._body(CountBody, request)).chat
        tokens, _ = await encode_chat(self._state, chat.conversation, chat.offered_tools, {})
        return _json({"input_tokens": len(tokens)})

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(TokenizeBody, request)
        tokenizer = self._state.text.tokenizer
        if body.messages is None:
            tokens = await tokenized(tokenizer, body.prompt or "", body.add_special_tokens is not False)
        else:
            tools, variables = described(body.tools or []), body.chat_template_kwargs or {}
            begin = body.add_generation_prompt is not False
            tokens, _ = await encode_chat(self._state, conversation(body.messages), tools, variables, begin)
        names = [tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
        most = self._state.facts.max_model_len
        return _json({"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(DetokenizeBody, request)
        check_ids(body.tokens, self._state.facts.vocab_size, "tokens")
        return _json({"prompt": self._state.text.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def _body(self, kind: type[Kind], request: Request) -> Kind:
        """The body of a request for a model of this server."""
        self._check_ready()
        options = self._state.options
        body = parse(kind, await read_json_body(request, options.max_body_bytes, options.body_timeout))
        if body.model:  # /tokenize needs none
            self._check_model(body.model)
        return body

    async def _chat(self, request: Request, body: ChatBody, shape: Shape) -> Response:
        choices = await prepare_chat(self._state, body, shape.id, _salt(request))
        self._check_ready()  # reading and tokenizing took a while
        return await answer(self._state, request, shape, choices, bool(body.stream), body.timeout)

    def _check_ready(self) -> None:
        if (error := self._state.unready) is not None:
            raise error

    def _check_model(self, name: str) -> None:
        if name not in self._state.models:
            raise unknown_model(name, self._state.models)

    def _model(self, name: str) -> dict[str, Any]:
        state = self._state
        return {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "llmkit",
            "max_model_len": state.facts.max_model_len,
            "root": state.roots.get(name, state.options.model),
            "parent": None if name in state.names else state.model_name,
        }


def _salt(request: Request) -> str:
    """What keeps this client's cached prefixes from others (see Guard)."""
    salt: str = request.scope["llmkit.salt"]
    return salt


def _counted(app: ASGIApp, state: State) -> ASGIApp:
    """`app`, known to `state` as long as it is answering: a graceful stop waits for it."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        scope["llmkit.arrived"] = time.perf_counter()
        with state.active():
            await app(scope, receive, send)

    return counted


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # the router's own: 404 and 405
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: {request.method} {request.scope['path']}"
        error = ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
    assert isinstance(error, ApiError)
    return Response(error.body(request.scope["path"]), error.status, error.headers, "application/json")


async def _answer_bug(request: Request, _error: Exception) -> Response:
    # uvicorn logs the traceback: Starlette raises the error again after this answer.
    return await _answer_error(request, ApiError(500, "The server failed; its log says why.", code="internal_error"))
