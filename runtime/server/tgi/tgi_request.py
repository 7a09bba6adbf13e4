"""Requests of TGI's API, and how each becomes a completion request."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import (
    INT64,
    MAX_LOGPROBS,
    MAX_N,
    BaseRequest,
    Penalty,
    RepetitionPenalty,
    StopStrings,
    StrictModel,
    build_request,
)
from llmkit.runtime.server.schemas.completion_request import CompletionRequest

DEFAULT_MAX_NEW_TOKENS = 100  # as huggingface_hub documents it
# The field of a completion for each type of grammar.
_GRAMMARS = {"json": "guided_json", "regex": "guided_regex", "json_schema": "guided_json"}


class TgiGrammar(StrictModel):
    """What the text must look like: a JSON schema, one with a name, or a regular expression."""

    type: Literal["json", "regex", "json_schema"]
    value: Any

    @property
    def constraint(self) -> Any:
        """The schema or the expression. Raises ApiError for a value of the wrong type."""
        value = self.value
        if self.type == "json_schema" and isinstance(value, dict) and "schema" in value:
            value = value["schema"]
        expected = str if self.type == "regex" else dict
        if not isinstance(value, expected):
            kind = "a string" if self.type == "regex" else "a JSON schema: an object"
            raise invalid(
                "parameters.grammar.value",
                f"The value of a grammar of the type {self.type} must be {kind}.",
                "invalid_type",
            )
        return value


class TgiParameters(StrictModel):
    """`parameters`. Without do_sample or a sampling parameter, the text is the likeliest."""

    neutral_values = {  # noqa: RUF012
        "typical_p": (1,),
        "watermark": (False,),
    }

    adapter_id: Annotated[str, Field(max_length=1024)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: Penalty | None = None
    grammar: TgiGrammar | None = None
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    return_full_text: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    stop: StopStrings | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    truncate: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled, as TGI decides it."""
        return bool(
            self.do_sample
            or self.temperature not in (None, 1.0)
            or self.top_k
            or self.top_p not in (None, 1.0)
        )


class TgiGenerateRequest(BaseRequest):
    """POST /generate and /generate_stream. TGI has no `model`: it serves one."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: TgiParameters | None = None

    def check(self) -> None:
        given = self.given_parameters
        if given.adapter_id:
            self.model = given.adapter_id
        if given.best_of is not None and given.best_of > 1:
            if not given.samples:
                message = "best_of needs sampling: set do_sample."
                raise invalid("parameters.best_of", message)
            if given.seed is not None:
                message = "best_of above 1 cannot be given with a seed."
                raise invalid("parameters.best_of", message)
            if self.streams:
                raise invalid("parameters.best_of", "best_of above 1 cannot be streamed.")
        if given.decoder_input_details and self.streams:
            raise invalid(
                "parameters.decoder_input_details", "decoder_input_details cannot be streamed."
            )
        _ = self.completion  # raises ApiError when it cannot be converted

    @property
    def given_parameters(self) -> TgiParameters:
        """The parameters, all unset if there are none."""
        return self.parameters or TgiParameters()

    @property
    def streams(self) -> bool:
        """Whether the response is a stream."""
        return False

    @property
    def num_top_tokens(self) -> int:
        """Alternatives for each token."""
        return self.given_parameters.top_n_tokens or 0

    @cached_property
    def completion(self) -> CompletionRequest:
        """The same request for /v1/completions. Raises ApiError if it cannot be converted."""
        given = self.given_parameters
        wants_tokens = given.details or given.decoder_input_details or self.streams
        is_ranked = (given.best_of or 1) > 1
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": self.inputs,
            "max_tokens": given.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
            "n": given.best_of,
            "temperature": given.temperature if given.samples else 0.0,
            "top_k": given.top_k,
            "top_p": given.top_p,
            "seed": given.seed,
            "stop": given.stop,
            # A text of TGI ends with the stop sequence.
            "include_stop_str_in_output": bool(given.stop),
            "repetition_penalty": given.repetition_penalty,
            "frequency_penalty": given.frequency_penalty,
            "truncate_prompt_tokens": given.truncate,
            "logprobs": self.num_top_tokens if wants_tokens or is_ranked else None,
            "prompt_logprobs": 0 if given.decoder_input_details else None,
        }
        if given.samples and given.temperature is None:
            fields["temperature"] = 1.0
        if given.grammar is not None:
            fields[_GRAMMARS[given.grammar.type]] = given.grammar.constraint
        return build_request(
            CompletionRequest,
            {name: value for name, value in fields.items() if value is not None},
        )


class TgiStreamRequest(TgiGenerateRequest):
    """POST /generate_stream."""

    no_effect_fields = frozenset({"stream"})

    @property
    def streams(self) -> bool:
        return True


class TgiCompatRequest(TgiGenerateRequest):
    """POST /, to which huggingface_hub's InferenceClient sends: generate or generate_stream."""

    stream: bool | None = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)
