"""Modal's API (gRPC) on a free port: it records what a client asks for, and makes nothing."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import grpclib.const
import grpclib.server
from modal_proto import api_grpc, api_pb2

_IMAGE_BUILDER = "2025.06"
# The fields of replies that name an object, and how Modal's ids of such objects begin.
_ID_FIELDS = {
    "app_id": "ap",
    "volume_id": "vo",
    "secret_id": "st",
    "image_id": "im",
    "function_id": "fu",
    "mount_id": "mo",
    "class_id": "cs",
    "environment_id": "en",
}


class ModalApi:
    """The API, as a context. Modal's client finds it by `environment`."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Any]] = []
        self._numbers = itertools.count()
        self._ready = threading.Event()
        self._url = ""

    def __enter__(self) -> ModalApi:
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MODAL_SERVER_URL": self._url,
            "MODAL_TOKEN_ID": "ak-1",
            "MODAL_TOKEN_SECRET": "as-1",
        }

    def requests(self, method: str) -> list[Any]:
        """The requests to a method, in order."""
        return [request for name, request in self._calls if name == method]

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        base = api_grpc.ModalClientBase
        methods = dict.fromkeys(base.__abstractmethods__, lambda self, stream: None)
        service = type("Service", (base,), methods)()
        handlers = {
            path: self._handler(path.rpartition("/")[2], handler)
            for path, handler in service.__mapping__().items()
        }
        table = type("Table", (), {"__mapping__": lambda self: handlers})()
        server = grpclib.server.Server([table])
        await server.start("127.0.0.1", 0)
        port = server._server.sockets[0].getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._ready.set()
        await self._end.wait()
        server.close()

    def _handler(self, name: str, handler: grpclib.const.Handler) -> grpclib.const.Handler:
        async def answer(stream: grpclib.server.Stream[Any, Any]) -> None:
            request = await stream.recv_message()
            self._calls.append((name, request))
            await stream.send_message(self._reply(name, request, handler.reply_type))

        return grpclib.const.Handler(
            answer, handler.cardinality, handler.request_type, handler.reply_type
        )

    def _reply(self, name: str, request: Any, kind: Any) -> Any:
        reply = kind()
        for field, prefix in _ID_FIELDS.items():
            if field in kind.DESCRIPTOR.fields_by_name:
                setattr(reply, field, f"{prefix}-{next(self._numbers):04}")
        if name == "EnvironmentGetOrCreate":
            reply.metadata.settings.image_builder_version = _IMAGE_BUILDER
        elif name == "ImageJoinStreaming":
            reply.result.status = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
        elif name == "FunctionCreate":
            reply.function_id = request.existing_function_id
            ranked = reply.function_data.ranked_functions.add()
            ranked.function.CopyFrom(request.function)
            reply.handle_metadata.function_name = request.function.function_name
        elif name == "AppPublish":
            reply.url = "https://modal.com/apps/test"
        return reply
