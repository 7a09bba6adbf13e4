"""The body of OpenAI's /v1/responses, and the chat that it stands for. Nothing is stored between requests."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.runtime.server.bodies.base import Body, Strict, Timeout, build, one_of
from llmkit.runtime.server.bodies.chat import MAX_MESSAGES, MAX_TOOLS, NAME, ChatBody
from llmkit.runtime.server.http.errors import invalid

# What an item has that is sent back as it came.
_ECHOED = frozenset({"id", "status", "type", "phase", "encrypted_content", "summary"})

_NAMED = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
}
_KINDS = ["message", "reasoning", "function_call", "function_call_output"]
_ITEMS = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {"type": "object", "properties": {"type": {"enum": _KINDS}}},
}


class ResponsesTool(Strict):
    """A function; its fields are those of a chat's, one level higher."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Strict):
    """`text.format`: a chat's response_format, one level higher."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    """`text`."""

    format: TextFormat | None = None


class ResponsesStreamOptions(Strict):
    """`stream_options`."""

    include_obfuscation: Literal[False] | None = None


class ResponsesBody(Body):
    """POST /v1/responses."""

    harmless = {  # noqa: RUF012  (a ClassVar in the base)
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "include": ([],),
        "reasoning": ({},),
        "max_tool_calls": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
        "context_management": (),
        "moderation": (),
        "image": (),
        "access_programs": (),
    }
    # `store: true` is taken: the answer says that it is not stored, and nothing can refer to it.
    no_effect = frozenset(
        {
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
        }
    )

    input: Annotated[Any, one_of({"type": "string"}, _ITEMS, null=False)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Any, one_of({"enum": ["auto", "none", "required"]}, _NAMED)] = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    timeout: Timeout | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options can be given with stream: true only.")
        _ = self.chat

    @cached_property
    def chat(self) -> ChatBody:
        """The same as a body of /v1/chat/completions. ApiError where it is none."""
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.keys() == {"type", "name"}:
            choice = {"type": choice["type"], "function": {"name": choice["name"]}}
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or []]
        fields = {
            "model": self.model,
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "timeout": self.timeout,
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
        }
        return build(ChatBody, {name: value for name, value in fields.items() if value is not None})

    def _format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None:
            return None
        schema = wanted.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": wanted.type, "json_schema": {"name": "answer", **schema} if schema else None}

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        if not isinstance(items, list) or not 1 <= len(items) <= MAX_MESSAGES:
            code = "invalid_value" if isinstance(items, list) else "invalid_type"
            raise invalid("input", f"input must be a string or a list of 1 to {MAX_MESSAGES} items.", code)
        thought: str | None = None
        for index, item in enumerate(items):
            param = f"input.{index}"
            if not isinstance(item, dict):
                raise invalid(param, "An item of the input must be an object.", "invalid_type")
            kind = item.get("type", "message")
            if kind == "reasoning":
                thought = _text(_fields(item, param, "content")["content"] or "", f"{param}.content", "reasoning_text")
                continue
            if kind == "message":
                message = _message(item, param)
            elif kind == "function_call":
                call = _fields(item, param, "call_id", "name", "arguments")
                entry = {"id": call["call_id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
                message = {"role": "assistant", "content": None, "tool_calls": [entry]}
                if messages and messages[-1]["role"] == "assistant" and thought is None:
                    messages[-1].setdefault("tool_calls", []).append(entry)
                    continue
            elif kind == "function_call_output":
                result = _fields(item, param, "call_id", "output")
                text = _text(result["output"], f"{param}.output", "input_text")
                message = {"role": "tool", "tool_call_id": result["call_id"], "content": text}
            else:
                raise invalid(f"{param}.type", f"Items of the type {str(kind)[:40]} are not supported.", "unsupported")
            if thought is not None and message["role"] == "assistant":
                message["reasoning_content"], thought = thought, None
            messages.append(message)
        return messages


def _message(item: dict[str, Any], param: str) -> dict[str, Any]:
    fields = _fields(item, param, "role", "content")
    if fields["role"] not in ("user", "assistant", "system", "developer"):
        raise invalid(f"{param}.role", "role must be user, assistant, system or developer.")
    content = _text(fields["content"], f"{param}.content", "input_text", "output_text")
    return {"role": fields["role"], "content": content}


def _fields(item: dict[str, Any], param: str, *names: str) -> dict[str, Any]:
    """The fields `names` of an item that has no others that matter."""
    if unknown := item.keys() - _ECHOED - set(names):
        raise invalid(f"{param}.{min(unknown)}", f"Unknown field: {min(unknown)}.", "unknown_parameter")
    for name in names:
        if name not in item and item.get("type") != "reasoning":
            raise invalid(f"{param}.{name}", f"{param}.{name} is missing.", "missing_required_parameter")
        if name in ("call_id", "name", "arguments") and not isinstance(item[name], str):
            raise invalid(f"{param}.{name}", f"{param}.{name} must be a string.", "invalid_type")
    return {name: item.get(name) for name in names}


def _text(content: Any, param: str, *kinds: str) -> str:
    """The text of a string or of parts of these `kinds`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(param, f"{param} must be a string or a list of parts.", "invalid_type")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
            raise invalid(f"{param}.{index}", "A part must be an object with a text.", "invalid_type")
        if (
            part.get("type") not in kinds
            or "text" not in part
            or part.keys() - {"type", "text", "annotations", "logprobs"}
        ):
            raise invalid(
                f"{param}.{index}", f"Only parts of the types {', '.join(kinds)} are supported.", "unsupported"
            )
    return "\n".join(part["text"] for part in content)
