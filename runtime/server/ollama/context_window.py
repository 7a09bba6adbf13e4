"""What fits into a context: `num_ctx`, `num_predict`, `truncate` and `context` of a request.

A chat that is too long loses its oldest messages, and an answer ends where the context is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.ollama.ollama_options import OllamaOptions
from llmkit.runtime.server.ollama.ollama_request import OllamaChatRequest
from llmkit.runtime.server.prepare import (
    check_token_ids,
    encode_chat,
    prepare_chat,
    template_variables,
)
from llmkit.runtime.server.server_state import ServerState

TOO_LONG = "context_length_exceeded"


def context_length(state: ServerState, options: OllamaOptions) -> int:
    """The tokens of prompt and answer together: `num_ctx`, at most what the server has."""
    max_model_len = state.engine_info.max_model_len
    return min(options.num_ctx or max_model_len, max_model_len)


async def prepare_ollama_chat(
    state: ServerState, body: OllamaChatRequest, request_id: str, cache_salt: str
) -> list[Choice]:
    """Return the choice of a chat, without its oldest messages if they do not fit.

    System messages and the last message stay. Raises ApiError as `prepare_chat` does.
    """
    limit = context_length(state, body.given_options)
    try:
        choices = await prepare_chat(state, body.chat, request_id, cache_salt)
        return limited(state, choices, body.given_options, "messages")
    except ApiError as error:
        if error.code != TOO_LONG or body.truncate is False:
            raise
    kept = await _kept_messages(state, body, limit)
    shorter = body.chat_of(kept)
    shorter.model = body.chat.model
    choices = await prepare_chat(state, shorter, request_id, cache_salt)
    return limited(state, choices, body.given_options, "messages")


def limited(
    state: ServerState,
    choices: Sequence[Choice],
    options: OllamaOptions,
    param: str,
    context: Sequence[int] = (),
    truncate: bool = True,
) -> list[Choice]:
    """Return `choices` with `context` before their prompts and answers that fit into the context.

    context: token ids of a conversation; with `truncate` it loses its first ones. Raises ApiError
    400 for a prompt from the field `param` that does not fit.
    """
    limit = context_length(state, options)
    check_token_ids(list(context), state.engine_info.vocab_size, "context")
    for choice in choices:
        request = choice.request
        room = limit - len(request.prompt_token_ids) - 1  # an answer has one token at least
        if room < 0 or (len(context) > room and not truncate):
            message = (
                f"The context of {limit} tokens is too short for a prompt of "
                f"{len(context) + len(request.prompt_token_ids)} tokens and an answer."
            )
            raise invalid(param, message, TOO_LONG)
        kept = context[len(context) - min(room, len(context)) :]
        prompt_token_ids = [*kept, *request.prompt_token_ids]
        params = request.sampling_params
        max_tokens = min(params.max_tokens, limit - len(prompt_token_ids))
        if options.max_new_tokens is not None:
            max_tokens = min(max_tokens, options.max_new_tokens)
        choice.request = replace(
            request,
            prompt_token_ids=prompt_token_ids,
            sampling_params=replace(params, max_tokens=max_tokens),
            num_shared_tokens=0 if kept else request.num_shared_tokens,
        )
    return list(choices)


async def _kept_messages(state: ServerState, body: OllamaChatRequest, limit: int) -> list[int]:
    """Return the positions of the messages that are kept: as many as fit, the latest ones.

    Without the oldest messages a conversation begins with the user's, as chat templates expect.
    """
    conversation = body.chat.conversation
    last = len(conversation) - 1
    starts = [
        index
        for index, message in enumerate(conversation)
        if index == last or message["role"] == "user"
    ]

    def kept(start: int) -> list[int]:
        system = [i for i in range(start) if conversation[i]["role"] == "system"]
        return [*system, *range(start, len(conversation))]

    # Finds the first start that fits. The last one is not tried: there is none after it.
    low = 0
    high = len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        token_ids, _ = await encode_chat(
            state,
            [conversation[index] for index in kept(starts[middle])],
            body.chat.offered_tools,
            template_variables(state.text, body.chat),
        )
        if len(token_ids) < limit:
            high = middle
        else:
            low = middle + 1
    return kept(starts[low])
