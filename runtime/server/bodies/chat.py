"""The body of /v1/chat/completions, which the bodies of /v1/messages and /v1/responses become."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from llmkit.runtime.server.bodies.base import Harmless, Logprobs, Strict, one_of, refuse_unsupported
from llmkit.runtime.server.bodies.structure import StructuredBody, check_size
from llmkit.runtime.server.http.errors import invalid

MAX_MESSAGES = 4096
MAX_TOOLS = 128
RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})  # variables of a template that are not the user's
NAME = r"^[a-zA-Z0-9_.-]{1,64}$"

# What clients send back when they repeat an assistant's message as they got it.
HARMLESS_IN_MESSAGE: Harmless = {"refusal": (), "audio": (), "function_call": (), "annotations": ([],)}

_NAMED = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    },
}


def parts_schema(*kinds: str) -> dict[str, Any]:
    """A JSON schema of a list of parts that have a type, one of `kinds`, and mostly a text."""
    properties = {"type": {"enum": list(kinds)}, "text": {"type": "string"}}
    return {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["type"], "properties": properties}}


class FunctionCall(Strict):
    """A call that the model made; `arguments` is the text of a JSON object."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Strict):
    """One of an assistant's `tool_calls`."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, one_of({"type": "string"}, parts_schema("text"))] = None
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class Function(Strict):
    """What a tool is called and takes; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One of a request's tools."""

    type: Literal["function"]
    function: Function


class ChatBody(StructuredBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Any, one_of({"enum": ["auto", "none", "required"]}, _NAMED)] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        _ = self.conversation
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs can be given with logprobs: true only.")
        check_variables(self.chat_template_kwargs)
        _check_tools(self.tools or [], self.tool_choice, self.named_tool)
        if self.must_call and self.form is not None:
            raise invalid(self.form.param, f"{self.form.param} cannot be kept where a call is asked for.")

    @property
    def told_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of, as chat templates want them; none with `tool_choice: none`."""
        offered = [] if self.tool_choice == "none" else self.tools or []
        return described(offered)

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """Those that it may call: one that `tool_choice` names is the only one."""
        return [tool for tool in self.offered_tools if self.named_tool in (None, tool["function"]["name"])]

    @property
    def named_tool(self) -> str | None:
        """The tool that `tool_choice` names. ApiError when it is something else that it may not be."""
        match self.tool_choice:
            case None | "auto" | "none" | "required":
                return None
            case {"type": "function", "function": {"name": str(name), **more}, **others} if not more and not others:
                return name
        raise invalid("tool_choice", "tool_choice must be auto, none, required or name a function.")

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice not in (None, "auto", "none")

    @property
    def strict_calls(self) -> bool:
        """Whether what begins as a call has to be one."""
        return any(tool["function"].get("strict") for tool in self.offered_tools)

    @property
    def several_calls(self) -> bool:
        """Whether it may call more than once."""
        return self.parallel_tool_calls is not False and self.named_tool is None

    @cached_property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates want them: text content only, `developer` under its older name."""
        return conversation(self.messages)


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """See `ChatBody.conversation`. ApiError for messages that are none."""
    return [_entry(message, f"messages.{index}") for index, message in enumerate(messages)]


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates want them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def check_variables(variables: Mapping[str, Any] | None) -> None:
    """ApiError for variables of a template that are the server's to set."""
    if reserved := RESERVED & (variables or {}).keys():
        raise invalid("chat_template_kwargs", f"The variable {min(reserved)} cannot be set.")


def _entry(message: Message, param: str) -> dict[str, Any]:
    refuse_unsupported(message.model_extra or {}, f"{param}.", HARMLESS_IN_MESSAGE)
    if message.role != "assistant" and message.tool_calls:
        raise invalid(f"{param}.tool_calls", "Only an assistant's message has tool_calls.")
    if message.role != "assistant" and message.reasoning_content is not None:
        raise invalid(f"{param}.reasoning_content", "Only an assistant's message has reasoning_content.")
    if (message.role == "tool") != (message.tool_call_id is not None):
        raise invalid(f"{param}.tool_call_id", "tool_call_id is what a message of the role tool has, and no other.")
    entry: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.tool_calls and message.content is None:
        entry["content"] = ""
    elif "content" not in message.model_fields_set:
        raise invalid(f"{param}.content", f"{param}.content is missing.", "missing_required_parameter")
    else:
        entry["content"] = _text(message.content, f"{param}.content")
    if message.tool_calls:
        entry["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _function(call, f"{param}.tool_calls.{index}.function")}
            for index, call in enumerate(message.tool_calls)
        ]
    for field in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, field)) is not None:
            entry[field] = value
    return entry


def _function(call: ToolCall, param: str) -> dict[str, Any]:
    # Templates write the arguments as JSON themselves.
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid(f"{param}.arguments", f"{param}.arguments must be the text of a JSON object.")
    return {"name": call.function.name, "arguments": arguments}


def _check_tools(tools: list[Tool], choice: Any, name: str | None) -> None:
    names = [tool.function.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise invalid("tools", f"Two tools have the name {min(twice)}.")
    for index, tool in enumerate(tools):
        parameters = tool.function.parameters or {}
        check_size(parameters, f"tools.{index}.function.parameters")
        if parameters.get("type", "object") != "object":
            raise invalid(f"tools.{index}.function.parameters", "A tool's parameters must be of the type object.")
    if name is not None and name not in names:
        raise invalid("tool_choice", f"There is no tool of the name {name}.")
    if choice == "required" and not tools:
        raise invalid("tool_choice", "tool_choice is required, but there are no tools.")


def _text(content: Any, param: str) -> str:
    """The text of a message's content: a string, or text parts, which are joined by line feeds as vLLM does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(param, f"{param} must be a string or a list of text parts.", "invalid_type")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise invalid(f"{param}.{index}", "A content part must be an object with a type.", "invalid_type")
        if part["type"] != "text":
            raise invalid(f"{param}.{index}", "Only text parts are supported.", "unsupported")
        if not isinstance(part.get("text"), str) or part.keys() != {"type", "text"}:
            raise invalid(f"{param}.{index}", "A text part must have the fields type and text.", "invalid_type")
        texts.append(part["text"])
    return "\n".join(texts)
