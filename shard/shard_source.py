"""`ShardSource`: the checkpoint that is split or merged. It may itself be sharded.

Its bytes are read once, in order, and hashed as they are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.manifest import manifest_mismatch
from llmkit.checkpoint.model_files import CONFIG
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.tensor_reader import FileDigest, read_into, sha256_file
from llmkit.common.errors import InputError
from llmkit.shard.chunking import Bytes, ByteShape, Chunk, overlaps
from llmkit.shard.sharded_layout import ShardedLayout, read_layout
from llmkit.shard.tensor_slice import TensorSlice


@dataclass(frozen=True)
class ChunkData:
    """The bytes of a chunk, and the byte ranges of files that were read for it."""

    data: Bytes  # [rows, elements, inner]
    reads: tuple[tuple[str, int, Bytes], ...]  # file, first byte, [bytes]


class ShardSource:
    """An opened checkpoint. The slices of a sharded one are joined when a tensor is read.

    Raises InputError when the ranks of a sharded checkpoint do not cover the whole model, or when a
    file does not match the layout.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.layout: ShardedLayout | None = None
        self._headers: dict[str, dict[str, TensorInfo]] = {}  # of a sharded checkpoint's files
        self._digests: dict[str, FileDigest] = {}  # of safetensors files
        self._early_reads: dict[str, ChunkData] = {}  # tensors that were read before their turn
        self.tensors = dict(
            sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].start))
        )
        if checkpoint.layout is not None:
            self.layout = read_layout(checkpoint.path)
            gaps = self.layout.gaps()
            if gaps:
                raise InputError(
                    f"{checkpoint.reference}: {gaps[0]}",
                    "Ranks that make up the whole checkpoint",
                    "Shard the source again",
                )
            self._headers = {
                file: read_header(checkpoint.path / file) for file in self.layout.all_files
            }
            for piece in self.layout.slices:
                self._find_slice(piece)
            self.tensors = self.layout.tensors
        if checkpoint.file_format == "safetensors":
            self._digests = {
                file: FileDigest(checkpoint.folder / file) for file in checkpoint.weight_files
            }

    @property
    def unsharded(self) -> Checkpoint:
        """The checkpoint with full_slice tensors in the source's order. For planning only."""
        return replace(self.checkpoint, tensors=self.tensors)

    @property
    def origin(self) -> dict[str, Any]:
        """The `source` entry in the manifest of a sharded checkpoint; {} for other checkpoints."""
        if self.layout is None or self.checkpoint.manifest is None:
            return {}
        source: dict[str, Any] = self.checkpoint.manifest.get("source", {})
        return source

    def read_order(self) -> list[str]:
        """The tensors in the order in which they lie in the files."""
        if self.layout is None:
            return list(self.tensors)
        return sorted(self.tensors, key=lambda name: -self.tensors[name].torch_dtype.itemsize)

    def read(self, name: str, byte_shape: ByteShape, chunk: Chunk) -> ChunkData:
        """A chunk of a tensor, in its own memory. Raises InputError when a file is cut short."""
        if name in self._early_reads:
            return self._early_reads.pop(name)
        if self.layout is not None:
            return self._join_slices(name, byte_shape, chunk)
        info = self.tensors[name]
        shape = byte_shape.chunk_shape(chunk)
        start, stop = byte_shape.byte_range(chunk)
        if self.checkpoint.file_format == "gguf":
            data = self.checkpoint.read_bytes(info, start, stop)
            return ChunkData(np.frombuffer(data, np.uint8).reshape(shape), ())
        file, first_byte, file_bytes = self._read_bytes(info, start, stop)
        return ChunkData(file_bytes.reshape(shape), ((file, first_byte, file_bytes),))

    def read_early(self, name: str) -> Bytes:
        """Read a small tensor of one dimension, and keep it until `read` returns it."""
        if name not in self._early_reads:
            info = self.tensors[name]
            byte_shape = ByteShape.of(info.dtype, info.shape, 0)
            self._early_reads[name] = self.read(name, byte_shape, byte_shape.full_chunk)
        return self._early_reads[name].data

    def hash(self, chunk_data: ChunkData) -> None:
        """Add what was read to the digests of the files.

        It is fastest when tensors are read in the order of `read_order`.
        """
        for file, start, file_bytes in chunk_data.reads:
            digest = self._digests[file]
            digest.catch_up(start)
            digest.add(start, file_bytes.data)
            digest.drop_page_cache()

    def check_digests(self) -> None:
        """Hash the bytes that were not read yet, and compare the digests with the manifest.

        Raises InputError when a file differs from the manifest. The digests become the checkpoint's
        `source_hashes`.
        """
        checkpoint = self.checkpoint
        if self._digests:
            hashes = {CONFIG: sha256_file(checkpoint.folder / CONFIG)}
            for file, digest in self._digests.items():
                hashes[file] = digest.hexdigest((checkpoint.folder / file).stat().st_size)
            checkpoint.set_source_hashes(hashes)
        recorded = checkpoint.manifest["files"] if checkpoint.manifest else {}
        for file, sha256 in checkpoint.source_hashes().items():
            if file in recorded and recorded[file]["sha256"] != sha256:
                raise manifest_mismatch(
                    f"{checkpoint.folder / file} has SHA-256 {sha256},"
                    f" llmkit.json says {recorded[file]['sha256']}"
                )

    def _read_bytes(self, info: TensorInfo, start: int, stop: int) -> tuple[str, int, Bytes]:
        """Bytes [start, stop) of a tensor, as an entry of `ChunkData.reads`."""
        data = np.empty(stop - start, np.uint8)
        read_into(self.checkpoint.folder / info.file, info.start + start, data.data)
        return info.file, info.start + start, data

    def _find_slice(self, piece: TensorSlice) -> TensorInfo:
        """A rank's tensor in its file.

        Raises InputError when the header differs from the layout.
        """
        info = self._headers[piece.file].get(piece.name)
        if info is None or (info.dtype, info.shape) != (piece.dtype, piece.shape):
            found = "absent" if info is None else f"{info.dtype} {list(info.shape)}"
            raise InputError(
                f"{self.checkpoint.path / piece.file}: tensor {piece.name} is {found}",
                f"{piece.dtype} {list(piece.shape)}",
                "Shard the source again",
            )
        return info

    def _join_slices(self, name: str, byte_shape: ByteShape, chunk: Chunk) -> ChunkData:
        """A chunk of a tensor of a sharded checkpoint, put together from the ranks' slices."""
        assert self.layout is not None
        slices = self.layout.slices_by_source[name]
        first = slices[0]
        if first.derived == "shape":
            shape = np.array(first.source_dense_shape, "<i8").view(np.uint8)
            return ChunkData(shape.reshape(byte_shape.chunk_shape(chunk)), ())
        stored_shape = ByteShape.of(first.dtype, first.source_shape, first.dim)
        if stored_shape != byte_shape:
            return self._join_other_slices(name, stored_shape, byte_shape, chunk)
        joined = None
        reads = []
        for piece in slices:
            parts = list(overlaps(piece.intervals, chunk))
            if not parts:
                continue
            slice_shape = ByteShape.of(piece.dtype, piece.shape, piece.dim)
            # The slice is contiguous in its file, so that one read covers all parts of the chunk.
            low = parts[0][2]
            high = parts[-1][2] + parts[-1][1] - parts[-1][0]
            if byte_shape.outer > 1:
                low = 0
                high = slice_shape.length
            slice_chunk = Chunk(chunk.first_row, chunk.end_row, low, high)
            start, stop = slice_shape.byte_range(slice_chunk)
            read = self._read_bytes(self._find_slice(piece), start, stop)
            reads.append(read)
            data = _count_from_zero(read[2], piece.first_group)
            data = data.reshape(-1, high - low, byte_shape.inner)
            if parts == [(chunk.start, chunk.stop, low)]:
                return ChunkData(data, tuple(reads))
            if joined is None:
                joined = np.empty(byte_shape.chunk_shape(chunk), np.uint8)
            for part_start, part_stop, offset in parts:
                part = data[:, offset - low : offset - low + part_stop - part_start]
                joined[:, part_start - chunk.start : part_stop - chunk.start] = part
        assert joined is not None, "a layout without gaps covers every chunk"
        return ChunkData(joined, tuple(reads))

    def _join_other_slices(
        self, name: str, stored_shape: ByteShape, byte_shape: ByteShape, chunk: Chunk
    ) -> ChunkData:
        """As `_join_slices`, for slices along another dimension than that of the chunk.

        A tensor of all experts is split by experts in one layout and by features in another. What
        was read is hashed later: it may be more than the chunk.
        """
        start, stop = byte_shape.byte_range(chunk)
        covering = stored_shape.covering_chunk(start, stop)
        first_byte, _ = stored_shape.byte_range(covering)
        data = self._join_slices(name, stored_shape, covering).data.reshape(-1)
        wanted = data[start - first_byte : stop - first_byte]
        return ChunkData(wanted.reshape(byte_shape.chunk_shape(chunk)), ())


def _count_from_zero(data: Bytes, first_group: int) -> Bytes:
    """Group indices of a slice, renumbered to count from the first group of the source.

    Tensors that are not group indices have `first_group` 0 and stay unchanged.
    """
    return (data.view("<i4") + np.int32(first_group)).view(np.uint8) if first_group else data
