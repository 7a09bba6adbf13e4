"""Folders that `llmkit deploy` writes for a platform, ready to run on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmkit.cli.main import run


def deploy(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The JSON document of `llmkit deploy WORDS`."""
    options, dashes, serve_words = list(words), [], []
    if "--" in options:
        at = options.index("--")
        options, dashes, serve_words = options[:at], ["--"], options[at + 1 :]
    code = run(["deploy", *options, "--json", *dashes, *serve_words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    document: dict[str, Any] = json.loads(captured.out)
    return document


def failed_deploy(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code and the error of `llmkit deploy WORDS`."""
    code = run(["deploy", *words])
    return code, capsys.readouterr().err


def package_file(folder: Path) -> Path:
    """A file with the name of llmkit's source archive; nothing installs it."""
    path = folder / "llmkit-0.1.0.tar.gz"
    path.write_bytes(b"")
    return path


def replace_in(path: Path, old: str, new: str) -> None:
    """Change a written file, which must have `old`."""
    text = path.read_text()
    assert old in text, text
    path.write_text(text.replace(old, new))


def platform_environment(**variables: str) -> dict[str, str]:
    """The environment of a platform's process; it has no key of this machine's user."""
    environment = {**os.environ, **variables}
    if "LLMKIT_API_KEY" not in variables:
        environment.pop("LLMKIT_API_KEY", None)
    environment.pop("PYTEST_CURRENT_TEST", None)
    return environment
