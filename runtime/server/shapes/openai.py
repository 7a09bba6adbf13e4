"""The JSON of answers, whole and streamed: what every shape has, and OpenAI's two of completions and chats."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.server.bodies.base import GenerationBody
from llmkit.runtime.server.generation import Choice, Delta
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.shapes.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from llmkit.runtime.server.text.calls import Call
from llmkit.runtime.server.text.parts import Part, Reasoning

DONE = b"data: [DONE]\n\n"


class Whole(Protocol):
    """How answers that are not streamed look to a client. One object makes one answer."""

    id: str

    def whole(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        """The body of an answer that is not streamed."""
        ...


class Shape(Whole, Protocol):
    """How answers look, streamed or not."""

    def chunks(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        """The events for what arrived; nothing for tokens whose text is still held back."""
        ...

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The events that end a stream."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """The event that ends a stream that goes wrong."""
        ...


def event(document: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(document) + b"\n\n"


class CompletionShape:
    """Answers of /v1/completions."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    one_prompt = False

    def __init__(self, body: GenerationBody, tokenizer: Tokenizer) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._body = body
        self._tokenizer = tokenizer
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def whole(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        document = self._document(self.whole_object)
        document["choices"] = entries = []
        for choice, answer in zip(choices, answers, strict=True):
            entries.append(self._choice(choice, answer, self._answer(answer)))
            if (count := self._body.prompt_logprobs) is not None:
                told = prompt_logprobs(self._tokenizer, choice.request.prompt, answer.prompt_logprobs or [], count)
                (document if self.one_prompt else entries[-1])["prompt_logprobs"] = told
        document["usage"] = self._usage(choices)
        return msgspec.json.encode(document)

    def chunks(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        return b"".join(
            self._event([self._choice(choices[delta.index], delta, self._delta(delta))], None)
            for delta in deltas
            if delta.parts or delta.finish_reason or delta.tokens or self._body.return_token_ids
        )

    def last(self, choices: Sequence[Choice]) -> bytes:
        return (self._event([], self._usage(choices)) if self._body.include_usage else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(error.envelope())

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        document = self._document(self.chunk_object)
        document["choices"] = choices
        if self._body.include_usage:
            document["usage"] = usage
        return event(document)

    def _document(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._body.model}

    def _choice(self, choice: Choice, delta: Delta, said: dict[str, Any]) -> dict[str, Any]:
        count = self._body.told_logprobs
        told = None if count is None else self._told(choice, delta, count)
        entry = {"index": delta.index, **said, "logprobs": told, "finish_reason": delta.finish_reason}
        if self._body.return_token_ids:
            entry["token_ids"] = delta.token_ids
        return entry

    def _told(self, choice: Choice, delta: Delta, count: int) -> dict[str, Any]:
        if delta.index not in self._logprobs:
            self._logprobs[delta.index] = CompletionLogprobs(self._tokenizer, count, choice.echo)
        return self._logprobs[delta.index].add(delta.tokens)

    def _answer(self, answer: Delta) -> dict[str, Any]:
        return {"text": answer.text}

    def _delta(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return usage(choices, self._body.n or 1)


class ChatShape(CompletionShape):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    one_prompt = True

    def __init__(self, body: GenerationBody, tokenizer: Tokenizer) -> None:
        super().__init__(body, tokenizer)
        self._calls: dict[int, int] = {}  # how many each choice has made; no entry before its first delta

    def _told(self, choice: Choice, delta: Delta, count: int) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, delta.tokens, count)

    def _answer(self, answer: Delta) -> dict[str, Any]:
        calls = [_call(part) for part in answer.parts if isinstance(part, Call)]
        text = answer.text
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thought := _thought(answer.parts):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _delta(self, delta: Delta) -> dict[str, Any]:
        first = delta.index not in self._calls
        made = self._calls.setdefault(delta.index, 0)
        said: dict[str, Any] = {"role": "assistant"} if first else {}
        text, thought = delta.text, _thought(delta.parts)
        if text or (first and not thought):
            said["content"] = text
        if thought:
            said["reasoning_content"] = thought
        calls = [part for part in delta.parts if isinstance(part, Call)]
        if calls:
            said["tool_calls"] = [{"index": made + index, **_call(call)} for index, call in enumerate(calls)]
            self._calls[delta.index] += len(calls)
        return {"delta": said}


def _thought(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Reasoning))


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage(choices: Sequence[Choice], count: int) -> dict[str, Any]:
    """The token counts of an answer over all its choices; each `count` of them answer one prompt, which counts once."""
    prompts = choices[::count]
    prompt = sum(len(choice.request.prompt) for choice in prompts)
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }
