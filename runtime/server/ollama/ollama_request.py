"""Requests of Ollama's API, and how each becomes one of OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.ollama.keep_alive import KeepAlive, keep_alive_seconds
from llmkit.runtime.server.ollama.ollama_options import AS_MANY_AS_FIT, OllamaOptions
from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    LogprobCount,
    NeutralValues,
    NonNegativeInt,
    ReasoningControl,
    StrictModel,
    ThinkingWishes,
    any_of_schema,
    build_request,
    given_controls,
)
from llmkit.runtime.server.schemas.chat_request import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatCompletionRequest,
    FunctionDefinition,
)
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest

MAX_CONTEXT_IDS = 2**20
_LEVELS = ("low", "medium", "high", "max")
_THINK_SCHEMA = any_of_schema({"type": "boolean"}, {"enum": list(_LEVELS)})
_FORMAT_SCHEMA = any_of_schema({"type": "object"}, {"enum": ["", "json"]})
_NO_IMAGES: NeutralValues = {"images": ([],)}


class OllamaFunctionCall(StrictModel):
    """A call that the model made; its arguments are an object."""

    no_effect_fields = frozenset({"index"})

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: dict[str, Any] | None = None


class OllamaToolCall(StrictModel):
    """One of a message's `tool_calls`."""

    no_effect_fields = frozenset({"index", "type"})

    id: Annotated[str, Field(max_length=256)] | None = None
    function: OllamaFunctionCall


class OllamaMessage(StrictModel):
    """One of the messages."""

    neutral_values = _NO_IMAGES

    role: Annotated[
        Literal["system", "user", "assistant", "tool"],
        BeforeValidator(lambda role: role.lower() if isinstance(role, str) else role),
    ]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[OllamaToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class OllamaTool(StrictModel):
    """One of the tools."""

    no_effect_fields = frozenset({"items"})

    type: Literal["function"] | None = None
    function: FunctionDefinition


class OllamaRequest(BaseRequest):
    """What requests for chats and completions share. Null means the default everywhere."""

    uses_chat_template = True
    neutral_values = {  # noqa: RUF012
        "template": ("",),
        "_debug_render_only": (False,),
    }
    no_effect_fields = frozenset({"shift"})  # a full context ends the answer

    stream: bool | None = None
    format: Annotated[Any, _FORMAT_SCHEMA] = None
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None
    think: Annotated[Any, _THINK_SCHEMA] = None
    truncate: bool | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None

    def check(self) -> None:
        keep_alive_seconds(self.keep_alive)
        self.given_options.add_ignored(self.ignored)
        if self.think is not None and not (isinstance(self.think, bool) or self.think in _LEVELS):
            levels = ", ".join(map(json.dumps, _LEVELS))
            raise invalid("think", f"think must be true, false or one of {levels}.")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs can be given with logprobs: true only.")
        self._response_format()

    @property
    def given_options(self) -> OllamaOptions:
        """The options, all unset if there are none."""
        return self.options or OllamaOptions()

    @property
    def streams(self) -> bool:
        """Whether the response is a stream, as it is by default."""
        return self.stream is not False

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives for each token of the answer; None: no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def thinks(self) -> bool:
        """Whether the request asks the model to think."""
        return self.think is not None and self.think is not False

    @property
    def reasoning_controls(self) -> list[ReasoningControl]:
        level = self.think if isinstance(self.think, str) else None
        return given_controls((("think",), level, "effort"))

    @property
    def thinking_wishes(self) -> ThinkingWishes:
        level: Any = self.think if isinstance(self.think, str) else None  # one of _LEVELS
        return ThinkingWishes(None if self.think is None else self.thinks, level)

    def _shared_fields(self) -> dict[str, Any]:
        """The fields of chats and completions alike."""
        fields = {"model": self.model, **self.given_options.sampling_fields}
        response_format = self._response_format()
        if response_format is not None:
            fields["response_format"] = response_format
        return fields

    def _chat_fields(self) -> dict[str, Any]:
        fields = self._shared_fields()
        if self.think is not None:
            fields["enable_thinking"] = self.thinks
        if isinstance(self.think, str):
            fields["reasoning_effort"] = self.think
        if self.logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return fields

    def _response_format(self) -> dict[str, Any] | None:
        match self.format:
            case None | "":
                return None
            case "json":
                return {"type": "json_object"}
            case dict(schema):
                json_schema = {"name": "answer", "schema": schema}
                return {"type": "json_schema", "json_schema": json_schema}
        raise invalid("format", 'format must be "json" or a JSON schema.', "invalid_type")


class OllamaChatRequest(OllamaRequest):
    """POST /api/chat. Without messages the model is only loaded."""

    messages: (
        Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    tools: Annotated[list[OllamaTool], Field(max_length=MAX_TOOLS)] | None = None

    def check(self) -> None:
        super().check()
        if self.messages:
            _ = self.chat  # raises ApiError when it cannot be converted

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer."""
        return not self.messages

    @cached_property
    def chat(self) -> ChatCompletionRequest:
        """The same request for /v1/chat/completions. Raises ApiError if it cannot be converted."""
        return self.chat_of(range(len(self.messages or [])))

    def chat_of(self, kept: Sequence[int]) -> ChatCompletionRequest:
        """As `chat`, with the messages at `kept` only."""
        messages = _chat_messages(self.messages or [])
        fields = self._chat_fields()
        fields["messages"] = [messages[index] for index in kept]
        if self.tools:
            fields["tools"] = [
                {"type": "function", "function": tool.function.model_dump(exclude_none=True)}
                for tool in self.tools
            ]
        return build_request(ChatCompletionRequest, fields)


class OllamaGenerateRequest(OllamaRequest):
    """POST /api/generate. Without a prompt the model is only loaded."""

    neutral_values = {  # noqa: RUF012
        **OllamaRequest.neutral_values,
        **_NO_IMAGES,
        "width": (0,),
        "height": (0,),
        "steps": (0,),
        "suffix": ("",),
    }

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: (
        Annotated[list[NonNegativeInt], Field(max_length=MAX_CONTEXT_IDS, fail_fast=True)] | None
    ) = None

    def check(self) -> None:
        super().check()
        if self.raw and (self.system or self.context):
            name = "system" if self.system else "context"
            raise invalid(name, f"{name} cannot be given with raw: true.")
        if self.prompt:
            _ = self.chat  # raises ApiError when it cannot be converted

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer."""
        return not self.prompt

    @cached_property
    def chat(self) -> ChatCompletionRequest:
        """The prompt as a chat, which the model's template writes."""
        messages = [{"role": "user", "content": self.prompt or ""}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        return build_request(ChatCompletionRequest, self._chat_fields() | {"messages": messages})

    @cached_property
    def completion(self) -> CompletionRequest:
        """The prompt as it is, for raw requests and models without a chat template."""
        fields = self._shared_fields()
        fields |= {"prompt": self.prompt, "max_tokens": AS_MANY_AS_FIT}
        if self.num_logprobs is not None:
            fields["logprobs"] = self.num_logprobs
        return build_request(CompletionRequest, fields)


class OllamaEmbedRequest(BaseRequest):
    """POST /api/embed. Without an input the model is only loaded."""

    no_effect_fields = frozenset({"prompt"})  # which some clients add, as for /api/embeddings

    input: Annotated[
        Any,
        any_of_schema(
            {"type": "string"}, {"type": "array", "items": {"type": "string", "minLength": 1}}
        ),
    ] = None
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None

    def check(self) -> None:
        keep_alive_seconds(self.keep_alive)
        (self.options or OllamaOptions()).add_ignored(self.ignored)
        is_list = isinstance(self.input, list)
        if not (self.input is None or isinstance(self.input, str) or is_list):
            raise invalid("input", "input must be a string or a list of strings.", "invalid_type")
        if is_list and not all(isinstance(text, str) for text in self.input):
            raise invalid("input", "input must be a string or a list of strings.", "invalid_type")
        if self.input:
            _ = self.embedding

    @cached_property
    def embedding(self) -> EmbeddingRequest:
        """The same request for /v1/embeddings. Raises ApiError if it cannot be converted."""
        fields: dict[str, Any] = {"model": self.model, "input": self.input}
        if self.truncate is not False:
            fields["truncate_prompt_tokens"] = AS_MANY_AS_FIT
            if self.options is not None and self.options.num_ctx is not None:
                fields["truncate_prompt_tokens"] = self.options.num_ctx
        if self.dimensions:
            fields["dimensions"] = self.dimensions
        return build_request(EmbeddingRequest, fields)


class OllamaEmbeddingsRequest(BaseRequest):
    """POST /api/embeddings, the older form for one text."""

    prompt: str | None = None
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None

    def check(self) -> None:
        keep_alive_seconds(self.keep_alive)
        (self.options or OllamaOptions()).add_ignored(self.ignored)

    @cached_property
    def embedding(self) -> EmbeddingRequest:
        """The same request for /v1/embeddings."""
        fields = {
            "model": self.model,
            "input": self.prompt,
            "truncate_prompt_tokens": AS_MANY_AS_FIT,
        }
        return build_request(EmbeddingRequest, fields)


class OllamaShowRequest(BaseRequest):
    """POST /api/show."""

    no_effect_fields = frozenset({"verbose", "system", "template", "options"})

    name: Annotated[str, Field(max_length=1024)] | None = None  # the older name of `model`


def _chat_messages(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """Return the messages as OpenAI's.

    Calls have ids there, which the messages with their results repeat. Where Ollama's have none, a
    result belongs to the first open call of its `tool_name`, or to the first open call.
    """
    converted = []
    open_calls: list[tuple[str, str]] = []  # id and name of calls without a result
    num_calls = 0
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking is not None:
            entry["reasoning_content"] = message.thinking
        if message.tool_calls:
            entry["tool_calls"] = []
        for call in message.tool_calls or []:
            call_id = call.id or f"call_{num_calls}"
            num_calls += 1
            function = call.function
            arguments = json.dumps(function.arguments or {}, ensure_ascii=False)
            entry["tool_calls"].append(
                {"id": call_id, "function": {"name": function.name, "arguments": arguments}}
            )
            open_calls.append((call_id, function.name))
        if message.role == "tool":
            entry["tool_call_id"] = message.tool_call_id or _result_id(message, open_calls)
            open_calls = [call for call in open_calls if call[0] != entry["tool_call_id"]]
            if message.tool_name is not None:
                entry["name"] = message.tool_name
        elif message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id  # refused, as in OpenAI's API
        converted.append(entry)
    return converted


def _result_id(message: OllamaMessage, open_calls: Sequence[tuple[str, str]]) -> str:
    of_name = [call_id for call_id, name in open_calls if name == message.tool_name]
    others = [call_id for call_id, _ in open_calls]
    return next(iter([*of_name, *others]), "call_unknown")
