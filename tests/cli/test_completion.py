"""Shell completion, through the program as a shell calls it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.cli import main


def complete(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """What bash would offer for the last word of `llmkit WORDS`."""
    monkeypatch.setenv("_LLMKIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["llmkit", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert main.run([]) == 0
    return capsys.readouterr().out.split()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with two models and an empty folder, and a hub cache with one."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "models" / "tiny" / "model.safetensors").write_text("")
    (tmp_path / "models" / "q.gguf").write_text("")
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / "abc"
    shutil.copytree(tmp_path / "models" / "tiny", snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["insp"], ["inspect"]),
        (["sha"], ["shard"]),
        (["deploy", "v"], ["vllm"]),
        (["deploy", "t"], ["triton", "trtllm"]),
        (["shard", "v"], ["verify"]),
        (["shard", "verify", "--js"], ["--json"]),
        (["quantize", "x", "--method", "g"], ["gptq"]),
        (["inspect", "mo"], ["models/q.gguf", "models/tiny"]),
        (["inspect", "./models/t"], ["./models/tiny"]),
        (["serve", "models/"], ["models/q.gguf", "models/tiny"]),
        (["chat", "org/"], ["org/cached"]),
        (["batch", "x", "--model", "models/t"], ["models/tiny"]),
        (["inspect", "models/empty/"], []),  # the shell then offers files
        (["list", "mo"], []),
    ],
)
def test_completion_of_commands_options_and_models(
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    offered: list[str],
) -> None:
    assert complete(words, monkeypatch, capsys) == offered


def test_completion_in_bash(models: Path) -> None:
    """The script that `--show-completion` prints, in a real shell."""
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash here")
    program = models.parent / "llmkit"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmkit.cli.start "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(llmkit --show-completion bash)"\n'
        "COMP_WORDS=(llmkit inspect models/t)\nCOMP_CWORD=2\n"
        '_llmkit_completion llmkit\necho "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        [shell, "--norc", "-c", script],
        env={
            **os.environ,
            "PATH": f"{models.parent}:{os.environ['PATH']}",
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("models/tiny\n", "")


def test_completion_imports_no_torch(models: Path) -> None:
    code = (
        "import sys\n"
        "from llmkit.cli import main\n"
        "assert main.run([]) == 0\n"
        "print([name for name in ('torch', 'numpy', 'huggingface_hub') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "_LLMKIT_COMPLETE": "complete_bash",
            "COMP_WORDS": "llmkit inspect m",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["models/q.gguf", "models/tiny", "[]"], done.stderr
