"""Reading ahead: the same bytes, in any order, and clean failures."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint import tensor_reader as reading
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo
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
