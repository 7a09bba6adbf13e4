"""The schema of /v1/chat/completions.

Requests of /v1/messages and /v1/responses are converted to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.common.formatting import shortened
from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import (
    LogprobCount,
    ReasoningControl,
    StrictModel,
    ThinkingWishes,
    any_of_schema,
    check_extra_fields,
    given_controls,
    take_alias,
)
from llmkit.runtime.server.schemas.ignored_fields import FieldPath, IgnoredFields
from llmkit.runtime.server.schemas.reasoning_options import (
    BUDGET_VARIABLE,
    EFFORT_VARIABLE,
    EFFORTS,
    SWITCHES,
    contradiction,
)
from llmkit.runtime.server.schemas.structured_output import (
    StructuredOutputRequest,
    check_schema_size,
)

MAX_MESSAGES = 4096
MAX_TOOLS = 128
# Variables of a chat template that the server sets: chat_template_kwargs must not hold them.
RESERVED_TEMPLATE_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})
# Prefixes are always cached.
_CACHE_CONTROL = frozenset({"cache_control"})
TOOL_NAME_PATTERN = r"^[a-zA-Z0-9_.-]{1,64}$"

_TOOL_CHOICE_SCHEMA = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}},
        },
    },
}


def content_parts_schema(*kinds: str) -> dict[str, Any]:
    """Return the JSON schema of a list of content parts whose types are `kinds`."""
    properties = {"type": {"enum": list(kinds)}, "text": {"type": "string"}}
    return {
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "required": ["type"], "properties": properties},
    }


class FunctionCall(StrictModel):
    """A call that the model made; `arguments` is the text of a JSON object."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(StrictModel):
    """One of an assistant's `tool_calls`."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(StrictModel):
    """One message of a conversation."""

    # Fields of an assistant's message that clients send back as they received them.
    neutral_values = {  # noqa: RUF012
        "refusal": (),
        "audio": (),
        "function_call": (),
        "annotations": ([],),
    }
    no_effect_fields = _CACHE_CONTROL | {"id"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, any_of_schema({"type": "string"}, content_parts_schema("text"))] = None
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the newer name of reasoning_content
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class FunctionDefinition(StrictModel):
    """What a tool is called and takes; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=TOOL_NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """One of a request's tools."""

    no_effect_fields = _CACHE_CONTROL

    type: Literal["function"]
    function: FunctionDefinition


class ChatCompletionRequest(StructuredOutputRequest):
    """POST /v1/chat/completions."""

    uses_chat_template = True

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Any, any_of_schema({"enum": ["auto", "none", "required"]}, _TOOL_CHOICE_SCHEMA)
    ] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    # Tokens of thoughts, vLLM's name and Qwen's; -1: no limit.
    thinking_token_budget: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    thinking_budget: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    semantic_cache: bool | None = None

    def check(self) -> None:
        super().check()
        _ = self.conversation  # raises ApiError when a message is invalid
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs can be given with logprobs: true only.")
        check_template_kwargs(self.chat_template_kwargs)
        take_alias(self, "thinking_budget", "thinking_token_budget")
        self._check_thinking()
        check_continuation(
            self.conversation, self.continue_final_message, self.add_generation_prompt
        )
        _check_tools(self.tools or [], self.tool_choice, self.forced_tool)
        constraint = self.output_constraint
        if self.requires_tool_call and constraint is not None:
            raise invalid(
                constraint.param,
                f"{constraint.param} cannot be given where tool_choice requires a call.",
            )

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the chat template lists; none with `tool_choice: none`."""
        return tool_dicts([] if self.tool_choice == "none" else self.tools or [])

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call: all that are offered, or the forced one only."""
        if self.forced_tool is None:
            return self.offered_tools
        return [tool for tool in self.offered_tools if tool["function"]["name"] == self.forced_tool]

    @property
    def forced_tool(self) -> str | None:
        """The name of the tool that must be called. Raises ApiError for a wrong `tool_choice`."""
        match self.tool_choice:
            case None | "auto" | "none" | "required":
                return None
            case {"type": "function", "function": {"name": str(name), **more}, **others} if (
                not more and not others
            ):
                return name
        raise invalid("tool_choice", "tool_choice must be auto, none, required or name a function.")

    @property
    def requires_tool_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in (None, "auto", "none")

    @property
    def strict_tool_calls(self) -> bool:
        """Whether a call must follow the schema of its tool."""
        return any(tool["function"].get("strict") for tool in self.offered_tools)

    @property
    def allows_parallel_calls(self) -> bool:
        """Whether the answer may have more than one call."""
        return self.parallel_tool_calls is not False and self.forced_tool is None

    @cached_property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them. Raises ApiError for an invalid message."""
        return parse_chat_messages(self.messages, self.ignored)

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template that the request sets itself."""
        variables = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        return variables

    @property
    def thinking_wishes(self) -> ThinkingWishes:
        """What the fields of the request, or else variables of its template, say of thinking."""
        variables = self.chat_template_kwargs or {}
        enabled = self.enable_thinking
        for name in sorted(SWITCHES):
            if enabled is None and isinstance(variables.get(name), bool):
                enabled = variables[name]
        effort = self.reasoning_effort
        if effort is None and variables.get(EFFORT_VARIABLE) in EFFORTS:
            effort = variables[EFFORT_VARIABLE]
        return ThinkingWishes(enabled, effort, self.thinking_token_budget)

    @property
    def reasoning_controls(self) -> list[ReasoningControl]:
        return [
            *super().reasoning_controls,
            *given_controls(
                (("enable_thinking",), self.enable_thinking, "enabled"),
                (("thinking_budget",), self.thinking_budget, "budget"),
            ),
            *(
                [ReasoningControl(("thinking_token_budget",), "budget")]
                if self.thinking_token_budget is not None and self.thinking_budget is None
                else []
            ),
        ]

    def _check_thinking(self) -> None:
        """Raise ApiError where fields and variables say different things of thinking."""
        given = {
            "enable_thinking": self.enable_thinking,
            "thinking": self.enable_thinking,
            EFFORT_VARIABLE: self.reasoning_effort,
            BUDGET_VARIABLE: self.thinking_token_budget,
        }
        for name, value in given.items():
            other = (self.chat_template_kwargs or {}).get(name)
            if None not in (value, other) and value != other:
                param = "enable_thinking" if name in SWITCHES else name
                raise invalid(param, f"{param} differs from chat_template_kwargs.{name}; give one.")
        message = contradiction(self.thinking_wishes)
        if message is not None:
            raise invalid("reasoning_effort", message)

    @property
    def adds_generation_prompt(self) -> bool:
        """Whether the prompt ends with the beginning of an assistant's message."""
        return self.add_generation_prompt is not False and not self.continue_final_message


def parse_chat_messages(
    messages: Sequence[ChatMessage], ignored: IgnoredFields
) -> list[dict[str, Any]]:
    """Return messages as chat templates take them. Raises ApiError for an invalid message.

    Content is text only, and the role `developer` has its older name, `system`. Unknown fields of
    content parts are added to `ignored`.
    """
    return [_template_message(message, index, ignored) for index, message in enumerate(messages)]


def check_continuation(
    conversation: Sequence[Mapping[str, Any]],
    continue_final_message: bool | None,
    add_generation_prompt: bool | None,
) -> None:
    """Raise ApiError unless the last message can be continued, if that is wanted."""
    if not continue_final_message:
        return
    if add_generation_prompt:
        raise invalid(
            "add_generation_prompt",
            "add_generation_prompt and continue_final_message cannot both be true.",
        )
    final_message = conversation[-1]
    if final_message["role"] != "assistant" or "tool_calls" in final_message:
        raise invalid(
            "continue_final_message",
            "continue_final_message needs an assistant's message without calls at the end.",
        )


def tool_dicts(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools as chat templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def check_template_kwargs(variables: Mapping[str, Any] | None) -> None:
    """Raise ApiError for variables of a chat template that the server sets."""
    reserved = RESERVED_TEMPLATE_VARIABLES & (variables or {}).keys()
    if reserved:
        raise invalid("chat_template_kwargs", f"The variable {min(reserved)} cannot be set.")


def _template_message(message: ChatMessage, index: int, ignored: IgnoredFields) -> dict[str, Any]:
    """Return one message, the one at `index`, as chat templates take it."""
    param = f"messages.{index}"
    reasoning = message.reasoning_content
    if reasoning is None:
        reasoning = message.reasoning
    elif message.reasoning not in (None, reasoning):
        raise invalid(
            f"{param}.reasoning", "reasoning and reasoning_content differ; give one of them."
        )
    if message.role != "assistant" and message.tool_calls:
        raise invalid(f"{param}.tool_calls", "Only an assistant's message has tool_calls.")
    if message.role != "assistant" and reasoning is not None:
        name = "reasoning" if message.reasoning_content is None else "reasoning_content"
        raise invalid(f"{param}.{name}", f"Only an assistant's message has {name}.")
    if (message.role == "tool") != (message.tool_call_id is not None):
        raise invalid(
            f"{param}.tool_call_id",
            "A message of the role tool must have tool_call_id, and no other may.",
        )
    entry: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.tool_calls and message.content is None:
        entry["content"] = ""
    elif "content" not in message.model_fields_set:
        raise invalid(
            f"{param}.content", f"{param}.content is missing.", "missing_required_parameter"
        )
    else:
        entry["content"] = _text(message.content, ("messages", index, "content"), ignored)
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": _template_function(call, f"{param}.tool_calls.{number}.function"),
            }
            for number, call in enumerate(message.tool_calls)
        ]
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": reasoning,
    }
    entry |= {name: value for name, value in optional.items() if value is not None}
    return entry


def _template_function(call: ToolCall, param: str) -> dict[str, Any]:
    # Chat templates write the arguments as JSON themselves.
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid(f"{param}.arguments", f"{param}.arguments must be the text of a JSON object.")
    return {"name": call.function.name, "arguments": arguments}


def _check_tools(tools: list[Tool], tool_choice: Any, forced_tool: str | None) -> None:
    names = [tool.function.name for tool in tools]
    duplicates = {name for name in names if names.count(name) > 1}
    if duplicates:
        raise invalid("tools", f"Two tools have the name {min(duplicates)}.")
    for index, tool in enumerate(tools):
        parameters = tool.function.parameters or {}
        check_schema_size(parameters, f"tools.{index}.function.parameters")
        if parameters.get("type", "object") != "object":
            raise invalid(
                f"tools.{index}.function.parameters",
                "A tool's parameters must be of the type object.",
            )
    if forced_tool is not None and forced_tool not in names:
        raise invalid("tool_choice", f"There is no tool of the name {forced_tool}.")
    if tool_choice == "required" and not tools:
        raise invalid("tool_choice", "tool_choice is required, but there are no tools.")


def _text(content: Any, path: FieldPath, ignored: IgnoredFields) -> str:
    """Return the text of a message's content: a string, or text parts joined by line feeds."""
    if isinstance(content, str):
        return content
    param = ".".join(map(str, path))
    if not isinstance(content, list) or not content:
        raise invalid(param, f"{param} must be a string or a list of text parts.", "invalid_type")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise invalid(
                f"{param}.{index}", "A content part must be an object with a type.", "invalid_type"
            )
        if part["type"] != "text":
            kind = shortened(part["type"], 40)
            message = f"Only text parts are supported, not {kind}."
            raise invalid(f"{param}.{index}", message, "unsupported")
        if not isinstance(part.get("text"), str):
            raise invalid(
                f"{param}.{index}",
                "A text part must have the fields type and text.",
                "invalid_type",
            )
        check_extra_fields(
            {name: value for name, value in part.items() if name not in ("type", "text")},
            (*path, index),
            ignored,
            no_effect_fields=_CACHE_CONTROL,
        )
        texts.append(part["text"])
    return "\n".join(texts)
