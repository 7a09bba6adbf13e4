"""The Open Inference Protocol over gRPC: each call is a request to the HTTP application, in the same process.

So a key, limits, draining and what is checked are those of HTTP. The messages are those that Triton's own client ships.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.protobuf import json_format
from starlette.types import ASGIApp
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from llmkit.checkpoint.errors import ShortageError
from llmkit.runtime.server.http.errors import ApiError, invalid
from llmkit.runtime.server.kserve.exchange import Exchange, Headers
from llmkit.runtime.server.kserve.shapes import VERSION
from llmkit.runtime.server.kserve.tensors import OUTPUTS, answered, decoded, packed, values_of
from llmkit.runtime.server.options import ServeOptions

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    431: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_FINAL = "triton_final_response"
_EMPTY_FINAL = "triton_enable_empty_final_response"
_RETURNED = [name for name in OUTPUTS if name != "text_output"]
Context = Any  # grpc.aio.ServicerContext, whose package says nothing of types


async def start(app: ASGIApp, options: ServeOptions) -> tuple[Any, int]:
    """A server that listens beside the one of HTTP, and its port. Raises ShortageError when the port is taken."""
    most = options.engine.dp * options.engine.max_num_seqs + options.max_waiting
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", options.max_body_bytes), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=most,
    )
    add_GRPCInferenceServiceServicer_to_server(Service(app, most), server)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address, credentials = f"{host}:{options.grpc_port}", _credentials(options)
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        raise ShortageError(
            f"port {options.grpc_port} on {options.host} cannot be used for gRPC",
            todo="Choose another with --grpc-port, or stop what uses it",
        ) from None
    await server.start()
    return server, port


def _credentials(options: ServeOptions) -> Any:
    """The certificates of HTTPS, which were found to be good; None where there are none."""
    if options.ssl_certfile is None:
        return None
    chain, clients = Path(options.ssl_certfile).read_bytes(), options.ssl_ca_certs
    key = chain if options.ssl_keyfile is None else Path(options.ssl_keyfile).read_bytes()
    roots = None if clients is None else Path(clients).read_bytes()
    return grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=roots is not None)


class Service(GRPCInferenceServiceServicer):  # type: ignore[misc]
    """One method per call, named as the protocol names them. most: requests of a stream that are under way at once."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def ServerLive(self, request: Any, context: Context) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=await self._status("/v2/health/live", context) == 200)

    async def ServerReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=await self._status("/v2/health/ready", context) == 200)

    async def ModelReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        status = await self._status(_path(request.name, request.version, "/ready"), context)
        if status not in (200, 404, 503):
            await self._document(_path(request.name, request.version, "/ready"), context)
        return pb.ModelReadyResponse(ready=status == 200)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        return json_format.ParseDict(await self._document("/v2", context), pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        document = await self._document(_path(request.name, request.version, ""), context)
        return json_format.ParseDict(document, pb.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Context) -> Any:  # noqa: N802
        document = await self._document(_path(request.name, request.version, "/config"), context)
        return json_format.ParseDict({"config": document}, pb.ModelConfigResponse())

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:  # noqa: N802
        document = await self._document("/v2/repository/index", context, "POST")
        return json_format.ParseDict({"models": document}, pb.RepositoryIndexResponse())

    async def ModelInfer(self, request: Any, context: Context) -> Any:  # noqa: N802
        try:
            body = _generate_body(request)
        except ApiError as error:
            await context.abort(CODES[error.status], error.message)
        path = _path(request.model_name, request.model_version, "/generate")
        return _response(request, await self._document(path, context, "POST", body))

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Context) -> None:  # noqa: N802
        """Answers to the requests of a stream as they come; an error is told in the place of an answer."""
        writing, room = asyncio.Lock(), asyncio.Semaphore(self._most)

        async def answer(request: Any) -> None:
            async with contextlib.aclosing(self._responses(request, context)) as responses:
                async for response in responses:
                    async with writing:
                        await context.write(response)
            room.release()

        async with asyncio.TaskGroup() as tasks:
            async for request in requests:
                await room.acquire()
                tasks.create_task(answer(request))

    async def _responses(self, request: Any, context: Context) -> AsyncGenerator[Any]:
        def failed(message: str) -> Any:
            return pb.ModelStreamInferResponse(
                error_message=message, infer_response=pb.ModelInferResponse(id=request.id)
            )

        try:
            body = _generate_body(request)
        except ApiError as error:
            yield failed(error.message)
            return
        empty_final = request.parameters[_EMPTY_FINAL].bool_param if _EMPTY_FINAL in request.parameters else False
        path = _path(request.model_name, request.model_version, "/generate_stream")
        async with Exchange(self._app, "POST", path, _headers(context), body) as exchange:
            if exchange.status != 200:
                yield failed(_message(await exchange.whole()))
                return
            held = b""
            async for chunk in exchange.chunks():
                *events, held = (held + chunk).split(b"\n\n")
                for event in events:
                    document = msgspec.json.decode(event.removeprefix(b"data: "))
                    if "error" in document:
                        yield failed(document["error"])
                        return
                    response = _response(request, document)
                    response.parameters[_FINAL].bool_param = document[_FINAL] and not empty_final
                    yield pb.ModelStreamInferResponse(infer_response=response)
        if empty_final:
            last = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
            last.parameters[_FINAL].bool_param = True
            yield pb.ModelStreamInferResponse(infer_response=last)

    async def _status(self, path: str, context: Context) -> int:
        async with Exchange(self._app, "GET", path, _headers(context)) as exchange:
            return exchange.status

    async def _document(self, path: str, context: Context, method: str = "GET", body: bytes = b"") -> Any:
        """The JSON of an answer; aborts the call with its error."""
        async with Exchange(self._app, method, path, _headers(context), body) as exchange:
            data = await exchange.whole()
        if exchange.status != 200:
            await context.abort(CODES.get(exchange.status, grpc.StatusCode.INTERNAL), _message(data))
        return msgspec.json.decode(data)


def _path(name: str, version: str, tail: str) -> str:
    return f"/v2/models/{name}{f'/versions/{version}' if version else ''}{tail}"


def _headers(context: Context) -> Headers:
    """What HTTP would know of the client: its key, as either API sends it, and the trace that it belongs to."""
    kept = {"authorization", "x-api-key", "traceparent"}
    pairs = ((key, value) for key, value in context.invocation_metadata() or () if key in kept)
    return [(key.encode(), value if isinstance(value, bytes) else value.encode()) for key, value in pairs]


def _message(data: bytes) -> str:
    document = msgspec.json.decode(data)
    error = document["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def _generate_body(request: Any) -> bytes:
    """A ModelInferRequest as the body of generate. ApiError 400 for tensors that there are not."""
    inputs: dict[str, Any] = {}
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise invalid("inputs", f"There are {len(request.inputs)} inputs and the contents of {len(raw)}.")
    for index, tensor in enumerate(request.inputs):
        if tensor.name in inputs:
            raise invalid(tensor.name, f"The input {tensor.name} is given twice.")
        data: list[Any] | bytes = raw[index] if raw else _contents(tensor)
        inputs[tensor.name] = values_of(tensor.name, tensor.datatype, list(tensor.shape), data)
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise invalid("outputs", f"There is no output {output.name!r}; there are {', '.join(OUTPUTS)}.")
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice") or "bool_param")
        for name, value in request.parameters.items()
        if name != _EMPTY_FINAL
    }
    wanted = {f"return_{name}": True for name in _wanted(request, inputs) if name != "text_output"}
    return msgspec.json.encode({"id": request.id, "parameters": parameters, **inputs, **wanted})


def _contents(tensor: Any) -> list[Any]:
    texts = [decoded(tensor.name, text) for text in tensor.contents.bytes_contents]
    return [*texts, *tensor.contents.bool_contents]


def _wanted(request: Any, inputs: dict[str, Any]) -> list[str]:
    """The outputs of the answer."""
    asked = list(dict.fromkeys(output.name for output in request.outputs))
    return asked or ["text_output", *(name for name in _RETURNED if inputs.get(f"return_{name}") == [True])]


def _response(request: Any, document: dict[str, Any]) -> Any:
    names = [output.name for output in request.outputs] or [name for name in OUTPUTS if name in document]
    response = pb.ModelInferResponse(model_name=document["model_name"], model_version=VERSION, id=request.id)
    for name, values in answered(document, list(dict.fromkeys(names))).items():
        response.outputs.add(name=name, datatype=OUTPUTS[name], shape=[len(values)])
        response.raw_output_contents.append(packed(OUTPUTS[name], values))
    return response
