"""Requests of the Open Inference Protocol, and how each becomes a completion request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from pydantic import ConfigDict, Field

from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.kserve.kserve_tensors import INPUTS, OUTPUTS, parse_values
from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    NonNegativeInt,
    StrictModel,
    build_request,
    parse_request,
)
from llmkit.runtime.server.schemas.completion_request import CompletionRequest

MAX_TENSORS = 64
# Fields of a completion that an input tensor already sets, or whose result no output tensor holds.
_UNSUPPORTED = {
    "model",
    "prompt",
    "stream",
    "stream_options",
    "echo",
    "logprobs",
    "prompt_logprobs",
    "return_token_ids",
    "reasoning_effort",
    "verbosity",
}
_SEQUENCE = {"sequence_id", "sequence_start", "sequence_end"}  # for stateful models only
_MICROSECONDS = 1e6


# The protocol has no fields beside its own: an unknown one is an error.
_NO_UNKNOWN_FIELDS = ConfigDict(extra="forbid")


class InferInput(StrictModel):
    """An input tensor; without `data` its values follow the JSON."""

    model_config = _NO_UNKNOWN_FIELDS

    name: str
    datatype: str
    shape: Annotated[list[NonNegativeInt], Field(max_length=8)]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferOutput(StrictModel):
    """An output that is asked for."""

    model_config = _NO_UNKNOWN_FIELDS

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(BaseRequest):
    """POST /v2/models/NAME/infer; the model is in the path."""

    model_config = _NO_UNKNOWN_FIELDS

    model: Annotated[str, Field(max_length=0)] = ""
    id: Annotated[str, Field(max_length=1024)] | None = None
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[InferInput], Field(max_length=MAX_TENSORS)]
    outputs: Annotated[list[InferOutput], Field(max_length=MAX_TENSORS)] | None = None


@dataclass(frozen=True)
class KserveRequest:
    """A checked request."""

    completion: CompletionRequest
    id: str  # the client's; may be empty
    outputs: tuple[str, ...]  # the output tensors of the response, in order
    binary_outputs: frozenset[str] = frozenset()  # the outputs to send in Triton's binary form


def parse_infer_request(model: str, data: bytes, json_length: int | None) -> KserveRequest:
    """Parse the body of infer.

    json_length: bytes of JSON before the binary data; None: there is no binary data. Raises
    ApiError 400 for a wrong body.
    """
    if json_length is not None and json_length > len(data):
        raise invalid(
            "inference-header-content-length",
            f"The body has {len(data)} bytes and its JSON {json_length}.",
        )
    body = parse_request(InferRequest, data[:json_length])
    offset = len(data) if json_length is None else json_length
    inputs: dict[str, list[Any]] = {}
    for tensor in body.inputs:
        if tensor.name in inputs:
            raise invalid(tensor.name, f"The input {tensor.name} is given twice.")
        values: list[Any] | bytes | None = tensor.data
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(data) - offset or values is not None:
                raise invalid(
                    tensor.name, f"The binary_data_size of {tensor.name} does not match the data."
                )
            values = data[offset : offset + size]
            offset += size
        if values is None:
            raise invalid(tensor.name, f"The input {tensor.name} has no data.")
        inputs[tensor.name] = parse_values(tensor.name, tensor.datatype, tensor.shape, values)
    if offset != len(data):
        raise invalid("inputs", f"{len(data) - offset} bytes follow the last input.")
    parameters = dict(body.parameters or {})
    all_binary = parameters.pop("binary_data_output", False) is True
    wanted = body.outputs or []
    output_names = [output.name for output in wanted]
    request = _completion_of(model, inputs, parameters, body.id or "", output_names)
    is_binary = {
        output.name: (output.parameters or {}).get("binary_data", all_binary) is True
        for output in wanted
    }
    binary_outputs = frozenset(name for name in request.outputs if is_binary.get(name, all_binary))
    return KserveRequest(request.completion, request.id, request.outputs, binary_outputs)


def parse_generate_request(model: str, data: bytes) -> KserveRequest:
    """Parse the body of Triton's generate: inputs and parameters are fields of one object.

    Raises ApiError 400 for a wrong body.
    """
    try:
        fields = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep
        raise ApiError(400, f"Invalid JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("parameters") or {}, dict):
        raise invalid("parameters", "An object was expected.", "invalid_type")
    nested = fields.pop("parameters", None) or {}
    _check_no_duplicates(fields, nested, "in parameters too")
    fields |= nested
    request_id = fields.pop("id", "")
    if not isinstance(request_id, str):
        raise invalid("id", "id must be a string.", "invalid_type")
    inputs: dict[str, list[Any]] = {}
    for name in fields.keys() & INPUTS.keys():
        value = fields.pop(name)
        values = value if isinstance(value, list) else [value]
        inputs[name] = parse_values(name, INPUTS[name], [len(values)], values)
    return _completion_of(model, inputs, fields, request_id, [])


def _completion_of(
    model: str,
    inputs: Mapping[str, Sequence[Any]],
    parameters: Mapping[str, Any],
    request_id: str,
    outputs: Sequence[str],
) -> KserveRequest:
    """Convert the inputs to a completion request, as Triton's vLLM backend does.

    A response that is not streamed begins with the prompt, unless the client excludes it.
    """

    def single_value(name: str, default: Any) -> Any:
        values = inputs.get(name, [default])
        if len(values) != 1:
            raise invalid(name, f"{name} has {len(values)} values; one was expected.")
        return values[0]

    if not inputs.get("text_input"):
        raise ApiError(
            400, "text_input is missing.", code="missing_required_parameter", param="text_input"
        )
    stream = single_value("stream", False)
    echo = not single_value("exclude_input_in_output", stream)
    if stream and echo:
        message = "A stream has no prompt in it; leave exclude_input_in_output out."
        raise invalid("exclude_input_in_output", message, "unsupported")
    fields = sampling_fields(single_value("sampling_parameters", "{}"), parameters)
    fields |= {"model": model, "prompt": list(inputs["text_input"]), "stream": stream, "echo": echo}
    for name in outputs:
        if name not in OUTPUTS:
            raise invalid(
                "outputs", f"There is no output {name!r}; there are {', '.join(OUTPUTS)}."
            )
    completion = build_request(CompletionRequest, fields)
    if outputs:
        return KserveRequest(completion, request_id, tuple(dict.fromkeys(outputs)))
    extra_outputs = [
        name
        for name in OUTPUTS
        if f"return_{name}" in INPUTS and single_value(f"return_{name}", False)
    ]
    return KserveRequest(completion, request_id, ("text_output", *extra_outputs))


def sampling_fields(text: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a completion's fields from the input sampling_parameters and from `parameters`."""
    try:
        sampling = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        sampling = None
    if not isinstance(sampling, dict):
        raise invalid("sampling_parameters", "sampling_parameters must be a JSON object.")
    fields = {name: value for name, value in parameters.items() if name not in _SEQUENCE or value}
    if "timeout" in fields:  # microseconds in this protocol, seconds in a completion
        if type(fields["timeout"]) is not int or not 0 < fields["timeout"] < 2**63:
            raise invalid("timeout", "timeout must be a whole number of microseconds.")
        fields["timeout"] /= _MICROSECONDS
    _check_no_duplicates(fields, sampling, "in parameters and in sampling_parameters")
    fields |= sampling
    refused = fields.keys() & (_UNSUPPORTED | _SEQUENCE)
    if refused:
        raise invalid(
            min(refused), f"{min(refused)} is not supported in this protocol.", "unsupported"
        )
    return fields


def _check_no_duplicates(fields: Mapping[str, Any], others: Mapping[str, Any], where: str) -> None:
    duplicates = fields.keys() & others.keys()
    if duplicates:
        raise invalid(min(duplicates), f"{min(duplicates)} is given twice, {where}.")
