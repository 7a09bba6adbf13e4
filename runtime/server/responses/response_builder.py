"""The interface of response builders: from choices and deltas to the bytes of an HTTP response.

One object builds one response. The formats of the APIs are in the other modules of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError

# Clients ignore it: a line that begins with a colon is a comment (WHATWG HTML, 9.2.6).
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
# Goes before the event that follows comments, in the same part of the body. A client that strips
# each part, as vLLM's bench client does, would take the event for the rest of the comment.
END_OF_COMMENTS = b":\n\n"


def sse_event(document: Any, name: str | None = None) -> bytes:
    """Return one server-sent event with `document` as JSON."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(document) + b"\n\n"


def json_line(document: Any, name: str | None = None) -> bytes:
    """Return one line of newline-delimited JSON, whose lines have no names."""
    return msgspec.json.encode(document) + b"\n"


@dataclass(frozen=True)
class StreamFormat:
    """How the events of a stream are written."""

    media_type: str
    # From a document and the event's name to bytes.
    event: Callable[[Any, str | None], bytes]
    # Sent during silence; empty: the format has nothing that clients ignore.
    keep_alive: bytes = b""
    # Goes before the event that follows `keep_alive`, in the same part of the body.
    end_of_keep_alive: bytes = b""


SERVER_SENT_EVENTS = StreamFormat(
    "text/event-stream", sse_event, KEEP_ALIVE_COMMENT, END_OF_COMMENTS
)
# https://github.com/ndjson/ndjson-spec: a client may refuse empty lines, so there is no keep-alive.
JSON_LINES = StreamFormat("application/x-ndjson", json_line)
STREAM_FORMATS = {form.media_type: form for form in (SERVER_SENT_EVENTS, JSON_LINES)}


class FullResponseBuilder(Protocol):
    """Builds a response that is not streamed."""

    id: str  # of the response

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        """Return the JSON body; `answers` hold all that was generated for each choice."""
        ...


class ResponseBuilder(FullResponseBuilder, Protocol):
    """Builds a response, streamed or not."""

    stream_format: StreamFormat

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        """Return the events for new deltas; empty while their text is held back."""
        ...

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        """Return the events that end a stream."""
        ...

    def error_event(self, error: ApiError) -> bytes:
        """Return the event that ends a stream with an error."""
        ...
