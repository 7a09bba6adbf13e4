"""From a validated body to engine requests: chat template, tokens, limits, defaults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from llmkit.checkpoint.tokenizer import ChatTemplateError, Tokenizer
from llmkit.runtime.server.errors import ApiError, invalid
from llmkit.runtime.server.generation import Choice
from llmkit.runtime.server.messages import Add, Ready
from llmkit.runtime.server.protocol import ChatBody, CompletionBody, GenerationBody
from llmkit.runtime.server.state import State, TextSide

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat answer may fill the context
_LONG_TEXT_CHARS = 8192  # longer texts are tokenized in a thread, so that streams keep flowing


async def prepare_completion(state: State, body: CompletionBody, request_id: str, salt: str = "") -> list[Choice]:
    """One choice per prompt. ApiError 400 for what can never be run."""
    prompts = body.prompts
    state.check_room(len(prompts))
    tokenizer = state.text.tokenizer
    tokens = []
    for prompt in prompts:
        if isinstance(prompt, str):
            tokens.append(await _tokenized(len(prompt), lambda text=prompt: tokenizer.encode(text)))  # type: ignore[misc]
        else:
            tokens.append(prompt)
    return _choices(state, body, request_id, tokens, "prompt", body.output_limit or COMPLETION_MAX_TOKENS, salt)


async def prepare_chat(state: State, body: ChatBody, request_id: str, salt: str = "") -> list[Choice]:
    """The one choice of a conversation. ApiError 400 for what can never be run or the template refuses."""
    conversation = body.conversation
    state.check_room(1)
    tokenizer = state.text.tokenizer
    if tokenizer.chat_template is None:
        message = "The model has no chat template; use /v1/completions."
        raise ApiError(400, message, code="no_chat_template", param="messages")
    characters = sum(len(message["content"]) for message in conversation)
    try:
        tokens = await _tokenized(characters, lambda: _encode_chat(tokenizer, conversation))
    except ChatTemplateError as error:
        raise invalid("messages", f"The chat template refuses the messages: {error}", "chat_template") from None
    return _choices(state, body, request_id, [tokens], "messages", body.output_limit, salt)


def _encode_chat(tokenizer: Tokenizer, conversation: list[dict[str, str]]) -> list[int]:
    # The template writes the special tokens itself.
    return tokenizer.encode(tokenizer.render_chat(conversation), add_special_tokens=False)


async def _tokenized(characters: int, encode: Callable[[], list[int]]) -> list[int]:
    return encode() if characters < _LONG_TEXT_CHARS else await asyncio.to_thread(encode)


def _choices(
    state: State,
    body: GenerationBody,
    request_id: str,
    prompts: list[list[int]],
    param: str,
    limit: int | None,
    salt: str,
) -> list[Choice]:
    facts, text, stops = state.facts, state.text, body.stops
    adapter = None if body.model == state.model_name else body.model
    for tokens in prompts:
        _check_ids(tokens, facts.vocab_size, param)
        _check_length(len(tokens), limit, facts, param)
    _check_ids(body.stop_token_ids or [], facts.vocab_size, "stop_token_ids")
    return [
        Choice(
            msgspec.structs.replace(
                _request(body, f"{request_id}-{index}", tokens, limit or facts.max_model_len - len(tokens), text),
                salt=salt,
                adapter=adapter,
            ),
            index,
            text.tokenizer.stream(),
            stops,
        )
        for index, tokens in enumerate(prompts)
    ]


def _request(body: GenerationBody, request_id: str, tokens: list[int], limit: int, text: TextSide) -> Add:
    defaults = text.defaults
    return Add(
        id=request_id,
        prompt=tokens,
        max_tokens=limit,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=defaults.top_k if body.top_k is None else max(0, body.top_k),
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        priority=body.priority or 0,
    )


def _check_ids(tokens: list[int], vocab_size: int, param: str) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise invalid(param, f"Token id {wrong} is outside the vocabulary (0 to {vocab_size - 1}).", "invalid_token_id")


def _check_length(prompt: int, limit: int | None, facts: Ready, param: str) -> None:
    """ApiError unless the prompt and `limit` new tokens (at least one) fit into the context."""
    if prompt == 0:
        raise invalid(param, "The prompt is empty; at least one token is needed.")
    if prompt + (limit or 1) > facts.max_model_len:
        asked = f"{prompt} in the prompt and {limit or 'at least 1'} to generate"
        raise ApiError(
            400,
            f"The context of {facts.max_model_len} tokens is too short for {prompt + (limit or 1)} tokens ({asked}).",
            code="context_length_exceeded",
            param=param if prompt >= facts.max_model_len or limit is None else "max_tokens",
        )
