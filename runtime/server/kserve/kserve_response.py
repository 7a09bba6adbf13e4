"""Responses of the Open Inference Protocol."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.kserve.kserve_request import KserveRequest
from llmkit.runtime.server.kserve.kserve_tensors import OUTPUTS, pack_values
from llmkit.runtime.server.responses.response_builder import SERVER_SENT_EVENTS, sse_event

VERSION = "1"  # of every model


class InferResponseBuilder:
    """Builds responses of infer. They are never streamed."""

    def __init__(self, request: KserveRequest) -> None:
        self.id = f"infer-{uuid.uuid4().hex}"
        # Bytes of JSON in a response with binary data; set by full_response.
        self.json_length: int | None = None
        self._request = request

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        """Return JSON, followed by the data of the outputs that the client wants in binary."""
        outputs: list[dict[str, Any]] = []
        binary_data = b""
        for name in self._request.outputs:
            values = [
                _output_value(name, choice, answer)
                for choice, answer in zip(choices, answers, strict=True)
            ]
            output: dict[str, Any] = {
                "name": name,
                "datatype": OUTPUTS[name],
                "shape": [len(values)],
            }
            if name in self._request.binary_outputs:
                packed = pack_values(OUTPUTS[name], values)
                output["parameters"] = {"binary_data_size": len(packed)}
                binary_data += packed
            else:
                output["data"] = values
            outputs.append(output)
        head = msgspec.json.encode(_response_head(self._request) | {"outputs": outputs})
        self.json_length = len(head) if self._request.binary_outputs else None
        return head + binary_data


class GenerateResponseBuilder:
    """Builds responses of generate and generate_stream.

    With one answer each output is a value; with several answers it is a list.
    """

    stream_format = SERVER_SENT_EVENTS

    def __init__(self, request: KserveRequest) -> None:
        self.id = f"generate-{uuid.uuid4().hex}"
        self._request = request

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        """Return the JSON of a response that is not streamed."""
        return msgspec.json.encode(self._document(list(zip(choices, answers, strict=True))))

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        """Return one event per delta that has text or a finish reason."""
        visible = [delta for delta in deltas if delta.text or delta.finish_reason]
        all_finished = all(choice.finish_reason for choice in choices)
        events = b""
        for delta in visible:
            document = self._document([(choices[delta.index], delta)])
            if len(choices) > 1:
                document["index"] = delta.index
            document["triton_final_response"] = all_finished and delta is visible[-1]
            events += sse_event(document)
        return events

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        """Return nothing: the protocol has no last event."""
        return b""

    def error_event(self, error: ApiError) -> bytes:
        """Return the event for an error in the middle of a stream."""
        return sse_event(error.flat_envelope())

    def _document(self, pairs: list[tuple[Choice, Delta]]) -> dict[str, Any]:
        document = _response_head(self._request)
        for name in self._request.outputs:
            values = [_output_value(name, choice, delta) for choice, delta in pairs]
            document[name] = values[0] if len(values) == 1 else values
        return document


def _response_head(request: KserveRequest) -> dict[str, Any]:
    head: dict[str, Any] = {"id": request.id} if request.id else {}
    return head | {"model_name": request.completion.model, "model_version": VERSION}


def _output_value(name: str, choice: Choice, delta: Delta) -> str | int:
    match name:
        case "text_output":
            return delta.text
        case "finish_reason":
            return delta.finish_reason or ""
        case "num_input_tokens":
            return len(choice.request.prompt_token_ids)
        case _:
            return len(delta.token_ids)
