"""What an impatient user meets: outputs that cannot be, names that are wrong, Ctrl-C and closed
streams at any time.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.cli import main
from llmkit.common.errors import InputError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_plan import plan_engine


@pytest.mark.parametrize("option", ["model", "tp", "draft_model"])
def test_missing_tensors_are_refused_by_every_kind_of_engine(
    model: Path, tmp_path: Path, option: str
) -> None:
    spoilt = shutil.copytree(model, tmp_path / "spoilt")
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    options: dict[str, Any] = {
        "model": {},
        "tp": {"tp": 2},
        "draft_model": {"draft_model": str(spoilt)},
    }[option]
    served = open_checkpoint(model if option == "draft_model" else spoilt)
    with pytest.raises(InputError, match=r"lacks 9 tensors \(model\.layers\.2\..* and 4 more\)"):
        plan_engine(served, EngineOptions(device="cpu", **options))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["deploy", "triton", "MODEL", "-o", "FILE"], "is not writable (Not a directory)"),
        (
            ["deploy", "vllm", "MODEL", "--gpu", "h100", "-o", "DIR"],
            "is not writable (Is a directory)",
        ),
        (
            ["deploy", "trtllm", "MODEL", "--gpu", "h100", "-o", "FILE/options.yaml"],
            "is not writable",
        ),
        (["recipes", "copy", "smollm2-cpu", "FILE"], "is not writable (File exists)"),
        (
            ["quantize", "MODEL", "--method", "bf16", "--no-eval", "-o", "FILE/out"],
            "is not writable",
        ),
        (["bench", "MODEL", "--offline", "-o", "DIR"], "is not a writable file"),
        (
            ["bench", "MODEL", "--offline", "--html", "FILE/page.html"],
            "is not a writable directory",
        ),
        (["bench", "MODEL", "--offline", "--charts", "FILE"], "is not a writable directory"),
    ],
)
def test_output_that_cannot_be_written_is_refused_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    file = tmp_path / "file"
    folder = tmp_path / "folder"
    file.write_text("kept")
    folder.mkdir()
    places = {"MODEL": str(model), "FILE": str(file), "DIR": str(folder)}
    given = []
    for word in words:
        first, slash, rest = word.partition("/")
        given.append(places.get(first, first) + slash + rest)
    assert main.run([*given, "--quiet"]) == 4
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err
    assert file.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == [file, folder]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["inspect", ""], 3, "the model's name is empty"),
        (["inspect", "a" * 300], 3, "File name too long"),
        (["quantize", "nothing", "--method", "bf16", "-o", "out"], 3, "nothing does not exist"),
        (["bench", "MODEL", "--offline", "--text", "nothing.txt"], 3, "nothing.txt was not found"),
        (
            ["bench", "--url", "localhost:8000"],
            2,
            "--url localhost:8000 is not a URL. Addresses begin with http",
        ),
        (
            ["batch", "FILE", "--url", "localhost:8000", "-o", "out"],
            2,
            "--url localhost:8000 is not a URL",
        ),
        (["batch", "FILE", "--model", "nothing", "-o", "out", "-q"], 3, "nothing does not exist"),
        (
            ["serve", "MODEL", "--lora", "a=nothing"],
            3,
            "--lora a=nothing: nothing is not a directory",
        ),
        (["run", "DIR"], 3, "is not a file. A YAML file"),
        (["run", "llama-3.1-8b-gtpq"], 3, "The nearest is llama-3.1-8b-gptq."),
        (["plan", "MODEL"], 2, "no --gpu, no --bench given"),
        (["shard", "m", "--tp", "four", "-o", "out"], 2, "as an integer (four)."),
        (["shard", "m", "--tp=four", "-o", "out"], 2, "as an integer (four)."),
        (
            ["inspect", "m", "--devise", "cpu"],
            2,
            "no such option: --devise. Options are --config, --json",
        ),
        (
            ["quantize", "m", "--calib", "x"],
            2,
            "no such option: --calib. The nearest is --calibration.",
        ),
    ],
)
def test_errors_are_one_line_and_leave_no_files(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "requests.jsonl"
    file.write_text(
        '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'
    )
    places = {"MODEL": str(model), "FILE": file.name, "DIR": str(tmp_path)}
    assert main.run([places.get(word, word) for word in words]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == [file]


def test_ctrl_c_during_imports_prints_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "from llmkit.cli import start\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'llmkit.cli.main':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "start.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_closed_standard_stream_is_no_error(closed: str) -> None:
    command = f"{sys.executable} -m llmkit.cli.start recipes schema {closed}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_server_process_ends_quietly_without_its_parent() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "llmkit.runtime.server.serve_process",
                "--fd",
                str(theirs.fileno()),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            pass_fds=[theirs.fileno()],
        )
    assert (done.returncode, done.stderr) == (0, "")
