"""`llmkit ps` and `llmkit list`: what runs and what lies on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.server_process import LlmkitServer

from llmkit.cli import main
from llmkit.cli.servers_list import uptime_text
from llmkit.common.user_folders import state_folder
from llmkit.runtime.server_files import ServerFile, server_entries

SERVER = {"kv_cache_memory": 2**25}
API_KEYS = ("secret",)


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of this module's servers and commands."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder / "llmkit" / "servers"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main.run([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_ps_shows_a_server_until_it_ends(
    server: LlmkitServer,
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (shown,) = run_json(capsys, "ps")["servers"]
    assert (shown["pid"], shown["url"], shown["models"]) == (
        server.process.pid,
        server.url,
        ["model"],
    )
    assert 0 <= shown["uptime_s"] < 300
    assert (shown["requests_running"], shown["requests_waiting"]) == (None, None)
    monkeypatch.setenv("LLMKIT_API_KEY", "secret")
    (shown,) = run_json(capsys, "ps")["servers"]
    assert (shown["requests_running"], shown["requests_waiting"]) == (0, 0)
    assert state.stat().st_mode & 0o777 == 0o700
    assert main.run(["ps"]) == 0
    table = capsys.readouterr().out
    assert f"{server.process.pid}" in table
    assert server.url in table
    assert server.stop() == 0
    assert list(state.iterdir()) == []
    assert run_json(capsys, "ps") == {"servers": []}
    assert main.run(["ps"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        "No server runs. `llmkit serve MODEL` starts one.\n",
    )


def test_ps_ignores_stale_files(state: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = ServerFile(state)
    own.write({"url": "http://127.0.0.1:1", "model": "mine"})
    (path,) = state.glob("*.json")
    document = json.loads(path.read_text())
    stale = {
        "ended": document | {"pid": ended.pid},
        "reused": document | {"process_started": psutil.Process().create_time() - 60},
    }
    kept = {"elsewhere": document | {"host": "another"}, "broken": {}}
    for name, content in (stale | kept).items():
        (state / f"{name}.json").write_text(json.dumps(content))
    assert [entry.models for entry in server_entries()] == [("mine",)]
    assert {file.stem for file in state.iterdir()} == {path.stem, *kept}
    own.remove()
    for name in kept:
        (state / f"{name}.json").unlink()


def test_server_file_that_cannot_be_written_does_not_stop_the_server(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = ServerFile(tmp_path / "file" / "servers")
    file.write({"url": "http://127.0.0.1:1", "model": "m"})
    file.remove()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert (tmp_path / "file").read_text() == ""


def test_state_folder_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative XDG_STATE_HOME counts as not set; a user without a home still has a folder."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local" / "state" / "llmkit"
    monkeypatch.setattr(Path, "home", no_home)
    assert state_folder() == Path(tempfile.gettempdir()) / f"llmkit-{os.getuid()}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2, "4.2 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (100_000, "1 d 3 h")],
)
def test_uptime_text(seconds: float, text: str) -> None:
    assert uptime_text(seconds) == text


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A folder with checkpoints, whole and broken, and a hub cache in `hub`."""
    models = tmp_path / "models"
    shutil.copytree(model, models / "whole")
    shutil.copytree(model, models / "family" / "int4")
    config = json.loads((model / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (models / "family" / "int4" / "config.json").write_text(json.dumps(quantized))
    shutil.copytree(model, models / "cut")
    weights = models / "cut" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    shutil.copytree(model, models / "lacks")
    (models / "lacks" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (models / "lacks" / "model.safetensors.index.json").write_text(json.dumps(index))
    (models / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    (models / ".hidden").mkdir()
    shutil.copytree(model, models / ".hidden" / "model")
    shutil.copytree(model, models / "a" / "b" / "c" / "too-deep")
    snapshots = tmp_path / "hub" / "models--org--tiny" / "snapshots"
    shutil.copytree(model, snapshots / "abc")
    shutil.copytree(models / "family" / "int4", snapshots / "def")
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("abc")
    return models


def test_list_shows_local_checkpoints_and_what_they_lack(
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(folder.parent / "hub"))
    monkeypatch.chdir(folder)
    listed = {entry["name"]: entry for entry in run_json(capsys, "list")["checkpoints"]}
    assert list(listed) == ["cut", "family/int4", "lacks", "whole", "x.gguf", "org/tiny"]
    size = (model / "model.safetensors").stat().st_size
    assert listed["whole"] == {
        "name": "whole",
        "path": "whole",
        "architecture": "LlamaForCausalLM",
        "quantization": None,
        "weight_bytes": size,
        "complete": True,
        "problem": None,
    }
    assert listed["family/int4"]["quantization"] == "gptq 4-bit"
    assert listed["x.gguf"]["quantization"] == "gguf"
    assert listed["org/tiny"]["quantization"] is None  # that of refs/main
    assert {name for name, entry in listed.items() if not entry["complete"]} == {"cut", "lacks"}
    assert "model.safetensors: " in listed["cut"]["problem"]
    assert listed["lacks"]["problem"].startswith("2 of 2 weight files are missing (model-1.")

    assert main.run(["list", "family", "--no-hub"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "gptq 4-bit" in lines[1]
    assert len(lines) == 2
    assert main.run(["list", str(folder / "absent")]) == 3
    assert "is not a folder" in capsys.readouterr().err


def test_list_shows_no_escape_sequences_of_a_config(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "whole" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["Evil\x1b]0;title\x07Arch"]}))
    assert main.run(["list", str(folder / "whole"), "--no-hub"]) == 0
    shown = capsys.readouterr().out
    assert "EvilArch" in shown
    assert "\x1b" not in shown


def test_list_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from llmkit.cli import main\n"
        f"assert main.run(['list', {str(folder)!r}, '--quiet']) == 0\n"
        "print([name for name in ('torch', 'numpy', 'huggingface_hub') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
