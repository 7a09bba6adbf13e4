"""Help and version: quick, complete, and without torch."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from llmkit.cli import main
from llmkit.cli.options_table import options_page
from llmkit.cli.settings import spellings

COMMANDS: dict[str, Any] = typer.main.get_command(main.app()).commands  # type: ignore[attr-defined]
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "datasets",
    "fastapi",
    "aiohttp",
    "pydantic_settings",
    "gguf",
    "pyarrow",
)


def test_help_imports_no_torch() -> None:
    """One process for all of them: what one imported, the next would show too."""
    runs = [["--help"], ["--version"], [], *([*name.split(), "--help"] for name in COMMANDS)]
    code = (
        "import contextlib, io, sys\n"
        "from llmkit.cli import main\n"
        f"for arguments in {runs!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        assert main.run(arguments) == 0, arguments\n"
        "    assert out.getvalue(), arguments\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout == "[]\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"llmkit {importlib.metadata.version('llmkit')}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f" {name} " in shown
    assert {"quantize", "shard", "bench", "serve", "inspect", "doctor"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_sentence_and_a_default_for_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([*name.split(), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Usage: llmkit {name} " in shown
    for parameter in COMMANDS[name].params:
        if parameter.name == "help":
            continue
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.help
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in shown
            if not parameter.required and not parameter.is_flag:
                assert parameter.default is not None or isinstance(parameter.show_default, str), (
                    parameter.name
                )


@pytest.mark.parametrize(
    ("name", "panels"),
    [
        ("quantize", ["Method", "Calibration", "Output"]),
        ("serve", ["Model", "Server", "Security", "Performance", "Memory"]),
    ],
)
def test_help_shows_the_common_options_on_one_screen(
    name: str,
    panels: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main.run([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    headings = [line.split()[1:-1] for line in lines if line.startswith("╭")]
    titles = [" ".join(word for word in words if word.strip("─")) for words in headings]
    assert titles[:2] == ["Arguments", "Options"]
    assert set(panels) <= set(titles)
    ends = [index for index, line in enumerate(lines, 1) if line.startswith("╰")]
    assert ends[1] <= 50, "move the less common options to a panel of their own"


def test_options_page_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    assert written == options_page(), "run: make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_common_options_are_everywhere(name: str) -> None:
    common = {"debug", "config"} | (
        {"json", "quiet"} if name != "serve" else set()
    )  # serve prints no result
    assert common <= spellings(main.COMMANDS[name]).keys()
