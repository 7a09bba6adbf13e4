"""JSON lines end with a line feed only, and errors name the line."""

from __future__ import annotations

import pytest

from llmkit.common.errors import InputError
from llmkit.common.json_lines import read_json_lines


def test_json_lines_may_hold_other_separators() -> None:
    text = '{"a": "x\u2028y\u0085z"}\r\n\n  \n[1]'
    assert list(read_json_lines(text.encode(), "file")) == [(1, {"a": "x\u2028y\u0085z"}), (4, [1])]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1\n{", r"^file, line 2: not JSON \(Expecting property name"),
        (b"1\n\xff", r"^file is not UTF-8 \(byte 2\)\. JSON lines were expected"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_json_lines_that_are_none_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(read_json_lines(data, "file"))
    assert caught.value.exit_code == 3
