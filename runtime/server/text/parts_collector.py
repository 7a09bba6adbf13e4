"""Collects the parts of one answer while its text is read."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from typing import Any

from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)
from llmkit.runtime.server.text.text_cursor import MalformedError, TextCursor
from llmkit.runtime.server.text.tool_dialects import SHORT_ID, ToolDialect


class AnswerEndError(Exception):
    """The answer is complete although the text may go on."""


class PartsCollector:
    """The parts that were found since `take_parts`, and what is known of the calls.

    White space next to a call is dropped. Whatever is collected is committed: the cursor does not
    go back to before it.
    """

    def __init__(
        self,
        cursor: TextCursor,
        dialect: ToolDialect | None,
        tools: Collection[Mapping[str, Any]],
        parallel: bool,
    ) -> None:
        """Create a collector.

        tools: as in requests, `{"type": "function", "function": {...}}`. parallel: the answer may
        have more than one call.
        """
        self.parallel = parallel
        self.num_complete = 0  # calls
        self.num_begun = 0
        self.possible_names: list[str] = []  # of a call that is being read and has not begun
        self.call: ToolCallPart | None = None  # that has begun and is not complete
        self.schemas = {
            tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools
        }
        self._cursor = cursor
        self._dialect = dialect
        self._parts: list[OutputPart] = []
        self._space = ""  # white space that is text unless a call follows
        self._after_call = False  # white space is dropped now
        self._indices: set[int] = set()  # of calls, where ids have them
        self._written_ids: set[str] = set()  # that the model wrote

    def take_parts(self) -> list[OutputPart]:
        """Return the parts since the last time, adjacent ones of a kind joined."""
        parts = join_parts(self._parts)
        self._parts = []
        return parts

    def text(self, text: str) -> None:
        """Add text beside calls."""
        self._cursor.commit()
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._after_call = False
            self._parts.append(TextPart(shown))

    def end_text(self) -> None:
        """The answer ends here: white space is text."""
        if self._space:
            self._parts.append(TextPart(self._space))
            self._space = ""

    def reasoning(self, text: str) -> None:
        """Add reasoning."""
        self._cursor.commit()
        self._parts.append(ReasoningPart(text))

    def read_call(self) -> None:
        """A call may follow, of any tool."""
        self.possible_names = list(self.schemas)

    def begun_name(self, text: str) -> None:
        """The name of the call that is being read begins with `text`, where the answer ends."""
        self.possible_names = [name for name in self.schemas if name.startswith(text)]

    def check_name(self, name: str) -> None:
        """Raise MalformedError if no tool is called `name`."""
        self.possible_names = [name] if name in self.schemas else []
        if not self.possible_names:
            raise MalformedError

    def begin_call(self, name: str, written_id: str = "") -> None:
        """A call begins. `written_id`: what the model wrote as its id, if anything."""
        self._cursor.commit()
        self.num_begun += 1
        self.possible_names = []
        self._space = ""
        self._after_call = True
        self.call = ToolCallPart(self._new_id(name, written_id), name, "", is_complete=False)
        self._parts.append(self.call)

    def arguments(self, text: str) -> None:
        """Add JSON to the arguments of the call."""
        assert self.call is not None
        self._cursor.commit()
        self._parts.append(self.call._replace(arguments=text, is_first=False))

    def complete_call(self) -> None:
        """The arguments of the call are complete.

        Raises AnswerEndError if it is the only one that the answer may have.
        """
        assert self.call is not None
        self._cursor.commit()
        self._parts.append(self.call._replace(is_first=False, is_complete=True))
        self.call = None
        self.num_complete += 1
        if not self.parallel:
            raise AnswerEndError

    def unfinished_call(self, name: str) -> None:
        """A call begins where the answer ends."""
        self.begin_call(name)
        self.abandon_call()

    def abandon_call(self) -> None:
        """The call, if there is one, never becomes complete."""
        self.call = None

    def _new_id(self, name: str, written_id: str) -> str:
        ids = self._dialect.ids if self._dialect else "call"
        if ids == "short":
            is_new = written_id not in self._written_ids
            if is_new and SHORT_ID.fullmatch(written_id):
                self._written_ids.add(written_id)
                return written_id
            return secrets.token_hex(5)[:9]
        if ids == "call":
            return "call_" + secrets.token_hex(12)
        index = int(written_id) if written_id.isdecimal() and len(written_id) < 9 else 0
        while index in self._indices:
            index += 1
        self._indices.add(index)
        return f"functions.{name}:{index}"
