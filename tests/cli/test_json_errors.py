"""With --json a failure is one JSON document on stdout; stderr keeps the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.cli import main
from llmkit.cli.command import Command
from llmkit.cli.error_report import Stopped
from llmkit.cli.output import Output
from llmkit.cli.recipes import NoArguments
from llmkit.common.errors import GateError, InputError


def failing_command(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, result: dict[str, object] | None = None
) -> None:
    """Make the command `quantize` raise an error, after its result if there is one."""

    def fail(output: Output, arguments: NoArguments) -> None:
        """Fails."""
        if result is not None:
            output.result(result, lambda console: None)
        raise error

    monkeypatch.setattr(main, "COMMANDS", {"quantize": Command("quantize", fail, NoArguments)})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            InputError("x has 3 bytes", "4 were expected", "Copy it again"),
            {
                "what": "x has 3 bytes",
                "expected": "4 were expected",
                "todo": "Copy it again",
                "exit_code": 3,
                "type": "InputError",
            },
        ),
        (
            ZeroDivisionError("division by zero"),
            {
                "what": "ZeroDivisionError: division by zero",
                "expected": "This is a bug in llmkit",
                "todo": "Run it again with --debug for the traceback",
                "exit_code": 70,
                "type": "ZeroDivisionError",
            },
        ),
        (
            Stopped(143),
            {
                "what": "stopped",
                "expected": "",
                "todo": "To resume: llmkit quantize --json --resume",
                "exit_code": 143,
                "type": "Stopped",
            },
        ),
    ],
)
def test_json_error_has_the_parts_of_the_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    expected: dict[str, object],
) -> None:
    failing_command(monkeypatch, error)
    assert main.run(["quantize", "--json"]) == expected["exit_code"]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": expected}
    assert captured.err.startswith("llmkit quantize: error: ")
    assert captured.err.count("\n") == 1


def test_json_error_is_left_out_after_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(monkeypatch, GateError("perplexity is 9"), {"perplexity": 9})
    assert main.run(["quantize", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"perplexity": 9}
    assert captured.err == "llmkit quantize: error: perplexity is 9.\n"


@pytest.mark.parametrize(
    ("words", "variable", "what"),
    [
        (["inspekt", "--json"], None, "no such command: inspekt"),
        (["inspect", "--json"], None, "missing argument 'MODEL'"),
        (["inspect", "x", "--jsn", "--json"], None, "no such option: --jsn"),
        (["shard", "verfy", "--json"], None, "no such command: shard verfy"),
        (["inspect"], "1", "missing argument 'MODEL'"),
    ],
)
def test_json_error_of_the_parser(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    variable: str | None,
    what: str,
) -> None:
    if variable:
        monkeypatch.setenv("LLMKIT_JSON", variable)
    assert main.run(words) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert (error["what"], error["exit_code"], error["type"]) == (what, 2, "UsageError")
    assert what in captured.err


def test_json_after_two_dashes_is_not_the_commands_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.run(["batch", "x", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_json_error_of_the_program(tmp_path: Path) -> None:
    """A name that is not UTF-8 stays readable for a JSON parser."""
    model = str(tmp_path / "m\udcff")
    done = subprocess.run(
        [sys.executable, "-m", "llmkit.cli.start", "inspect", model, "--json"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["what"] == f"{model} does not exist"
    assert b"Traceback" not in done.stderr
