"""How a run ends: exit codes, one line on stderr, nothing else."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console
from support.server_process import wait_for

from llmkit.cli import main
from llmkit.cli.command import Command
from llmkit.cli.error_report import Stopped
from llmkit.cli.output import Output, seconds_text
from llmkit.cli.progress_bars import Bars
from llmkit.cli.recipes import NoArguments
from llmkit.common.errors import (
    GateError,
    InputError,
    LlmkitError,
    OutputError,
    ShortageError,
    UsageError,
)
from llmkit.common.formatting import (
    bytes_text,
    count_text,
    milliseconds_text,
    same_decimals,
    shortened,
)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command `quantize` that raises the given error, with further arguments."""

    def run(error: BaseException, *arguments: str) -> int:
        def fail(output: Output, arguments: NoArguments) -> None:
            """Fails."""
            raise error

        commands = {"quantize": Command("quantize", fail, NoArguments)}
        monkeypatch.setattr(main, "COMMANDS", commands)
        return main.run(["quantize", *arguments])

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [(GateError, 1), (UsageError, 2), (InputError, 3), (ShortageError, 4), (OutputError, 5)],
)
def test_llmkit_errors_are_one_line_and_an_exit_code(
    failing: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    error: type[LlmkitError],
    code: int,
) -> None:
    assert failing(error("the file x has\n3 bytes", "4 were expected", "Copy it again")) == code
    captured = capsys.readouterr()
    assert (
        captured.err
        == "llmkit quantize: error: the file x has 3 bytes. 4 were expected. Copy it again.\n"
    )
    assert captured.out == ""


def test_other_exceptions_are_reported_as_bugs(
    failing: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(ZeroDivisionError("division by zero")) == 70
    assert capsys.readouterr().err == (
        "llmkit quantize: error: ZeroDivisionError: division by zero. This is a bug in llmkit."
        " Run it again with --debug for the traceback.\n"
    )
    assert failing(ZeroDivisionError("division by zero"), "--debug") == 70
    debugged = capsys.readouterr().err
    assert "Traceback (most recent call last)" in debugged
    assert debugged.endswith("This is a bug in llmkit.\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            "no space left on the disk (out/x).",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "out/x"),
            "the disk quota is used up (out/x).",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "permission denied (out)."),
        (MemoryError(), "out of memory (MemoryError)."),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nmore"),
            "out of memory (CUDA out of",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
            "out of memory (",
        ),
    ],
)
def test_shortages_of_libraries_have_exit_code_4(
    failing: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    message: str,
) -> None:
    assert failing(error) == 4
    assert f"llmkit quantize: error: {message}" in capsys.readouterr().err


def test_interrupted_run_says_how_to_resume(
    failing: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(KeyboardInterrupt()) == 130
    assert (
        capsys.readouterr().err
        == "llmkit quantize: error: stopped. To resume: llmkit quantize --resume\n"
    )
    assert failing(Stopped(143), "--quiet") == 143
    assert (
        capsys.readouterr().err
        == "llmkit quantize: error: stopped. To resume: llmkit quantize --quiet --resume\n"
    )


def test_sigterm_unwinds_the_command() -> None:
    """In a process of its own: the handler belongs to the program, not to pytest."""
    code = (
        "import os, signal, time\n"
        "from llmkit.cli import main\n"
        "from llmkit.cli.command import Command\n"
        "from llmkit.cli.recipes import NoArguments\n"
        "def shard(output, arguments):\n"
        "    'Waits.'\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    finally:\n"
        "        print('unwound')\n"
        "main.COMMANDS = {'shard': Command('shard', shard, NoArguments)}\n"
        "import sys; sys.argv = ['llmkit', 'shard']; main.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "unwound\n")
    assert done.stderr == "llmkit shard: error: stopped. To resume: llmkit shard\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "llmkit: error: no such command: quantise. The nearest is quantize."),
        (
            ["xyzzy"],
            "no such command: xyzzy. Commands are quantize, convert, shard, bench, serve, chat, "
            "ps, plan, deploy, batch, run, recipes, pull, push, sign, verify, list, inspect, "
            "doctor.",
        ),
        (
            ["shard", "verfy", "d"],
            "llmkit: error: no such command: shard verfy. The nearest is shard verify.",
        ),
        (["--verison"], "llmkit: error: no such option: --verison. The nearest is --version."),
        (
            ["quantize", "--metod", "rtn"],
            "llmkit quantize: error: no such option: --metod. The nearest is --method.",
        ),
        (
            ["shard", "verify", "--jsn"],
            "llmkit shard verify: error: no such option: --jsn. The nearest is --json.",
        ),
        (["inspect"], "llmkit inspect: error: missing argument 'MODEL'."),
        (["shard", "m", "-o", "x"], "llmkit shard: error: missing option '--tp'."),
        (["inspect", "a", "b"], "llmkit inspect: error: got unexpected extra argument"),
        (
            ["quantize", "m", "-o", "x", "--method", "int3"],
            "invalid value for '--method': 'int3' is not one of 'auto', 'bf16',",
        ),
        (["serve", "m", "--port", "x"], "llmkit serve: error: invalid value for '--port'"),
        (
            ["serve", "m", "--max-model-len", "x"],
            "--max-model-len: 'x' is neither a positive number nor 'auto'.",
        ),
    ],
)
def test_usage_errors_name_the_nearest(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_progress_without_a_terminal_has_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Output().progress()
    progress.start("Quantizing", 3, "layers")
    progress.advance(3, "layer 2")
    progress.finish()
    progress.start("Writing", 2 * 2**20, "bytes")
    progress.message("done")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Quantizing (3 layers)\nWriting (2.0 MiB)\ndone\n"
    quiet = Output(quiet=True)
    quiet.progress().start("Quantizing", 3, "layers")
    quiet.message("hidden")
    assert capsys.readouterr().err == ""


def test_progress_bar_is_closed_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StringIO()

    def fail(output: Output, arguments: NoArguments) -> None:
        """Fails with a bar open."""
        output.notes = Console(file=stream, force_terminal=True, width=120)
        output.progress().start("Quantizing", 2, "layers")
        raise InputError("bad")

    commands = {"quantize": Command("quantize", fail, NoArguments)}
    monkeypatch.setattr(main, "COMMANDS", commands)
    assert main.run(["quantize"]) == 3
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_progress_bars_on_a_terminal() -> None:
    stream = StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=120))
    bars.start("Quantizing", 2, "layers")
    bars.advance(1, "layer 0")
    bars.message("said between")
    bars.start("Writing", 4096, "bytes")
    bars.advance(4096)
    bars.finish()
    shown = stream.getvalue()
    assert "1 of 2 layers" in shown
    assert "said between" in shown
    assert "4.0 KiB of 4.0 KiB" in shown


@pytest.mark.parametrize("colors", ["standard", None])
@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_progress_bar_is_one_line_on_a_narrow_terminal(width: int, colors: str | None) -> None:
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=width, no_color=colors is None)
    bars = Bars(console)
    bars.start("sensitivity", 30, "layers")
    bars.advance(12, "model.layers.12.mlp.down_proj [1/2] error 1.23e-04, 12,345 tokens/s")
    if width >= 60:
        wait_for(lambda: "mod" in stream.getvalue())
    bars.start("write", 40 << 30, "bytes")
    bars.advance(12 << 30, "model.layers.12.mlp.down_proj.weight")
    bars.finish()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()))
    assert max(map(len, lines)) <= width
    drawn = [line for line in lines if line.strip()]
    for line in drawn:
        if line.startswith("sensitivity"):
            assert re.match(r"sensitivity .* (0|12) of 30 layers 0:0\d:\d", line)
        else:
            assert re.match(r"write .* (0 B|12.0 GiB) of 40.0 GiB 0:0\d:\d", line)
    assert any("━" in line for line in drawn)
    assert any(line.rstrip().endswith("…") and "mod" in line for line in drawn) == (width >= 60)


def test_json_output_is_one_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).result(
        {"a": math.nan, "b": [1.5, math.inf], "c": {"d": "é"}}, lambda console: None
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": None, "b": [1.5, None], "c": {"d": "é"}}
    assert captured.err == ""


def test_formatted_sizes_and_durations() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1024, 98_300_000, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "93.7 MiB",
        "5.0 TiB",
    ]
    assert [seconds_text(s) for s in (0.04, 59.9, 200)] == ["0.0 s", "59.9 s", "3 min 20 s"]


def test_formatted_counts_times_and_columns() -> None:
    assert [count_text(n, "runs") for n in (0, 1, 2, 1200)] == [
        "0 runs",
        "1 run",
        "2 runs",
        "1,200 runs",
    ]
    assert [milliseconds_text(ms) for ms in (0, 0.0004, 0.34, 2.54, 12.4, 1250)] == [
        "0 ms",
        "1 µs",
        "340 µs",
        "2.5 ms",
        "12 ms",
        "1,250 ms",
    ]
    assert same_decimals([12.5, 14.99]) == ["12.50", "14.99"]
    assert same_decimals([12.5]) == ["12.50"]
    assert same_decimals([8, 12.0]) == ["8", "12"]
    assert same_decimals([0.0123, 14.99]) == ["0.012", "14.990"]
    assert same_decimals([1234.5, 0.5, math.inf]) == ["1,234", "0.50", "inf"]
    assert same_decimals([3e-9, 0.0]) == ["3e-09", "0.000000"]
    assert shortened("One is\nshort. Two is long and", 20) == "One is short"
    assert shortened("a sentence of many words", 12) == "a sentence ..."


def test_closed_pipe_is_no_error() -> None:
    code = f"{sys.executable} -m llmkit.cli.main --help | true"
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert "Traceback" not in done.stderr
