"""Reads text that arrives in pieces, by generators that yield when they need more of it.

Every method that reads is such a generator: `found = yield from cursor.take("[")`. What it returns
does not depend on where the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Never

from llmkit.runtime.server.text.stop_strings import partial_match_length

MAX_HELD_CHARS = 1 << 18  # of text that may be a call, and of a value that cannot be sent in parts

Steps = Generator[None]  # a reader without a result


class MalformedError(Exception):
    """The text is not what the reader expects."""


class EndOfTextError(Exception):
    """The text ends where the reader needs more."""


class TextCursor:
    """A position in text that arrives in pieces.

    Text before the position is forgotten, except from the last `commit` on: `rewind` goes back.
    """

    def __init__(self) -> None:
        self.final = False  # no text follows
        self.is_cut = False  # something other than the model ended the text
        self._text = ""
        self._position = 0
        self._committed = 0

    def add(self, text: str, final: bool, is_cut: bool = False) -> None:
        """Add the next `text`.

        final: no text follows. is_cut: because of a limit or a stop string, not of the model.
        """
        self._text = self._text[self._committed :] + text
        self._position -= self._committed
        self._committed = 0
        self.final = final
        self.is_cut = is_cut

    @property
    def at_end(self) -> bool:
        """Whether there is no text after the position so far."""
        return self._position >= len(self._text)

    def ahead(self, length: int) -> str:
        """The next characters after the position, at most `length`, that are there so far."""
        return self._text[self._position : self._position + length]

    def commit(self) -> None:
        """Make the position the one that `rewind` goes back to."""
        self._committed = self._position

    def rewind(self) -> None:
        """Go back to where `commit` was called last."""
        self._position = self._committed

    def skip(self, length: int) -> None:
        """Move the position by `length` characters, which may be negative."""
        self._position += length

    def skip_rest(self) -> None:
        """Move the position to the end of the text that is there so far."""
        self._position = len(self._text)

    def wait(self) -> Steps:
        """Wait for more text.

        Raises EndOfTextError when none follows, MalformedError when too much is held back.
        """
        if self.final:
            raise EndOfTextError
        if len(self._text) - self._committed > MAX_HELD_CHARS:
            raise MalformedError
        yield

    def fail(self) -> Never:
        """Raise MalformedError."""
        raise MalformedError

    def peek(self) -> Generator[None, None, str]:
        """Return the next character, which stays unread."""
        while self.at_end:
            yield from self.wait()
        return self._text[self._position]

    def match(self, pattern: re.Pattern[str]) -> str:
        """Read, and return, what matches `pattern` in the text that is there so far."""
        match = pattern.match(self._text, self._position)
        if match is None:
            return ""
        self._position = match.end()
        return match[0]

    def skip_space(self) -> Steps:
        """Skip white space; at the end of the text, too."""
        while True:
            self.match(_SPACE)
            if not self.at_end or self.final:
                return
            yield from self.wait()

    def take(self, *marks: str) -> Generator[None, None, str]:
        """Read, and return, the one of `marks` that follows; "" when none does."""
        while True:
            rest = self.ahead(max(map(len, marks), default=0))
            for mark in marks:
                if rest.startswith(mark):
                    self._position += len(mark)
                    return mark
            if self.final or not any(mark.startswith(rest) for mark in marks):
                return ""
            yield from self.wait()

    def expect(self, *marks: str) -> Generator[None, None, str]:
        """Read, and return, the one of `marks` that follows.

        Raises MalformedError when none does, EndOfTextError when the text ends in one.
        """
        mark = yield from self.take(*marks)
        if not mark:
            rest = self.ahead(max(map(len, marks)))
            if self.final and any(mark.startswith(rest) for mark in marks):
                raise EndOfTextError
            raise MalformedError
        return mark

    def close(self, mark: str) -> Generator[None, None, bool]:
        """Read white space, then `mark` or its beginning at the end of the text if it is there.

        Returns whether it was.
        """
        mark = mark.strip()
        if not mark:
            return False
        yield from self.skip_space()
        if (yield from self.take(mark)):
            return True
        if self.final and mark.startswith(self.ahead(len(mark))):
            self._position = len(self._text)
            return True
        return False

    def ends_before(self, mark: str) -> bool:
        """Whether the model ended the text here, or in the beginning of `mark`."""
        return self.final and not self.is_cut and mark.startswith(self.ahead(len(mark)))

    def until(
        self, marks: Sequence[str], emit: Callable[[str], object], keep_partial: bool = False
    ) -> Generator[None, None, str]:
        """Pass on the text up to the first of `marks` as it comes; read and return the mark.

        Returns "" at the end of the text. keep_partial: what may be the beginning of a mark there
        stays unread.
        """
        pattern = _any_of(tuple(marks))
        longest = max(map(len, marks), default=0)
        while True:
            match = pattern.search(self._text, self._position) if marks else None
            if match is not None:
                text = self._text[self._position : match.start()]
                self._position = match.start()
                if text:
                    emit(text)
                self._position += len(match[0])
                return match[0]
            end = len(self._text)
            if not self.final or keep_partial:
                tail = self._text[max(self._position, end - longest) :]
                end -= partial_match_length(tail, marks)
            text = self._text[self._position : end]
            self._position = end
            if text:
                emit(text)
            if self.final:
                return ""
            yield from self.wait()

    def read_until(
        self, marks: Sequence[str], limit: int = MAX_HELD_CHARS
    ) -> Generator[None, None, tuple[str, str]]:
        """Read at most `limit` characters up to the first of `marks`; return them and the mark.

        Raises MalformedError when there are more, EndOfTextError when the text ends before.
        """
        pieces: list[str] = []
        length = 0

        def add(piece: str) -> None:
            nonlocal length
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise MalformedError

        mark = yield from self.until(marks, add)
        if not mark:
            raise EndOfTextError
        return "".join(pieces), mark


_SPACE = re.compile(r"\s+")


@lru_cache(maxsize=256)
def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
