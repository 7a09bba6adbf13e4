"""The schema of OpenAI's /v1/responses, and its conversion to a chat completion request.

Nothing is stored between requests.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    StrictModel,
    TimeoutSeconds,
    any_of_schema,
    build_request,
)
from llmkit.runtime.server.schemas.chat_request import (
    MAX_MESSAGES,
    MAX_TOOLS,
    TOOL_NAME_PATTERN,
    ChatCompletionRequest,
)

# Fields of an item that clients send back as they received them; they have no effect.
_IGNORED_ITEM_FIELDS = frozenset({"id", "status", "type", "phase", "encrypted_content", "summary"})

_TOOL_CHOICE_SCHEMA = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
}
_ITEM_TYPES = ["message", "reasoning", "function_call", "function_call_output"]
_ITEMS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {"type": "object", "properties": {"type": {"enum": _ITEM_TYPES}}},
}


class ResponsesTool(StrictModel):
    """A function; its fields are those of a chat's, one level higher."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=TOOL_NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(StrictModel):
    """`text.format`: a chat's response_format, one level higher."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(StrictModel):
    """`text`."""

    format: TextFormat | None = None


class ResponsesStreamOptions(StrictModel):
    """`stream_options`."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(BaseRequest):
    """POST /v1/responses."""

    neutral_values = {  # noqa: RUF012
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
    # `store: true` is accepted: the response says that it is not stored.
    ignored_fields = frozenset(
        {
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
        }
    )

    input: Annotated[Any, any_of_schema({"type": "string"}, _ITEMS_SCHEMA, null=False)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Any, any_of_schema({"enum": ["auto", "none", "required"]}, _TOOL_CHOICE_SCHEMA)
    ] = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    timeout: TimeoutSeconds | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options can be given with stream: true only.")
        _ = self.chat  # raises ApiError when it cannot be converted

    @cached_property
    def chat(self) -> ChatCompletionRequest:
        """The same request for /v1/chat/completions. Raises ApiError if it cannot be converted."""
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.keys() == {"type", "name"}:
            choice = {"type": choice["type"], "function": {"name": choice["name"]}}
        tools = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})}
            for tool in self.tools or []
        ]
        fields = {
            "model": self.model,
            "messages": self._chat_messages(),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "timeout": self.timeout,
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
        }
        return build_request(
            ChatCompletionRequest,
            {name: value for name, value in fields.items() if value is not None},
        )

    def _response_format(self) -> dict[str, Any] | None:
        text_format = self.text.format if self.text else None
        if text_format is None:
            return None
        fields = text_format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        json_schema = {"name": "answer", **fields} if fields else None
        return {"type": text_format.type, "json_schema": json_schema}

    def _chat_messages(self) -> list[dict[str, Any]]:
        """Convert the items of the input; reasoning belongs to the assistant's next message."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if not isinstance(items, list) or not 1 <= len(items) <= MAX_MESSAGES:
            code = "invalid_value" if isinstance(items, list) else "invalid_type"
            raise invalid(
                "input", f"input must be a string or a list of 1 to {MAX_MESSAGES} items.", code
            )
        thought: str | None = None  # reasoning that waits for the assistant's next message
        for index, item in enumerate(items):
            param = f"input.{index}"
            if not isinstance(item, dict):
                raise invalid(param, "An item of the input must be an object.", "invalid_type")
            kind = item.get("type", "message")
            if kind == "reasoning":
                content = _item_fields(item, param, "content")["content"] or ""
                thought = _text(content, f"{param}.content", "reasoning_text")
                continue
            if kind == "message":
                message = _chat_message(item, param)
            elif kind == "function_call":
                fields = _item_fields(item, param, "call_id", "name", "arguments")
                function = {"name": fields["name"], "arguments": fields["arguments"]}
                call = {"id": fields["call_id"], "function": function}
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
                if messages and messages[-1]["role"] == "assistant" and thought is None:
                    # Another call of the same message.
                    messages[-1].setdefault("tool_calls", []).append(call)
                    continue
            elif kind == "function_call_output":
                fields = _item_fields(item, param, "call_id", "output")
                text = _text(fields["output"], f"{param}.output", "input_text")
                message = {"role": "tool", "tool_call_id": fields["call_id"], "content": text}
            else:
                raise invalid(
                    f"{param}.type",
                    f"Items of the type {str(kind)[:40]} are not supported.",
                    "unsupported",
                )
            if thought is not None and message["role"] == "assistant":
                message["reasoning_content"] = thought
                thought = None
            messages.append(message)
        return messages


def _chat_message(item: dict[str, Any], param: str) -> dict[str, Any]:
    fields = _item_fields(item, param, "role", "content")
    if fields["role"] not in ("user", "assistant", "system", "developer"):
        raise invalid(f"{param}.role", "role must be user, assistant, system or developer.")
    content = _text(fields["content"], f"{param}.content", "input_text", "output_text")
    return {"role": fields["role"], "content": content}


def _item_fields(item: dict[str, Any], param: str, *names: str) -> dict[str, Any]:
    """Return the fields `names` of an item. Raises ApiError when one is missing, or unknown."""
    unknown = item.keys() - _IGNORED_ITEM_FIELDS - set(names)
    if unknown:
        raise invalid(
            f"{param}.{min(unknown)}", f"Unknown field: {min(unknown)}.", "unknown_parameter"
        )
    for name in names:
        if name not in item and item.get("type") != "reasoning":
            raise invalid(
                f"{param}.{name}", f"{param}.{name} is missing.", "missing_required_parameter"
            )
        if name in ("call_id", "name", "arguments") and not isinstance(item[name], str):
            raise invalid(f"{param}.{name}", f"{param}.{name} must be a string.", "invalid_type")
    return {name: item.get(name) for name in names}


def _text(content: Any, param: str, *part_types: str) -> str:
    """Return the text of a string, or of content parts of these types."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(param, f"{param} must be a string or a list of parts.", "invalid_type")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
            raise invalid(
                f"{param}.{index}", "A part must be an object with a text.", "invalid_type"
            )
        has_unknown_field = part.keys() - {"type", "text", "annotations", "logprobs"}
        if part.get("type") not in part_types or "text" not in part or has_unknown_field:
            raise invalid(
                f"{param}.{index}",
                f"Only parts of the types {', '.join(part_types)} are supported.",
                "unsupported",
            )
    return "\n".join(part["text"] for part in content)
