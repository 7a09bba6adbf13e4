"""The bodies of the Open Inference Protocol, and the completion that each stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from pydantic import Field

from llmkit.runtime.server.bodies.base import Body, Count, Strict, build, parse
from llmkit.runtime.server.bodies.completions import CompletionBody
from llmkit.runtime.server.http.errors import ApiError, invalid
from llmkit.runtime.server.kserve.tensors import INPUTS, OUTPUTS, values_of

MAX_TENSORS = 64
# What a completion takes and an answer of tensors cannot say, or what an input says.
_NOT_HERE = {"model", "prompt", "stream", "stream_options", "echo", "logprobs", "prompt_logprobs", "return_token_ids"}
_SEQUENCE = {"sequence_id", "sequence_start", "sequence_end"}  # of stateful models
_MICROSECONDS = 1e6


class InferInput(Strict):
    """An input tensor; without `data` its values follow the JSON."""

    name: str
    datatype: str
    shape: Annotated[list[Count], Field(max_length=8)]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferOutput(Strict):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] | None = None


class InferBody(Body):
    """POST /v2/models/NAME/infer; the model is in the path."""

    model: Annotated[str, Field(max_length=0)] = ""
    id: Annotated[str, Field(max_length=1024)] | None = None
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[InferInput], Field(max_length=MAX_TENSORS)]
    outputs: Annotated[list[InferOutput], Field(max_length=MAX_TENSORS)] | None = None


@dataclass(frozen=True)
class Asked:
    """A request: the completion, its own id, the outputs of its answer and those of them in the binary form."""

    body: CompletionBody
    id: str
    outputs: tuple[str, ...]
    binary: frozenset[str] = frozenset()


def infer_request(model: str, data: bytes, header: int | None) -> Asked:
    """The body of an inference request. header: bytes of JSON before binary data. ApiError 400 for a wrong one."""
    if header is not None and header > len(data):
        raise invalid("inference-header-content-length", f"The body has {len(data)} bytes and its JSON {header}.")
    body, at, inputs = parse(InferBody, data[:header]), len(data) if header is None else header, dict[str, list[Any]]()
    for tensor in body.inputs:
        if tensor.name in inputs:
            raise invalid(tensor.name, f"The input {tensor.name} is given twice.")
        values: list[Any] | bytes | None = tensor.data
        if (size := (tensor.parameters or {}).get("binary_data_size")) is not None:
            if type(size) is not int or not 0 <= size <= len(data) - at or values is not None:
                raise invalid(tensor.name, f"The binary data of {tensor.name} has another size than it says.")
            values, at = data[at : at + size], at + size
        if values is None:
            raise invalid(tensor.name, f"The input {tensor.name} has no data.")
        inputs[tensor.name] = values_of(tensor.name, tensor.datatype, tensor.shape, values)
    if at != len(data):
        raise invalid("inputs", f"{len(data) - at} bytes follow the last input.")
    parameters, outputs = dict(body.parameters or {}), body.outputs or []
    all_binary = parameters.pop("binary_data_output", False) is True
    asked = _asked(model, inputs, parameters, body.id or "", [output.name for output in outputs])
    chosen = {one.name: (one.parameters or {}).get("binary_data", all_binary) is True for one in outputs}
    return Asked(asked.body, asked.id, asked.outputs, frozenset(n for n in asked.outputs if chosen.get(n, all_binary)))


def generate_request(model: str, data: bytes) -> Asked:
    """The body of Triton's generate extension: inputs and parameters as the fields of one object. ApiError as above."""
    try:
        fields = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep
        raise ApiError(400, f"Invalid JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("parameters") or {}, dict):
        raise invalid("parameters", "An object was expected.", "invalid_type")
    nested = fields.pop("parameters", None) or {}
    if twice := fields.keys() & nested.keys():
        raise invalid(min(twice), f"{min(twice)} is given twice, in parameters too.")
    given = fields | nested
    request_id = given.pop("id", "")
    if not isinstance(request_id, str):
        raise invalid("id", "id must be a string.", "invalid_type")
    inputs: dict[str, list[Any]] = {}
    for name in given.keys() & INPUTS.keys():
        values = one if isinstance(one := given.pop(name), list) else [one]
        inputs[name] = values_of(name, INPUTS[name], [len(values)], values)
    return _asked(model, inputs, given, request_id, [])


def _asked(
    model: str, inputs: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any], request_id: str,
    outputs: Sequence[str],
) -> Asked:  # fmt: skip
    """As Triton's vLLM backend reads it: the prompt comes with an answer that is not streamed, if not excluded."""

    def one(name: str, default: Any) -> Any:
        values = inputs.get(name, [default])
        if len(values) != 1:
            raise invalid(name, f"{name} has {len(values)} values; one was expected.")
        return values[0]

    if not inputs.get("text_input"):
        raise ApiError(400, "text_input is missing.", code="missing_required_parameter", param="text_input")
    stream = one("stream", False)
    echo = not one("exclude_input_in_output", stream)
    if stream and echo:
        message = "A stream has no prompt in it; leave exclude_input_in_output out."
        raise invalid("exclude_input_in_output", message, "unsupported")
    fields = _sampling(one("sampling_parameters", "{}"), parameters)
    fields |= {"model": model, "prompt": list(inputs["text_input"]), "stream": stream, "echo": echo}
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise invalid("outputs", f"There is no output {unknown[0]!r}; there are {', '.join(OUTPUTS)}.")
    extra = (name for name in OUTPUTS if f"return_{name}" in INPUTS and one(f"return_{name}", False))
    return Asked(build(CompletionBody, fields), request_id, tuple(dict.fromkeys(outputs)) or ("text_output", *extra))


def _sampling(text: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A completion's fields from the input sampling_parameters and the request's parameters."""
    try:
        sampling = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        sampling = None
    if not isinstance(sampling, dict):
        raise invalid("sampling_parameters", "sampling_parameters must be a JSON object.")
    own = {name: value for name, value in parameters.items() if name not in _SEQUENCE or value}
    if "timeout" in own:  # Triton's has another unit
        if type(own["timeout"]) is not int or not 0 < own["timeout"] < 2**63:
            raise invalid("timeout", "timeout must be a whole number of microseconds.")
        own["timeout"] /= _MICROSECONDS
    if twice := own.keys() & sampling.keys():
        raise invalid(min(twice), f"{min(twice)} is given twice, in parameters and in sampling_parameters.")
    fields = own | sampling
    if refused := fields.keys() & (_NOT_HERE | _SEQUENCE):
        raise invalid(min(refused), f"{min(refused)} is not supported in this protocol.", "unsupported")
    return fields
