"""The JSON of answers, whole and streamed, in both of OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.generation import Choice, Delta

DONE = b"data: [DONE]\n\n"


def event(document: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


class CompletionShape:
    """Answers of /v1/completions. `ids`: add `token_ids` to every choice."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: str, ids: bool, include_usage: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._ids = ids
        self._include_usage = include_usage

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], ids: Sequence[list[int]]) -> bytes:
        """The body of an answer that is not streamed."""
        document = self._document(self.whole_object)
        document["choices"] = [
            self._choice(self._whole_text(text), choice.index, choice.finish_reason, token_ids)
            for choice, text, token_ids in zip(choices, texts, ids, strict=True)
        ]
        document["usage"] = usage(choices)
        return msgspec.json.encode(document)

    def chunks(self, deltas: Iterable[Delta]) -> bytes:
        """The events for what arrived; nothing for tokens whose text is still held back."""
        return b"".join(
            self._event([self._choice(self._delta_text(d), d.index, d.finish_reason, d.token_ids)], None)
            for d in deltas
            if d.text or d.finish_reason or self._ids
        )

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The events that end a stream."""
        return (self._event([], usage(choices)) if self._include_usage else b"") + DONE

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        document = self._document(self.chunk_object)
        document["choices"] = choices
        if self._include_usage:
            document["usage"] = usage
        return event(document)

    def _document(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, text: dict[str, Any], index: int, finish: str | None, token_ids: list[int]) -> dict[str, Any]:
        choice = {"index": index, **text, "logprobs": None, "finish_reason": finish}
        if self._ids:
            choice["token_ids"] = token_ids
        return choice

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta_text(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}


class ChatShape(CompletionShape):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    _role_sent = False

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta_text(self, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text or not self._role_sent else {}
        role = {} if self._role_sent else {"role": "assistant"}
        self._role_sent = True
        return {"delta": role | content}


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """The token counts of an answer over all its choices."""
    prompt = sum(len(choice.request.prompt) for choice in choices)
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in choices)},
    }
