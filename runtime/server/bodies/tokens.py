"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from llmkit.runtime.server.bodies.base import Body, Count
from llmkit.runtime.server.bodies.chat import MAX_MESSAGES, MAX_TOOLS, Message, Tool, check_variables, conversation
from llmkit.runtime.server.http.errors import invalid


class TokenizeBody(Body):
    """POST /tokenize: a prompt or messages."""

    model: str = ""  # any of the server's: they have one tokenizer
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "Give either prompt or messages.")
        of_chats = ("tools", "add_generation_prompt", "chat_template_kwargs")
        given = [name for name in of_chats if getattr(self, name) is not None]
        if self.prompt is not None and given:
            raise invalid(given[0], f"{given[0]} goes with messages, not with prompt.")
        if self.messages is not None and self.add_special_tokens:
            raise invalid("add_special_tokens", "The chat template writes the special tokens itself.", "unsupported")
        check_variables(self.chat_template_kwargs)
        _ = conversation(self.messages or [])


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str = ""
    tokens: Annotated[list[Count], Field(fail_fast=True)]
