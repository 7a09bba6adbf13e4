"""What all request schemas share: parsing, fields of generation, errors that name the field.

Every field is validated before anything is queued, and none is silently ignored. pydantic parses
strictly and directly from the bytes. A known field that llmkit does not implement is accepted only
with a value that leaves the answer unchanged: see `StrictModel.neutral_values`. An unknown field,
in the request or in an object within it, has no effect and is reported: see `ignored_fields.py`.

The docstrings of request classes are descriptions in /openapi.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
)

from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.schemas.ignored_fields import FieldPath, IgnoredFields

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_N = 128  # answers to one prompt
MAX_LOGPROBS = 20  # alternatives for each token
MAX_BIASES = 1024
INT64 = 2**63  # one more than the largest int64
# pydantic takes seconds to describe the first of a million errors.
_MAX_DESCRIBED_ERRORS = 10_000

# What huggingface_hub and users of TGI send where they do not name the server's only model.
PLACEHOLDER_MODELS = frozenset({"dummy", "tgi"})

NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TimeoutSeconds = Annotated[float, Field(gt=0, le=86_400)]
# Requests with different salts never share a cached prefix.
CacheSalt = Annotated[str, Field(min_length=1, max_length=1024)]
MaxTokens = Annotated[int, Field(ge=-1, lt=2**31)]  # -1: as many as fit into the context
# How many tokens of a prompt are kept; -1: as many as fit into the context.
TruncatePromptTokens = Annotated[int, Field(ge=-1, lt=2**31)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(max_length=MAX_STOPS),
]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Verbosity = Literal["low", "medium", "high"]
# Names of fields, and the values that leave the answer unchanged. Null always does.
NeutralValues = Mapping[str, tuple[Any, ...]]


def any_of_schema(*schemas: dict[str, Any], null: bool = True) -> WithJsonSchema:
    """Return the JSON schema of a field that is validated by hand; `null`: it may be null, too."""
    alternatives = list(schemas)
    if null:
        alternatives.append({"type": "null"})
    return WithJsonSchema({"anyOf": alternatives})


_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}


def _add_known_extras(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add the fields that are accepted but not implemented to the JSON schema of `model`."""
    assert issubclass(model, StrictModel)
    properties = schema.setdefault("properties", {})
    for name, values in model.neutral_values.items():
        properties.setdefault(name, {"enum": [None, *values]})
    for name in sorted(model.no_effect_fields):
        properties.setdefault(name, {})


class StrictModel(BaseModel):
    """An object of a request. The types of its fields are strict.

    `parse_request` removes the fields that it does not have, and reports the unknown ones.
    """

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_add_known_extras
    )

    # Fields that are not implemented, with the values that leave the answer unchanged.
    neutral_values: ClassVar[NeutralValues] = {}
    # Fields that never change the answer: any value is accepted.
    no_effect_fields: ClassVar[frozenset[str]] = frozenset()


class StreamOptions(StrictModel):
    """`stream_options` of a request."""

    neutral_values = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


ModelName = Annotated[
    str,
    Field(max_length=1024),
    BeforeValidator(lambda name: "" if name is None else name),
    any_of_schema({"type": "string", "maxLength": 1024}),
]


NO_LIMIT = -1  # as a thinking budget
Wish = Literal["enabled", "effort", "budget"]


class ThinkingWishes(NamedTuple):
    """What a request says of thinking; None: nothing. See `reasoning_options.py`."""

    enabled: bool | None = None
    effort: Effort | None = None
    budget: int | None = None  # tokens; NO_LIMIT: as many as the model wants


class ReasoningControl(NamedTuple):
    """A field that asks the model to reason, or to write, more or less than it does by itself."""

    path: FieldPath
    # Which of the `ThinkingWishes` it is; None: it never has an effect.
    wish: Wish | None


class BaseRequest(StrictModel):
    """The base of all request schemas."""

    # Whether the model's chat template writes the prompt.
    uses_chat_template: ClassVar[bool] = False

    _ignored: IgnoredFields = PrivateAttr(default_factory=IgnoredFields)

    # Empty only where the server has several models; see `parse_request`.
    model: ModelName = ""

    @property
    def ignored(self) -> IgnoredFields:
        """The fields of this request that have no effect."""
        return self._ignored

    @property
    def reasoning_controls(self) -> list[ReasoningControl]:
        """The fields given that control how much the model reasons."""
        return []

    @property
    def thinking_wishes(self) -> ThinkingWishes:
        """What these fields say together."""
        return ThinkingWishes()

    def check(self) -> None:
        """Check what the types of single fields cannot express. Raises ApiError."""


class GenerationRequest(BaseRequest):
    """The fields that OpenAI's completions and chats share. Null means the default everywhere."""

    neutral_values = {
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "top_logprobs": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "return_tokens_as_token_ids": (False,),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "logits_processors": ([],),
        "chat_template": (),
        "documents": ([],),
        "prompt_embeds": (),
        # Other servers' names of constraints.
        "regex": (),
        "ebnf": (),
        "grammar": ("",),
        "json_schema": ({},),
        "guided_whitespace_pattern": (),
    }
    # parallel_tool_calls matters to chats only. The others concern storage, billing and caching,
    # which do not change the answer.
    no_effect_fields = frozenset(
        {
            "parallel_tool_calls",
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
        }
    )

    max_tokens: MaxTokens | None = None
    n_predict: MaxTokens | None = None  # llama.cpp's name of max_tokens
    max_completion_tokens: MaxTokens | None = None
    min_tokens: NonNegativeInt | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    repeat_penalty: RepetitionPenalty | None = None  # llama.cpp's name of repetition_penalty
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]
        | None
    ) = None
    prompt_logprobs: LogprobCount | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    stop: Annotated[
        Any,
        any_of_schema(
            _STOP_STRING_SCHEMA,
            {"type": "array", "items": _STOP_STRING_SCHEMA, "maxItems": MAX_STOPS},
        ),
    ] = None
    stop_token_ids: (
        Annotated[list[NonNegativeInt], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: TruncatePromptTokens | None = None
    cache_salt: CacheSalt | None = None
    cache_prompt: bool | None = None
    reasoning_effort: Effort | None = None
    verbosity: Verbosity | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    timeout: TimeoutSeconds | None = None

    def check(self) -> None:
        take_alias(self, "n_predict", "max_tokens")
        take_alias(self, "repeat_penalty", "repetition_penalty")
        check_truncation(self.truncate_prompt_tokens)
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options can be given with stream: true only.")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs", "prompt_logprobs can be given without stream only.")
        both_limits = self.max_tokens is not None and self.max_completion_tokens is not None
        if both_limits and self.max_tokens != self.max_completion_tokens:
            raise invalid(
                "max_completion_tokens",
                f"max_tokens ({self.max_tokens}) and max_completion_tokens "
                f"({self.max_completion_tokens}) differ; give one of them.",
            )
        if self.max_new_tokens == 0 and not self.allows_empty_output:
            name = "max_completion_tokens" if self.max_tokens is None else "max_tokens"
            message = f"{name} must be at least 1, or -1 for as many as fit; 0 goes with echo only."
            raise invalid(name, message)
        _ = self.stop_strings  # raises ApiError when `stop` is invalid

    @property
    def allows_empty_output(self) -> bool:
        """Whether max_tokens may be 0."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives for each token of the answer; None: no log probabilities at all."""
        raise NotImplementedError

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings. Raises ApiError when `stop` is not a string or up to 16 of them."""
        stop_strings = self.stop
        if stop_strings is None:
            stop_strings = []
        elif isinstance(stop_strings, str):
            stop_strings = [stop_strings]
        if not isinstance(stop_strings, list) or not all(
            isinstance(stop_string, str) for stop_string in stop_strings
        ):
            raise invalid("stop", "stop must be a string or a list of strings.", "invalid_type")
        if len(stop_strings) > MAX_STOPS:
            raise invalid(
                "stop", f"stop has {len(stop_strings)} strings; at most {MAX_STOPS} are possible."
            )
        if not all(0 < len(stop_string) <= MAX_STOP_CHARS for stop_string in stop_strings):
            raise invalid("stop", f"A stop string must have 1 to {MAX_STOP_CHARS} characters.")
        return tuple(stop_strings)

    @property
    def max_new_tokens(self) -> int | None:
        """`max_tokens`, or `max_completion_tokens`, its newer name; -1: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def include_continuous_usage(self) -> bool:
        """Whether every chunk of a stream holds the usage so far."""
        return self.include_usage and bool(
            self.stream_options is not None and self.stream_options.continuous_usage_stats
        )

    @property
    def reasoning_controls(self) -> list[ReasoningControl]:
        return given_controls(
            (("reasoning_effort",), self.reasoning_effort, "effort"),
            (("verbosity",), self.verbosity, None),
        )


def given_controls(
    *controls: tuple[FieldPath, Any, Wish | None],
) -> list[ReasoningControl]:
    """Return the controls among (path, value, wish) whose value is not null."""
    return [ReasoningControl(path, wish) for path, value, wish in controls if value is not None]


def take_alias(request: BaseModel, alias: str, name: str) -> None:
    """Set the field `name` from its other name. Raises ApiError 400 when the two differ."""
    value = getattr(request, alias)
    if value is None:
        return
    known = getattr(request, name)
    if known is None:
        setattr(request, name, value)
    elif known != value:
        raise invalid(alias, f"{alias} and {name} are the same field and differ; give one of them.")


def check_truncation(truncate_prompt_tokens: int | None) -> None:
    """Raise ApiError 400 for a prompt that is to be cut to nothing."""
    if truncate_prompt_tokens == 0:
        raise invalid(
            "truncate_prompt_tokens",
            "truncate_prompt_tokens must be at least 1, or -1 for as many as fit.",
        )


RequestT = TypeVar("RequestT", bound=BaseRequest)


def parse_request(
    kind: type[RequestT], data: bytes, strict_fields: bool = True, default_model: str = ""
) -> RequestT:
    """Parse a request's body. Raises ApiError 400 that names the field at fault.

    strict_fields: whether an unknown field is an error; otherwise it is in the request's `ignored`.
    default_model: the model of a request that names none, or one of PLACEHOLDER_MODELS.
    """
    try:
        request = kind.model_validate_json(data)
    except ValidationError as error:
        raise _validation_error(error) from None
    except RecursionError:
        raise ApiError(400, "The JSON is nested too deeply.", code="invalid_json") from None
    if not request.model or request.model in PLACEHOLDER_MODELS:
        request.model = default_model or request.model
    return _checked(request, strict_fields)


def build_request(kind: type[RequestT], fields: dict[str, Any]) -> RequestT:
    """Build a request from the converted fields of another API; raises as `parse_request` does.

    An unknown field is an error.
    """
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _validation_error(error) from None
    return _checked(request, strict_fields=True)


def _checked(request: RequestT, strict_fields: bool) -> RequestT:
    request.ignored.strict = strict_fields
    _take_extra_fields(request, (), request.ignored)
    request.check()
    return request


def _take_extra_fields(value: Any, path: FieldPath, ignored: IgnoredFields) -> None:
    """Check and remove the fields that `value`, which is at `path`, and objects in it do not have.

    They are removed so that no chat template sees them.
    """
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, StrictModel):
                return  # lists are of one type
            _take_extra_fields(item, (*path, index), ignored)
    elif isinstance(value, StrictModel):
        extra = value.model_extra
        if extra:
            check_extra_fields(extra, path, ignored, value.neutral_values, value.no_effect_fields)
            extra.clear()
        for name, field in type(value).model_fields.items():
            _take_extra_fields(getattr(value, name), (*path, field.alias or name), ignored)


def check_extra_fields(
    extra: Mapping[str, Any],
    path: FieldPath,
    ignored: IgnoredFields,
    neutral_values: NeutralValues = MappingProxyType({}),
    no_effect_fields: frozenset[str] = frozenset(),
) -> None:
    """Add the unknown fields among `extra`, fields of the object at `path`, to `ignored`.

    Raises ApiError 400 for a field that is not implemented and would change the answer.
    """
    for name, value in extra.items():
        if name in no_effect_fields:
            continue
        if name not in neutral_values:
            ignored.add_unknown((*path, name))
            continue
        allowed = neutral_values[name]
        if value is None or any(_same(value, neutral) for neutral in allowed):
            continue
        param = ".".join(map(str, (*path, name)))
        choices = " or ".join(json.dumps(choice) for choice in (*allowed, None))
        raise invalid(
            param,
            f"{param} is not supported with this value, which would change the answer: leave it "
            f"out, or send {choices}.",
            "unsupported",
        )


def _same(value: Any, other: Any) -> bool:
    # True == 1 in Python, but `n: true` is not `n: 1`.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _validation_error(error: ValidationError) -> ApiError:
    """Return the ApiError of pydantic's first error, with the path of the field at fault."""
    count = error.error_count()
    if count > _MAX_DESCRIBED_ERRORS:
        return ApiError(
            400, f"{count} values of the body are wrong or unknown.", code="too_many_errors"
        )
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind = first["type"]
    message = first["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"{message}.", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"]) or None
    if kind == "missing":
        return ApiError(400, f"{param} is missing.", code="missing_required_parameter", param=param)
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown field: {param}.", code="unknown_parameter", param=param)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    prefix = f"{param}: " if param else ""
    return ApiError(400, f"{prefix}{message}.", code=code, param=param)
