"""Answers of the Open Inference Protocol."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.generation import Choice, Delta
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.kserve.body import Asked
from llmkit.runtime.server.kserve.tensors import OUTPUTS, packed
from llmkit.runtime.server.shapes.openai import event

VERSION = "1"  # of every model


class InferShape:
    """Answers of infer; they come whole."""

    def __init__(self, asked: Asked) -> None:
        self.id = f"infer-{uuid.uuid4().hex}"
        self.header: int | None = None  # bytes of JSON in an answer with binary data
        self._asked = asked

    def whole(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        outputs, tail = list[dict[str, Any]](), b""
        for name in self._asked.outputs:
            values = [_value(name, *one) for one in zip(choices, answers, strict=True)]
            output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": [len(values)]}
            if name in self._asked.binary:
                raw = packed(OUTPUTS[name], values)
                output["parameters"], tail = {"binary_data_size": len(raw)}, tail + raw
            else:
                output["data"] = values
            outputs.append(output)
        head = msgspec.json.encode(_named(self._asked) | {"outputs": outputs})
        self.header = len(head) if self._asked.binary else None
        return head + tail


class GenerateShape:
    """Answers of generate and generate_stream: a value for one answer, a list for several."""

    def __init__(self, asked: Asked) -> None:
        self.id = f"generate-{uuid.uuid4().hex}"
        self._asked = asked

    def whole(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        return msgspec.json.encode(self._document(list(zip(choices, answers, strict=True))))

    def chunks(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        shown = [delta for delta in deltas if delta.text or delta.finish_reason]
        ended = all(choice.finish_reason for choice in choices)
        several, events = len(choices) > 1, b""
        for delta in shown:
            document = self._document([(choices[delta.index], delta)])
            document |= {"index": delta.index} if several else {}
            events += event(document | {"triton_final_response": ended and delta is shown[-1]})
        return events

    def last(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def failed(self, error: ApiError) -> bytes:
        return event(error.flat())

    def _document(self, pairs: list[tuple[Choice, Delta]]) -> dict[str, Any]:
        lists = {name: [_value(name, *pair) for pair in pairs] for name in self._asked.outputs}
        return _named(self._asked) | {name: one[0] if len(one) == 1 else one for name, one in lists.items()}


def _named(asked: Asked) -> dict[str, Any]:
    own = {"id": asked.id} if asked.id else {}
    return own | {"model_name": asked.body.model, "model_version": VERSION}


def _value(name: str, choice: Choice, delta: Delta) -> str | int:
    match name:
        case "text_output":
            return delta.text
        case "finish_reason":
            return delta.finish_reason or ""
        case "num_input_tokens":
            return len(choice.request.prompt)
        case _:
            return len(delta.token_ids)
