"""Reading files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llmkit.common.errors import InputError


def read_json_lines(data: bytes, source: str) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not blank.

    Lines end with a line feed: other separators, such as U+2028, may stand in a JSON string.
    Raises InputError for text that is not UTF-8, and with the line for what is no JSON.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 (byte {error.start})", "JSON lines were expected"
        ) from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{source}, line {number}: not JSON ({error})", "A JSON value on each line"
            ) from error
