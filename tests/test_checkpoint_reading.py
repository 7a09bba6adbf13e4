"""Reading ahead: the same bytes, in any order, and clean failures."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmkit.checkpoint import reading
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.writer import CheckpointWriter, PlannedTensor

NAMES = [f"t{i:02}" for i in range(40)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(index, 50, generator=generator) for index, name in enumerate(NAMES)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return open_checkpoint(tmp_path)


def no_threads_left() -> bool:
    return not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_the_same_tensors_in_their_order(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(reading, "AHEAD_BYTES", limit)
    with checkpoint.reading_ahead(NAMES):
        for name, expected in tensors().items():
            found = checkpoint.read(name)
            assert torch.equal(found, expected)
            found.fill_(7)  # memory of its own
    assert no_threads_left()
    assert torch.equal(checkpoint.read("t05"), tensors()["t05"])


@pytest.mark.parametrize("patience", [0, 5, 50])
def test_any_other_order_and_tensors_that_nobody_reads(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    monkeypatch.setattr(reading, "AHEAD_BYTES", 30_000)
    monkeypatch.setattr(reading, "PATIENCE", patience)
    expected = tensors()
    with checkpoint.reading_ahead(NAMES[:30]):
        for index in (3, 3, 29, 1, 35, 28):
            assert torch.equal(checkpoint.read(NAMES[index]), expected[NAMES[index]])
    assert no_threads_left()
    with checkpoint.reading_ahead(NAMES):
        pass
    assert no_threads_left()


def test_no_more_is_held_than_was_allowed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AHEAD_BYTES", 10 * 50 * 4)
    begun: list[str] = []
    real = checkpoint.read_info

    def read(info: reading.TensorInfo) -> torch.Tensor:
        begun.append(info.name)
        return real(info)

    infos = [checkpoint.tensors[name] for name in NAMES]
    ahead = reading.ReadAhead(read, infos)
    assert ahead.take("t10") is None
    assert ahead.take("t02") is not None
    ahead.close()
    assert set(begun) <= set(NAMES[:6])  # 0 + 1 + 2 + 3 + 4 rows are 10; the sixth for the third


def test_a_file_that_is_cut_short(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "model.safetensors"
    end = checkpoint.tensors["t20"].end
    with path.open("r+b") as file:
        file.truncate(end)
    with checkpoint.reading_ahead(NAMES):
        for name in NAMES[:21]:
            checkpoint.read(name)
        with pytest.raises(InputError, match=f"ends at byte {end}, but"):
            checkpoint.read("t21")
    assert no_threads_left()


def test_a_file_that_is_gone(checkpoint: Checkpoint) -> None:
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"), checkpoint.reading_ahead(NAMES):
        checkpoint.read("t00")
    assert no_threads_left()


def test_bytes_that_differ_from_the_manifest(tmp_path: Path) -> None:
    plan = {"model.safetensors": [PlannedTensor(name, "F32", (index, 50)) for index, name in enumerate(NAMES)]}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        for name, tensor in tensors().items():
            writer.write(name, tensor)
        writer.finish({}, {}, {})
    checkpoint = open_checkpoint(tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(checkpoint.tensors["t30"].start)
        file.write(b"\x01\x02\x03")
    with checkpoint.reading_ahead(NAMES):
        for name in NAMES[:30]:
            checkpoint.read(name)
        with pytest.raises(InputError, match="tensor t30 has SHA-256"):
            checkpoint.read("t30")
