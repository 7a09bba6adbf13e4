"""Requests that return no tokens: embeddings and the logits of labels, one for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import Pooling, PoolingTask, SamplingParams
from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.prepare import (
    check_token_ids,
    combined_salt,
    in_thread_if_long,
    prompt_limit,
)
from llmkit.runtime.server.server_state import ServerState

POOLINGS: dict[str, Pooling] = {"last": "last", "mean": "mean"}


class PooledRequest(Protocol):
    """The fields that all requests for pooled results have."""

    model: str
    cache_salt: str | None
    priority: int | None


def pooled_choices(
    state: ServerState,
    request: PooledRequest,
    request_id: str,
    cache_salt: str,
    prompts: Sequence[list[int]],
    pooling: PoolingTask,
    param: str,
) -> list[Choice]:
    """Return a choice for each prompt of token ids, which come from the field `param`.

    Raises ApiError 400 for a prompt that can never run.
    """
    adapter = None if request.model in state.base_model_names else request.model
    salt = combined_salt(cache_salt, request.cache_salt)
    choices = []
    for index, token_ids in enumerate(prompts):
        if not token_ids:
            raise invalid(param, "The prompt is empty; at least one token is needed.")
        check_token_ids(token_ids, state.engine_info.vocab_size, param)
        check_input_length(state, token_ids, param)
        engine_request = EngineRequest(
            f"{request_id}-{index}",
            token_ids,
            SamplingParams(max_tokens=1, temperature=0.0),
            priority=request.priority or 0,
            cache_salt=salt,
            adapter=adapter,
            pooling=pooling,
            label_token_ids=state.text.label_token_ids if pooling == "classify" else None,
        )
        choices.append(Choice(engine_request, index, state.text.tokenizer.stream()))
    return choices


def check_input_length(state: ServerState, token_ids: Sequence[int], param: str) -> None:
    """Raise ApiError 400 for a prompt from the field `param` that the context cannot hold."""
    max_model_len = state.engine_info.max_model_len
    if len(token_ids) > max_model_len:
        message = (
            f"The context of {max_model_len} tokens is too short for an input of {len(token_ids)} "
            "tokens."
        )
        raise invalid(param, message, "context_length_exceeded")


async def input_token_ids(
    state: ServerState,
    inputs: Sequence[str | list[int]],
    add_special_tokens: bool,
    truncate_prompt_tokens: int | None,
) -> list[list[int]]:
    """Return the token ids of each input. An input that is too long loses its last tokens.

    truncate_prompt_tokens: how many are kept; -1: as many as fit; None: all.
    """
    max_tokens = prompt_limit(state, truncate_prompt_tokens, num_new_tokens=0)
    tokenizer = state.text.tokenizer

    def tokenize() -> list[list[int]]:
        return [
            tokenizer.encode(text, add_special_tokens, max_tokens, keep="first")
            if isinstance(text, str)
            else text[:max_tokens]
            for text in inputs
        ]

    return await in_thread_if_long(sum(map(len, inputs)), tokenize)


def embedding_pooling(state: ServerState) -> Pooling:
    """How the model's embeddings are pooled. Raises ApiError 400 where that is not known."""
    name = state.options.pooling or state.text.embeddings.pooling
    if name not in POOLINGS:
        message = (
            f"The checkpoint makes embeddings in a way that llmkit does not know ({name}); serve "
            "it with --pooling last or --pooling mean."
        )
        raise ApiError(400, message, code="unsupported", param="model")
    return POOLINGS[name]


def pooled_usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """The `usage` of a response."""
    tokens = sum(len(choice.request.prompt_token_ids) for choice in choices)
    cached = sum(choice.cached_tokens for choice in choices)
    return {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
