"""Which requests may use the semantic cache, and what an answer depends on but for the question."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import msgspec

from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest

HEADER = "x-llmkit-semantic-cache"
MAX_QUESTION_CHARS = 2000  # the embedding of a longer one says little about its details
_HEADER_VALUES = {None: None, "on": True, "off": False}
Requests = Literal["asked", "all"]
# Fields of a request that do not keep questions apart: they do not change the answer, or what they
# mean is in the engine's request, the conversation or the stop strings. Every other field does.
_LEFT_OUT = {
    *(field.name for field in fields(SamplingParams)),
    "messages",
    "model",
    "max_completion_tokens",
    "n_predict",
    "n",
    "repeat_penalty",
    "stop",
    "top_logprobs",
    "tools",  # this and the next two: no request with tools uses the cache
    "tool_choice",
    "parallel_tool_calls",
    "cache_salt",
    "semantic_cache",
    "stream",
    "stream_options",
    "priority",
    "timeout",
    "user",
}


@dataclass(frozen=True)
class SemanticQuestion:
    """A question that an earlier answer may answer."""

    text: str  # the last message of the user
    namespace: bytes  # a hash of everything else that the answer depends on
    adapter: str | None  # that computes the embedding, too
    cache_salt: str


def semantic_question(
    request: ChatCompletionRequest,
    header: str | None,
    choices: Sequence[Choice],
    requests: Requests,
    adapters: Container[str],
) -> SemanticQuestion | None:
    """The question of a request that allows another question's answer; None: it does not.

    header: the value of HEADER. requests: which requests may use the cache. adapters: those that
    never change. Raises ApiError 400 for another value of the header than on and off.
    """
    asked = _asked(request, header)
    if asked is False or (asked is None and requests == "asked"):
        return None
    choice = choices[0]
    params = choice.request.sampling_params
    if params.temperature > 0 and not asked:
        return None
    message = request.conversation[-1]
    text = message.get("content")
    has_tools = bool(request.offered_tools) or any(
        "tool_calls" in entry or entry["role"] == "tool" for entry in request.conversation
    )
    adapter = choice.request.adapter
    if (
        len(choices) > 1
        or has_tools
        or choice.request.grammar is not None
        or params.logprobs is not None
        or params.prompt_logprobs is not None
        or request.return_token_ids
        or request.truncate_prompt_tokens is not None
        or not request.adds_generation_prompt
        or (adapter is not None and adapter not in adapters)
        or message["role"] != "user"
        or not isinstance(text, str)
        or not 0 < len(text.strip()) <= MAX_QUESTION_CHARS
    ):
        return None
    return SemanticQuestion(
        text.strip(), _namespace(request, choice), adapter, choice.request.cache_salt
    )


def _asked(request: ChatCompletionRequest, header: str | None) -> bool | None:
    """Whether the client asks for the cache; None: it says nothing. The body has precedence."""
    if header not in _HEADER_VALUES:
        raise invalid(HEADER, f"The header {HEADER} is on or off.")
    if request.semantic_cache is not None:
        return request.semantic_cache
    return _HEADER_VALUES[header]


def _namespace(request: ChatCompletionRequest, choice: Choice) -> bytes:
    engine_request = choice.request
    params = engine_request.sampling_params
    # Without a limit of its own, an answer may be as long as the question leaves room for.
    params = replace(
        params,
        seed=None if params.temperature == 0 else params.seed,
        max_tokens=request.max_new_tokens or 0,
    )
    engine_request = replace(
        engine_request,
        request_id="",
        priority=0,
        prompt_token_ids=[],
        num_shared_tokens=0,
        sampling_params=params,
    )
    last = {**request.conversation[-1], "content": ""}
    parts = (
        engine_request,
        choice.stop_strings,
        sorted(choice.skipped_token_ids),
        [*request.conversation[:-1], last],
        request.template_variables,
        request.model_dump(mode="json", exclude=_LEFT_OUT, exclude_none=True),
    )
    return hashlib.sha256(msgspec.msgpack.encode(parts)).digest()
