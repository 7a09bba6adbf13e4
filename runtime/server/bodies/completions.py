"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from llmkit.runtime.server.bodies.base import MAX_N, Logprobs, one_of
from llmkit.runtime.server.bodies.structure import StructuredBody
from llmkit.runtime.server.http.errors import invalid

MAX_PROMPTS = 16_384  # of one request


def _several(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


_TEXT = {"type": "string", "minLength": 1}
_IDS = _several({"type": "integer", "minimum": 0})


class CompletionBody(StructuredBody):
    """POST /v1/completions."""

    prompt: Annotated[Any, one_of(_TEXT, _IDS, _several(_TEXT), _several(_IDS), null=False)]
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool | None = None
    logprobs: Logprobs | None = None

    def check(self) -> None:
        super().check()
        _ = self.prompts
        if self.best_of not in (None, self.n or 1):
            message = f"best_of ({self.best_of}) other than n ({self.n or 1}) is not supported: answers are not ranked."
            raise invalid("best_of", message, "unsupported")

    @property
    def may_be_empty(self) -> bool:
        return bool(self.echo)

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text or list of ids per prompt. ApiError when empty or of mixed types."""
        return prompt_list(self.prompt, "prompt")


def prompt_list(prompt: Any, param: str) -> list[str | list[int]]:
    """The texts or lists of ids that the field `param` has. ApiError when it is empty or of mixed types."""
    several = isinstance(prompt, list) and not _is_ids(prompt)
    if several and len(prompt) > MAX_PROMPTS:
        raise invalid(param, f"{param} has {len(prompt)} prompts; at most {MAX_PROMPTS} are possible.")
    prompts = prompt if several else [prompt]
    if all(isinstance(one, str) for one in prompts) or all(_is_ids(one) for one in prompts):
        if not all(prompts):
            raise invalid(param, "The prompt is empty; at least one token is needed.")
        return prompts
    expected = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    raise invalid(param, f"{param} must be {expected}.", "invalid_type")


def _is_ids(value: Any) -> bool:
    # bool is an int to isinstance.
    return isinstance(value, list) and set(map(type, value)) <= {int}
