"""`make gpu` in parts: what is written when, what runs again, and parts that fail or hang."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.bench.gpu import figure_log, run_parts
from llmkit.bench.gpu.figure_log import (
    DeviceLostError,
    FigureLog,
    NotInstalledError,
    PartOptions,
    Record,
    latest,
    part_is_complete,
    read_records,
)
from llmkit.bench.gpu.run_parts import COMPLETE, INCOMPLETE, Part, measure_part, run_part

PART = Part("steps", "decode_steps", 20, 10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "figures.jsonl"


def refuse(message: str = "it must not run") -> Callable[[], dict[str, Any]]:
    """A figure that fails."""

    def run() -> dict[str, Any]:
        raise RuntimeError(message)

    return run


def status(path: Path, name: str) -> tuple[str, str]:
    record = latest(path, "steps")["decode", name]
    return record["status"], record.get("reason", "")


def test_figure_is_in_the_file_before_the_next_one_begins(path: Path) -> None:
    log = FigureLog(path, "steps", 100)
    seen: list[Record] = []

    def second() -> dict[str, Any]:
        seen.extend(read_records(path))
        return {"ms": 2.0}

    assert log.measure("decode", "first", lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert log.measure("decode", "second", second) == {"ms": 2.0}
    assert [(one["name"], one["status"]) for one in seen] == [
        ("first", "begun"),
        ("first", "measured"),
        ("second", "begun"),
    ]
    assert seen[1]["ms"] == 1.0 and log.is_complete


def test_figure_that_fails_does_not_end_the_part(path: Path) -> None:
    log = FigureLog(path, "steps", 100)
    assert log.measure("decode", "bad", refuse("no such kernel")) is None
    assert log.measure("decode", "good", lambda: {"ms": 1.0})
    assert status(path, "bad") == ("failed", "RuntimeError: no such kernel")
    assert not log.is_complete


def test_figures_without_time_are_noted(path: Path) -> None:
    log = FigureLog(path, "steps", 5)
    assert log.measure("decode", "long", refuse(), needs_s=60) is None
    assert log.measure("decode", "short", lambda: {"ms": 1.0}, needs_s=1)
    assert status(path, "long") == ("not measured", "no time was left")
    assert not log.is_complete


def test_figures_of_missing_packages_are_no_failures(path: Path) -> None:
    log = FigureLog(path, "steps", 100)

    def run() -> dict[str, Any]:
        raise NotInstalledError("vllm is not installed")

    assert log.measure("decode", "vllm", run) is None
    assert status(path, "vllm") == ("skipped", "vllm is not installed")
    assert log.is_complete


def test_next_run_measures_what_is_missing(path: Path) -> None:
    first = FigureLog(path, "steps", 100, run="one")
    first.measure("decode", "good", lambda: {"ms": 1.0})
    first.measure("decode", "bad", refuse())
    again = FigureLog(path, "steps", 100, run="one")  # the part's process was started again
    assert again.measure("decode", "good", refuse())["ms"] == 1.0  # type: ignore[index]
    assert again.measure("decode", "bad", lambda: {"ms": 2.0}) is None
    assert not again.is_complete
    later = FigureLog(path, "steps", 100, run="two")
    assert later.measure("decode", "good", refuse())["ms"] == 1.0  # type: ignore[index]
    assert later.measure("decode", "bad", lambda: {"ms": 2.0}) == {"ms": 2.0}
    assert later.is_complete
    assert status(path, "bad")[0] == "measured"


def test_figure_that_ended_its_process_is_left_out(path: Path) -> None:
    def crash() -> dict[str, float]:
        raise KeyboardInterrupt

    log = FigureLog(path, "steps", 100, run="one")
    with pytest.raises(KeyboardInterrupt):
        log.measure("decode", "crash", crash)
    with path.open("a") as file:
        file.write('{"part": "steps", "figure": "deco')  # cut off
    again = FigureLog(path, "steps", 100, run="one")
    assert again.measure("decode", "crash", refuse()) is None
    assert not again.is_complete
    assert FigureLog(path, "steps", 100, "two").measure("decode", "crash", lambda: {"ms": 1.0})


def test_gpu_that_answers_no_more_ends_the_process(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal memory access every later figure of the process would fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse("illegal memory access"))
    log = FigureLog(path, "steps", 100)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        log.measure("decode", "bad", refuse())
    assert status(path, "bad")[0] == "failed"


class FakeModule:
    """A part with one figure."""

    def __init__(self, run: Callable[[], dict[str, Any]]) -> None:
        self.run = run

    def measure(self, log: FigureLog, options: PartOptions) -> None:
        log.measure("decode", "one", self.run)


@pytest.mark.parametrize(
    ("run", "code", "complete"),
    [(lambda: {"ms": 1.0}, COMPLETE, True), (refuse(), INCOMPLETE, False)],
)
def test_part_ends_well_when_all_its_figures_are_measured(
    run: Callable[[], dict[str, Any]],
    code: int,
    complete: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_parts, "import_module", lambda name: FakeModule(run))
    options = PartOptions(torch.device("cpu"), tmp_path)
    assert measure_part(PART, options, 10, "run") == code
    assert part_is_complete(options.figures_path, "steps") is complete


# Each start of a part's process: what it appends to the file, and what it does then.
BEGUN = {"part": "steps", "figure": "decode", "name": "one", "status": "begun"}
FAKE_PROCESS = """
import json, os, sys, time
path, starts, figure, ending = sys.argv[1:]
number = len(open(starts).read()) if os.path.exists(starts) else 0
open(starts, "a").write(".")
if figure != "none":
    open(path, "a").write(figure.replace("NUMBER", str(number)) + "\\n")
ending = json.loads(ending)[number]
if ending == "hang":
    open(starts + ".hangs", "w").write(str(os.getpid()))
    time.sleep(600)
    ending = 0  # complete, unless it was killed before
if ending == "crash":
    os.abort()
sys.exit(ending)
"""


def fake_processes(
    monkeypatch: pytest.MonkeyPatch, folder: Path, figure: str, endings: list[Any]
) -> Callable[[], int]:
    """Have a part's processes end so. Returns a function with the number of starts."""
    starts = folder / "starts"

    def command(part: Part, options: PartOptions, seconds: float, run: str) -> list[str]:
        arguments = [str(options.figures_path), str(starts), figure, json.dumps(endings)]
        return [sys.executable, "-c", FAKE_PROCESS, *arguments]

    monkeypatch.setattr(run_parts, "part_command", command)
    return lambda: len(starts.read_text())


class HangClock:
    """In the place of `time`: it stands still, but for 2 s at each look while a process hangs."""

    def __init__(self, pid_file: Path) -> None:
        self.pid_file = pid_file
        self.now_s = 0.0

    def monotonic(self) -> float:
        pid = self.pid_file.read_text() if self.pid_file.exists() else ""
        if pid and Path(f"/proc/{pid}").exists():
            self.now_s += 2
        return self.now_s

    def time(self) -> float:
        return time.time() + self.now_s


def test_part_is_started_again_after_a_crash_and_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_parts, "time", HangClock(tmp_path / "starts.hangs"))
    begun = json.dumps(BEGUN | {"name": "figure NUMBER"})
    starts = fake_processes(
        monkeypatch, tmp_path, begun, ["crash", run_parts.DEVICE_LOST, "hang", COMPLETE]
    )
    options = PartOptions(torch.device("cpu"), tmp_path)
    assert run_part(Part("steps", "decode_steps", 60, 1.0), options)
    assert starts() == 4


def test_part_that_cannot_start_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = fake_processes(monkeypatch, tmp_path, "none", [1, 1])
    options = PartOptions(torch.device("cpu"), tmp_path)
    assert not run_part(PART, options)
    assert starts() == 1
    ended = latest(options.figures_path, "steps")["part", "steps"]
    assert ended["how"] == "its process ended with code 1"


def test_parts_go_on_after_one_and_leave_out_what_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FigureLog(tmp_path / figure_log.FILE_NAME, "profile", 1).end_part("complete")
    ran: list[str] = []

    def run(part: Part, options: PartOptions, budget_s: float | None) -> bool:
        ran.append(part.name)
        return part.name != "steps"

    monkeypatch.setattr(run_parts, "run_part", run)
    words = ["--device", "cpu", "--results", str(tmp_path)]
    assert run_parts.main([*words, "ceilings", "steps", "profile", "kernels"]) == 1
    assert ran == ["ceilings", "steps", "kernels"]
    err = capsys.readouterr().err
    assert "profile: ended well before" in err and "incomplete: steps" in err
    assert run_parts.main([*words, "kernels"]) == 0
    ran.clear()
    run_parts.main(words)
    assert ran == [name for name in run_parts.PARTS if name != "profile"]


def test_parts_are_known_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_parts.main(["--device", "cpu", "speed"])
    assert "there is no part speed; there are ceilings, steps" in capsys.readouterr().err
    assert all(part.budget_s + run_parts.GRACE_S <= 480 for part in run_parts.PARTS.values())
    assert list(run_parts.PARTS)[:5] == ["ceilings", "steps", "profile", "kernels", "saturate"]


def test_parts_need_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run_parts.main(["--results", str(tmp_path)]) == 0
    assert "sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
