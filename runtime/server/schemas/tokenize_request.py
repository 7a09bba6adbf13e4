"""The schemas of /tokenize and /detokenize."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.schemas.base_request import BaseRequest, NonNegativeInt
from llmkit.runtime.server.schemas.chat_request import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatMessage,
    Tool,
    check_continuation,
    check_template_kwargs,
    parse_chat_messages,
)


class TokenizeRequest(BaseRequest):
    """POST /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "Give either prompt or messages.")
        for name in (
            "tools",
            "add_generation_prompt",
            "continue_final_message",
            "chat_template_kwargs",
        ):
            if self.prompt is not None and getattr(self, name) is not None:
                raise invalid(name, f"{name} goes with messages, not with prompt.")
        check_template_kwargs(self.chat_template_kwargs)
        check_continuation(
            self.conversation, self.continue_final_message, self.add_generation_prompt
        )

    @cached_property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them. Raises ApiError for an invalid message."""
        return parse_chat_messages(self.messages or [], self.ignored)

    @property
    def adds_generation_prompt(self) -> bool:
        """Whether the prompt ends with the beginning of an assistant's message."""
        return self.add_generation_prompt is not False and not self.continue_final_message


class DetokenizeRequest(BaseRequest):
    """POST /detokenize."""

    tokens: Annotated[list[NonNegativeInt], Field(fail_fast=True)]
