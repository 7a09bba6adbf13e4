"""The body of /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.runtime.server.bodies.base import Body, Timeout
from llmkit.runtime.server.bodies.completions import prompt_list


class EmbeddingsBody(Body):
    """POST /v1/embeddings. Null means the default everywhere."""

    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout: Timeout | None = None
    user: str | None = None

    def check(self) -> None:
        _ = self.inputs

    @property
    def inputs(self) -> list[str | list[int]]:
        """One text or list of ids per vector. ApiError when empty or of mixed types."""
        return prompt_list(self.input, "input")
