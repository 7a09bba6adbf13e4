"""`llmkit serve --api-key`: a key from stdin, a terminal or the command line; short dtypes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from support.server_process import wait_for

from llmkit.cli import main

KEY = "sk-very-secret"


def test_api_key_of_stdin_is_needed_and_shown_nowhere(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    out = tmp_path / "out"
    program = [sys.executable, "-m", "llmkit.cli.main", "serve", str(model), "--api-key", "-"]
    program += ["--port", "0", "--device", "cpu", "--json", "--debug"]
    with log.open("w") as stderr, out.open("w") as stdout:
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)
    assert process.stdin is not None
    process.stdin.write(f"{KEY}\n".encode())
    process.stdin.close()
    try:
        wait_for(lambda: out.read_text().endswith("}\n") or process.poll() is not None)
        url = json.loads(out.read_text())["url"]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            assert KEY not in " ".join(one.cmdline())
            assert KEY not in one.environ().values()
    finally:
        process.terminate()
        process.wait(60)
    assert KEY not in log.read_text() + out.read_text()


def test_api_key_is_asked_for_on_a_terminal(tmp_path: Path) -> None:
    parent, child = pty.openpty()
    program = [sys.executable, "-m", "llmkit.cli.main", "serve", str(tmp_path), "--api-key", "-"]
    process = subprocess.Popen(
        program, stdin=child, stdout=child, stderr=child, start_new_session=True
    )
    os.close(child)
    said = b""
    try:
        while b"API key: " not in said:
            said += os.read(parent, 1024)
        os.write(parent, f"{KEY}\n".encode())
        while b"has no config.json" not in said:
            said += os.read(parent, 1024)
    finally:
        assert process.wait(60) == 3
        os.close(parent)
    assert KEY.encode() not in said  # the terminal does not echo it


def test_api_key_on_the_command_line_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "")  # so that it is restored
    assert main.run(["serve", str(tmp_path), "--api-key", KEY]) == 3
    warning, error = capsys.readouterr().err.splitlines()
    assert "other users of this machine can see a key on the command line" in warning
    assert "has no config.json" in error
    assert KEY not in warning + error
    monkeypatch.setenv("LLMKIT_API_KEY", KEY)
    assert main.run(["serve", str(tmp_path)]) == 3
    assert "warning" not in capsys.readouterr().err


def test_api_key_option_refuses_what_it_cannot_keep_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(f"api-key: {KEY}\n")
    keys = tmp_path / "keys"
    keys.write_text("other\n")
    lines = ["batch", "none.jsonl", "-o", "out.jsonl", "--model", "nowhere", "--"]
    for words, reason in (
        (["serve", "nowhere", "--config", str(config)], "cannot be in this file"),
        (["serve", "nowhere", "--api-key", "x", "--api-key-file", str(keys)], "exclude each other"),
        (["serve", "nowhere", "--api-key", " "], "the API key is empty"),
        ([*lines, "--api-key", KEY], "--api-key is for `llmkit serve`"),
    ):
        assert main.run(words) == 2
        printed = capsys.readouterr()
        assert reason in printed.err
        assert KEY not in printed.err + printed.out


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_dtype_takes_short_names(
    model: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_DTYPE", name)
    words = ["serve", str(model), "--device", "cpu", "--plan", "--json"]
    assert main.run(words) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    monkeypatch.delenv("LLMKIT_DTYPE")
    assert main.run([*words, "--dtype", name]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    assert main.run([*words, "--dtype", "fp8"]) == 2
