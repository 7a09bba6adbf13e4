"""Options from the command line, the environment and a file: who wins, and what is said of
mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from llmkit.cli import main
from llmkit.cli.command import Command
from llmkit.cli.output import Output
from llmkit.cli.settings import config_argument
from llmkit.common.errors import UsageError
from llmkit.common.option_values import count_or_auto, parse_count, parse_size
from llmkit.common.options import DEVICE, Argument, Option


@dataclass(frozen=True)
class TryArguments:
    """A few options of each kind."""

    model: Annotated[str, Argument("Model.", metavar="MODEL")]
    tp: Annotated[int, Option("Ranks.")]
    group_size: Annotated[int | None, Option("Size.", format=count_or_auto())] = None
    evaluate: Annotated[bool, Option("Score.", flags=("--eval/--no-eval",))] = True
    gates: Annotated[tuple[str, ...], Option("Gates.", flags=("--gate",))] = ()
    device: Annotated[str, DEVICE] = "auto"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the last call of a command `try`."""
    calls: dict[str, Any] = {}

    def attempt(output: Output, arguments: TryArguments) -> None:
        """A command for tests."""
        calls.update(vars(arguments), quiet=output.quiet, json=output.as_json)

    commands = [Command(name, attempt, TryArguments) for name in ("try", "try again")]
    monkeypatch.setattr(main, "COMMANDS", {command.name: command for command in commands})
    return calls


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_settings_precedence_is_command_line_environment_file_default(
    seen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(
        tmp_path / "c.yaml",
        "tp: 2\ngroup-size: 32\ndevice: cpu\ngate: [a<=1, b>=2]\nno-eval: true\n",
    )
    assert main.run(["try", "m", "--config", config]) == 0
    assert seen == {
        "model": "m",
        "tp": 2,
        "group_size": 32,
        "evaluate": False,
        "gates": ("a<=1", "b>=2"),
        "device": "cpu",
        "quiet": False,
        "json": False,
    }
    monkeypatch.setenv("LLMKIT_TP", "3")
    monkeypatch.setenv("LLMKIT_EVAL", "yes")
    monkeypatch.setenv("LLMKIT_GATE", "c<=3,d<=4")
    assert main.run(["try", "m", f"--config={config}"]) == 0
    assert (seen["tp"], seen["evaluate"], seen["gates"], seen["group_size"]) == (
        3,
        True,
        ("c<=3", "d<=4"),
        32,
    )
    monkeypatch.setenv("LLMKIT_TRY_TP", "4")
    assert main.run(["try", "m", "--config", config]) == 0
    assert seen["tp"] == 4
    assert main.run(["try", "m", "--config", config, "--tp", "5", "--gate", "e", "--quiet"]) == 0
    assert (seen["tp"], seen["gates"], seen["quiet"]) == (5, ("e",), True)
    monkeypatch.setenv("LLMKIT_TRY_AGAIN_TP", "6")
    assert main.run(["try", "again", "m"]) == 0
    assert seen["tp"] == 6


def test_config_file_may_be_named_by_the_environment(
    seen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "LLMKIT_CONFIG",
        write(tmp_path / "c.yaml", "tp: 7\njson: yes\n# nothing else\ngate: null\n"),
    )
    assert main.run(["try", "m"]) == 0
    assert (seen["tp"], seen["json"], seen["gates"]) == (7, True, ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp: 2\ngrup-size: 64\n", "c.yaml:2: unknown key 'grup-size'. The nearest is group-size."),
        (
            "tp: 2\n\nxyzzy: 1\n",
            "c.yaml:3: unknown key 'xyzzy'. Keys are tp, group-size, eval, no-eval, gate,",
        ),
        ("config: other.yaml\n", "c.yaml:1: unknown key 'config'"),
        ("tp: 2\ntp: 3\n", "c.yaml:2: 'tp' was already set in line 1."),
        ("eval: maybe\n", "c.yaml:1: 'maybe' is neither true nor false. Write true or false."),
        ("group-size: [1, 2]\n", "c.yaml:1: one value was expected, not [1, 2]."),
        ("tp: many\n", "c.yaml:1: invalid value for '--tp': "),
        ("- tp\n", "c.yaml:1: a list of `key: value` lines was expected."),
        ("tp: [1\n", "c.yaml:2: not valid YAML (expected ',' or ']'"),
    ],
)
def test_config_file_errors_name_the_line(
    seen: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    expected: str,
) -> None:
    assert main.run(["try", "m", "--config", write(tmp_path / "c.yaml", text)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llmkit try: error: ")
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not seen


def test_config_file_that_cannot_be_read_is_an_error(
    seen: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["try", "m", "--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.endswith("none.yaml: No such file or directory.\n")


def test_variables_with_bad_values_or_unknown_names_are_reported(
    seen: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "secret")
    monkeypatch.setenv("LLMKIT_DEVISE", "cpu")
    assert main.run(["try", "m", "--tp", "1"]) == 0
    assert capsys.readouterr().err == (
        "llmkit try: warning: LLMKIT_DEVISE is not a variable of llmkit and is ignored. The "
        "nearest is LLMKIT_DEVICE.\n"
    )
    monkeypatch.delenv("LLMKIT_DEVISE")
    monkeypatch.setenv("LLMKIT_TP", "x")
    assert main.run(["try", "m"]) == 2
    assert "error: LLMKIT_TP: invalid value for '--tp'" in capsys.readouterr().err
    assert main.run(["try", "m", "--tp", "1"]) == 0


def test_config_file_is_found_before_options_are_parsed() -> None:
    assert config_argument(["m", "--config", "a"], {}) == "a"
    assert config_argument(["m", "--config=b"], {"LLMKIT_CONFIG": "e"}) == "b"
    assert config_argument(["m", "--", "--config", "a"], {"LLMKIT_CONFIG": "e"}) == "e"
    assert config_argument(["m", "--config"], {"LLMKIT_CONFIG": ""}) is None


def test_sizes_and_counts() -> None:
    assert parse_size("--x", None) is None
    assert [parse_size("--x", text) for text in ("12", "1.5k", "2GiB", "3 GB", "1M")] == [
        12,
        1536,
        2 * 2**30,
        3 * 10**9,
        2**20,
    ]
    with pytest.raises(UsageError, match=r"--x: '2 apples' is not a size\. Write it like 2GiB"):
        parse_size("--x", "2 apples")
    assert parse_count("--x", "auto") is None
    assert parse_count("--x", "64") == 64
    for text in ("0", "-1", "x", "1.5"):
        with pytest.raises(UsageError, match="is neither a positive number nor 'auto'"):
            parse_count("--x", text)
