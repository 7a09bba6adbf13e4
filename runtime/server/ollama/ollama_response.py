"""Responses of Ollama's API, in full and streamed as lines of JSON."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.embedding_requests import embedding_vector
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.ollama.model_facts import timestamp
from llmkit.runtime.server.responses.call_arguments import whole_arguments
from llmkit.runtime.server.responses.logprobs_response import chat_logprobs
from llmkit.runtime.server.responses.response_builder import JSON_LINES, json_line
from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)

_DONE_REASONS = {"tool_calls": "stop"}


class OllamaChatResponseBuilder:
    """Builds a response of /api/chat, which has one choice. A ResponseBuilder.

    A call is sent when it is complete, because its arguments are an object.
    """

    stream_format = JSON_LINES

    def __init__(
        self, model: str, tokenizer: Tokenizer, num_logprobs: int | None, arrival_time: float
    ) -> None:
        """model: as the request names it. num_logprobs: see OllamaRequest.

        arrival_time: of the request, perf_counter seconds.
        """
        self.id = f"ollama-{uuid.uuid4().hex}"
        self._model = model
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs
        self._arrival_time = arrival_time
        self._open_call: ToolCallPart | None = None  # its pieces so far
        self._num_calls = 0
        self._finish_reason: str | None = None

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        answer = answers[0]
        self._finish_reason = answer.finish_reason
        document = self._document(self._content(self._whole_parts(answer.parts, final=True)))
        document |= self._logprobs(answer)
        return msgspec.json.encode(document | self._final_fields(choices[0], answer.token_ids))

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        lines = []
        for delta in deltas:
            self._finish_reason = delta.finish_reason
            parts = self._whole_parts(delta.parts, final=delta.finish_reason is not None)
            logprobs = self._logprobs(delta)
            if parts or logprobs.get("logprobs"):
                document = self._document(self._content(parts)) | logprobs | {"done": False}
                lines.append(json_line(document))
            self._record(delta)
        return b"".join(lines)

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        document = self._document(self._content([]))
        return json_line(document | self._final_fields(choices[0], self._streamed_token_ids()))

    def error_event(self, error: ApiError) -> bytes:
        return json_line(error.flat_envelope())

    def _content(self, parts: Sequence[OutputPart]) -> dict[str, Any]:
        """The fields of a document that hold the answer's `parts`."""
        message: dict[str, Any] = {"role": "assistant", "content": _text(parts)}
        thinking = _thinking(parts)
        if thinking:
            message["thinking"] = thinking
        calls = [self._call(part) for part in parts if isinstance(part, ToolCallPart)]
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _record(self, delta: Delta) -> None:
        """Keep what the final line of a stream needs."""

    def _streamed_token_ids(self) -> list[int]:
        return []

    def _context(self, choice: Choice, token_ids: Sequence[int]) -> dict[str, Any]:
        """The conversation so far, in the API's older form."""
        return {}

    def _whole_parts(self, parts: Sequence[OutputPart], final: bool) -> list[OutputPart]:
        """Return `parts` with the pieces of each call joined; hold back a call that is not whole.

        final: no parts follow, so a call that was cut is returned, too.
        """
        held_back = [self._open_call] if self._open_call is not None else []
        self._open_call = None
        joined = join_parts([*held_back, *parts])
        last = joined[-1] if joined else None
        if isinstance(last, ToolCallPart) and not last.is_complete and not final:
            self._open_call = last
            joined.pop()
        return joined

    def _call(self, call: ToolCallPart) -> dict[str, Any]:
        self._num_calls += 1
        function = {
            "index": self._num_calls - 1,
            "name": call.name,
            "arguments": msgspec.Raw(whole_arguments(call)),
        }
        return {"id": call.id, "function": function}

    def _document(self, content: dict[str, Any]) -> dict[str, Any]:
        return {"model": self._model, "created_at": timestamp(time.time()), **content}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        if self._num_logprobs is None:
            return {}
        logprobs = chat_logprobs(self._tokenizer, delta.tokens, self._num_logprobs)
        return {"logprobs": logprobs["content"]}

    def _final_fields(self, choice: Choice, token_ids: Sequence[int]) -> dict[str, Any]:
        reason = self._finish_reason or "stop"
        times = choice.times
        started = times.sent + times.queue_s
        return {
            "done": True,
            "done_reason": _DONE_REASONS.get(reason, reason),
            **self._context(choice, token_ids),
            "total_duration": nanoseconds(time.perf_counter() - self._arrival_time),
            # The model is loaded: this is the time until it could begin.
            "load_duration": nanoseconds(started - self._arrival_time),
            "prompt_eval_count": len(choice.request.prompt_token_ids),
            "prompt_eval_duration": nanoseconds(times.prefill_s),
            "eval_count": choice.completion_tokens,
            "eval_duration": nanoseconds(times.decode_s),
        }


class OllamaGenerateResponseBuilder(OllamaChatResponseBuilder):
    """Builds a response of /api/generate. A ResponseBuilder."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        num_logprobs: int | None,
        arrival_time: float,
        returns_context: bool,
    ) -> None:
        """returns_context: whether the last document has the token ids of prompt and answer."""
        super().__init__(model, tokenizer, num_logprobs, arrival_time)
        self._returns_context = returns_context
        self._token_ids: list[int] = []

    def _content(self, parts: Sequence[OutputPart]) -> dict[str, Any]:
        thinking = _thinking(parts)
        return {"response": _text(parts), **({"thinking": thinking} if thinking else {})}

    def _record(self, delta: Delta) -> None:
        if self._returns_context:
            self._token_ids += delta.token_ids

    def _streamed_token_ids(self) -> list[int]:
        return self._token_ids

    def _context(self, choice: Choice, token_ids: Sequence[int]) -> dict[str, Any]:
        if not self._returns_context:
            return {}
        return {"context": [*choice.request.prompt_token_ids, *token_ids]}


class OllamaEmbedResponseBuilder:
    """Builds a response of /api/embed or, with `single`, of /api/embeddings."""

    def __init__(
        self, model: str, dimensions: int | None, arrival_time: float, single: bool = False
    ) -> None:
        self.id = f"ollama-{uuid.uuid4().hex}"
        self._model = model
        self._dimensions = dimensions
        self._arrival_time = arrival_time
        self._single = single

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        vectors = [embedding_vector(answer, self._dimensions).tolist() for answer in answers]
        if self._single:
            return msgspec.json.encode({"embedding": vectors[0]})
        times = choices[0].times
        document = {
            "model": self._model,
            "embeddings": vectors,
            "total_duration": nanoseconds(time.perf_counter() - self._arrival_time),
            "load_duration": nanoseconds(times.sent + times.queue_s - self._arrival_time),
            "prompt_eval_count": sum(len(choice.request.prompt_token_ids) for choice in choices),
        }
        return msgspec.json.encode(document)


def empty_response(path: str, model: str, reason: str) -> dict[str, Any]:
    """Return the response to a request that only loads or unloads `model`; `reason` says which."""
    match path:
        case "/api/embed":
            return {"model": model, "embeddings": []}
        case "/api/embeddings":
            return {"embedding": []}
        case "/api/chat":
            content: dict[str, Any] = {"message": {"role": "assistant", "content": ""}}
        case _:
            content = {"response": ""}
    created_at = timestamp(time.time())
    return {
        "model": model,
        "created_at": created_at,
        **content,
        "done": True,
        "done_reason": reason,
    }


def nanoseconds(seconds: float) -> int:
    """A duration as Ollama writes it; an answer from a cache has no times of its own."""
    return max(0, round(seconds * 1e9))


def _text(parts: Iterable[OutputPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def _thinking(parts: Iterable[OutputPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, ReasoningPart))
