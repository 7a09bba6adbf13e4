"""Text from elsewhere, made fit for a terminal: without control characters and escape sequences."""

from __future__ import annotations

import unicodedata
from typing import Literal

_State = Literal["text", "escape", "sequence", "string"]


class TerminalFilter:
    """Removes control characters and escape sequences from text that arrives in pieces.

    A sequence may be split over any pieces. Tabs and line feeds stay. The sequences are those of
    ECMA-48: ESC or a C1 character, parameters and a final byte (CSI), or a string up to its end
    (OSC, DCS, SOS, PM, APC). A line feed ends an incomplete one, so that at most a line is lost.
    """

    def __init__(self) -> None:
        self._state: _State = "text"

    def feed(self, piece: str) -> str:
        """The part of the next piece that may be shown."""
        return "".join(character for character in piece if self._shows(character))

    def _shows(self, character: str) -> bool:
        if character == "\n":
            self._state = "text"
            return True
        if character == "\x1b":
            self._state = "escape"
            return False
        if self._state == "text":
            return self._shows_text(character)
        self._state = self._next_state(character)
        return False

    def _shows_text(self, character: str) -> bool:
        if character == "\x9b":
            self._state = "sequence"
        elif character in "\x90\x98\x9d\x9e\x9f":
            self._state = "string"
        # Surrogates are parts of characters that UTF-8 cannot express.
        return character == "\t" or unicodedata.category(character) not in ("Cc", "Cs")

    def _next_state(self, character: str) -> _State:
        match self._state:
            case "sequence":
                return "sequence" if " " <= character <= "?" else "text"
            case "string":
                return "text" if character in "\x07\x9c" else "string"
        # After ESC. In a string, ESC and a backslash are its end; any other sequence cuts it off.
        if character == "[":
            return "sequence"
        if character in "]PX^_":
            return "string"
        # Intermediate bytes come before the final byte.
        return "escape" if " " <= character <= "/" else "text"


def clean_text(text: str) -> str:
    """A whole text without control characters and escape sequences."""
    return TerminalFilter().feed(text)


def clean_line(text: str, max_chars: int = 300) -> str:
    """The beginning of a text as one line, without control characters."""
    return " ".join(clean_text(text[:max_chars]).split())
