"""What all request schemas share: parsing, fields of generation, errors that name the field.

Every field is validated before anything is queued, and none is silently ignored. pydantic parses
strictly and directly from the bytes. A field that llmkit does not implement is accepted only with a
value that leaves the answer unchanged: see `BaseRequest.neutral_values`.

The docstrings of request classes are descriptions in /openapi.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from llmkit.runtime.server.http.http_errors import ApiError, invalid

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_N = 128  # answers to one prompt
MAX_LOGPROBS = 20  # alternatives for each token
MAX_BIASES = 1024
INT64 = 2**63  # one more than the largest int64
# pydantic takes seconds to describe the first of a million errors.
_MAX_DESCRIBED_ERRORS = 10_000

NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TimeoutSeconds = Annotated[float, Field(gt=0, le=86_400)]
# Names of fields, and the values that leave the answer unchanged. Null always does.
NeutralValues = Mapping[str, tuple[Any, ...]]


def any_of_schema(*schemas: dict[str, Any], null: bool = True) -> WithJsonSchema:
    """Return the JSON schema of a field that is validated by hand; `null`: it may be null, too."""
    alternatives = list(schemas)
    if null:
        alternatives.append({"type": "null"})
    return WithJsonSchema({"anyOf": alternatives})


_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}


class StrictModel(BaseModel):
    """An object without unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(StrictModel):
    """`stream_options` of a request."""

    include_usage: bool | None = None


class BaseRequest(BaseModel):
    """The base of all request schemas."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    # Fields that are not implemented, with the values that leave the answer unchanged.
    neutral_values: ClassVar[NeutralValues] = {}
    # Fields that never change the answer: any value is accepted.
    ignored_fields: ClassVar[frozenset[str]] = frozenset()

    model: Annotated[str, Field(min_length=1, max_length=1024)]

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
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }
    # parallel_tool_calls matters to chats only. The others concern storage, billing and caching,
    # which do not change the answer.
    ignored_fields = frozenset(
        {
            "parallel_tool_calls",
            "store",
            "metadata",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
        }
    )

    max_tokens: NonNegativeInt | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_tokens: NonNegativeInt | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
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
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    timeout: TimeoutSeconds | None = None

    def check(self) -> None:
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
        if self.max_tokens == 0 and not self.allows_empty_output:
            raise invalid("max_tokens", "max_tokens must be at least 1; 0 goes with echo only.")
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
        """`max_tokens`, or `max_completion_tokens`, its newer name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


RequestT = TypeVar("RequestT", bound=BaseRequest)


def parse_request(kind: type[RequestT], data: bytes) -> RequestT:
    """Parse a request's body. Raises ApiError 400 that names the field at fault."""
    try:
        request = kind.model_validate_json(data)
    except ValidationError as error:
        raise _validation_error(error) from None
    except RecursionError:
        raise ApiError(400, "The JSON is nested too deeply.", code="invalid_json") from None
    return _checked(request)


def build_request(kind: type[RequestT], fields: dict[str, Any]) -> RequestT:
    """Build a request from the converted fields of another API; raises as `parse_request` does."""
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _validation_error(error) from None
    return _checked(request)


def _checked(request: RequestT) -> RequestT:
    reject_unsupported_fields(
        request.model_extra or {}, "", request.neutral_values, request.ignored_fields
    )
    request.check()
    return request


def reject_unsupported_fields(
    extra: Mapping[str, Any],
    prefix: str,
    neutral_values: NeutralValues,
    ignored_fields: frozenset[str] = frozenset(),
) -> None:
    """Raise ApiError for a field that is unknown, or not implemented and would change the answer.

    `extra` are the fields that the schema does not have; `prefix` is put before their names.
    """
    for name, value in extra.items():
        param = prefix + name
        if name in ignored_fields:
            continue
        if name not in neutral_values:
            raise invalid(param, f"Unknown field: {param}.", "unknown_parameter")
        if value is None or any(_same(value, neutral) for neutral in neutral_values[name]):
            continue
        raise invalid(
            param,
            f"{param} is not supported with a value that would change the answer.",
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
