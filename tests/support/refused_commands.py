"""Commands of llmkit that refuse their input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmkit.cli.main import run


def check_refused(
    command: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The command ends with one error, which has `message`, and writes nothing into `folder`.

    message: a regular expression. Returns the line of the error.
    """
    before = sorted(folder.iterdir())
    assert run(command) == 3, command
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1, (command, lines)
    name = "shard merge" if command[:2] == ["shard", "merge"] else command[0]
    assert errors[0].startswith(f"llmkit {name}: error: ")
    assert re.search(message, errors[0]), (command, errors)
    assert sorted(folder.iterdir()) == before, command
    return errors[0]


def quantize_command(source: Path, out: Path) -> list[str]:
    """A command that reads all weights of `source` and writes them in 16 bits."""
    flags = ["--method", "fp16", "--no-eval", "--device", "cpu"]
    return ["quantize", str(source), *flags, "-o", str(out)]
