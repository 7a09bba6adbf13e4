"""Shows an answer while it arrives: Markdown on a terminal, plain text elsewhere."""

from __future__ import annotations

import re
import sys
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from llmkit.runtime.chat_client import Answer

REFRESHES_PER_S = 8
# As rich's own, but HTML is text.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# A block that begins like this may belong to the list before it.
_CONTINUES = re.compile(r"\s|[-*+] |\d+[.)] ")


class AnswerView(Protocol):
    """Shows an answer that grows. It is a context manager for the time of the answer."""

    def __enter__(self) -> AnswerView: ...

    def __exit__(self, *_: object) -> None:
        """Show what is not shown yet."""

    def update(self, answer: Answer) -> None:
        """Show what was added to the answer since the last call."""


class PlainView:
    """Writes the answer's text to stdout as it arrives, without the reasoning."""

    def __init__(self) -> None:
        self._shown_chars = 0
        self._ends_line = True

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ends_line:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def update(self, answer: Answer) -> None:
        """Write what was added to the answer since the last call."""
        text = answer.content[self._shown_chars :]
        if text:
            self._shown_chars = len(answer.content)
            self._ends_line = text.endswith("\n")
            sys.stdout.write(text)
            sys.stdout.flush()


class MarkdownView:
    """Renders the answer on a terminal, the reasoning dimmed before it.

    A finished block of Markdown is printed once. Only the last block, which may still change, is
    drawn again and again, because a terminal cannot redraw what has scrolled out of sight.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._reasoning = ""  # the part that is not printed yet
        self._content = ""  # the same of the content
        self._reasoning_chars = 0  # taken from the answer so far
        self._content_chars = 0
        self._has_block = False  # whether a block of the content has been printed
        self._live = Live(
            console=console,
            get_renderable=lambda: Tail(self._rest()),
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )

    def __enter__(self) -> MarkdownView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._end_reasoning()
        if self._content.strip():
            self._print_block(self._content)

    def update(self, answer: Answer) -> None:
        """Print the blocks that are finished now."""
        self._reasoning += answer.reasoning[self._reasoning_chars :]
        self._reasoning_chars = len(answer.reasoning)
        content = answer.content[self._content_chars :]
        self._content_chars = len(answer.content)
        if content:
            self._end_reasoning()
            self._content += content
        lines, newline, rest = self._reasoning.rpartition("\n")
        if newline:
            self._reasoning = rest
            self._console.print(_dimmed(lines))
        end = finished_chars(self._content)
        if end:
            block = self._content[:end]
            self._content = self._content[end:]
            self._print_block(block)

    def _end_reasoning(self) -> None:
        reasoning = self._reasoning
        self._reasoning = ""
        if reasoning.strip():
            self._console.print(_dimmed(reasoning))

    def _print_block(self, text: str) -> None:
        if self._has_block or self._reasoning_chars:
            self._console.print()
        self._has_block = True
        self._console.print(_markdown(text))

    def _rest(self) -> Text | Markdown:
        return _markdown(self._content) if self._content.strip() else _dimmed(self._reasoning)


class Tail:
    """The last lines of a renderable, as many as the terminal has room for."""

    def __init__(self, renderable: Text | Markdown) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._renderable, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def answer_view(console: Console) -> AnswerView:
    """The view for a console: a terminal that can redraw, or any other output."""
    if console.is_terminal and not console.is_dumb_terminal:
        return MarkdownView(console)
    return PlainView()


def finished_chars(text: str) -> int:
    """The length of the Markdown blocks at the start of a text that further text cannot change.

    A block ends with a blank line outside a code fence, when the next block is no part of a list.
    """
    finished = 0
    position = 0
    fence = ""  # the opening fence of the code block that the line is in
    after_blank = False
    for line in text.splitlines(keepends=True):
        if after_blank and line.strip() and not fence:
            if line.endswith("\n") and not _CONTINUES.match(line):
                finished = position
            after_blank = False
        match = _FENCE.match(line)
        if match is not None:
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif not line.strip() and not fence:
            after_blank = True
        position += len(line)
    return finished


def _markdown(text: str) -> Markdown:
    # With hyperlinks a link's text could show another address than the one that it leads to.
    markdown = Markdown(text, hyperlinks=False)
    # rich leaves HTML out, and so would lose words such as <div> of an answer.
    markdown.parsed = _PARSER.parse(text)
    return markdown


def _dimmed(text: str) -> Text:
    return Text(text, style="dim")
