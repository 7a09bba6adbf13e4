"""What the writer of checkpoints says, refuses and asks of the disk, exactly."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint import writer as writing
from llmkit.checkpoint.journal import RunClock
from llmkit.checkpoint.manifest import manifest_digest, verify_manifest
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.writer import CheckpointWriter, plan_files
from llmkit.common.errors import ShortageError
from llmkit.common.version import version

FILE = "model.safetensors"
NAMES = ("a", "b", "c", "d", "e", "f", "g")
ONE = {FILE: [TensorInfo(name, "U8", (3,)) for name in NAMES]}
RANKS = {f"rank-{rank}.safetensors": [TensorInfo("w", "U8", (2,))] for rank in range(2)}


class InterruptedRunError(Exception):
    pass


def interrupted(out: Path, names: tuple[str, ...] = NAMES, earlier_s: float = 0.0) -> None:
    """A run of ONE that stops after it has written `names`."""

    def run() -> None:
        clock = RunClock(earlier_s=earlier_s)
        with CheckpointWriter(out, ONE, identity={"seed": 1}, clock=clock) as writer:
            assert writer.resume_note == ""
            assert writer.time_note() == ""
            for name in names:
                writer.write(name, torch.full((3,), ord(name), dtype=torch.uint8))
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run()


def sizes(files: dict[str, list[TensorInfo]]) -> list[list[int]]:
    return [[tensor.nbytes for tensor in part] for part in files.values()]


GIB = 2**30


@pytest.mark.parametrize(
    ("found", "max_bytes", "expected"),
    [
        ([500, 60, 40, 1], 100, [[500], [60, 40], [1]]),
        ([60, 41, 100, 0, 1], 100, [[60], [41], [100, 0], [1]]),
        ([], 100, [[]]),
        ([4 * GIB, GIB, 1], None, [[4 * GIB, GIB], [1]]),
    ],
)
def test_plan_files_fills_each_file_to_the_byte(
    found: list[int], max_bytes: int | None, expected: list[list[int]]
) -> None:
    tensors = [TensorInfo(str(number), "U8", (size,)) for number, size in enumerate(found)]
    limit = {} if max_bytes is None else {"max_bytes": max_bytes}
    assert sizes(plan_files(tensors, **limit)) == expected


def test_writer_tells_of_the_run_that_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(out, ("a", "b"), earlier_s=100.0)
    clock = RunClock()
    with CheckpointWriter(out, ONE, identity={"seed": 1}, clock=clock) as writer:
        assert 100.0 < clock.earlier_s < 200.0
        assert writer.resume_note == (
            f"continuing an interrupted run of {clock.earlier_s:.1f} s: 2 of 7 tensors"
            " (6 B of 21 B) are written, 5 are left"
        )
        monkeypatch.setattr(RunClock, "total_s", 1234.56)
        assert writer.time_note() == (
            f"the whole run took 1234.6 s, {clock.earlier_s:.1f} s of them before it was"
            " interrupted"
        )
        assert writer.files_with("a") == (FILE,)


@pytest.mark.parametrize("identity", [{"seed": 2, "new": 1}, {"seed": 1}])
def test_writer_tells_why_it_starts_again(identity: dict[str, int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)
    changed = "new, seed" if "new" in identity else "its files"
    if changed == "its files":
        (tmp_path / "out.partial" / FILE).unlink()
    with CheckpointWriter(out, ONE, identity=identity) as writer:
        assert writer.resume_note == (
            f"the interrupted run had other settings (changed: {changed}): its partial output"
            f" {tmp_path}/out.partial is removed, and this run starts from the beginning"
        )


@pytest.mark.parametrize("damage", ["none", "size", "header", "folder", "tensor"])
def test_writer_continues_only_what_it_planned(damage: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)  # all tensors, but no `finish`
    path = tmp_path / "out.partial" / FILE
    data = path.read_bytes()
    if damage == "size":
        path.write_bytes(data + b"!")
    elif damage == "header":
        path.write_bytes(data.replace(b'"U8"', b'"I8"'))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "tensor":
        with (tmp_path / "out.partial.journal").open("a") as file:
            file.write(json.dumps([FILE, "unknown", "0" * 64]) + "\n")
    with CheckpointWriter(out, ONE, identity={"seed": 1}) as writer:
        assert [writer.is_written(name) for name in NAMES] == [damage == "none"] * 7


def test_writer_chunk_at_the_first_byte_starts_a_tensor_again(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {FILE: ONE[FILE][:1]}) as writer:
        with pytest.raises(ValueError, match=r"a: chunk \[1, 2\) after byte 0 of 3"):
            writer.write_chunk(FILE, "a", 1, b"x")
        writer.write_chunk(FILE, "a", 0, b"xy")
        with pytest.raises(ValueError, match=r"a: chunk \[2, 4\) after byte 2 of 3"):
            writer.write_chunk(FILE, "a", 2, b"zz")
        writer.write_chunk(FILE, "a", 0, b"1")
        writer.write_chunk(FILE, "a", 1, b"23")
        assert writer.read_back("a").tolist() == list(b"123")
        writer.commit()
        writer.write_chunk(FILE, "a", 0, b"4")
        writer.write_chunk(FILE, "a", 1, b"56")
        writer.finish({}, {}, {})
    assert verify_manifest(tmp_path / "out") == []
    assert open_checkpoint(tmp_path / "out").read("a").tolist() == list(b"456")


def test_writer_writes_on_after_a_short_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data[:2]), at))
    with CheckpointWriter(tmp_path / "out", {FILE: [TensorInfo("a", "U8", (7,))]}) as writer:
        writer.write("a", torch.arange(7, dtype=torch.uint8))
        writer.finish({}, {}, {})
    assert open_checkpoint(tmp_path / "out").read("a").tolist() == list(range(7))


class DirectWrites:
    """Notes the writes past the page cache, on any file system; `code` refuses them.

    They must lie at whole pages.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.seen: list[tuple[int, int]] = []
        self.other_bytes = 0  # through the page cache
        self.refusals = 0
        self._code = code
        self._fds: set[int] = set()
        self._open = os.open
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def open(self, path: Any, flags: int, *more: Any, **named: Any) -> int:
        fd = self._open(path, flags & ~os.O_DIRECT, *more, **named)
        self._fds.discard(fd)
        if flags & os.O_DIRECT:
            self._fds.add(fd)
        return fd

    def pwrite(self, fd: int, view: memoryview, position: int) -> int:
        if fd in self._fds:
            if self._code:
                self.refusals += 1
                raise OSError(self._code, os.strerror(self._code))
            assert position % 4096 == len(view) % 4096 == 0
            self.seen.append((position, len(view)))
        else:
            self.other_bytes += len(view)
        return self._pwrite(fd, view, position)


MIB = 2**20


def test_writer_bypasses_the_page_cache_with_the_full_pages_of_large_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = DirectWrites(monkeypatch)
    data = torch.arange(11 * MIB).to(torch.uint8)
    plan = {FILE: [TensorInfo("a", "U8", (11 * MIB,))]}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        start = read_header(tmp_path / "out.partial" / FILE)["a"].start
        assert 0 < start < 4096
        direct.other_bytes = 0  # those of the lock
        page = 4096 - start  # the first byte at a page's beginning
        cuts = [0, page, page + 1, MIB - 1, 2 * MIB - 1, 2 * MIB + 4096 - start, 11 * MIB]
        for first, last in itertools.pairwise(cuts):
            writer.write_chunk(FILE, "a", first, memoryview(data.numpy())[first:last])
        writer.finish({}, {}, {})
    assert direct.seen == [
        (MIB + 4096, MIB - 4096),  # the write of exactly 1 MiB; one byte less was not direct
        (2 * MIB + 4096, 8 * MIB),  # the last write, in pieces of 8 MiB
        (10 * MIB + 4096, MIB - 4096),
    ]
    assert direct.other_bytes == 11 * MIB - sum(length for _, length in direct.seen)
    assert torch.equal(open_checkpoint(tmp_path / "out").read("a"), data)
    assert verify_manifest(tmp_path / "out") == []


def test_writer_goes_through_the_page_cache_where_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = DirectWrites(monkeypatch, errno.EINVAL)
    data = torch.arange(3 * MIB).to(torch.uint8)
    with CheckpointWriter(tmp_path / "out", {FILE: [TensorInfo("a", "U8", (3 * MIB,))]}) as writer:
        page = 4096 - read_header(tmp_path / "out.partial" / FILE)["a"].start
        for first, last in itertools.pairwise([0, page, page + MIB, 3 * MIB]):
            writer.write_chunk(FILE, "a", first, memoryview(data.numpy())[first:last])
        writer.finish({}, {}, {})
    assert torch.equal(open_checkpoint(tmp_path / "out").read("a"), data)
    assert direct.refusals == 1  # it is not tried again


def test_writer_full_disk_past_the_page_cache_is_a_shortage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DirectWrites(monkeypatch, errno.ENOSPC)
    plan = {FILE: [TensorInfo("a", "U8", (2 * MIB,))]}
    with (
        pytest.raises(ShortageError, match="The disk is full"),
        CheckpointWriter(tmp_path / "out", plan) as writer,
    ):
        writer.write("a", torch.zeros(2 * MIB, dtype=torch.uint8))


def test_writer_names_tensors_that_it_cannot_place(tmp_path: Path) -> None:
    files = sorted(RANKS)
    with CheckpointWriter(tmp_path / "out", RANKS) as writer:
        assert writer.files_with("w") == tuple(files)
        for wrong in (None, "elsewhere"):
            with pytest.raises(ValueError, match="planned in") as caught:
                writer.write("w", torch.zeros(2, dtype=torch.uint8), wrong)
            assert str(caught.value) == f"w is planned in {files}, asked for in {wrong}"
    with CheckpointWriter(tmp_path / "one", ONE) as writer:
        writer.write("g", torch.zeros(3, dtype=torch.uint8))
        with pytest.raises(ValueError, match="not been written") as caught:
            writer.finish({}, {}, {})
        assert str(caught.value) == "6 tensors have not been written (a, b, c, d, e)"
    with pytest.raises(AssertionError):
        CheckpointWriter(tmp_path / "out", {"../x.safetensors": []})


def finished(out: Path, plan: dict[str, list[TensorInfo]], **entries: Any) -> dict[str, Any]:
    """The manifest of a checkpoint of zeros."""
    with CheckpointWriter(out, plan) as writer:
        for file, tensors in plan.items():
            for info in tensors:
                writer.write(info.name, torch.zeros(info.shape, dtype=torch.uint8), file)
        writer.finish({"name": "é"}, {"vocab.txt": b"a"}, entries)
    manifest: dict[str, Any] = json.loads((out / "llmkit.json").read_text(encoding="utf-8"))
    return manifest


def test_writer_manifest_describes_every_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = finished(out, {FILE: ONE[FILE][:1]}, seed=3)
    assert (out / "config.json").read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'
    assert {path.name for path in out.iterdir()} == manifest["files"].keys() | {"llmkit.json"}
    assert manifest == {
        "format_version": 1,
        "tool": {"name": "llmkit", "version": version()},
        "seed": 3,
        "files": {
            name: {
                "bytes": (out / name).stat().st_size,
                "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
            }
            for name in ("config.json", FILE, "vocab.txt")
        },
        "tensors": {
            "a": {
                "file": FILE,
                "dtype": "U8",
                "shape": [3],
                "sha256": hashlib.sha256(bytes(3)).hexdigest(),
            }
        },
    }


def test_writer_manifest_of_ranks_has_a_digest_of_itself(tmp_path: Path) -> None:
    manifest = finished(tmp_path / "out", RANKS, layout={"tp": 2})
    assert manifest["sha256"] == manifest_digest(manifest)
    assert sorted(manifest["files"]) == ["config.json", *sorted(RANKS), "vocab.txt"]


@pytest.mark.parametrize("given", [None, {"reference": "mine"}])
def test_writer_manifest_names_its_source(given: dict[str, str] | None, tmp_path: Path) -> None:
    source = open_checkpoint(synthetic_checkpoint(tmp_path / "source"))
    with CheckpointWriter(tmp_path / "out", {FILE: ONE[FILE][:1]}, source) as writer:
        writer.write("a", torch.zeros(3, dtype=torch.uint8))
        writer.finish({}, {}, {"source": given} if given else {})
    manifest = json.loads((tmp_path / "out" / "llmkit.json").read_text())
    own = {"reference": str(tmp_path / "source"), "files": source.source_hashes()}
    assert manifest["source"] == (given or own)


def test_writer_finish_removes_what_is_not_of_the_output(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    partial = tmp_path / "out.partial"
    for number in range(20):
        (partial / f"stray-{number}").write_text("left over")
    (partial / "folder").mkdir()
    (partial / "folder" / "file").write_text("left over")
    with CheckpointWriter(tmp_path / "out", ONE, identity={"seed": 1}) as writer:
        writer.finish({}, {"vocab.txt": b"a"}, {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "llmkit.json",
        FILE,
        "vocab.txt",
    ]


def test_writer_discard_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", ONE) as writer:
        writer.write("a", torch.zeros(3, dtype=torch.uint8))
        writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_writer_commit_syncs_before_the_journal_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        steps.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    with CheckpointWriter(tmp_path / "out", RANKS) as writer:
        for file in reversed(RANKS):
            writer.write("w", torch.zeros(2, dtype=torch.uint8), file)
        monkeypatch.setattr(writing.os, "fsync", fsync)
        writer.commit()
        assert sorted(steps[:-1]) == sorted(RANKS)
        assert steps[-1] == "out.partial.journal"
        steps.clear()
        writer.commit()  # nothing is new
        assert steps == []
