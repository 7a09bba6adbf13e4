"""Splits the text of an answer, as it arrives, into text, reasoning and tool calls.

The result does not depend on where the text is cut into pieces. Text that only looks like reasoning
or a tool call is returned as text, unchanged.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from llmkit.runtime.server.text.stop_strings import partial_match_length
from llmkit.runtime.server.text.tool_calls import TextPart, ToolCallParser, ToolCallPart

THINK_START = "<think>"
THINK_END = "</think>"
# What a chat template has if its model can reason: the mark, or a variable for it.
_REASONING_IN_TEMPLATE = re.compile(
    rf"{THINK_START}|\b(enable_thinking|thinking|thinking_budget|reasoning_effort)\b"
)


def has_reasoning(template: str) -> bool:
    """Whether a chat template has reasoning."""
    return _REASONING_IN_TEMPLATE.search(template) is not None


class ReasoningPart(NamedTuple):
    """A piece of the reasoning before the answer."""

    text: str


OutputPart = TextPart | ReasoningPart | ToolCallPart


class OutputParser:
    """The parser of one answer."""

    def __init__(
        self,
        may_reason: bool = False,
        starts_in_reasoning: bool = False,
        tool_calls: ToolCallParser | None = None,
    ) -> None:
        """Create a parser.

        `may_reason`: the answer may begin with reasoning. `starts_in_reasoning`: the prompt ends
        with THINK_START, so the answer begins inside the reasoning. `tool_calls` finds the tool
        calls, if there are tools.
        """
        self._reasoning = (
            ReasoningParser(starts_in_reasoning) if may_reason or starts_in_reasoning else None
        )
        self._tool_calls = tool_calls

    @property
    def num_tool_calls(self) -> int:
        """How many tool calls were found so far."""
        return self._tool_calls.count if self._tool_calls else 0

    @property
    def is_reasoning(self) -> bool:
        """Whether the reasoning has begun and not ended."""
        return self._reasoning is not None and self._reasoning.is_open

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete although the text may go on."""
        return self._tool_calls is not None and self._tool_calls.stopped

    def feed(self, text: str, final: bool = False) -> list[OutputPart]:
        """Add the next `text`; return the parts that it completes. `final`: no text follows."""
        parts: list[OutputPart] = []
        if self._reasoning is not None:
            thought, text = self._reasoning.feed(text, final)
            if thought:
                parts.append(ReasoningPart(thought))
        if self._tool_calls is not None:
            parts += self._tool_calls.feed(text, final)
        elif text:
            parts.append(TextPart(text))
        return parts


class ReasoningParser:
    """Separates the reasoning, called a thought here, from the answer that follows it.

    The stages: `before` a thought that may come; at its `start`, where line feeds are dropped;
    `inside` it; `after` it, where line feeds are dropped; `done`: the rest is the answer.
    """

    def __init__(self, starts_in_reasoning: bool) -> None:
        self._buffer = ""  # text that is held back
        self._stage: Literal["before", "start", "inside", "after", "done"] = "before"
        if starts_in_reasoning:
            self._stage = "start"

    @property
    def is_open(self) -> bool:
        """Whether a thought has begun and not ended."""
        return self._stage in ("start", "inside")

    def feed(self, text: str, final: bool) -> tuple[str, str]:
        """Add the next `text`; return the thought and the answer that it completes."""
        self._buffer += text
        thought = ""
        if self._stage == "before":
            begin = self._buffer.lstrip()
            if begin.startswith(THINK_START):
                self._buffer = begin[len(THINK_START) :]
                self._stage = "start"
            elif not THINK_START.startswith(begin) or final:
                self._stage = "done"
        if self._stage == "start":
            self._buffer = self._buffer.lstrip("\n")
            self._stage = "inside" if self._buffer else "start"
        if self._stage == "inside":
            thought = self._take_thought(final)
        if self._stage == "after":
            self._buffer = self._buffer.lstrip("\n")
            self._stage = "done" if self._buffer else "after"
        if self._stage != "done":
            return thought, ""
        answer = self._buffer
        self._buffer = ""
        return thought, answer

    def _take_thought(self, final: bool) -> str:
        """Remove from the buffer, and return, the text that is certainly part of the thought."""
        end = self._buffer.find(THINK_END)
        if end >= 0:
            thought = self._buffer[:end]
            self._buffer = self._buffer[end + len(THINK_END) :]
            self._stage = "after"
            return thought.rstrip("\n")
        held_back = 0 if final else partial_match_length(self._buffer, [THINK_END])
        # Line feeds at the end are held back: at the end of the thought they are dropped.
        thought = self._buffer[: len(self._buffer) - held_back].rstrip("\n")
        self._buffer = self._buffer[len(thought) :]
        return thought
