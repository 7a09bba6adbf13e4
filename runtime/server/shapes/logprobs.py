"""Log probabilities in the shapes that clients know: OpenAI's of chats and of completions, vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.engine.types import Logprobs
from llmkit.runtime.server.generation import Echo

_LEAST = -9999.0  # JSON has no minus infinity

Told = Sequence[tuple[int, Logprobs | None]]  # tokens, and what is known of them; nothing of a prompt's first


def chat_logprobs(tokenizer: Tokenizer, tokens: Told, count: int) -> dict[str, Any]:
    """`logprobs` of a chat's choice, with `count` alternatives a token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": max(logprob, _LEAST)}

    content = [
        {**entry(token, told.own), "top_logprobs": [entry(*other) for other in told.top[:count]]}
        for token, told in tokens
        if told is not None
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`logprobs` of a completion's choice, whose tokens come in pieces. echo: those of the prompt are the first."""

    def __init__(self, tokenizer: Tokenizer, count: int, echo: Echo | None) -> None:
        self._tokenizer, self._count = tokenizer, count
        self._hidden = 0 if echo is None else echo.hidden
        self._text = tokenizer.stream(skip_special_tokens=echo is None)
        self._offset = 0

    def add(self, tokens: Told) -> dict[str, Any]:
        """The next tokens' object. An alternative that reads as a likelier one is left out: the shape is by text."""
        offsets = []
        for token, _ in tokens:
            offsets.append(self._offset)
            self._offset += 0 if self._hidden else len(self._text.add([token]))
            self._hidden = max(0, self._hidden - 1)
        return {
            "tokens": [self._name(token) for token, _ in tokens],
            "token_logprobs": [None if told is None else max(told.own, _LEAST) for _, told in tokens],
            "top_logprobs": [None if told is None else self._top(token, told) for token, told in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: int, told: Logprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for other, logprob in [*told.top[: self._count], (token, told.own)]:
            top.setdefault(self._name(other), max(logprob, _LEAST))
        return top

    def _name(self, token: int) -> str:
        """The text, or where that is no whole character the bytes, as OpenAI writes them."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], told: Sequence[Logprobs], count: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id, the prompt's own always. A rank is null where it is not known."""

    def entry(token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        text = tokenizer.token_bytes(token).decode(errors="replace")
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": text}

    entries: list[dict[str, Any] | None] = [None]
    for token, one in zip(prompt[1:], told, strict=True):
        ranks = {other: rank for rank, (other, _) in enumerate(one.top, start=1)}
        here = {str(token): entry(token, one.own, ranks.get(token))}
        for other, logprob in one.top[:count]:
            here.setdefault(str(other), entry(other, logprob, ranks[other]))
        entries.append(here)
    return entries
