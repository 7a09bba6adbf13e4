"""The routes of stored responses, and what storing adds to POST /v1/responses."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.prepare import prepare_chat
from llmkit.runtime.server.read_request import check_ready, client_salt
from llmkit.runtime.server.responses.logprobs_response import TextLogprobs
from llmkit.runtime.server.responses.responses_response import ResponsesResponseBuilder
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.server_state import ServerState
from llmkit.runtime.server.stored_responses.background_runs import BackgroundRun, BackgroundRuns
from llmkit.runtime.server.stored_responses.response_store import (
    MissingResponseError,
    ResponseStore,
    StoredResponse,
    new_response_id,
)

RESPONSE_PATH = "/v1/responses/{response_id}"
CANCEL_PATH = RESPONSE_PATH + "/cancel"
INPUT_ITEMS_PATH = RESPONSE_PATH + "/input_items"
MAX_PAGE = 100
_DEFAULT_PAGE = 20


class StoredResponses:
    """What storing adds to POST /v1/responses, and one method per other route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._runs = BackgroundRuns(state)

    async def builder(self, request: Request, body: ResponsesRequest) -> ResponsesResponseBuilder:
        """Return the builder of a response to `body`, whose history is put before its input.

        The builder stores the response if the server stores and the request allows it. Raises
        ApiError when the history is not there.
        """
        store = self._state.response_store
        owner = client_salt(request)
        if store is None:
            for name in ("previous_response_id", "background"):
                if getattr(body, name):
                    raise invalid(
                        name,
                        f"{name} needs stored responses: start the server with --store-responses.",
                        "unsupported",
                    )
        elif body.previous_response_id is not None:
            body.continue_from(await _history(store, owner, body.previous_response_id))
        logprobs = None
        if body.includes_logprobs:
            logprobs = TextLogprobs(self._state.text.tokenizer, body.top_logprobs or 0)
        builder = ResponsesResponseBuilder(body, new_response_id(self._state.model_name), logprobs)
        if store is not None and body.store is not False:
            items = body.items

            def put(response: dict[str, Any]) -> None:
                store.put(StoredResponse(owner, response, items))

            builder.on_complete = put
        return builder

    async def start_in_background(self, request: Request, body: ResponsesRequest) -> Response:
        """Start a background response, and answer with it as it is now, or with its events."""
        builder = await self.builder(request, body)
        store = self._store()
        owner = client_salt(request)
        choices: list[Choice] = await prepare_chat(self._state, body.chat, builder.id, owner)
        check_ready(self._state)
        run = BackgroundRun(owner, builder, choices[0])
        builder.on_complete = run.complete
        items = body.items

        def put(response: dict[str, Any]) -> None:
            store.put(StoredResponse(owner, response, items))

        queued = run.response
        await self._runs.start(request, run, choices, body.timeout, put)
        put(queued)
        if body.stream:
            return _event_stream(run.events())
        return _json_response(queued)

    async def retrieve(self, request: Request, response_id: str) -> Response:
        """Return a stored response, or with `stream=true` the events of a background response."""
        query = request.query_params
        stream = query.get("stream", "false").lower()
        if stream not in ("true", "false"):
            raise invalid("stream", "stream must be true or false.")
        starting_after = _integer(query.get("starting_after", "-1"), "starting_after", -1, 2**31)
        run = self._runs.get(client_salt(request), response_id)
        if stream == "true":
            if run is None:
                await self._find(request, response_id)
                message = (
                    "The response has no events: those of a background response are kept while it "
                    "runs and a while after."
                )
                raise invalid("stream", message, "unsupported")
            return _event_stream(run.events(starting_after))
        if run is not None:
            return _json_response(run.response)
        return _json_response((await self._find(request, response_id)).response)

    async def delete(self, request: Request, response_id: str) -> Response:
        """Delete a response; one that runs is cancelled."""
        owner = client_salt(request)
        if self._runs.get(owner, response_id) is not None:
            self._runs.remove(response_id)
        if not await self._store().delete(owner, response_id):
            raise response_not_found(response_id)
        return _json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request, response_id: str) -> Response:
        """Cancel a background response; one that has ended stays as it is."""
        run = self._runs.get(client_salt(request), response_id)
        if run is not None:
            run.cancel()
            await run.wait()
            return _json_response(run.response)
        stored = await self._find(request, response_id)
        if not stored.response["background"]:
            message = "Only a response with background: true can be cancelled."
            raise invalid("response_id", message, "invalid_value")
        return _json_response(stored.response)

    async def input_items(self, request: Request, response_id: str) -> Response:
        """List the items of a response's own input, page by page."""
        query = request.query_params
        limit = _integer(query.get("limit", str(_DEFAULT_PAGE)), "limit", 1, MAX_PAGE)
        order = query.get("order", "desc")
        after = query.get("after")
        if order not in ("asc", "desc"):
            raise invalid("order", "order must be asc or desc.")
        items = (await self._find(request, response_id)).input_items
        if order == "desc":
            items = items[::-1]
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise invalid("after", f"The response has no input item {after[:80]!r}.")
            items = items[ids.index(after) + 1 :]
        page = items[:limit]
        return _json_response(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(items) > limit,
            }
        )

    def _store(self) -> ResponseStore:
        check_ready(self._state)
        store = self._state.response_store
        if store is None:
            message = "The server stores no responses: start it with --store-responses."
            raise ApiError(404, message, code="not_stored")
        return store

    async def _find(self, request: Request, response_id: str) -> StoredResponse:
        stored = await self._store().get(client_salt(request), response_id)
        if stored is None:
            raise response_not_found(response_id)
        return stored


def add_response_routes(app: FastAPI, responses: StoredResponses) -> None:
    """Add the routes of stored responses, except POST /v1/responses."""
    for path, method, endpoint in (
        (RESPONSE_PATH, "GET", responses.retrieve),
        (RESPONSE_PATH, "DELETE", responses.delete),
        (CANCEL_PATH, "POST", responses.cancel),
        (INPUT_ITEMS_PATH, "GET", responses.input_items),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)


async def _history(
    store: ResponseStore, owner: str, previous_response_id: str
) -> list[dict[str, Any]]:
    try:
        return await store.history(owner, previous_response_id)
    except MissingResponseError as error:
        message = f"Previous response with id {error.response_id[:128]!r} {error}."
        raise invalid("previous_response_id", message, "previous_response_not_found") from None


def _integer(text: str, param: str, low: int, high: int) -> int:
    """Return a query parameter's number. Raises ApiError 400."""
    number = int(text) if re.fullmatch(r"-?[0-9]{1,12}", text) else low - 1
    if not low <= number <= high:
        raise invalid(param, f"{param} must be a whole number from {low} to {high}.")
    return number


def response_not_found(response_id: str) -> ApiError:
    """Return the 404 for a response that is not stored, or that another key has."""
    message = f"Response with id {response_id[:128]!r} not found."
    return ApiError(404, message, code="response_not_found", param="response_id")


def _event_stream(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(
        events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


def _json_response(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
