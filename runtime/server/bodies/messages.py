"""The body of Anthropic's /v1/messages, and the chat that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.runtime.server.bodies.base import MAX_STOP_CHARS, MAX_STOPS, Body, Strict, Timeout, build, one_of
from llmkit.runtime.server.bodies.chat import MAX_MESSAGES, MAX_TOOLS, NAME, ChatBody, parts_schema
from llmkit.runtime.server.http.errors import invalid

# Prefixes are cached anyway, and a result that is an error says so in its text.
_NO_EFFECT_IN_BLOCK = frozenset({"cache_control", "citations", "is_error", "signature", "caller"})
_BLOCKS: dict[
    str, tuple[set[str], dict[str, type]]
] = {  # fields of the blocks that messages have, by the role that may have them
    "text": ({"user", "assistant", "system"}, {"text": str}),
    "tool_use": ({"assistant"}, {"id": str, "name": str, "input": dict}),
    "thinking": ({"assistant"}, {"thinking": str}),
    "tool_result": ({"user"}, {"tool_use_id": str}),
}


class Turn(Strict):
    """One of the messages."""

    role: Literal["user", "assistant"]
    content: Annotated[Any, one_of({"type": "string"}, parts_schema(*_BLOCKS), null=False)]


class MessagesTool(Strict):
    """A tool; `input_schema` is a JSON schema."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: Any = None
    strict: bool | None = None


class MessagesChoice(Strict):
    """Whether and which tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Strict):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """`output_config`."""

    format: OutputFormat | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    harmless = {  # noqa: RUF012  (a ClassVar in the base)
        "thinking": ({"type": "disabled"},),
        "container": (),
        "diagnostics": (),
        "context_management": (),
        "mcp_servers": ([],),
        "output_format": (),
    }
    no_effect = frozenset(
        {"metadata", "service_tier", "cache_control", "inference_geo", "speed", "user_profile_id", "workspace_id"}
    )

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Annotated[Any, one_of({"type": "string"}, parts_schema("text"))] = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesChoice | None = None
    output_config: OutputConfig | None = None

    def check(self) -> None:
        _ = self.chat

    @cached_property
    def chat(self) -> ChatBody:
        """The same as a body of /v1/chat/completions. ApiError where it is none."""
        return build(ChatBody, {name: value for name, value in self._chat().items() if value is not None})

    def _chat(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": _text(self.system, "system", "system")})
        for index, turn in enumerate(self.messages):
            messages += _messages(turn, f"messages.{index}.content")
        if self.messages[-1].role == "assistant":
            message = "The last message must be the user's: an answer that is begun cannot be continued."
            raise invalid(f"messages.{len(self.messages) - 1}.role", message, "unsupported")
        choice = self.tool_choice or MessagesChoice(type="auto")
        named = {"type": "function", "function": {"name": choice.name or ""}}
        form = self.output_config.format if self.output_config else None
        schema = {"name": "answer", "schema": form.schema_} if form else None
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
            "tool_choice": {"auto": "auto", "any": "required", "tool": named, "none": "none"}[choice.type],
            "response_format": {"type": "json_schema", "json_schema": schema} if schema else None,
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
        }


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    timeout: Timeout | None = None

    def _chat(self) -> dict[str, Any]:
        return {
            **super()._chat(),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "timeout": self.timeout,
        }


def _messages(turn: Turn, param: str) -> list[dict[str, Any]]:
    """A turn as messages of a chat: results of tools are messages of their own there, and come first."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    blocks = _blocks(turn.content, turn.role, param)
    results = [
        {
            "role": "tool",
            "tool_call_id": block["tool_use_id"],
            "content": _text(block.get("content") or "", "user", f"{param}.{index}.content"),
        }
        for index, block in enumerate(blocks)
        if block["type"] == "tool_result"
    ]
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    calls = [
        {"id": block["id"], "function": {"name": block["name"], "arguments": json.dumps(block["input"])}}
        for block in blocks
        if block["type"] == "tool_use"
    ]
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    if not (texts or calls or thoughts):
        return results
    message: dict[str, Any] = {"role": turn.role, "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [*results, message]


def _text(content: Any, role: str, param: str) -> str:
    """The text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    blocks = _blocks(content, role, param)
    for index, block in enumerate(blocks):
        if block["type"] != "text":
            raise invalid(f"{param}.{index}", "Only text blocks are supported here.", "unsupported")
    return "\n".join(block["text"] for block in blocks)


def _blocks(content: Any, role: str, param: str) -> list[Mapping[str, Any]]:
    """`content`, each block of a known type with the fields of that type."""
    if not isinstance(content, list) or not content:
        raise invalid(param, f"{param} must be a string or a list of blocks.", "invalid_type")
    for index, block in enumerate(content):
        where = f"{param}.{index}"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise invalid(where, "A block must be an object with a type.", "invalid_type")
        roles, fields = _BLOCKS.get(block["type"], (set(), {}))
        if role not in roles:
            raise invalid(where, f"A block of the type {block['type'][:40]} is not supported here.", "unsupported")
        for name, kind in fields.items():
            if not isinstance(block.get(name), kind):
                raise invalid(f"{where}.{name}", f"{where}.{name} is missing or of the wrong type.", "invalid_type")
        known = {"type", *fields, *_NO_EFFECT_IN_BLOCK, *(["content"] if block["type"] == "tool_result" else [])}
        if unknown := block.keys() - known:
            raise invalid(f"{where}.{min(unknown)}", f"Unknown field: {min(unknown)}.", "unknown_parameter")
    return content
