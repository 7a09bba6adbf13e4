"""The text of an answer, as it comes, to its parts: what is said, what was only thought, the tools that are called.

What comes out does not depend on where the text was cut. What only looks like a call or a thought is text, unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

from llmkit.runtime.server.text.calls import Call, Calls, Text
from llmkit.runtime.server.text.stop import possible_start

THINK, END_THINK = "<think>", "</think>"


class Reasoning(NamedTuple):
    """A piece of what the model thought before it."""

    text: str


Part = Text | Reasoning | Call


class Parts:
    """One answer's parser. thinks: the model may begin with a thought; it has begun one, where `begun`."""

    def __init__(self, thinks: bool = False, begun: bool = False, calls: Calls | None = None) -> None:
        self._thoughts = Thoughts(begun) if thinks or begun else None
        self._calls = calls

    @property
    def called(self) -> int:
        """Calls until now."""
        return self._calls.count if self._calls else 0

    @property
    def thinking(self) -> bool:
        """Whether a thought is under way."""
        return self._thoughts is not None and self._thoughts.inside

    @property
    def stopped(self) -> bool:
        """Whether the answer is over though the text may go on."""
        return self._calls is not None and self._calls.stopped

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that `text` completes; `final`: no text follows."""
        parts: list[Part] = []
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, final)
            parts += [Reasoning(thought)] if thought else []
        if self._calls is not None:
            return parts + self._calls.feed(text, final)
        return parts + ([Text(text)] if text else [])


class Thoughts:
    """Splits a thought, with the line feeds around it, from the answer that follows it."""

    def __init__(self, begun: bool) -> None:
        self._held = ""
        self._place = "start" if begun else "before"  # before, start, inside, after, done

    @property
    def inside(self) -> bool:
        """Whether a thought has begun and not ended."""
        return self._place in ("start", "inside")

    def feed(self, text: str, final: bool) -> tuple[str, str]:
        """The thought and the answer that `text` completes."""
        self._held += text
        thought = ""
        if self._place == "before":
            begin = self._held.lstrip()
            if begin.startswith(THINK):
                self._held, self._place = begin[len(THINK) :], "start"
            elif not THINK.startswith(begin) or final:
                self._place = "done"
        if self._place == "start":
            self._held = self._held.lstrip("\n")
            self._place = "inside" if self._held else "start"
        if self._place == "inside":
            thought = self._thought(final)
        if self._place == "after":
            self._held = self._held.lstrip("\n")
            self._place = "done" if self._held else "after"
        if self._place != "done":
            return thought, ""
        answer, self._held = self._held, ""
        return thought, answer

    def _thought(self, final: bool) -> str:
        end = self._held.find(END_THINK)
        if end >= 0:
            thought, self._held, self._place = self._held[:end], self._held[end + len(END_THINK) :], "after"
            return thought.rstrip("\n")
        keep = 0 if final else possible_start(self._held, [END_THINK])
        thought = self._held[: len(self._held) - keep].rstrip("\n")
        self._held = self._held[len(thought) :]
        return thought
