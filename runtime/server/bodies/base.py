"""The bodies of requests: every field is validated before anything is queued, and none is silently ignored.

pydantic parses strictly and straight from the bytes. Fields of the APIs that llmkit does not implement are accepted
only with a value that leaves the answer as it is: see `Body.harmless`. The endpoints' own bodies are in *_body.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from llmkit.runtime.server.http.errors import ApiError, invalid

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_N = 128  # answers to one prompt
MAX_LOGPROBS = 20  # alternatives told of for each token
MAX_BIASES = 1024
INT64 = 2**63
_MAX_EXPLAINED = 10_000  # complaints; pydantic takes seconds to tell the first of a million

Count = Annotated[int, Field(ge=0, lt=2**31)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Timeout = Annotated[float, Field(gt=0, le=86_400)]  # seconds
Harmless = Mapping[str, tuple[Any, ...]]


def one_of(*schemas: dict[str, Any], null: bool = True) -> WithJsonSchema:
    """What the API's description says of a field that is checked by hand; null: it may be null too."""
    return WithJsonSchema({"anyOf": [*schemas, *([{"type": "null"}] if null else [])]})


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}


class Strict(BaseModel):
    """An object whose fields are all known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """`stream_options` of a request."""

    include_usage: bool | None = None


class Body(BaseModel):
    """What all bodies have."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    harmless: ClassVar[Harmless] = {}  # fields that are not implemented, and the values that change nothing, as null
    no_effect: ClassVar[frozenset[str]] = frozenset()  # fields that never change the answer

    model: Annotated[str, Field(min_length=1, max_length=1024)]

    def check(self) -> None:
        """ApiError for what no single field's type can say."""


class GenerationBody(Body):
    """What both kinds of OpenAI's generation take. Null means the default everywhere."""

    harmless = {
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
    # There are no tools in most requests, nothing is stored and nobody is billed.
    no_effect = frozenset(
        {"parallel_tool_calls", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
    )

    max_tokens: Count | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    prompt_logprobs: Logprobs | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    stop: Annotated[Any, one_of(_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS})] = None
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    return_token_ids: bool | None = None
    timeout: Timeout | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options can be given with stream: true only.")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs", "prompt_logprobs can be given without stream only.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid(
                "max_completion_tokens",
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) differ; "
                "give one of them.",
            )
        if self.max_tokens == 0 and not self.may_be_empty:
            raise invalid("max_tokens", "max_tokens must be at least 1; 0 goes with echo only.")
        _ = self.stops

    @property
    def may_be_empty(self) -> bool:
        """Whether an answer of no tokens makes sense."""
        return False

    @property
    def told_logprobs(self) -> int | None:
        """How many alternatives to tell of for each token of the answer; None: nothing at all."""
        raise NotImplementedError

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
        """`max_tokens` under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Kind = TypeVar("Kind", bound=Body)


def parse(kind: type[Kind], data: bytes) -> Kind:
    """The body of a request as `kind`, or an ApiError (400) that names the field at fault."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _explain(error) from None
    except RecursionError:
        raise ApiError(400, "The JSON is nested too deeply.", code="invalid_json") from None
    return _complete(body)


def build(kind: type[Kind], fields: dict[str, Any]) -> Kind:
    """The body of `kind` that another endpoint's stands for; as `parse`."""
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None
    return _complete(body)


def _complete(body: Kind) -> Kind:
    refuse_unsupported(body.model_extra or {}, "", body.harmless, body.no_effect)
    body.check()
    return body


def refuse_unsupported(
    extra: Mapping[str, Any], prefix: str, harmless: Harmless, no_effect: frozenset[str] = frozenset()
) -> None:
    """ApiError for a field that nobody knows, or that is not implemented and has a value that matters."""
    for name, value in extra.items():
        param = prefix + name
        if name not in harmless and name not in no_effect:
            raise invalid(param, f"Unknown field: {param}.", "unknown_parameter")
        if name in harmless and value is not None and not any(_same(value, other) for other in harmless[name]):
            raise invalid(param, f"{param} is not supported with a value that would change the answer.", "unsupported")


def _same(value: Any, other: Any) -> bool:
    # True == 1 in Python, but `n: true` is not `n: 1`.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _explain(error: ValidationError) -> ApiError:
    """The first complaint, with the path of the field at fault."""
    if (count := error.error_count()) > _MAX_EXPLAINED:
        return ApiError(400, f"{count} values of the body are wrong or unknown.", code="too_many_errors")
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
