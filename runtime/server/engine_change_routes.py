"""Routes with which an operator lets the server sleep, wakes it up, and loads other weights.

They exist with `--enable-sleep-mode` and `--reload-dir` only, and need a key with the right `admin`
where keys are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import Field

from llmkit.runtime.server.engine_control import (
    DROP_WEIGHTS,
    KEEP_WEIGHTS,
    EngineControl,
    SleepLevel,
)
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.http.request_body import read_json_body
from llmkit.runtime.server.schemas.base_request import BaseRequest, parse_request
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_state import Phase, ServerState

_LEVELS: dict[str, SleepLevel] = {"1": KEEP_WEIGHTS, "2": DROP_WEIGHTS}
TAGS = frozenset({"weights", "kv_cache"})  # vLLM's


class ReloadRequest(BaseRequest):
    """POST /reload."""

    model: Annotated[str, Field(max_length=256)] = ""
    path: Annotated[str, Field(min_length=1, max_length=4096)]  # within --reload-dir


def add_engine_change_routes(app: FastAPI, state: ServerState) -> None:
    """Add the routes that the options allow."""
    routes = _Routes(state)
    options = state.options
    paths: list[tuple[str, str, Callable[..., Any]]] = []
    if options.enable_sleep_mode:
        paths += [
            ("/sleep", "POST", routes.sleep),
            ("/wake_up", "POST", routes.wake_up),
            ("/is_sleeping", "GET", routes.is_sleeping),
        ]
    if options.reload_dir is not None:
        paths.append(("/reload", "POST", routes.reload))
    for path, method, endpoint in paths:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)


class _Routes:
    """One method per route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def sleep(self, request: Request) -> Response:
        """Free the memory of the caches; at level 2 that of the weights, too."""
        _require_admin(request)
        text = request.query_params.get("level", "1")
        if text not in _LEVELS:
            raise invalid("level", f"level is {text!r}; 1 or 2 was expected.", "invalid_value")
        started_at = time.perf_counter()
        mode = request.query_params.get("mode", "abort")
        level = await self._changes.sleep(mode, _LEVELS[text])
        return _json({"status": "sleeping", "level": level, "elapsed_ms": _since_ms(started_at)})

    async def wake_up(self, request: Request) -> Response:
        """Get the memory again, load the model if its weights were dropped, accept requests."""
        _require_admin(request)
        tags = request.query_params.getlist("tags")
        if tags and set(tags) != TAGS:
            message = "Weights and KV cache wake up together; leave out tags, or give both."
            raise invalid("tags", message, "not_supported")
        started_at = time.perf_counter()
        await self._changes.wake_up()
        return _json(
            {"status": "awake", "tags_woken": tags or None, "elapsed_ms": _since_ms(started_at)}
        )

    async def is_sleeping(self) -> Response:
        """Say whether the server sleeps."""
        return _json({"is_sleeping": self._state.phase is Phase.SLEEPING})

    async def reload(self, request: Request) -> Response:
        """Serve the weights of another directory, without an interruption."""
        _require_admin(request)
        options = self._state.options
        data = await read_json_body(request, options.max_body_bytes, options.body_timeout)
        body = parse_request(ReloadRequest, data, options.strict_fields, self._state.model_name)
        request.scope["llmkit.ignored_fields"].append(body.ignored)
        root = _resolve(options, body.path)
        started_at = time.perf_counter()
        changed = await self._changes.reload(root)
        return _json(
            {
                "status": "loaded",
                "path": root,
                "changed": changed,
                "elapsed_ms": _since_ms(started_at),
            }
        )

    @property
    def _changes(self) -> EngineControl:
        changes = self._state.engine_changes
        if changes is None:
            error = self._state.unavailable_error
            assert error is not None, "it is set before the server is ready"
            raise error
        return changes


def _require_admin(request: Request) -> None:
    if not request.scope["llmkit.is_admin"]:
        message = "This needs a key with the right `admin` in the server's key file."
        raise ApiError(403, message, code="admin_key_needed")


def _resolve(options: ServeOptions, path: str) -> str:
    """Return the directory of weights.

    Raises the same ApiError 400 for every path that is not a directory within --reload-dir, so that
    clients learn nothing about other files.
    """
    assert options.reload_dir is not None
    folder = Path(options.reload_dir).resolve()
    try:
        found = (folder / path).resolve()
        if folder in found.parents and found.is_dir():
            return str(found)
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
        pass
    message = "There are no such weights in the server's folder of weights (--reload-dir)."
    raise invalid("path", message, "weights_not_found")


def _since_ms(started_at: float) -> float:
    return round((time.perf_counter() - started_at) * 1e3, 2)


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
