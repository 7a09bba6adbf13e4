"""Log probabilities in the formats of OpenAI's chats, OpenAI's completions and vLLM's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.server.choice import Echo

_MIN_LOGPROB = -9999.0  # JSON has no minus infinity

# Token ids with their log probabilities; the first token of a prompt has none.
TokenLogprobs = Sequence[tuple[int, Logprobs | None]]


def chat_logprobs(tokenizer: Tokenizer, tokens: TokenLogprobs, count: int) -> dict[str, Any]:
    """Return `logprobs` of a chat's choice, with `count` alternatives for each token."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {
            "token": data.decode(errors="replace"),
            "bytes": list(data),
            "logprob": max(logprob, _MIN_LOGPROB),
        }

    content = []
    for token_id, logprobs in tokens:
        if logprobs is not None:
            alternatives = [entry(*alternative) for alternative in logprobs.top[:count]]
            content.append({**entry(token_id, logprobs.logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Builds `logprobs` of a completion's choice, whose tokens arrive in pieces.

    With `echo` the tokens of the prompt come first.
    """

    def __init__(self, tokenizer: Tokenizer, count: int, echo: Echo | None) -> None:
        self._tokenizer = tokenizer
        self._count = count  # alternatives for each token
        # Leading tokens that the tokenizer added, which are not in the text.
        self._num_added_tokens = 0 if echo is None else echo.num_added_tokens
        self._detokenizer = tokenizer.stream(skip_special_tokens=echo is None)
        self._offset = 0  # of the next token in the text, in characters

    def add(self, tokens: TokenLogprobs) -> dict[str, Any]:
        """Return the `logprobs` object for the next tokens.

        The alternatives of a token are a dict by text: of those with the same text, it has only the
        most probable one.
        """
        offsets = []
        for token_id, _ in tokens:
            offsets.append(self._offset)
            if self._num_added_tokens:
                self._num_added_tokens -= 1
            else:
                self._offset += len(self._detokenizer.add([token_id]))
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        for token_id, logprobs in tokens:
            if logprobs is None:
                token_logprobs.append(None)
                top_logprobs.append(None)
            else:
                token_logprobs.append(max(logprobs.logprob, _MIN_LOGPROB))
                top_logprobs.append(self._top(token_id, logprobs))
        return {
            "tokens": [self._token_text(token_id) for token_id, _ in tokens],
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprobs: Logprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for alternative, logprob in [*logprobs.top[: self._count], (token_id, logprobs.logprob)]:
            top.setdefault(self._token_text(alternative), max(logprob, _MIN_LOGPROB))
        return top

    def _token_text(self, token_id: int) -> str:
        """The token's text, or its bytes in OpenAI's notation if they are not complete UTF-8."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    logprobs: Sequence[Logprobs],
    count: int,
) -> list[dict[str, Any] | None]:
    """Return vLLM's `prompt_logprobs`: for each token of the prompt, entries by token id.

    There is an entry for the prompt's own token and for each of `count` alternatives. The rank of a
    token that is not among the computed alternatives is unknown: null.
    """

    def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {
            "logprob": max(logprob, _MIN_LOGPROB),
            "rank": rank,
            "decoded_token": tokenizer.token_bytes(token_id).decode(errors="replace"),
        }

    entries: list[dict[str, Any] | None] = [None]
    for token_id, position in zip(prompt_token_ids[1:], logprobs, strict=True):
        ranks = {other: rank for rank, (other, _) in enumerate(position.top, start=1)}
        by_token = {str(token_id): entry(token_id, position.logprob, ranks.get(token_id))}
        for other, logprob in position.top[:count]:
            by_token.setdefault(str(other), entry(other, logprob, ranks[other]))
        entries.append(by_token)
    return entries
