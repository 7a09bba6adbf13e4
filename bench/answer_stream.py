"""Reading a streamed answer of `/v1/completions` or `/v1/chat/completions` after it was recorded.

A recording is a list of reads with their times: parsing would take processor time from a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from llmkit.common.sse import EventParser

_MAX_ERROR_CHARS = 300  # of a server's error message


@dataclass
class RequestRecord:
    """The response to one request as it was read. Times are `time.perf_counter()` seconds."""

    sent_s: float = 0.0
    status: int = 0
    reads: list[tuple[float, bytes]] = field(default_factory=list)  # (time, data)
    error: str | None = None
    schedule_lag_s: float = 0.0  # from its scheduled time to its sending; 0 without a schedule


@dataclass
class StreamedAnswer:
    """What a stream said. `error` is why the answer is incomplete; None: it is whole."""

    arrivals_s: list[float] = field(default_factory=list)  # of events that brought tokens
    # Of the first event with text or a tool call, not with reasoning; None: there was none.
    first_output_s: float | None = None
    output_tokens: int = 0
    prompt_tokens: int | None = None  # by the server's usage; None: it reports none
    cached_tokens: int | None = None
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)  # as in a message
    token_ids: list[int] = field(default_factory=list)  # empty when the server returns none
    prompt_token_ids: list[int] = field(default_factory=list)  # vLLM sends a chat's
    error: str | None = None


def read_answer(record: RequestRecord) -> StreamedAnswer:
    """Parse a recorded response: token arrivals, the answer, usage, or the reason of a failure."""
    answer = StreamedAnswer(error=record.error)
    if not answer.error and record.status != 200:
        content = b"".join(data for _, data in record.reads)
        answer.error = f"HTTP {record.status}: {server_error_message(content)}"
    if answer.error:
        return answer
    done = False
    final_event_s: list[float] = []  # of an event that has a finish reason and no text
    usage: dict[str, Any] = {}
    for arrival_s, data in _events(record.reads):
        if data.strip() == "[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
            if event.get("error"):
                message = server_error_message(data.encode())
                answer.error = f"the stream broke off: {message}"
                break
            answer.prompt_token_ids = event.get("prompt_token_ids") or answer.prompt_token_ids
            if isinstance(event.get("usage"), dict):
                usage = event["usage"]
            for choice in event.get("choices") or ():
                if _add_choice(answer, choice, arrival_s):
                    answer.arrivals_s.append(arrival_s)
                elif choice.get("finish_reason"):
                    final_event_s = [arrival_s]
        except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
            answer.error = f"an event is not a completion: {printable(data)}"
            break
    num_tokens = len(answer.token_ids) or len(answer.arrivals_s)
    answer.output_tokens = _count(usage, "completion_tokens") or num_tokens
    answer.prompt_tokens = _count(usage, "prompt_tokens")
    answer.cached_tokens = _count(usage.get("prompt_tokens_details"), "cached_tokens")
    if len(answer.arrivals_s) < answer.output_tokens:
        answer.arrivals_s += final_event_s  # it carried a token without text
    if not answer.error and not done:
        answer.error = "the stream ended without [DONE]"
    return answer


def _add_choice(answer: StreamedAnswer, choice: Mapping[str, Any], arrival_s: float) -> bool:
    """Add an event's choice to the answer. Returns whether it carried tokens."""
    token_ids = choice.get("token_ids") or ()
    answer.token_ids += token_ids
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
        reasoning = ""
        calls: Sequence[Mapping[str, Any]] = ()
        # Any event of a completion carries tokens, with text or without. Only the last one may
        # carry nothing but the finish reason.
        has_tokens = not choice.get("finish_reason")
    else:
        text = delta.get("content") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        calls = delta.get("tool_calls") or ()
        has_tokens = False  # a chat's first event may carry the role alone
    for call in calls:
        _add_tool_call(answer.tool_calls, call)
    answer.text += text
    answer.reasoning += reasoning
    if (text or calls) and answer.first_output_s is None:
        answer.first_output_s = arrival_s
    return bool(text or reasoning or calls or token_ids or has_tokens)


def _add_tool_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    """Add a piece of a streamed tool call to the calls so far."""
    index = piece.get("index") or 0
    if index == len(calls):
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    call["id"] = piece.get("id") or call["id"]
    function = piece.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _events(reads: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """Each event's data, with the time of the read that completed it."""
    parser = EventParser()
    for arrival_s, read in reads:
        for data in parser.feed(read):
            yield arrival_s, data
    for data in parser.close():
        yield reads[-1][0], data


def _count(usage: Any, name: str) -> int | None:
    """A count of the server's usage; None when it is missing."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else None


def server_error_message(content: bytes) -> str:
    """The message of a server's error response, or the beginning of an unknown response."""
    text = content.decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    return printable(text)


def printable(text: str) -> str:
    """A server's text, made fit for a terminal: one short line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_ERROR_CHARS]).strip()
