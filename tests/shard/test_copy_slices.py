"""Copying slices: what is read, how often the work is committed, and what the progress shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.synthetic_checkpoint import synthetic_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.shard import chunking, copy_slices, shard_source
from llmkit.shard.chunking import ByteShape, Chunk
from llmkit.shard.merge import merge
from llmkit.shard.shard_checkpoint import open_source, shard

GPTQ = QuantizationConfig("gptq", Scheme(4, 8))


class Listener:
    """Keeps what a `Progress` is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, str]] = []
        self.advances: list[tuple[int, str]] = []
        self.messages: list[str] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.stages.append((stage, total, unit))

    def advance(self, n: int = 1, note: str = "") -> None:
        self.advances.append((n, note))

    def finish(self) -> None:
        self.stages.append(("finished", 0, ""))

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_shard_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source", GPTQ)
    sizes = {name: info.nbytes for name, info in open_checkpoint(source).tensors.items()}
    for write in (
        lambda listener: shard(source, tmp_path / "ranks", 2, 2, progress=listener),
        lambda listener: merge(tmp_path / "ranks", tmp_path / "merged", listener),
    ):
        listener = Listener()
        write(listener)
        assert listener.stages == [("write", sum(sizes.values()), "bytes"), ("finished", 0, "")]
        assert sorted(listener.advances) == sorted((size, name) for name, size in sizes.items())
        assert listener.messages == []  # nothing was continued, and nothing is left out


def test_shard_again_keeps_what_was_left_out(tmp_path: Path) -> None:
    source = synthetic_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for path, output in ((source, tmp_path / "one"), (tmp_path / "one", tmp_path / "two")):
        listener = Listener()
        plan = shard(path, output, 2, progress=listener)
        assert plan.left_out == ("lm_head.weight",)
        assert listener.messages == [
            "Left out, because other tensors hold the same: lm_head.weight"
        ]


def test_plan_reads_the_group_indices_of_split_columns_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic_checkpoint(tmp_path / "source", GPTQ)
    tensors = open_checkpoint(source).tensors
    read: list[str] = []

    def recording(path: Path, start: int, view: memoryview) -> None:
        read.extend(
            name for name, info in tensors.items() if start <= info.start < start + len(view)
        )
        read_into(path, start, view)

    read_into = shard_source.read_into
    monkeypatch.setattr(shard_source, "read_into", recording)
    shard(source, tmp_path / "out", 1, 2, dry_run=True)
    assert read == []
    shard(source, tmp_path / "out", 2, dry_run=True)
    assert sorted(read) == [
        f"model.layers.{layer}.{module}.g_idx"
        for layer in (0, 1)
        for module in ("mlp.down_proj", "self_attn.o_proj")
    ]


@pytest.mark.parametrize("limit", [128, 129])
def test_shard_commits_after_the_chunk_that_reaches_the_limit(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = synthetic_checkpoint(tmp_path / "source")
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 64)
    monkeypatch.setattr(copy_slices, "COMMIT_BYTES", limit)
    written: list[list[int]] = [[]]  # the bytes of each write, by commit
    write_chunk = CheckpointWriter.write_chunk
    commit = CheckpointWriter.commit

    def recording_write(writer: CheckpointWriter, file: str, name: str, offset: int, data) -> None:
        written[-1].append(len(data))
        write_chunk(writer, file, name, offset, data)

    def recording_commit(writer: CheckpointWriter) -> None:
        commit(writer)
        written.append([])

    monkeypatch.setattr(CheckpointWriter, "write_chunk", recording_write)
    monkeypatch.setattr(CheckpointWriter, "commit", recording_commit)
    shard(source, tmp_path / "ranks", 1)
    assert len(written) > 100
    whole = [sizes for sizes in written if sum(sizes) >= limit]
    assert all(sum(sizes[:-1]) < limit for sizes in whole)
    # Only the last commits, those of finishing, may hold less.
    assert written[: len(whole)] == whole


def test_shard_commits_every_gib() -> None:
    assert copy_slices.COMMIT_BYTES == 1024 * 1024 * 1024


PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}


@pytest.mark.parametrize(
    ("quantization", "config", "name", "dim"),
    [
        (GPTQ, {}, "model.layers.0.mlp.down_proj.g_idx", 0),
        (GPTQ, {}, "model.layers.0.mlp.gate_proj.qweight", 1),
        (GPTQ, {}, "model.layers.0.mlp.down_proj.qweight", 0),
        (None, {}, "model.norm.weight", 0),
        (None, PHI3, "model.layers.1.self_attn.qkv_proj.weight", 0),  # three intervals on a rank
    ],
)
def test_shard_source_reads_any_chunk_of_a_sharded_tensor(
    quantization: QuantizationConfig | None,
    config: dict[str, Any],
    name: str,
    dim: int,
    tmp_path: Path,
) -> None:
    path = synthetic_checkpoint(tmp_path / "source", quantization, **config)
    shard(path, tmp_path / "ranks", 2)
    source = open_source(tmp_path / "ranks")
    info = source.tensors[name]
    byte_shape = ByteShape.of(info.dtype, info.shape, dim)
    outer = byte_shape.outer
    length = byte_shape.length
    tensor = load_file(path / "model.safetensors")[name].view(torch.uint8)
    data = tensor.numpy().reshape(outer, length, byte_shape.inner)
    bounds = [(start, stop) for stop in range(1, length + 1) for start in range(stop)]
    if outer > 1:  # chunks are whole rows, of which columns are cut out
        chunks = [Chunk(row, end, 0, length) for row, end in ((0, 1), (outer - 1, outer), (1, 3))]
    else:
        chunks = [Chunk(0, 1, start, stop) for start, stop in bounds]
    for chunk in chunks:
        found = source.read(name, byte_shape, chunk).data
        expected = data[chunk.first_row : chunk.end_row, chunk.start : chunk.stop]
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes(), chunk


def test_shard_source_keeps_what_it_reads_early(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.g_idx"
    source = open_source(synthetic_checkpoint(tmp_path / "source", GPTQ))
    early = source.read_early(name)
    assert source.read_early(name) is early
    info = source.tensors[name]
    byte_shape = ByteShape.of(info.dtype, info.shape, 0)
    assert source.read(name, byte_shape, byte_shape.full_chunk).data is early
    assert source.read(name, byte_shape, byte_shape.full_chunk).data is not early


def test_shard_source_of_a_manifest_without_origin(tmp_path: Path) -> None:
    """Only an output of `llmkit shard` hands on where its source came from."""
    path = synthetic_checkpoint(tmp_path / "source")
    assert open_source(path).origin == {}
    shard(path, tmp_path / "ranks", 2)
    merge(tmp_path / "ranks", tmp_path / "merged")
    assert open_source(tmp_path / "merged").origin == {}
    manifest = json.loads((tmp_path / "ranks" / "llmkit.json").read_text())
    assert open_source(tmp_path / "ranks").origin == manifest["source"] != {}
