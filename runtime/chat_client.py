"""A conversation with an OpenAI-compatible server, one streamed answer at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from llmkit.common.errors import InputError, LlmkitError, OutputError, ShortageError
from llmkit.common.sse import EventParser
from llmkit.common.terminal_text import TerminalFilter, clean_line
from llmkit.runtime.server_client import Server, open_session

_ROLES = ("system", "user", "assistant")
# What servers call the reasoning in a delta: llmkit, vLLM and DeepSeek; OpenRouter and others.
_REASONING_FIELDS = ("reasoning_content", "reasoning")

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a request. The server's defaults hold for None."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass
class Answer:
    """An answer as far as it has arrived. Its text has no control characters."""

    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None  # "stop", "length"; None: it was stopped or broke off
    usage: dict[str, Any] | None = None  # None: the server did not say


@dataclass
class Conversation:
    """The messages of a chat. The last one is the user's while it has no answer."""

    system: str = ""
    messages: list[Message] = field(default_factory=list)  # without the system prompt
    num_retries: int = 0  # of the last answer
    _own_files: set[Path] = field(default_factory=set)

    def document(self) -> list[Message]:
        """All messages, as a request has them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def ask(self, text: str) -> None:
        """Add a message of the user. It replaces one that got no answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})
        self.num_retries = 0

    def retry(self) -> bool:
        """Remove the last answer. False when no message of the user is left to answer."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            self.num_retries += 1
        return bool(self.messages)

    def answered(self, content: str) -> None:
        """Add the model's answer."""
        self.messages.append({"role": "assistant", "content": content})

    def clear(self) -> None:
        """Remove all messages. The system prompt stays."""
        self.messages.clear()
        self.num_retries = 0

    def save(self, path: Path) -> None:
        """Write the messages as JSON.

        Raises OutputError for a file that this conversation has neither saved nor loaded, and
        ShortageError when it cannot be written.
        """
        path = path.expanduser().absolute()
        text = json.dumps(self.document(), indent=2, ensure_ascii=False) + "\n"
        try:
            with path.open("w" if path in self._own_files else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise OutputError(f"{path} exists", todo="Choose another name") from None
        except OSError as error:
            raise ShortageError(f"{path} cannot be written ({error.strerror})") from None
        self._own_files.add(path)

    def load(self, path: Path) -> None:
        """Replace the messages and the system prompt with those in a JSON file.

        Raises InputError when it is not a list of messages.
        """
        path = path.expanduser().absolute()
        try:
            document = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON ({error})") from None
        messages = document.get("messages") if isinstance(document, dict) else document
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InputError(
                f"{path} has no messages", "A list of objects with a role and a content"
            )
        messages = [{"role": entry["role"], "content": entry["content"]} for entry in messages]
        has_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages.pop(0)["content"] if has_system else ""
        self.messages = messages
        self.num_retries = 0
        self._own_files.add(path)


def _is_message(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("role") in _ROLES
        and isinstance(entry.get("content"), str)
    )


@dataclass(frozen=True)
class ChatClient:
    """Asks one model of a server."""

    server: Server
    model: str
    sampling: Sampling

    def ask(self, conversation: Conversation, answer: Answer, changed: Callable[[], None]) -> None:
        """Stream the answer to a conversation into `answer`.

        changed: called after each change of `answer`. Ctrl-C raises KeyboardInterrupt and ends the
        request; `answer` then has what had arrived.

        Raises InputError when the server refuses the request, ShortageError when it cannot be
        reached or answers with an error of its own, and the error with which the own server ended.
        """
        try:
            asyncio.run(self._ask(self._body(conversation), answer, changed))
        except ShortageError:
            self._raise_own_error()
            raise
        except (aiohttp.ClientError, OSError) as error:
            self._raise_own_error()
            raise ShortageError(
                f"{self.server.base_url} cannot be reached "
                f"({clean_line(f'{type(error).__name__}: {error}')})",
                todo="Check the address, or try again later",
            ) from error

    @property
    def server_has_ended(self) -> bool:
        """Whether the command's own server has ended."""
        process = self.server.process
        return process is not None and process.ended.done()

    def _raise_own_error(self) -> None:
        """Raise the error of the own server, when it has ended: the reason of a lost connection."""
        if self.server.process is not None and self.server_has_ended:
            raise self.server.process.ended.result()

    def _body(self, conversation: Conversation) -> dict[str, Any]:
        given = {name: value for name, value in asdict(self.sampling).items() if value is not None}
        if "seed" in given:
            given["seed"] += conversation.num_retries  # another answer than the one before
        return {
            "model": self.model,
            "messages": conversation.document(),
            "stream": True,
            "stream_options": {"include_usage": True},
        } | given

    async def _ask(
        self, body: Mapping[str, Any], answer: Answer, changed: Callable[[], None]
    ) -> None:
        url = f"{self.server.base_url}/v1/chat/completions"
        reader = _AnswerReader(answer)
        async with (
            open_session(self.server) as session,
            # A redirect would send the key and the conversation to another address.
            session.post(url, json=body, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise _response_error(url, response.status, await response.read())
            parser = EventParser()
            async for read in response.content.iter_any():
                for data in parser.feed(read):
                    reader.add(data)
                changed()
            for data in parser.close():
                reader.add(data)
            changed()
        if not reader.complete:
            raise ShortageError("the answer broke off", todo="Try again")


class _AnswerReader:
    """Adds the events of a stream to an answer."""

    def __init__(self, answer: Answer) -> None:
        self.complete = False  # whether the last event has come
        self._answer = answer
        self._content_filter = TerminalFilter()
        self._reasoning_filter = TerminalFilter()

    def add(self, data: str) -> None:
        """Add an event. Raises ShortageError for an error in the stream, InputError for others."""
        if data.strip() == "[DONE]":
            self.complete = True
            return
        try:
            event = json.loads(data)
            error = event.get("error")
            usage = event.get("usage")
            choices = event.get("choices") or [{}]
            finish_reason = choices[0].get("finish_reason")
            delta = choices[0].get("delta") or {}
            content = delta.get("content")
            reasoning = next((delta[name] for name in _REASONING_FIELDS if delta.get(name)), "")
        except (ValueError, AttributeError, TypeError, LookupError, RecursionError):
            raise InputError(
                f"the server sent what is no answer ({clean_line(data)})",
                "An OpenAI-compatible server was expected",
            ) from None
        if error:
            raise ShortageError(f"the answer broke off: {_error_message(data.encode())}")
        if isinstance(usage, dict):
            self._answer.usage = usage
        if isinstance(finish_reason, str):
            self._answer.finish_reason = clean_line(finish_reason)
            self.complete = True
        if isinstance(reasoning, str):
            self._answer.reasoning += self._reasoning_filter.feed(reasoning)
        if isinstance(content, str):
            self._answer.content += self._content_filter.feed(content)


def _response_error(url: str, status: int, content: bytes) -> LlmkitError:
    message = _error_message(content)
    if status in (401, 403):
        return InputError(
            f"the server wants another API key (HTTP {status}: {message})",
            todo="Give --api-key-file FILE or set LLMKIT_API_KEY",
        )
    if status == 429 or status >= 500:
        return ShortageError(
            f"the server cannot answer now (HTTP {status}: {message})", todo="Try again later"
        )
    if status == 404:
        return InputError(f"{url} answered HTTP 404: {message}")
    return InputError(f"the server refused the request (HTTP {status}: {message})")


def _error_message(content: bytes) -> str:
    """The message of an error response, or the beginning of an unknown one."""
    text = content.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    return clean_line(text)
