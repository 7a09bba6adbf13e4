"""The Open Inference Protocol over gRPC.

Each call becomes a request to the HTTP application, in the same process. So keys, limits, draining
and checks are those of HTTP. The protobuf messages come from Triton's client package.
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

from llmkit.common.errors import ShortageError
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.http.internal_request import Headers, InternalRequest
from llmkit.runtime.server.kserve.kserve_response import VERSION
from llmkit.runtime.server.kserve.kserve_tensors import (
    OUTPUTS,
    decode_text,
    output_values,
    pack_values,
    parse_values,
)
from llmkit.runtime.server.serve_options import ServeOptions

STATUS_CODES = {
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
_FINAL_RESPONSE = "triton_final_response"
_EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
_OPTIONAL_OUTPUTS = [name for name in OUTPUTS if name != "text_output"]
Context = Any  # grpc.aio.ServicerContext, whose package has no types


async def start_grpc_server(app: ASGIApp, options: ServeOptions) -> tuple[Any, int]:
    """Start a gRPC server in front of `app`; return the server and its port.

    Raises ShortageError when the port is taken.
    """
    max_concurrent = options.engine.dp * options.engine.max_num_seqs + options.max_waiting
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", options.max_body_bytes),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=max_concurrent,
    )
    add_GRPCInferenceServiceServicer_to_server(InferenceService(app, max_concurrent), server)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.grpc_port}"
    credentials = _server_credentials(options)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        raise ShortageError(
            f"port {options.grpc_port} on {options.host} cannot be used for gRPC",
            todo="Choose another with --grpc-port, or stop what uses it",
        ) from None
    await server.start()
    return server, port


def _server_credentials(options: ServeOptions) -> Any:
    """Return the certificates of HTTPS, which are already checked, or None without them."""
    if options.ssl_certfile is None:
        return None
    chain = Path(options.ssl_certfile).read_bytes()
    key = chain if options.ssl_keyfile is None else Path(options.ssl_keyfile).read_bytes()
    client_ca = None if options.ssl_ca_certs is None else Path(options.ssl_ca_certs).read_bytes()
    return grpc.ssl_server_credentials(
        [(key, chain)], client_ca, require_client_auth=client_ca is not None
    )


class InferenceService(GRPCInferenceServiceServicer):  # type: ignore[misc]
    """One method per call, with the protocol's names."""

    def __init__(self, app: ASGIApp, max_concurrent: int) -> None:
        """max_concurrent: how many requests of one stream run at the same time."""
        self._app = app
        self._max_concurrent = max_concurrent

    async def ServerLive(self, request: Any, context: Context) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=await self._status("/v2/health/live", context) == 200)

    async def ServerReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=await self._status("/v2/health/ready", context) == 200)

    async def ModelReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        path = _model_path(request.name, request.version, "/ready")
        status = await self._status(path, context)
        if status not in (200, 404, 503):
            await self._document(path, context)  # aborts the call
        return pb.ModelReadyResponse(ready=status == 200)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        document = await self._document("/v2", context)
        return json_format.ParseDict(document, pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        path = _model_path(request.name, request.version, "")
        document = await self._document(path, context)
        return json_format.ParseDict(document, pb.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Context) -> Any:  # noqa: N802
        path = _model_path(request.name, request.version, "/config")
        document = await self._document(path, context)
        return json_format.ParseDict({"config": document}, pb.ModelConfigResponse())

    async def ModelStatistics(self, request: Any, context: Context) -> Any:  # noqa: N802
        path = _model_path(request.name, request.version, "/stats")
        if not request.name:
            path = "/v2/models/stats"
        document = await self._document(path, context)
        return json_format.ParseDict(document, pb.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:  # noqa: N802
        document = await self._document("/v2/repository/index", context, "POST")
        return json_format.ParseDict({"models": document}, pb.RepositoryIndexResponse())

    async def ModelInfer(self, request: Any, context: Context) -> Any:  # noqa: N802
        try:
            body = _generate_body(request)
        except ApiError as error:
            await context.abort(STATUS_CODES[error.status], error.message)
        path = _model_path(request.model_name, request.model_version, "/generate")
        return _infer_response(request, await self._document(path, context, "POST", body))

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[Any], context: Context
    ) -> None:
        """Answer the requests of a stream concurrently. An error is sent as a response."""
        write_lock = asyncio.Lock()
        free_slots = asyncio.Semaphore(self._max_concurrent)

        async def answer(request: Any) -> None:
            async with contextlib.aclosing(self._responses(request, context)) as responses:
                async for response in responses:
                    async with write_lock:
                        await context.write(response)
            free_slots.release()

        async with asyncio.TaskGroup() as tasks:
            async for request in requests:
                await free_slots.acquire()
                tasks.create_task(answer(request))

    async def _responses(self, request: Any, context: Context) -> AsyncGenerator[Any]:
        def error_response(message: str) -> Any:
            return pb.ModelStreamInferResponse(
                error_message=message, infer_response=pb.ModelInferResponse(id=request.id)
            )

        try:
            body = _generate_body(request)
        except ApiError as error:
            yield error_response(error.message)
            return
        wants_empty_final = False
        if _EMPTY_FINAL_RESPONSE in request.parameters:
            wants_empty_final = request.parameters[_EMPTY_FINAL_RESPONSE].bool_param
        path = _model_path(request.model_name, request.model_version, "/generate_stream")
        async with InternalRequest(self._app, "POST", path, _headers(context), body) as http:
            if http.status != 200:
                yield error_response(_error_message(await http.read()))
                return
            incomplete = b""
            async for chunk in http.chunks():
                *events, incomplete = (incomplete + chunk).split(b"\n\n")
                for event in events:
                    if event.startswith(b":"):  # a keep-alive comment
                        continue
                    document = msgspec.json.decode(event.removeprefix(b"data: "))
                    if "error" in document:
                        yield error_response(document["error"])
                        return
                    response = _infer_response(request, document)
                    is_final = document[_FINAL_RESPONSE] and not wants_empty_final
                    response.parameters[_FINAL_RESPONSE].bool_param = is_final
                    yield pb.ModelStreamInferResponse(infer_response=response)
        if wants_empty_final:
            response = pb.ModelInferResponse(
                model_name=request.model_name, model_version=VERSION, id=request.id
            )
            response.parameters[_FINAL_RESPONSE].bool_param = True
            yield pb.ModelStreamInferResponse(infer_response=response)

    async def _status(self, path: str, context: Context) -> int:
        async with InternalRequest(self._app, "GET", path, _headers(context)) as http:
            return http.status

    async def _document(
        self, path: str, context: Context, method: str = "GET", body: bytes = b""
    ) -> Any:
        """Return the JSON of a response. Aborts the call if the response is an error."""
        async with InternalRequest(self._app, method, path, _headers(context), body) as http:
            data = await http.read()
        if http.status != 200:
            code = STATUS_CODES.get(http.status, grpc.StatusCode.INTERNAL)
            await context.abort(code, _error_message(data))
        return msgspec.json.decode(data)


def _model_path(name: str, version: str, suffix: str) -> str:
    version_part = f"/versions/{version}" if version else ""
    return f"/v2/models/{name}{version_part}{suffix}"


def _headers(context: Context) -> Headers:
    """Return the call's metadata that the HTTP server needs: the API key, the trace and the id."""
    kept = {"authorization", "x-api-key", "traceparent", "x-request-id"}
    headers = []
    for key, value in context.invocation_metadata() or ():
        if key in kept:
            headers.append((key.encode(), value if isinstance(value, bytes) else value.encode()))
    return headers


def _error_message(data: bytes) -> str:
    document = msgspec.json.decode(data)
    error = document["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def _generate_body(request: Any) -> bytes:
    """Return a ModelInferRequest as the JSON body of generate.

    Raises ApiError 400 for unknown or wrong tensors.
    """
    inputs: dict[str, Any] = {}
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise invalid(
            "inputs", f"There are {len(request.inputs)} inputs and the contents of {len(raw)}."
        )
    for index, tensor in enumerate(request.inputs):
        if tensor.name in inputs:
            raise invalid(tensor.name, f"The input {tensor.name} is given twice.")
        data: list[Any] | bytes = raw[index] if raw else _tensor_contents(tensor)
        inputs[tensor.name] = parse_values(tensor.name, tensor.datatype, list(tensor.shape), data)
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise invalid(
                "outputs", f"There is no output {output.name!r}; there are {', '.join(OUTPUTS)}."
            )
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice") or "bool_param")
        for name, value in request.parameters.items()
        if name != _EMPTY_FINAL_RESPONSE
    }
    return_flags = {
        f"return_{name}": True for name in _output_names(request, inputs) if name != "text_output"
    }
    document = {"id": request.id, "parameters": parameters, **inputs, **return_flags}
    return msgspec.json.encode(document)


def _tensor_contents(tensor: Any) -> list[Any]:
    texts = [decode_text(tensor.name, text) for text in tensor.contents.bytes_contents]
    return [*texts, *tensor.contents.bool_contents]


def _output_names(request: Any, inputs: dict[str, Any]) -> list[str]:
    """Return the names of the response's outputs."""
    names = list(dict.fromkeys(output.name for output in request.outputs))
    if names:
        return names
    returned = [name for name in _OPTIONAL_OUTPUTS if inputs.get(f"return_{name}") == [True]]
    return ["text_output", *returned]


def _infer_response(request: Any, document: dict[str, Any]) -> Any:
    """Return a response of generate as a ModelInferResponse to `request`."""
    names = [output.name for output in request.outputs]
    if not names:
        names = [name for name in OUTPUTS if name in document]
    response = pb.ModelInferResponse(
        model_name=document["model_name"], model_version=VERSION, id=request.id
    )
    for name, values in output_values(document, list(dict.fromkeys(names))).items():
        response.outputs.add(name=name, datatype=OUTPUTS[name], shape=[len(values)])
        response.raw_output_contents.append(pack_values(OUTPUTS[name], values))
    return response
