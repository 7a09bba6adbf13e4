"""Responses of OpenAI's /v1/completions and /v1/chat/completions, in full and streamed."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import msgspec

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.responses.logprobs_response import (
    CompletionLogprobs,
    chat_logprobs,
    prompt_logprobs,
)
from llmkit.runtime.server.responses.response_builder import SERVER_SENT_EVENTS, sse_event
from llmkit.runtime.server.schemas.base_request import GenerationRequest
from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class CompletionResponseBuilder:
    """Builds responses of /v1/completions. A ResponseBuilder."""

    stream_format = SERVER_SENT_EVENTS
    id_prefix = "cmpl"
    full_object = "text_completion"  # the field `object` of a full response
    chunk_object = "text_completion"  # the field `object` of a chunk of a stream
    single_prompt = False  # whether all choices answer one prompt

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._request = request
        self._tokenizer = tokenizer
        self._num_logprobs = request.num_logprobs
        self._includes_usage = request.include_usage
        self._includes_continuous_usage = request.include_continuous_usage
        self._returns_token_ids = bool(request.return_token_ids)
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by index of the choice
        # In the chunks so far, by index of the choice; counted for continuous usage only.
        self._num_tokens: Counter[int] = Counter()

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        document = self._document(self.full_object)
        entries: list[dict[str, Any]] = []
        document["choices"] = entries
        for choice, answer in zip(choices, answers, strict=True):
            entry = self._choice_entry(choice, answer, self._full_content(answer))
            entries.append(entry)
            count = self._request.prompt_logprobs
            if count is not None:
                holder = document if self.single_prompt else entry
                holder["prompt_logprobs"] = prompt_logprobs(
                    self._tokenizer,
                    choice.request.prompt_token_ids,
                    answer.prompt_logprobs or [],
                    count,
                )
        document["usage"] = _usage(choices, self._request.n or 1)
        return msgspec.json.encode(document)

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        events = []
        for delta in deltas:
            choice = choices[delta.index]
            if self._includes_continuous_usage:
                self._num_tokens[delta.index] += len(delta.token_ids)
            has_content = delta.parts or delta.finish_reason or delta.tokens
            if has_content or self._returns_token_ids:
                entry = self._choice_entry(choice, delta, self._delta_content(delta))
                usage = None
                if self._includes_continuous_usage:
                    num_prompt_tokens = len(choice.request.prompt_token_ids)
                    usage = _token_counts(num_prompt_tokens, self._num_tokens[delta.index])
                events.append(self._chunk([entry], usage))
        return b"".join(events)

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        if not self._includes_usage:
            return DONE
        return self._chunk([], _usage(choices, self._request.n or 1)) + DONE

    def error_event(self, error: ApiError) -> bytes:
        return sse_event(error.envelope())

    def _chunk(self, entries: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        usage_field = b',"usage":' + _encode(usage) if self._includes_usage else b""
        return b"%b%b%b}\n\n" % (self._chunk_start, _encode(entries), usage_field)

    @cached_property
    def _chunk_start(self) -> bytes:
        """The event of a chunk up to its choices: the same for all chunks of a stream."""
        document = msgspec.json.encode(self._document(self.chunk_object))
        return b"data: " + document.removesuffix(b"}") + b',"choices":'

    def _document(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
        }

    def _choice_entry(
        self, choice: Choice, delta: Delta, content: dict[str, Any]
    ) -> dict[str, Any]:
        count = self._num_logprobs
        entry = {
            "index": delta.index,
            **content,
            "logprobs": None if count is None else self._logprobs_entry(choice, delta, count),
            "finish_reason": delta.finish_reason,
        }
        if self._returns_token_ids:
            entry["token_ids"] = delta.token_ids
        return entry

    def _logprobs_entry(self, choice: Choice, delta: Delta, count: int) -> dict[str, Any]:
        if delta.index not in self._logprobs:
            self._logprobs[delta.index] = CompletionLogprobs(self._tokenizer, count, choice.echo)
        return self._logprobs[delta.index].add(delta.tokens)

    def _full_content(self, answer: Delta) -> dict[str, Any]:
        """The fields of a choice that hold its complete text."""
        return {"text": answer.text}

    def _delta_content(self, delta: Delta) -> dict[str, Any]:
        """The fields of a choice in a stream that hold its new text."""
        return {"text": delta.text}


class ChatCompletionResponseBuilder(CompletionResponseBuilder):
    """Builds responses of /v1/chat/completions. A ResponseBuilder."""

    id_prefix = "chatcmpl"
    full_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    single_prompt = True

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        super().__init__(request, tokenizer)
        # Tool calls so far, by index of the choice; there is no entry before its first delta.
        self._num_tool_calls: dict[int, int] = {}

    def _logprobs_entry(self, choice: Choice, delta: Delta, count: int) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, delta.tokens, count)

    def _full_content(self, answer: Delta) -> dict[str, Any]:
        parts = join_parts(answer.parts)
        calls = [_tool_call(part) for part in parts if isinstance(part, ToolCallPart)]
        text = answer.text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if calls else ""),
            "refusal": None,
        }
        reasoning = _reasoning(answer.parts)
        if reasoning:
            message |= _reasoning_fields(reasoning)
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _delta_content(self, delta: Delta) -> dict[str, Any]:
        first = delta.index not in self._num_tool_calls
        self._num_tool_calls.setdefault(delta.index, 0)
        message: dict[str, Any] = {"role": "assistant"} if first else {}
        text = ""
        reasoning = ""
        calls = []
        for part in join_parts(delta.parts):
            if isinstance(part, TextPart):
                text += part.text
            elif isinstance(part, ReasoningPart):
                reasoning += part.text
            else:
                self._num_tool_calls[delta.index] += part.is_first
                calls.append(_tool_call_delta(self._num_tool_calls[delta.index] - 1, part))
        if text or (first and not reasoning):
            message["content"] = text
        if reasoning:
            message |= _reasoning_fields(reasoning)
        if calls:
            message["tool_calls"] = calls
        return {"delta": message}


def _reasoning(parts: Sequence[OutputPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, ReasoningPart))


def _reasoning_fields(reasoning: str) -> dict[str, Any]:
    """Both names of a message's reasoning: vLLM's clients read one or the other."""
    return {"reasoning": reasoning, "reasoning_content": reasoning}


def _tool_call(call: ToolCallPart) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _tool_call_delta(index: int, call: ToolCallPart) -> dict[str, Any]:
    """A piece of call `index` of a choice, in a stream. Only the first piece has id and name."""
    if call.is_first:
        return {"index": index, **_tool_call(call)}
    return {"index": index, "function": {"arguments": call.arguments}}


def _usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """The token counts of all choices; `n` choices answer one prompt, which is counted once."""
    first_choices = choices[::n]
    prompt_tokens = sum(len(choice.request.prompt_token_ids) for choice in first_choices)
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        **_token_counts(prompt_tokens, completion_tokens),
        "prompt_tokens_details": {
            "cached_tokens": sum(choice.cached_tokens for choice in first_choices)
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)
        },
    }


def _token_counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
