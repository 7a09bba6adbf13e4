"""The bodies of requests: every field is validated before anything is queued, and none is silently ignored.

pydantic parses strictly and straight from the bytes. Fields of OpenAI's and vLLM's APIs that llmkit does not
implement are accepted only with a value that leaves the answer as it is: see HARMLESS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmkit.runtime.server.errors import ApiError, invalid

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_MESSAGES = 4096
INT64 = 2**63

# Fields that are not implemented, and the values that change nothing (null never does).
HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# Fields that never change the answer: there are no tools, nothing is stored and nobody is billed.
NO_EFFECT = frozenset(
    {"parallel_tool_calls", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
)
# What clients send back when they repeat an assistant's message as they got it.
HARMLESS_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "annotations": ([],),
}


class StreamOptions(BaseModel):
    """`stream_options` of a request."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None


class GenerationBody(BaseModel):
    """What both kinds of generation take. Null means the default everywhere."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    stop: Any = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings. ApiError when `stop` is not a string or up to 16 of them."""
        stops = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise invalid("stop", "stop must be a string or a list of strings.", "invalid_type")
        if len(stops) > MAX_STOPS:
            raise invalid("stop", f"stop has {len(stops)} strings; at most {MAX_STOPS} are possible.")
        if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise invalid("stop", f"A stop string must have 1 to {MAX_STOP_CHARS} characters.")
        return tuple(stops)

    @property
    def output_limit(self) -> int | None:
        """`max_tokens` under either name. ApiError when both are given and differ."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid(
                "max_completion_tokens",
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) differ; "
                "give one of them.",
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Any

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or list of ids per choice. ApiError when empty or of mixed types."""
        prompt = self.prompt
        several = isinstance(prompt, list) and not _is_ids(prompt)
        prompts = prompt if several else [prompt]
        if all(isinstance(one, str) for one in prompts) or all(_is_ids(one) for one in prompts):
            if not all(prompts):
                raise invalid("prompt", "The prompt is empty; at least one token is needed.")
            return prompts
        expected = "a string, a list of strings, a list of token ids or a list of lists of token ids"
        raise invalid("prompt", f"prompt must be {expected}.", "invalid_type")


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: Annotated[str, Field(max_length=256)] | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates want them: text content only, `developer` under its older name."""
        conversation = []
        for index, message in enumerate(self.messages):
            entry = {
                "role": "system" if message.role == "developer" else message.role,
                "content": _text(message.content, f"messages.{index}.content"),
            }
            if message.name is not None:
                entry["name"] = message.name
            conversation.append(entry)
        return conversation


Body = TypeVar("Body", bound=GenerationBody)


def parse(kind: type[Body], data: bytes) -> Body:
    """The body of a request as `kind`, or an ApiError (400) that names the field at fault."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _explain(error) from None
    except RecursionError:
        raise ApiError(400, "The JSON is nested too deeply.", code="invalid_json") from None
    _refuse_unsupported(body.model_extra or {}, "", HARMLESS)
    if isinstance(body, ChatBody):
        for index, message in enumerate(body.messages):
            _refuse_unsupported(message.model_extra or {}, f"messages.{index}.", HARMLESS_IN_MESSAGE)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options can be given with stream: true only.")
    return body


def _refuse_unsupported(extra: Mapping[str, Any], prefix: str, harmless: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in extra.items():
        param = prefix + name
        if name not in harmless and (prefix or name not in NO_EFFECT):
            raise invalid(param, f"Unknown field: {param}.", "unknown_parameter")
        if name in harmless and value is not None and not any(_same(value, other) for other in harmless[name]):
            raise invalid(param, f"{param} is not supported with a value that would change the answer.", "unsupported")


def _same(value: Any, other: Any) -> bool:
    # True == 1 in Python, but `n: true` is not `n: 1`.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _is_ids(value: Any) -> bool:
    # bool is an int to isinstance.
    return isinstance(value, list) and all(type(item) is int for item in value)


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


def _explain(error: ValidationError) -> ApiError:
    """The first complaint, with the path of the field at fault."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"{message}.", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"]) or None
    if kind == "missing":
        return ApiError(400, f"{param} is missing.", code="missing_required_parameter", param=param)
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown field: {param}.", code="unknown_parameter", param=param)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    where = f"{param}: " if param else ""
    return ApiError(400, f"{where}{message}.", code=code, param=param)
