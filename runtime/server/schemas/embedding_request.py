"""The schema of /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.runtime.server.schemas.base_request import (
    BaseRequest,
    CacheSalt,
    TimeoutSeconds,
    TruncatePromptTokens,
    check_truncation,
)
from llmkit.runtime.server.schemas.completion_request import prompt_list


class EmbeddingRequest(BaseRequest):
    """POST /v1/embeddings. Null means the default everywhere."""

    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: TruncatePromptTokens | None = None
    cache_salt: CacheSalt | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout: TimeoutSeconds | None = None
    user: str | None = None

    def check(self) -> None:
        check_truncation(self.truncate_prompt_tokens)
        _ = self.inputs  # raises ApiError when the input is invalid

    @property
    def inputs(self) -> list[str | list[int]]:
        """A text or a list of token ids for each vector. Raises ApiError: see `prompt_list`."""
        return prompt_list(self.input, "input")
