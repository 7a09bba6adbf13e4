"""The arguments of a call as a JSON object, for APIs that have no text of them."""

from __future__ import annotations

from pydantic_core import from_json, to_json

from llmkit.runtime.server.text.output_parts import ToolCallPart


def whole_arguments(call: ToolCallPart) -> bytes:
    """Return the JSON object of the arguments of `call`, whose pieces are joined.

    Of an unfinished call it has what is certain, as in Anthropic's clients, which complete the
    JSON of a stream: whole members, and no text that was cut.
    """
    if call.is_complete:
        return call.arguments.encode()
    try:
        return to_json(from_json(call.arguments, allow_partial=True, allow_inf_nan=False))
    except ValueError:  # nothing of the object was written
        return b"{}"
