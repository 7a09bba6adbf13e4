"""Reasoning that a client of /v1/responses carries: `encrypted_content` of a reasoning item.

Some clients send an item's `encrypted_content` back and drop its text. It is the text in base64, in
a form that tells it from another server's. It hides nothing: the item has the same text openly.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "llmkit.reasoning.1:"


def carry_reasoning(text: str) -> str:
    """Return the `encrypted_content` of an item with this text."""
    return _PREFIX + base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()


def carried_reasoning(content: object) -> str | None:
    """Return the text of `encrypted_content`; None: this server did not write it."""
    if not isinstance(content, str) or not content.startswith(_PREFIX):
        return None
    try:
        encoded = base64.b64decode(content[len(_PREFIX) :], validate=True)
        return encoded.decode("utf-8", "surrogatepass")
    except (binascii.Error, UnicodeDecodeError):
        return None
