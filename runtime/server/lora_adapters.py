"""Routes that load and unload LoRA adapters at run time, from the folder of `--lora-dir` only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, ClassVar
from uuid import uuid4

import msgspec
from fastapi import Request, Response
from pydantic import Field

from llmkit.runtime.server.engines.engine_client import EngineClient
from llmkit.runtime.server.engines.engine_messages import LoadAdapter, Refused, UnloadAdapter
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.http.request_body import read_json_body
from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    NeutralValues,
    RequestT,
    parse_request,
)
from llmkit.runtime.server.server_state import ServerState

MAX_ADAPTERS = 64
_POLL_S = 0.05  # between two attempts to unload an adapter that requests still use

AdapterName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\w.:/@+-]+$")]


class UnloadLoraAdapterRequest(BaseRequest):
    """POST /v1/unload_lora_adapter."""

    neutral_values: ClassVar[NeutralValues] = {"lora_int_id": ()}

    model: Annotated[str, Field(max_length=0)] = ""  # the adapter's name is lora_name
    lora_name: AdapterName


class LoadLoraAdapterRequest(UnloadLoraAdapterRequest):
    """POST /v1/load_lora_adapter."""

    neutral_values: ClassVar[NeutralValues] = {"lora_int_id": (), "load_inplace": (False,)}

    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class LoraAdapterRoutes:
    """The two routes. Changes are made one after the other; requests continue meanwhile."""

    def __init__(self, state: ServerState, folder: Path) -> None:
        self._state = state
        self._folder = Path(folder).resolve()
        self._lock = asyncio.Lock()  # held during a change

    async def load(self, request: Request) -> Response:
        """Load the adapter in the folder `lora_path`, and serve it as the model `lora_name`."""
        body = await self._parse(LoadLoraAdapterRequest, request)
        name = body.lora_name
        path = self._resolve(body.lora_path)
        async with self._lock:
            if name in self._state.models:
                raise invalid(
                    "lora_name",
                    f"There is a model {name!r} already; unload it first.",
                    "already_exists",
                )
            if len(self._state.adapter_paths) >= MAX_ADAPTERS:
                raise invalid(
                    "lora_name",
                    f"{MAX_ADAPTERS} adapters are loaded; unload one first.",
                    "too_many",
                )
            await self._load_in_all(name, path)
            self._state.loaded_adapters[name] = path
        return _done(name, "loaded")

    async def unload(self, request: Request) -> Response:
        """Refuse new requests for an adapter, and unload it after its running requests."""
        body = await self._parse(UnloadLoraAdapterRequest, request)
        name = body.lora_name
        async with self._lock:
            if self._state.loaded_adapters.pop(name, None) is None:
                message = (
                    f"No adapter {name!r} was loaded here; adapters of --lora cannot be unloaded."
                )
                raise ApiError(404, message, code="model_not_found", param="lora_name")
            answers = await asyncio.gather(*(_unload(client, name) for client in self._clients))
            for refused in answers:
                # A process that has died has no adapters, and its successor does not load this one.
                if refused is not None and refused.code != "engine_dead":
                    raise _error(refused)
        return _done(name, "unloaded")

    async def _load_in_all(self, name: str, path: str) -> None:
        """Load an adapter in every replica, or in none: raises ApiError when one refuses."""
        clients = self._clients
        answers = await asyncio.gather(
            *(client.change(LoadAdapter(uuid4().hex, name, path)) for client in clients)
        )
        refusals = [answer for answer in answers if answer is not None]
        if not refusals:
            return
        loaded = [client for client, answer in zip(clients, answers, strict=True) if answer is None]
        await asyncio.gather(*(_unload(client, name) for client in loaded))
        raise _error(refusals[0])

    @property
    def _clients(self) -> list[EngineClient]:
        return self._state.engines.clients

    async def _parse(self, kind: type[RequestT], request: Request) -> RequestT:
        options = self._state.options
        data = await read_json_body(request, options.max_body_bytes, options.body_timeout)
        body = parse_request(kind, data, options.strict_fields)
        request.scope["llmkit.ignored_fields"].append(body.ignored)
        error = self._state.unavailable_error
        if error is not None:
            raise error
        layout = self._state.info["layout"]
        if layout["tp"] * layout["pp"] > 1:
            message = (
                "The model is on several ranks, which have the adapters given at the start "
                "(--lora) only."
            )
            raise ApiError(400, message, code="not_supported", param="lora_name")
        return body

    def _resolve(self, lora_path: str) -> str:
        """Return the path of an adapter's folder.

        Raises the same ApiError 400 for every path that is not a folder within --lora-dir, so that
        clients learn nothing about other files.
        """
        try:
            path = (self._folder / lora_path).resolve()
            if self._folder in path.parents and path.is_dir():
                return str(path)
        except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, a loop of links
            pass
        message = "There is no such adapter in the server's folder of adapters (--lora-dir)."
        raise invalid("lora_path", message, "adapter_not_found")


async def _unload(client: EngineClient, name: str) -> Refused | None:
    """Unload an adapter in one replica, as soon as no request uses it."""
    while True:
        refused = await client.change(UnloadAdapter(uuid4().hex, name))
        if refused is None or refused.code != "in_use":
            return refused
        await asyncio.sleep(_POLL_S)


def _error(refused: Refused) -> ApiError:
    status = 503 if refused.code == "engine_dead" else 400
    return ApiError(status, refused.message, code=refused.code, param=refused.param)


def _done(name: str, status: str) -> Response:
    document = {"lora_name": name, "status": status}
    return Response(msgspec.json.encode(document), media_type="application/json")
