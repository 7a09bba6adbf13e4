"""Uploads of weights: buffers are reused only after their copy, weights used only after theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fake_streams import LateCuda, LateEvent
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model import device as transfer
from llmkit.model import weight_loader as loader
from llmkit.model.device import PinnedUploader

CPU = torch.device("cpu")
TENSORS = [
    torch.arange(1000.0).view(10, 100),  # of 4,000 bytes: several buffers
    torch.arange(7, dtype=torch.int64),
    torch.tensor(3.5, dtype=torch.bfloat16),
    torch.arange(600, dtype=torch.uint8).view(20, 30).T,  # not contiguous
    torch.empty(0, 5),
    torch.arange(-256, 256, dtype=torch.int16).view(torch.float8_e4m3fn),
]


@pytest.mark.parametrize(("size", "count"), [(1024, 2), (512, 3), (4096, 2), (64, 2)])
def test_uploader_keeps_tensors(size: int, count: int) -> None:
    upload = PinnedUploader(CPU, size, count, LateCuda())
    for tensor in TENSORS:
        got = upload(tensor)
        assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(
            got.contiguous().view(-1).view(torch.uint8),
            tensor.contiguous().view(-1).view(torch.uint8),
        )


def test_uploader_waits_before_reusing_a_buffer() -> None:
    cuda = LateCuda()
    PinnedUploader(CPU, 1000, 2, cuda)(TENSORS[0])  # four pieces
    assert cuda.log == ["copy", "copy", "copied", "copy", "copied", "copy", "copied", "copied"]


@pytest.mark.parametrize("forgotten", ["synchronize", "wait_event"])
def test_late_cuda_notices_missing_waits(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = LateCuda()
    if forgotten == "wait_event":
        monkeypatch.setattr(cuda.now, "wait_event", lambda event: None)
    else:
        waits = LateEvent.synchronize
        monkeypatch.setattr(LateEvent, "synchronize", lambda event: None)
        monkeypatch.setattr(cuda.now, "wait_event", waits)
    assert not torch.equal(PinnedUploader(CPU, 1000, 2, cuda)(TENSORS[0]), TENSORS[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uploader_loads_a_model(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, "qwen2"))
    plain = loader.load_model(checkpoint, dtype)
    upload = PinnedUploader(CPU, 10_000, 2, LateCuda())
    moved = []
    monkeypatch.setattr(
        loader, "upload", lambda tensor, device: moved.append(tensor.nbytes) or upload(tensor)
    )
    monkeypatch.setattr(loader, "CHUNK_BYTES", 20_000)  # the embedding is cast in pieces
    loaded = loader.load_model(checkpoint, dtype)
    assert sum(moved) == sum(info.nbytes for info in checkpoint.tensors.values())
    for one, other in zip(plain.layers, loaded.layers, strict=True):
        for name, linear in one.linears.items():
            assert torch.equal(linear.weight, other.linears[name].weight)
    assert torch.equal(plain.embedding, loaded.embedding) and torch.equal(
        plain.head.weight, loaded.head.weight
    )


def test_upload_to_cpu_copies_nothing() -> None:
    assert transfer.upload(TENSORS[0], "cpu") is TENSORS[0]
