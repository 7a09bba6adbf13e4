"""Compares what two models predict for the tokens of one answer (teacher forcing).

Both get the prompt and the answer of the model that answered the client, and return the log
probabilities of its tokens (vLLM's `prompt_logprobs`). Each gets the prompt by its own chat
template; the tokens of the answer must be the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.async_waits import run_in_thread
from llmkit.runtime.server.shadow.logprob_divergence import AnswerDivergence, answer_divergence
from llmkit.runtime.server.shadow.shadow_answer import Answer
from llmkit.runtime.server.shadow.shadow_client import ShadowClient, ShadowFailedError
from llmkit.runtime.server.tiers.url_logprobs import COMPLETIONS, parse_json

_TOKENIZE = "/tokenize"
_TOP_LOGPROBS = 20  # at each position; servers allow this many by default
# Responses have log probabilities of the prompt, too.
_MAX_TOKENS = 4096
_CHAT_FIELDS = ("messages", "tools", "chat_template_kwargs", "continue_final_message")


class IncomparableError(Exception):
    """An answer has no KL divergence. `reason` is a word for metrics."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class _Entry(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    prompt_logprobs: list[msgspec.Raw] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    prompt_logprobs: list[msgspec.Raw] | None = None


async def compare_predictions(
    model: ShadowClient, shadow: ShadowClient, body: Mapping[str, Any], answer: Answer
) -> AnswerDivergence:
    """Compare the predictions for the tokens of `answer`, which `model` gave to `body`.

    Raises IncomparableError.
    """
    if answer.tool_calls:
        raise IncomparableError("tool_calls")
    if answer.reasoning:
        raise IncomparableError("reasoning")
    if not answer.text:
        raise IncomparableError("empty")
    try:
        tokens = await asyncio.gather(
            *(_tokens_of_answer(one, answer) for one in (model, shadow)),
        )
        prompts = await asyncio.gather(*(_tokens_of_prompt(one, body) for one in (model, shadow)))
    except ShadowFailedError as error:
        raise IncomparableError("tokenize") from error
    if tokens[0] != tokens[1]:
        raise IncomparableError("tokenizer")
    if max(map(len, prompts)) + len(tokens[0]) > _MAX_TOKENS:
        raise IncomparableError("too_long")
    try:
        p, q = await asyncio.gather(
            _predictions(model, prompts[0], tokens[0]), _predictions(shadow, prompts[1], tokens[1])
        )
    except ShadowFailedError as error:
        raise IncomparableError("prompt_logprobs") from error
    return await run_in_thread(lambda: answer_divergence(p, q))


async def _tokens_of_answer(client: ShadowClient, answer: Answer) -> list[int]:
    return await _tokenize(client, {"prompt": answer.text, "add_special_tokens": False})


async def _tokens_of_prompt(client: ShadowClient, body: Mapping[str, Any]) -> list[int]:
    """The token ids of a chat, with the beginning of the answer, or of a completion's prompt."""
    if "messages" not in body:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return await _tokenize(client, {"prompt": prompt})
        return list(prompt)
    fields = {name: body[name] for name in _CHAT_FIELDS if body.get(name) is not None}
    continues = bool(body.get("continue_final_message"))
    return await _tokenize(client, {**fields, "add_generation_prompt": not continues})


async def _tokenize(client: ShadowClient, fields: Mapping[str, Any]) -> list[int]:
    document = parse_json(await client.post(_TOKENIZE, fields))
    tokens = document.get("tokens") if isinstance(document, dict) else None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ShadowFailedError(f"{_TOKENIZE} returned no tokens")
    return tokens


async def _predictions(
    client: ShadowClient, prompt: Sequence[int], answer: Sequence[int]
) -> list[dict[str, float]]:
    """The log probabilities by token id at each position of the answer."""
    request = {
        "prompt": [*prompt, *answer],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": _TOP_LOGPROBS,
    }
    content = await client.generate(COMPLETIONS, request)
    predictions = await run_in_thread(lambda: _parse_predictions(content, len(answer)))
    if len(predictions) != len(answer):
        raise ShadowFailedError("log probabilities are missing")
    return predictions


def _parse_predictions(content: bytes, num_tokens: int) -> list[dict[str, float]]:
    """The predictions of the last tokens. Those of the other tokens are not decoded."""
    try:
        document = msgspec.json.decode(content, type=_Completion)
        entries = document.choices[0].prompt_logprobs or document.prompt_logprobs or []
        decoder = msgspec.json.Decoder(dict[str, _Entry])
        return [
            {token: entry.logprob for token, entry in decoder.decode(position).items()}
            for position in entries[-num_tokens:]
        ]
    except (msgspec.MsgspecError, IndexError) as error:
        raise ShadowFailedError("the log probabilities cannot be read") from error
