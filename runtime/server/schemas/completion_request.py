"""The schema of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import MAX_N, LogprobCount, any_of_schema
from llmkit.runtime.server.schemas.structured_output import StructuredOutputRequest

MAX_PROMPTS = 16_384  # of one request


def _array_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_TOKEN_IDS_SCHEMA = _array_of({"type": "integer", "minimum": 0})
PROMPTS_SCHEMA = any_of_schema(
    _TEXT_SCHEMA,
    _TOKEN_IDS_SCHEMA,
    _array_of(_TEXT_SCHEMA),
    _array_of(_TOKEN_IDS_SCHEMA),
    null=False,
)


class CompletionRequest(StructuredOutputRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, PROMPTS_SCHEMA]
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool | None = None
    logprobs: LogprobCount | None = None

    def check(self) -> None:
        super().check()
        _ = self.prompts  # raises ApiError when the prompt is invalid
        if self.best_of not in (None, self.n or 1):
            message = (
                f"best_of ({self.best_of}) other than n ({self.n or 1}) is not supported: "
                "answers are not ranked."
            )
            raise invalid("best_of", message, "unsupported")

    @property
    def allows_empty_output(self) -> bool:
        return bool(self.echo)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """A text or a list of token ids for each prompt. Raises ApiError: see `prompt_list`."""
        return prompt_list(self.prompt, "prompt")


def prompt_list(value: Any, param: str) -> list[str | list[int]]:
    """Return the texts or lists of token ids in the field `param`.

    Raises ApiError when it is empty or of mixed types.
    """
    is_list = isinstance(value, list) and not _is_token_ids(value)
    if is_list and len(value) > MAX_PROMPTS:
        raise invalid(
            param, f"{param} has {len(value)} prompts; at most {MAX_PROMPTS} are possible."
        )
    prompts = value if is_list else [value]
    all_texts = all(isinstance(prompt, str) for prompt in prompts)
    if all_texts or all(_is_token_ids(prompt) for prompt in prompts):
        if not all(prompts):
            raise invalid(param, "The prompt is empty; at least one token is needed.")
        return prompts
    expected = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    raise invalid(param, f"{param} must be {expected}.", "invalid_type")


def _is_token_ids(value: Any) -> bool:
    # Not isinstance: a bool is an instance of int.
    return isinstance(value, list) and set(map(type, value)) <= {int}
