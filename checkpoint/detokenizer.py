"""Incremental detokenization: token ids to text, in linear time, without splitting a character.

A token is a sequence of bytes. Text is returned when UTF-8 says that a character is complete.
Invalid bytes become U+FFFD, one for each maximal invalid sequence, as when the whole text is
decoded at once.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

from llmkit.common.errors import InputError


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet, from printable character to byte.

    A printable byte stands for itself; the other bytes are U+0100 and the characters after it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # an added token is plain text
        return token.encode()


def _with_spaces(token: str) -> bytes:
    return token.replace("\u2581", " ").encode()


def _byte_fallback(token: str) -> bytes:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(match[1], 16)]) if match else _with_spaces(token)


class TokenBytes:
    """The bytes of every token of a tokenizer, and whether decoding strips the first space.

    decoder: the decoder of the tokenizer.json.
    Raises InputError for decoders other than ByteLevel, Metaspace and the SentencePiece sequence
    (Replace, ByteFallback, Fuse, Strip).
    """

    def __init__(self, tokenizer: Tokenizer, decoder: Mapping[str, Any] | None) -> None:
        steps = [decoder or {}]
        if steps[0].get("type") == "Sequence":
            steps = list(steps[0]["decoders"])
        kinds = [step.get("type") for step in steps]
        convert: Callable[[str], bytes]
        if kinds == ["ByteLevel"]:
            convert = _byte_level
            self.strips_space = False
        elif kinds == ["Metaspace"]:
            convert = _with_spaces
            self.strips_space = steps[0].get("prepend_scheme", "always") != "never"
        elif kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
            convert = _byte_fallback
            self.strips_space = kinds[3:] == ["Strip"]
        else:
            raise InputError(
                f"The tokenizer has the decoder {' + '.join(map(str, kinds))}",
                "ByteLevel, Metaspace or Replace + ByteFallback + Fuse was expected",
            )
        self.bytes_of = {index: convert(token) for token, index in tokenizer.get_vocab().items()}


class Detokenizer:
    """Decodes one text.

    The joined results of `add` and the final `flush` are the decoded tokens.
    """

    def __init__(self, tokens: TokenBytes, skipped_ids: frozenset[int] = frozenset()) -> None:
        self._bytes_of = tokens.bytes_of
        self.skipped_ids = skipped_ids
        self._strip = tokens.strips_space
        self._rest = b""  # the beginning of a character

    def add(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete, possibly empty. Unknown ids add nothing."""
        data = b"".join([self._bytes_of.get(i, b"") for i in ids if i not in self.skipped_ids])
        return self._decode(data, final=False)

    def flush(self) -> str:
        """End the text. An incomplete character becomes U+FFFD."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool) -> str:
        data = self._rest + data
        # What the incremental decoder of `codecs` calls, which costs three times as much.
        text, num_decoded = codecs.utf_8_decode(data, "replace", final)
        self._rest = data[num_decoded:]
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
