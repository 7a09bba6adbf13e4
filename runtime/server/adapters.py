"""LoRA adapters that clients load and unload while the server runs, out of one folder of its own (`--lora-dir`)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, ClassVar
from uuid import uuid4

import msgspec
from fastapi import Request, Response
from pydantic import Field

from llmkit.runtime.server.bodies.base import Body, Harmless, Kind, parse
from llmkit.runtime.server.engines.messages import LoadAdapter, Refused, UnloadAdapter
from llmkit.runtime.server.engines.process import EngineClient
from llmkit.runtime.server.http.body import read_json_body
from llmkit.runtime.server.http.errors import ApiError, invalid
from llmkit.runtime.server.state import State

MAX_ADAPTERS = 64
_IN_USE_S = 0.05  # between two looks whether requests still use an adapter

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\w.:/@+-]+$")]


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    harmless: ClassVar[Harmless] = {"lora_int_id": ()}

    model: Annotated[str, Field(max_length=0)] = ""  # the adapter's name is lora_name
    lora_name: Name


class LoadBody(UnloadBody):
    """POST /v1/load_lora_adapter."""

    harmless: ClassVar[Harmless] = {"lora_int_id": (), "load_inplace": (False,)}

    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class Adapters:
    """The two routes. One change at a time; requests go on meanwhile."""

    def __init__(self, state: State, folder: Path) -> None:
        self._state, self._folder = state, Path(folder).resolve()
        self._change = asyncio.Lock()

    async def load(self, request: Request) -> Response:
        """Serve the adapter of the folder `lora_path` as the model `lora_name`."""
        body = await self._body(LoadBody, request)
        state, name = self._state, body.lora_name
        path = self._inside(body.lora_path)
        async with self._change:
            if name in state.models:
                raise invalid("lora_name", f"There is a model {name!r} already; unload it first.", "already_exists")
            if len(state.roots) >= MAX_ADAPTERS:
                raise invalid("lora_name", f"{MAX_ADAPTERS} adapters are loaded; unload one first.", "too_many")
            told = await asyncio.gather(*(one.ask(LoadAdapter(uuid4().hex, name, path)) for one in self._clients))
            refused = next((one for one in told if one is not None), None)
            if refused is not None:  # by one replica: the others need not have it either
                loaded = [one for one, answer in zip(self._clients, told, strict=True) if answer is None]
                await asyncio.gather(*(_unload(one, name) for one in loaded))
                raise _error(refused)
            state.loaded_adapters[name] = path
        return _done(name, "loaded")

    async def unload(self, request: Request) -> Response:
        """Take no more requests for an adapter, and let go of it when those under way have ended."""
        body = await self._body(UnloadBody, request)
        state, name = self._state, body.lora_name
        async with self._change:
            if state.loaded_adapters.pop(name, None) is None:
                message = f"No adapter {name!r} was loaded here; those of --lora stay."
                raise ApiError(404, message, code="model_not_found", param="lora_name")
            told = await asyncio.gather(*(_unload(one, name) for one in self._clients))
            for refused in told:
                if refused is not None:
                    raise _error(refused)
        return _done(name, "unloaded")

    @property
    def _clients(self) -> list[EngineClient]:
        return self._state.client.clients

    async def _body(self, kind: type[Kind], request: Request) -> Kind:
        options = self._state.options
        body = parse(kind, await read_json_body(request, options.max_body_bytes, options.body_timeout))
        if (error := self._state.unready) is not None:
            raise error
        layout = self._state.info["layout"]
        if layout["tp"] * layout["pp"] > 1:
            message = "The model is on several ranks, which have the adapters given at the start (--lora) only."
            raise ApiError(400, message, code="not_supported", param="lora_name")
        return body

    def _inside(self, given: str) -> str:
        """The path of an adapter. ApiError 400, the same whatever is there, unless it is in the folder."""
        try:
            path = (self._folder / given).resolve()
            if self._folder in path.parents and path.is_dir():
                return str(path)
        except (OSError, ValueError, RuntimeError):  # too long, with a NUL byte, a loop of links
            pass
        message = "There is no such adapter in the server's folder of adapters (--lora-dir)."
        raise invalid("lora_path", message, "adapter_not_found")


async def _unload(client: EngineClient, name: str) -> Refused | None:
    while (refused := await client.ask(UnloadAdapter(uuid4().hex, name))) is not None and refused.code == "in_use":
        await asyncio.sleep(_IN_USE_S)
    return refused


def _error(refused: Refused) -> ApiError:
    status = 503 if refused.code == "engine_dead" else 400
    return ApiError(status, refused.message, code=refused.code, param=refused.param)


def _done(name: str, what: str) -> Response:
    return Response(msgspec.json.encode({"lora_name": name, "status": what}), media_type="application/json")
