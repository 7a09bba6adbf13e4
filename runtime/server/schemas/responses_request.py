"""The schema of OpenAI's /v1/responses, and its conversion to a chat completion request.

The items of an earlier response that a request continues are put before its own: see
`ResponsesRequest.continue_from`.
"""

from __future__ import annotations

import uuid
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    CacheSalt,
    Effort,
    LogprobCount,
    ReasoningControl,
    StrictModel,
    ThinkingWishes,
    TimeoutSeconds,
    Verbosity,
    any_of_schema,
    build_request,
    check_extra_fields,
    given_controls,
)
from llmkit.runtime.server.schemas.carried_reasoning import carried_reasoning
from llmkit.runtime.server.schemas.chat_request import (
    MAX_MESSAGES,
    MAX_TOOLS,
    TOOL_NAME_PATTERN,
    ChatCompletionRequest,
)
from llmkit.runtime.server.schemas.ignored_fields import FieldPath, IgnoredFields

# Fields of an item that clients send back as they received them; they have no effect.
_NO_EFFECT_ITEM_FIELDS = frozenset(
    {"id", "status", "type", "phase", "encrypted_content", "summary"}
)
_NO_EFFECT_PART_FIELDS = frozenset({"annotations", "logprobs"})
# Values of `include` for items that no answer of this server has.
_EMPTY_INCLUDES = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
_ENCRYPTED_REASONING = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"

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
    verbosity: Verbosity | None = None


class ReasoningOptions(StrictModel):
    """`reasoning`. Answers have the reasoning itself and no summary of it."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStreamOptions(StrictModel):
    """`stream_options`."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(BaseRequest):
    """POST /v1/responses."""

    uses_chat_template = True
    neutral_values = {  # noqa: RUF012
        "conversation": (),
        "prompt": (),
        "background_options": (),
        "truncation": ("disabled",),
        "moderation": (),
        "image": (),
        "access_programs": (),
    }
    # max_tool_calls limits calls of built-in tools, and there are none here.
    no_effect_fields = frozenset(
        {
            "max_tool_calls",
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
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    context_management: list[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None
    # Without --store-responses, `store: true` has no effect: the response says that it is not
    # stored. With it, null means true.
    store: bool | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    background: bool | None = None
    top_logprobs: LogprobCount | None = None
    cache_salt: CacheSalt | None = None
    user: str | None = None
    timeout: TimeoutSeconds | None = None

    _history: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def check(self) -> None:
        if self.background and self.store is False:
            raise invalid("background", "A background response must be stored: leave out store.")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options can be given with stream: true only.")
        for index, name in enumerate(self.include or []):
            known = _EMPTY_INCLUDES | {_ENCRYPTED_REASONING, _LOGPROBS}
            if name not in known:
                raise invalid(
                    f"include.{index}",
                    f"{name[:80]!r} is not supported; {', '.join(sorted(known))} are.",
                    "unsupported",
                )
        if self.top_logprobs and not self.includes_logprobs:
            raise invalid("top_logprobs", f"top_logprobs needs {_LOGPROBS!r} in include.")
        if self.previous_response_id is None:
            _ = self.chat  # raises ApiError when it cannot be converted
        else:
            self._check_items()

    @property
    def includes_logprobs(self) -> bool:
        """Whether the text has log probabilities."""
        return _LOGPROBS in (self.include or [])

    def continue_from(self, history: list[dict[str, Any]]) -> None:
        """Put the items of an earlier conversation before the input. Raises ApiError."""
        self._history = history
        _ = self.chat

    @property
    def items(self) -> list[dict[str, Any]]:
        """The items of the request's own input, complete, each with an id."""
        if isinstance(self.input, str):
            return [complete_item({"role": "user", "content": self.input})]
        return [complete_item(item) for item in self.input]

    @property
    def reasoning_controls(self) -> list[ReasoningControl]:
        reasoning = self.reasoning or ReasoningOptions()
        return given_controls(
            (("reasoning", "effort"), reasoning.effort, "effort"),
            (("reasoning", "summary"), reasoning.summary, None),
            (("reasoning", "generate_summary"), reasoning.generate_summary, None),
            (("text", "verbosity"), self.text.verbosity if self.text else None, None),
            (("context_management",), self.context_management or None, None),
        )

    @property
    def thinking_wishes(self) -> ThinkingWishes:
        return ThinkingWishes(effort=self.reasoning.effort if self.reasoning else None)

    @property
    def includes_encrypted_reasoning(self) -> bool:
        """Whether reasoning items have `encrypted_content`."""
        return _ENCRYPTED_REASONING in (self.include or [])

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
            "cache_salt": self.cache_salt,
            "timeout": self.timeout,
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.thinking_wishes.effort,
            "response_format": self._response_format(),
            "logprobs": self.includes_logprobs or None,
            "top_logprobs": self.top_logprobs,
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
        self._check_items()
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        if len(self._history) + len(items) > MAX_MESSAGES:
            raise invalid(
                "previous_response_id",
                f"The conversation has {len(self._history) + len(items)} items; at most "
                f"{MAX_MESSAGES} are possible.",
            )
        thought: str | None = None  # reasoning that waits for the assistant's next message
        # Items of the history, which were checked before, have negative numbers.
        for index, item in enumerate([*self._history, *items], -len(self._history)):
            param = f"input.{index}"
            content_path = ("input", index, "content")
            kind = item.get("type", "message")
            if kind == "reasoning":
                content = self._item_fields(item, index, "content")["content"]
                if not content:
                    content = carried_reasoning(item.get("encrypted_content")) or ""
                thought = _text(content, content_path, self.ignored, "reasoning_text")
                continue
            if kind == "message":
                message = self._chat_message(item, index)
            elif kind == "function_call":
                fields = self._item_fields(item, index, "call_id", "name", "arguments")
                function = {"name": fields["name"], "arguments": fields["arguments"]}
                call = {"id": fields["call_id"], "function": function}
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
                if messages and messages[-1]["role"] == "assistant" and thought is None:
                    # Another call of the same message.
                    messages[-1].setdefault("tool_calls", []).append(call)
                    continue
            elif kind == "function_call_output":
                fields = self._item_fields(item, index, "call_id", "output")
                output_path = ("input", index, "output")
                text = _text(fields["output"], output_path, self.ignored, "input_text")
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

    def _check_items(self) -> None:
        """Raise ApiError unless the input is a string or a list of objects."""
        items = self.input
        if isinstance(items, str):
            return
        if not isinstance(items, list) or not 1 <= len(items) <= MAX_MESSAGES:
            code = "invalid_value" if isinstance(items, list) else "invalid_type"
            raise invalid(
                "input", f"input must be a string or a list of 1 to {MAX_MESSAGES} items.", code
            )
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                message = "An item of the input must be an object."
                raise invalid(f"input.{index}", message, "invalid_type")

    def _chat_message(self, item: dict[str, Any], index: int) -> dict[str, Any]:
        """Convert an item of the type message."""
        fields = self._item_fields(item, index, "role", "content")
        if fields["role"] not in ("user", "assistant", "system", "developer"):
            raise invalid(
                f"input.{index}.role", "role must be user, assistant, system or developer."
            )
        path = ("input", index, "content")
        content = _text(fields["content"], path, self.ignored, "input_text", "output_text")
        return {"role": fields["role"], "content": content}

    def _item_fields(self, item: dict[str, Any], index: int, *names: str) -> dict[str, Any]:
        """Return the fields `names` of an item. Raises ApiError when one is missing or wrong."""
        param = f"input.{index}"
        extra = {name: value for name, value in item.items() if name not in names}
        if index >= 0:  # those of the history were reported before
            check_extra_fields(
                extra, ("input", index), self.ignored, no_effect_fields=_NO_EFFECT_ITEM_FIELDS
            )
        for name in names:
            if name not in item and item.get("type") != "reasoning":
                raise invalid(
                    f"{param}.{name}", f"{param}.{name} is missing.", "missing_required_parameter"
                )
            if name in ("call_id", "name", "arguments") and not isinstance(item[name], str):
                raise invalid(
                    f"{param}.{name}", f"{param}.{name} must be a string.", "invalid_type"
                )
        return {name: item.get(name) for name in names}


_ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}


def complete_item(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item of an input as OpenAI lists it: with its type, an id and a list of parts."""
    kind = item.get("type", "message")
    # A socket completes items before they are checked.
    prefix = _ID_PREFIXES.get(kind, "item") if isinstance(kind, str) else "item"
    complete: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind}
    if kind != "reasoning":
        complete["status"] = "completed"
    complete |= {name: value for name, value in item.items() if value is not None}
    if kind == "message" and isinstance(complete.get("content"), str):
        part: dict[str, Any] = {"type": "input_text", "text": complete["content"]}
        if complete.get("role") == "assistant":
            part = {"type": "output_text", "text": complete["content"], "annotations": []}
        complete["content"] = [part]
    return complete


def _text(content: Any, path: FieldPath, ignored: IgnoredFields, *part_types: str) -> str:
    """Return the text of a string, or of content parts of these types.

    Unknown fields of a part are added to `ignored`.
    """
    if isinstance(content, str):
        return content
    param = ".".join(map(str, path))
    if not isinstance(content, list) or not content:
        raise invalid(param, f"{param} must be a string or a list of parts.", "invalid_type")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
            raise invalid(
                f"{param}.{index}", "A part must be an object with a text.", "invalid_type"
            )
        if part.get("type") not in part_types or "text" not in part:
            raise invalid(
                f"{param}.{index}",
                f"Only parts of the types {', '.join(part_types)} are supported.",
                "unsupported",
            )
        check_extra_fields(
            {name: value for name, value in part.items() if name not in ("type", "text")},
            (*path, index),
            ignored,
            no_effect_fields=_NO_EFFECT_PART_FIELDS,
        )
    return "\n".join(part["text"] for part in content)
