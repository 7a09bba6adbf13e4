"""Log probabilities in the formats of OpenAI's chats, OpenAI's completions and vLLM's prompts."""

from __future__ import annotations

import bisect
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


class TextLogprobs:
    """Finds the tokens of a response's text among all tokens that the model wrote.

    Reasoning, calls and the marks around them have tokens, too, and text may be held back. So the
    parts of the answer are looked up in the text of the tokens, in their order.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._tokenizer = tokenizer
        self._count = count  # alternatives for each token
        self._detokenizer = tokenizer.stream(skip_special_tokens=True)
        self._text = ""  # of all tokens
        self._tokens: list[tuple[int, Logprobs | None]] = []
        self._ends: list[int] = []  # of the tokens in `_text`
        self._offset = 0  # in `_text`, of what no part has yet
        self._num_passed = 0  # tokens that belong to a part, or stand before one

    def add(self, tokens: TokenLogprobs) -> None:
        """Add the next tokens."""
        for token_id, logprobs in tokens:
            self._text += self._detokenizer.add([token_id])
            self._tokens.append((token_id, logprobs))
            self._ends.append(len(self._text))

    def take(self, text: str) -> list[dict[str, Any]]:
        """Return the entries of the tokens of `text`, the next part of the answer."""
        start = self._text.find(text, self._offset)
        if start < 0 and self._ends:
            # The end of an answer may be bytes that are no complete character.
            self._text += self._detokenizer.flush()
            self._ends[-1] = len(self._text)
            start = self._text.find(text, self._offset)
        if start < 0:
            return []
        first = self._num_passed
        if start > self._offset:
            first = max(first, bisect.bisect_right(self._ends, start))
            # Tokens without a text of their own begin the character that the next one completes.
            while first > self._num_passed and self._width(first - 1) == 0:
                first -= 1
        self._offset = start + len(text)
        # A token that `text` has a piece of only belongs to it.
        last = bisect.bisect_left(self._ends, self._offset)
        self._num_passed = max(first, min(last + 1, len(self._tokens)))
        tokens = self._tokens[first : self._num_passed]
        entries: list[dict[str, Any]] = chat_logprobs(self._tokenizer, tokens, self._count)[
            "content"
        ]
        return entries

    def _width(self, index: int) -> int:
        """The number of characters that a token adds to the text."""
        return self._ends[index] - (self._ends[index - 1] if index else 0)

    def skip(self, text: str) -> None:
        """Pass the tokens of `text`, a part without log probabilities."""
        self.take(text)


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
