"""The output directory and its lock, and the journal of an interrupted run."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from llmkit.checkpoint import journal as journals
from llmkit.checkpoint.journal import Journal, RunClock
from llmkit.checkpoint.output_directory import (
    check_output,
    check_space,
    output_lock,
    partial_path,
    sibling,
    write_errors,
    write_new_file,
)
from llmkit.common.errors import InputError, OutputError, ShortageError

SPARE = 2**25


def test_check_space_counts_an_interrupted_run_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    partial_path(out).mkdir()
    for name in ("a", "b"):
        (partial_path(out) / name).write_bytes(os.urandom(100_000))
    written = sum(file.stat().st_blocks * 512 for file in partial_path(out).iterdir())
    assert written >= 200_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=SPARE + 10))
    check_space(out, written + 10)
    with pytest.raises(ShortageError, match=rf"{SPARE + written + 11} bytes .* has") as caught:
        check_space(out, written + 11)
    assert f"the disk has {SPARE + written + 10} (" in str(caught.value)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_check_space_refuses_a_parent_that_cannot_be_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "parent"
    if kind == "file":
        parent.write_text("")
        parent.chmod(0o777)
    else:
        parent.mkdir()
        asked: list[tuple[Path, int]] = []
        monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(ShortageError, match=f"^{parent} is not writable. A directory"):
        check_output(parent / "deep" / "out", None, 0)
    if kind == "folder":
        assert asked == [(parent, os.W_OK | os.X_OK)]


def test_check_output_beside_its_source_is_fine(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "file").write_text("")
    check_output(tmp_path / "out", tmp_path / "source", 0)
    check_output(tmp_path / "out", tmp_path / "file", 0)
    with pytest.raises(OutputError, match="is the source or lies in it"):
        check_output(tmp_path / "file", tmp_path / "file", 0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EDQUOT, "The disk is full"),
        (errno.EROFS, "is not writable"),
        (errno.ENAMETOOLONG, "is not writable"),
        (errno.EIO, None),
    ],
)
def test_write_errors_translates_what_the_user_can_mend(
    code: int, message: str | None, tmp_path: Path
) -> None:
    with (
        pytest.raises(OSError if message is None else ShortageError, match=message),
        write_errors(tmp_path),
    ):
        raise OSError(code, os.strerror(code))
    with pytest.raises(InputError, match="as it is"), write_errors(tmp_path):
        raise InputError("as it is")


def test_output_lock_may_be_removed_by_someone_else(tmp_path: Path) -> None:
    path = sibling(tmp_path / "out", ".lock")
    path.write_text("4194304 and more, left by a dead run\n")
    with output_lock(tmp_path / "out"):
        assert path.read_text() == f"{os.getpid()}\n"
        path.unlink()
    assert list(tmp_path.iterdir()) == []


def test_output_lock_is_waited_for(tmp_path: Path) -> None:
    """Who waits on a file that is removed takes a new one."""
    out = tmp_path / "deep" / "out"
    path = sibling(out, ".lock")
    held = threading.Event()
    seen: list[object] = []

    def wait_for_it() -> None:
        with output_lock(out, wait=True):
            seen.append(held.is_set())
            seen.append(path.read_text())
            with pytest.raises(OutputError, match="is being written"), output_lock(out):
                pass

    with output_lock(out):
        first = path.stat().st_ino
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert path.stat().st_ino == first
        held.set()
    thread.join(10)
    assert seen == [True, f"{os.getpid()}\n"]
    assert not path.exists()


IDENTITY = {"shape": (2, 3), "seed": 1}  # in any order
FIRST = '{"identity": {"seed": 1, "shape": [2, 3]}}\n'
A = '["f", "a", "aa"]\n'
B = '["f", "b", "bb"]\n'
KEYS = {("f", "a"): "aa", ("f", "b"): "bb"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.partial.journal"


def test_journal_holds_a_line_for_each_tensor_and_the_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.12349, 103.5, 204.0])
    monkeypatch.setattr(journals.time, "perf_counter", lambda: next(now))
    clock = RunClock(earlier_s=2.5, started=100.0)
    journal = Journal(path, IDENTITY, clock)
    journal.start()
    assert path.read_text() == FIRST
    journal.append({("f", "a"): "aa"})
    journal.append({("f", "b"): "bb"})
    assert path.read_text() == f'{FIRST}{A}{{"seconds": 2.623}}\n{B}{{"seconds": 6.0}}\n'
    assert journal.entries == KEYS
    assert clock.total_s == 106.5
    journal.start()
    assert (path.read_text(), journal.entries) == (FIRST, {})
    journal.remove()
    journal.remove()
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "loaded", "entries", "seconds", "kept"),
    [
        (None, False, 0, 0.0, ""),
        ("", False, 0, 0.0, ""),
        (FIRST[:-1], False, 0, 0.0, FIRST[:-1]),
        (FIRST.replace("1", "2") + A, False, 0, 0.0, FIRST.replace("1", "2") + A),
        (FIRST, True, 0, 0.0, FIRST),
        (FIRST + A + B, True, 2, 0.0, FIRST + A + B),
        (FIRST + A + B[:-1], True, 1, 0.0, FIRST + A),
        (FIRST + A + B[:-3], True, 1, 0.0, FIRST + A),
        (FIRST + A + "\udcff\n" + B, True, 1, 0.0, FIRST + A),
        (FIRST + A + '["f", "b"]\n' + B, True, 1, 0.0, FIRST + A),
        (
            FIRST + '{"seconds": 7}\n' + A + '{"seconds": 3.5}\n{"seconds": 9}',
            True,
            1,
            7.0,
            FIRST + '{"seconds": 7}\n' + A + '{"seconds": 3.5}\n',
        ),
    ],
)
def test_journal_is_read_up_to_a_torn_line(
    text: str | None, loaded: bool, entries: int, seconds: float, kept: str, path: Path
) -> None:
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    clock = RunClock()
    journal = Journal(path, IDENTITY, clock)
    assert journal.load() is loaded
    assert journal.entries == dict(list(KEYS.items())[:entries])
    assert clock.earlier_s == seconds
    assert (path.read_text() if path.exists() else "") == kept


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (None, ["seed", "shape"]),
        ("[]", ["seed", "shape"]),
        ("no JSON", ["seed", "shape"]),
        (FIRST, []),
        ('{"identity": {"seed": 2, "shape": [2, 3], "old": 0}}', ["old", "seed"]),
    ],
)
def test_journal_names_the_settings_that_differ(
    text: str | None, changed: list[str], path: Path
) -> None:
    if text is not None:
        path.write_text(text)
    assert Journal(path, IDENTITY, RunClock()).changed_settings() == changed


def test_new_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "folder" / "new.yaml"
    with monkeypatch.context() as patch:
        patch.setattr("llmkit.checkpoint.output_directory.os.fsync", full_disk)
        with pytest.raises(ShortageError, match="The disk is full"):
            write_new_file(path, "text")
    assert list(path.parent.iterdir()) == []
    write_new_file(path, "text")
    assert path.read_text() == "text"
    with pytest.raises(OutputError, match="exists and is a file"):
        write_new_file(path, "other")
    assert path.read_text() == "text"
