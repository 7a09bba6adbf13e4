"""A request to a server of the same container, and its errors.

Nothing heavy is imported here: functions start cold.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"


@dataclass(frozen=True)
class LocalRequest:
    """A request to the server. body: None for a request without one."""

    method: str
    path: str
    body: dict[str, Any] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether the response is server-sent events."""
        return self.body is not None and self.body.get("stream") is True


class RequestError(Exception):
    """The server refused a request. document: its error, as the OpenAI API has it."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status = status
        self.document = document
        super().__init__(error_message(document))


def error_message(document: dict[str, Any]) -> str:
    """The message in an error document of the server."""
    error = document.get("error")
    return str(error.get("message")) if isinstance(error, dict) else json.dumps(document)


def log_line(text: str) -> None:
    """Write a line to the container's log."""
    sys.stderr.write(f"llmkit: {text}\n")
    sys.stderr.flush()


def chat_request(prompt: str, system_prompt: str, messages: str, **sampling: Any) -> LocalRequest:
    """The streamed chat of a prompt, or of messages in JSON.

    sampling: fields of the request; None: the server's default. Raises ValueError.
    """
    conversation: Any = [{"role": "user", "content": prompt}]
    if messages:
        try:
            conversation = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"messages is not JSON ({error})") from None
    elif not prompt:
        raise ValueError("there is neither a prompt nor messages; one of them was expected")
    elif system_prompt:
        conversation.insert(0, {"role": "system", "content": system_prompt})
    given = {name: value for name, value in sampling.items() if value is not None}
    return LocalRequest("POST", CHAT_PATH, {"messages": conversation, "stream": True} | given)
