"""Reading tensors and bytes, also ahead: the same bytes, in any order, and clean failures."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint import tensor_reader as reading
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.common.errors import InputError

NAMES = [f"t{i:02}" for i in range(40)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(index, 50, generator=generator) for index, name in enumerate(NAMES)}


@pytest.fixture
def opened(tmp_path: Path) -> Checkpoint:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return open_checkpoint(tmp_path)


def no_threads_left() -> bool:
    return not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_read_ahead_returns_the_same_tensors_in_order(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(reading, "READ_AHEAD_BYTES", limit)
    with opened.reading_ahead(NAMES):
        for name, expected in tensors().items():
            found = opened.read(name)
            assert torch.equal(found, expected)
            found.fill_(7)  # memory of its own
    assert no_threads_left()
    assert torch.equal(opened.read("t05"), tensors()["t05"])


@pytest.mark.parametrize("patience", [0, 5, 50])
def test_read_ahead_allows_another_order_and_unread_tensors(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    monkeypatch.setattr(reading, "READ_AHEAD_BYTES", 30_000)
    monkeypatch.setattr(reading, "MAX_SKIPPED_TENSORS", patience)
    expected = tensors()
    with opened.reading_ahead(NAMES[:30]):
        for index in (3, 3, 29, 1, 35, 28):
            assert torch.equal(opened.read(NAMES[index]), expected[NAMES[index]])
    assert no_threads_left()
    with opened.reading_ahead(NAMES):
        pass
    assert no_threads_left()


def test_read_ahead_respects_its_memory_limit(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "READ_AHEAD_BYTES", 10 * 50 * 4)
    begun: list[str] = []
    real = opened.read_info

    def read(info: reading.TensorInfo) -> torch.Tensor:
        begun.append(info.name)
        return real(info)

    infos = [opened.tensors[name] for name in NAMES]
    ahead = reading.ReadAhead(read, infos)
    assert ahead.take("t10") is None
    assert ahead.take("t02") is not None
    ahead.close()
    assert set(begun) <= set(NAMES[:6])  # 0 + 1 + 2 + 3 + 4 rows are 10; the sixth for the third


def test_read_ahead_raises_for_a_truncated_file(opened: Checkpoint) -> None:
    path = opened.path / "model.safetensors"
    end = opened.tensors["t20"].end
    with path.open("r+b") as file:
        file.truncate(end)
    with opened.reading_ahead(NAMES):
        for name in NAMES[:21]:
            opened.read(name)
        with pytest.raises(InputError, match=f"ends at byte {end}, but"):
            opened.read("t21")
    assert no_threads_left()


def test_read_ahead_raises_for_a_removed_file(opened: Checkpoint) -> None:
    (opened.path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"), opened.reading_ahead(NAMES):
        opened.read("t00")
    assert no_threads_left()


def test_read_ahead_raises_for_bytes_that_differ_from_the_manifest(tmp_path: Path) -> None:
    plan = {
        "model.safetensors": [
            TensorInfo(name, "F32", (index, 50)) for index, name in enumerate(NAMES)
        ]
    }
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        for name, tensor in tensors().items():
            writer.write(name, tensor)
        writer.finish({}, {}, {})
    opened = open_checkpoint(tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(opened.tensors["t30"].start)
        file.write(b"\x01\x02\x03")
    with opened.reading_ahead(NAMES):
        for name in NAMES[:30]:
            opened.read(name)
        with pytest.raises(InputError, match="tensor t30 has SHA-256"):
            opened.read("t30")


class Pool:
    """Reads at once, and notes what it was asked to read."""

    def __init__(self, *_: object, **__: object) -> None:
        """As ThreadPoolExecutor."""

    def submit(
        self, read: Callable[[TensorInfo], torch.Tensor], info: TensorInfo
    ) -> Future[torch.Tensor]:
        future: Future[torch.Tensor] = Future()
        future.set_result(read(info))
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        assert cancel_futures


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that the next ReadAhead begins to read, of 10 bytes each, 3 of them ahead."""
    monkeypatch.setattr(reading, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(reading, "READ_AHEAD_BYTES", 30)
    monkeypatch.setattr(reading, "MAX_SKIPPED_TENSORS", 2)
    return []


def read_ahead(begun: list[str], count: int = 10) -> reading.ReadAhead:
    def read(info: TensorInfo) -> torch.Tensor:
        begun.append(info.name)
        return torch.tensor(int(info.name))

    return reading.ReadAhead(read, [TensorInfo(str(i), "U8", (10,)) for i in range(count)])


def test_read_ahead_reads_as_far_as_its_limit(begun: list[str]) -> None:
    ahead = read_ahead(begun)
    assert begun == ["0", "1", "2"]
    assert ahead.take("0") == torch.tensor(0)
    assert begun[3:] == ["3"]
    assert ahead.take("unknown") is None
    assert ahead.take("0") is None
    assert ahead.take("1") == torch.tensor(1)
    assert begun[4:] == ["4"]
    assert ahead.take("3") == torch.tensor(3)  # 2 still waits
    assert begun[5:] == ["5"]
    assert ahead.take("2") == torch.tensor(2)
    assert begun[6:] == ["6"]
    ahead.close()


def test_read_ahead_drops_what_was_skipped_long_ago(begun: list[str]) -> None:
    ahead = read_ahead(begun)
    assert ahead.take("4") is None  # not begun; 2 is the oldest that may wait, 0 and 1 are dropped
    assert begun[3:] == ["3", "5"]
    assert ahead.take("1") is None
    assert ahead.take("2") == torch.tensor(2)
    assert begun[5:] == ["6"]
    assert ahead.take("9") is None
    assert begun[6:] == ["7", "8"]
    assert ahead.take("8") == torch.tensor(8)
    assert ahead.take("6") is None
    assert len(begun) == 8


def test_read_ahead_reads_one_tensor_that_is_larger_than_its_limit(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "READ_AHEAD_BYTES", 10)
    ahead = read_ahead(begun, 2)
    assert begun == ["0"]
    now = iter([1.0, 3.5, 10.0, 10.5])
    monkeypatch.setattr(reading.time, "perf_counter", lambda: next(now))
    for index in range(2):
        assert ahead.take(str(index)) == torch.tensor(index)
    assert begun == ["0", "1"]
    assert ahead.waited_s == 3.0


MIB = 2**20


def test_read_ahead_and_chunks_have_their_documented_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """128 MiB wait, for 50 tensors; chunks have 64 MiB, and 8 MiB where a file is hashed."""

    def begin(count: int, nbytes: int) -> tuple[reading.ReadAhead, list[str]]:
        begun: list[str] = []

        def read(info: TensorInfo) -> torch.Tensor:
            begun.append(info.name)
            return torch.tensor(0)

        infos = [TensorInfo(str(index), "U8", (nbytes,)) for index in range(count)]
        return reading.ReadAhead(read, infos), begun

    monkeypatch.setattr(reading, "ThreadPoolExecutor", Pool)
    assert len(begin(3, 64 * MIB)[1]) == 2
    assert len(begin(3, 64 * MIB - 1)[1]) == 3
    ahead, begun = begin(60, 1)
    assert len(begun) == 60
    ahead.take("51")
    assert (ahead.take("0"), ahead.take("1")) == (None, torch.tensor(0))

    assert list(reading.row_chunks(TensorInfo("a", "U8", (65537, 1024)))) == [
        (0, 65536),
        (65536, 65537),
    ]
    with (tmp_path / "file").open("wb") as file:
        file.truncate(8 * MIB + 1)
    sizes: list[int] = []
    monkeypatch.setattr(reading, "read_into", lambda path, at, view: sizes.append(len(view)))
    reading.FileDigest(tmp_path / "file").hexdigest(8 * MIB + 1)
    assert sizes == [8 * MIB, 1]


@pytest.mark.parametrize(
    ("rows", "nbytes_of_row", "limit", "expected"),
    [
        (0, 4, 8, []),
        (5, 4, 8, [(0, 2), (2, 4), (4, 5)]),
        (5, 4, 7, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (5, 4, 1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (5, 4, 20, [(0, 5)]),
        (5, 4, 19, [(0, 4), (4, 5)]),
        (3, 0, 1, [(0, 3)]),
    ],
)
def test_row_chunks_have_at_most_the_limit(
    rows: int, nbytes_of_row: int, limit: int, expected: list[tuple[int, int]]
) -> None:
    info = TensorInfo("a", "U8", (rows, nbytes_of_row))
    assert list(reading.row_chunks(info, limit)) == expected


def test_row_chunks_of_a_number_are_one_row() -> None:
    assert list(reading.row_chunks(TensorInfo("a", "F32", ()))) == [(0, 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the bytes 0 to 19."""
    (tmp_path / "file").write_bytes(bytes(range(20)))
    return tmp_path / "file"


def test_read_into_reads_on_after_a_short_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:3]], at))
    view = memoryview(bytearray(10))
    reading.read_into(path, 4, view)
    assert view == bytes(range(4, 14))
    reading.read_into(path, 10, view)
    assert view == bytes(range(10, 20))
    with pytest.raises(InputError, match=rf"^{path} ends at byte 20, but 21 were expected"):
        reading.read_into(path, 11, view)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_sha256_range_is_that_of_its_bytes(
    count: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4)
    expected = hashlib.sha256(bytes(range(7, 7 + count))).hexdigest()
    assert reading.sha256_range(path, 7, count) == expected


@pytest.mark.parametrize("start", [0, 2])
def test_file_digest_reads_only_what_it_was_not_given(
    start: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was given differs here from what the file has: "x" for given bytes."""
    monkeypatch.setattr(reading, "DIGEST_BYTES", 3)
    data = bytes(range(20))
    x = b"x" * 20

    def digest(text: bytes) -> str:
        return hashlib.sha256(text).hexdigest()

    found = reading.FileDigest(path, start) if start else reading.FileDigest(path)
    found.add(start + 1, memoryview(x)[:5])  # a later piece: not hashed now
    found.add(start, memoryview(x)[:5])
    found.add(start + 4, memoryview(x)[:5])  # not the next piece
    found.rewind(start + 5)  # nothing of it was hashed
    assert found.hexdigest(start + 5) == digest(x[:5])
    assert found.hexdigest(start + 4) == digest(x[:5])  # no more to read
    assert found.hexdigest(13) == digest(x[:5] + data[start + 5 : 13])
    found.add(13, memoryview(x)[:2])
    found.rewind(14)
    assert found.hexdigest(16) == digest(data[start:16])
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *given: calls.append(given))
    found.drop_page_cache()
    assert calls == [(start, 16 - start, os.POSIX_FADV_DONTNEED)]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(8)[3::8],
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.arange(12).reshape(3, 4)[:, 1:3],
    ],
    ids=["transposed", "one of a stride", "scalar", "empty", "columns"],
)
def test_tensor_bytes_are_in_c_order(tensor: torch.Tensor) -> None:
    assert bytes(reading.tensor_bytes(tensor)) == tensor.numpy().tobytes()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_safetensors_rows_are_those_of_the_tensor(rows: int, tmp_path: Path) -> None:
    tensor = torch.arange(rows * 6, dtype=torch.int16).reshape(rows, 3, 2)
    save_file({"before": torch.zeros(3), "w": tensor}, tmp_path / "model.safetensors")
    info = read_header(tmp_path / "model.safetensors")["w"]
    reader = reading.SafetensorsRows(tmp_path)
    for start in range(rows + 1):
        for stop in range(start, rows + 1):
            assert torch.equal(reader.rows(info, start, stop), tensor[start:stop])
