"""The schema of Anthropic's /v1/messages, and its conversion to a chat completion request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    CacheSalt,
    Effort,
    ReasoningControl,
    StopStrings,
    StrictModel,
    ThinkingWishes,
    TimeoutSeconds,
    any_of_schema,
    build_request,
    check_extra_fields,
    given_controls,
)
from llmkit.runtime.server.schemas.chat_request import (
    MAX_MESSAGES,
    MAX_TOOLS,
    TOOL_NAME_PATTERN,
    ChatCompletionRequest,
    content_parts_schema,
)
from llmkit.runtime.server.schemas.client_nonces import strip_client_nonces
from llmkit.runtime.server.schemas.ignored_fields import FieldPath, IgnoredFields

MAX_EDITS = 64  # of the context
# Fields of content blocks without effect: prefixes are cached anyway, and a result that is an error
# says so in its text.
_NO_EFFECT_BLOCK_FIELDS = frozenset(
    {"cache_control", "citations", "is_error", "signature", "caller"}
)
# By type of content block: the roles that may have it, and its fields.
_BLOCKS: dict[str, tuple[set[str], dict[str, type]]] = {
    "text": ({"user", "assistant", "system"}, {"text": str}),
    "tool_use": ({"assistant"}, {"id": str, "name": str, "input": dict}),
    # Its signature means nothing here: clients send it back, and may send another.
    "thinking": ({"assistant"}, {"thinking": str}),
    "redacted_thinking": ({"assistant"}, {"data": str}),
    "tool_result": ({"user"}, {"tool_use_id": str}),
}


class MessageParam(StrictModel):
    """One of the messages."""

    role: Literal["user", "assistant"]
    content: Annotated[
        Any, any_of_schema({"type": "string"}, content_parts_schema(*_BLOCKS), null=False)
    ]


class MessagesTool(StrictModel):
    """A tool; `input_schema` is a JSON schema."""

    name: Annotated[str, Field(pattern=TOOL_NAME_PATTERN)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: Any = None
    strict: bool | None = None


class MessagesToolChoice(StrictModel):
    """Whether and which tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(StrictModel):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(StrictModel):
    """`output_config`."""

    format: OutputFormat | None = None
    effort: Effort | None = None


class ThinkingConfig(StrictModel):
    """`thinking`."""

    no_effect_fields = frozenset({"display"})

    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None


CLEAR_THINKING = "clear_thinking_20251015"


class ContextManagement(StrictModel):
    """`context_management`: edits of the context. Those of other types have no effect."""

    edits: Annotated[list[dict[str, Any]], Field(max_length=MAX_EDITS)] | None = None

    def kept_thinking_turns(self, ignored: IgnoredFields) -> int | None:
        """Return how many of the last turns with thinking keep it; None: all.

        Edits without effect are added to `ignored`. Raises ApiError for a wrong one.
        """
        kept = None
        for index, edit in enumerate(self.edits or []):
            path = ("context_management", "edits", index)
            if edit.get("type") != CLEAR_THINKING:
                ignored.add(path)
                continue
            match edit.get("keep", {"type": "thinking_turns", "value": 1}):
                case "all" | {"type": "all"}:
                    kept = None
                case {"type": "thinking_turns", "value": int(value)} if value > 0:
                    kept = value
                case _:
                    raise invalid(
                        ".".join(map(str, (*path, "keep"))),
                        'keep must be "all" or {"type": "thinking_turns", "value": N}, N above 0.',
                    )
        return kept


class CountTokensRequest(BaseRequest):
    """POST /v1/messages/count_tokens."""

    uses_chat_template = True
    neutral_values = {  # noqa: RUF012
        "container": (),
        "diagnostics": (),
        "mcp_servers": ([],),
        "output_format": (),
    }
    no_effect_fields = frozenset(
        {
            "metadata",
            "service_tier",
            "cache_control",
            "inference_geo",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )

    messages: Annotated[
        list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    system: Annotated[Any, any_of_schema({"type": "string"}, content_parts_schema("text"))] = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: ThinkingConfig | None = None
    context_management: ContextManagement | None = None

    def check(self) -> None:
        thinking = self.thinking
        if thinking and thinking.type != "enabled" and thinking.budget_tokens is not None:
            message = f"budget_tokens goes with the type enabled, not {thinking.type}."
            raise invalid("thinking.budget_tokens", message)
        effort = self.output_config.effort if self.output_config else None
        if thinking and thinking.type == "enabled" and effort == "none":
            message = "The effort is none, and thinking is enabled: leave one of them out."
            raise invalid("output_config.effort", message)
        _ = self.chat  # raises ApiError when it cannot be converted

    @property
    def reasoning_controls(self) -> list[ReasoningControl]:
        effort = self.output_config.effort if self.output_config else None
        thinking = self.thinking
        budget = None if thinking is None else thinking.budget_tokens
        return given_controls(
            (("output_config", "effort"), effort, "effort"),
            (("thinking", "type"), None if thinking is None else thinking.type, "enabled"),
            (("thinking", "budget_tokens"), budget, "budget"),
        )

    @property
    def thinking_wishes(self) -> ThinkingWishes:
        effort = self.output_config.effort if self.output_config else None
        thinking = self.thinking
        if thinking is None:
            return ThinkingWishes(effort=effort)
        # Clients send an effort with `disabled`, too: it is about the answer then.
        enabled = thinking.type != "disabled"
        return ThinkingWishes(enabled, effort if enabled else None, thinking.budget_tokens)

    @cached_property
    def chat(self) -> ChatCompletionRequest:
        """The same request for /v1/chat/completions. Raises ApiError if it cannot be converted."""
        fields = {name: value for name, value in self._chat_fields().items() if value is not None}
        return build_request(ChatCompletionRequest, fields)

    def strip_client_nonces(self) -> None:
        """Remove from the system prompt what its client changes in each request.

        It is named in `ignored`. See `client_nonces.py`.
        """
        if self.system is None:
            return
        conversation = self.chat.conversation
        text, names = strip_client_nonces(conversation[0]["content"])
        for name in names:
            self.ignored.add(("system", name))
        if names and text:
            conversation[0]["content"] = text
        elif names and len(conversation) > 1:
            del conversation[0]

    def _chat_fields(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            text = _text(self.system, "system", ("system",), self.ignored)
            messages.append({"role": "system", "content": text})
        for index, message in enumerate(self.messages):
            messages += _chat_messages(message, ("messages", index, "content"), self.ignored)
        if self.context_management is not None:
            _clear_thinking(messages, self.context_management.kept_thinking_turns(self.ignored))
        # The answer continues an assistant's message at the end.
        continues = self.messages[-1].role == "assistant"
        if continues and "tool_calls" in messages[-1]:
            raise invalid(
                f"messages.{len(self.messages) - 1}.content",
                "The last message has tool_use: its tool_result must follow.",
            )
        choice = self.tool_choice or MessagesToolChoice(type="auto")
        forced_tool = {"type": "function", "function": {"name": choice.name or ""}}
        tool_choices = {"auto": "auto", "any": "required", "tool": forced_tool, "none": "none"}
        output_format = self.output_config.format if self.output_config else None
        wishes = self.thinking_wishes
        response_format = None
        if output_format is not None:
            json_schema = {"name": "answer", "schema": output_format.schema_}
            response_format = {"type": "json_schema", "json_schema": json_schema}
        return {
            "model": self.model,
            "messages": messages,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.input_schema,
                        "strict": tool.strict,
                    },
                }
                for tool in self.tools or []
            ],
            "tool_choice": tool_choices[choice.type],
            "response_format": response_format,
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
            "continue_final_message": continues or None,
            "enable_thinking": wishes.enabled,
            "reasoning_effort": wishes.effort,
            "thinking_token_budget": wishes.budget,
        }


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: StopStrings | None = None
    thread: dict[str, Any] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    cache_salt: CacheSalt | None = None
    timeout: TimeoutSeconds | None = None

    def check(self) -> None:
        if self.thread is not None:
            # A request that continues a thread has only its new messages. The client's tool runner
            # sends the whole conversation once it sees these details.
            raise ApiError(
                400,
                "thread is not supported: no conversation is stored. Send all messages.",
                code="unsupported",
                param="thread",
                details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
            )
        super().check()

    def _chat_fields(self) -> dict[str, Any]:
        return {
            **super()._chat_fields(),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "cache_salt": self.cache_salt,
            "timeout": self.timeout,
        }


def _clear_thinking(messages: list[dict[str, Any]], num_kept: int | None) -> None:
    """Remove the thoughts of all turns that have some except the last `num_kept`; None: of none.

    A turn is what an assistant says, calls of tools included, until the user speaks again.
    """
    if num_kept is None:
        return
    num_turns = 0  # with thoughts, from the end
    is_counted = False  # whether the current turn is one of them
    for message in reversed(messages):
        if message["role"] == "user":
            is_counted = False
        elif "reasoning_content" in message:
            num_turns += not is_counted
            is_counted = True
            if num_turns > num_kept:
                del message["reasoning_content"]


def _chat_messages(
    message: MessageParam, path: FieldPath, ignored: IgnoredFields
) -> list[dict[str, Any]]:
    """Convert one message to the messages of a chat.

    Each tool result becomes a separate message; these messages come first.
    """
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    blocks = _checked_blocks(message.content, message.role, path, ignored)
    results: list[dict[str, Any]] = []
    texts = []
    calls = []
    thoughts = []
    for index, block in enumerate(blocks):
        match block["type"]:
            case "tool_result":
                content_path = (*path, index, "content")
                content = _text(block.get("content") or "", "user", content_path, ignored)
                results.append(
                    {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}
                )
            case "text":
                texts.append(block["text"])
            case "tool_use":
                function = {"name": block["name"], "arguments": json.dumps(block["input"])}
                calls.append({"id": block["id"], "function": function})
            case "thinking":
                thoughts.append(block["thinking"])
            case "redacted_thinking":
                ignored.add((*path, index))  # another server's, which only that one can read
    if not (texts or calls or thoughts):
        return results
    chat_message: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        chat_message["tool_calls"] = calls
    if thoughts:
        chat_message["reasoning_content"] = "\n".join(thoughts)
    return [*results, chat_message]


def _text(content: Any, role: str, path: FieldPath, ignored: IgnoredFields) -> str:
    """Return the text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    blocks = _checked_blocks(content, role, path, ignored)
    for index, block in enumerate(blocks):
        if block["type"] != "text":
            param = ".".join(map(str, (*path, index)))
            raise invalid(param, "Only text blocks are supported here.", "unsupported")
    return "\n".join(block["text"] for block in blocks)


def _checked_blocks(
    content: Any, role: str, path: FieldPath, ignored: IgnoredFields
) -> list[Mapping[str, Any]]:
    """Return `content`, a list of blocks that this role may have, with valid fields.

    Their unknown fields are added to `ignored`.
    """
    param = ".".join(map(str, path))
    if not isinstance(content, list) or not content:
        raise invalid(param, f"{param} must be a string or a list of blocks.", "invalid_type")
    for index, block in enumerate(content):
        block_param = f"{param}.{index}"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(block_param, "A block must be an object with a type.", "invalid_type")
        kind = block["type"]
        roles, fields = _BLOCKS.get(kind, (set(), {}))
        if role not in roles:
            raise invalid(
                block_param,
                f"A block of the type {kind[:40]} is not supported here.",
                "unsupported",
            )
        for name, field_type in fields.items():
            if not isinstance(block.get(name), field_type):
                raise invalid(
                    f"{block_param}.{name}",
                    f"{block_param}.{name} is missing or of the wrong type.",
                    "invalid_type",
                )
        known = {"type", *fields}
        if kind == "tool_result":
            known.add("content")
        extra = {name: value for name, value in block.items() if name not in known}
        check_extra_fields(extra, (*path, index), ignored, no_effect_fields=_NO_EFFECT_BLOCK_FIELDS)
    return content
