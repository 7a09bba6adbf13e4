"""`Source`: what is split or merged. Whole or sharded, its bytes are read once, in order, and hashed on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import CONFIG
from llmkit.checkpoint.manifest import mismatch
from llmkit.checkpoint.reading import FileDigest, read_into, sha256_file
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.source import Checkpoint
from llmkit.shard.blocks import Bytes, Chunk, Grid, overlaps
from llmkit.shard.layout import Layout, StoredSlice, read_layout


@dataclass(frozen=True)
class Read:
    """Bytes of a tensor, from byte `start` of its file."""

    info: TensorInfo
    start: int
    data: Bytes  # [bytes]


@dataclass(frozen=True)
class Block:
    """A chunk of a source tensor, [rows, elements, inner], and what was read for it."""

    view: Bytes
    reads: tuple[Read, ...]


class Source:
    """An opened checkpoint as the tensors it has in one piece, whatever they lie in.

    Raises InputError when a sharded one's ranks do not make up the whole or are not what its manifest says.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.layout: Layout | None = None
        self._headers: dict[str, dict[str, TensorInfo]] = {}  # of a sharded one's files
        self._digests: dict[str, FileDigest] = {}  # of safetensors files
        self._kept: dict[str, Block] = {}  # tensors that were read before their turn
        self.tensors = dict(sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].start)))
        if checkpoint.layout is not None:
            self.layout = read_layout(checkpoint.path)
            if gaps := self.layout.gaps():
                raise InputError(
                    f"{checkpoint.reference}: {gaps[0]}",
                    "Ranks that make up the whole checkpoint",
                    "Shard the source again",
                )
            self._headers = {file: read_header(checkpoint.path / file) for file in self.layout.files}
            for stored in self.layout.slices:
                self._located(stored)
            self.tensors = self.layout.tensors
        if checkpoint.kind == "safetensors":
            self._digests = {file: FileDigest(checkpoint.folder / file) for file in checkpoint.weight_files}

    @property
    def whole(self) -> Checkpoint:
        """The checkpoint with its tensors in one piece, in the source's order: for planning, not for reading."""
        return replace(self.checkpoint, tensors=self.tensors)

    @property
    def origin(self) -> dict[str, Any]:
        """What a sharded checkpoint's manifest says of the whole one it was made from."""
        return (self.checkpoint.manifest or {}).get("source", {}) if self.layout else {}

    def sequence(self) -> list[str]:
        """The tensors in the order in which they lie in the files that are read."""
        if self.layout is None:
            return list(self.tensors)
        return sorted(self.tensors, key=lambda name: -self.tensors[name].torch_dtype.itemsize)

    def read(self, name: str, grid: Grid, chunk: Chunk) -> Block:
        """A chunk of a tensor, in memory of its own. Raises InputError when a file is cut short."""
        if name in self._kept:
            return self._kept.pop(name)
        if self.layout is not None:
            return self._assemble(name, grid, chunk)
        info, shape = self.tensors[name], grid.shape_of(chunk)
        start, stop = grid.bytes_of(chunk)
        if self.checkpoint.kind == "gguf":
            data = self.checkpoint.read_bytes(info, start, stop)
            return Block(np.frombuffer(data, np.uint8).reshape(shape), ())
        read = self._bytes(info, start, stop)
        return Block(read.data.reshape(shape), (read,))

    def keep(self, name: str) -> Bytes:
        """A small tensor of one dimension, which is kept until `read` asks for it: it is read once."""
        if name not in self._kept:
            info = self.tensors[name]
            grid = Grid.of(info.dtype, info.shape, 0)
            self._kept[name] = self.read(name, grid, grid.whole)
        return self._kept[name].view

    def hash(self, block: Block) -> None:
        """Take up what was read into the digests. Blocks come in the order of `sequence`."""
        for read in block.reads:
            digest = self._digests[read.info.file]
            digest.catch_up(read.start)
            digest.add(read.start, read.data.data)
            digest.forget()

    def check(self) -> None:
        """Read and hash what no tensor was made of. Raises InputError when something differs from the manifest.

        The checkpoint's `source_hashes` are then those of the bytes that were read.
        """
        checkpoint = self.checkpoint
        if self._digests:
            read = {file: d.hexdigest((checkpoint.folder / file).stat().st_size) for file, d in self._digests.items()}
            checkpoint.set_source_hashes({CONFIG: sha256_file(checkpoint.folder / CONFIG), **read})
        recorded = checkpoint.manifest["files"] if checkpoint.manifest else {}
        for file, found in checkpoint.source_hashes().items():
            if file in recorded and recorded[file]["sha256"] != found:
                raise mismatch(
                    f"{checkpoint.folder / file} has SHA-256 {found}, llmkit.json says {recorded[file]['sha256']}"
                )

    def _bytes(self, info: TensorInfo, start: int, stop: int) -> Read:
        data = np.empty(stop - start, np.uint8)
        read_into(self.checkpoint.folder / info.file, info.start + start, data.data)
        return Read(info, info.start + start, data)

    def _located(self, stored: StoredSlice) -> TensorInfo:
        """Where a rank's tensor lies. Raises InputError when the file's header is not as planned."""
        want = stored.slice
        info = self._headers[stored.file].get(want.name)
        if info is None or (info.dtype, info.shape) != (want.dtype, want.shape):
            found = "absent" if info is None else f"{info.dtype} {list(info.shape)}"
            raise InputError(
                f"{self.checkpoint.path / stored.file}: tensor {want.name} is {found}",
                f"{want.dtype} {list(want.shape)}",
                "Shard the source again",
            )
        return info

    def _assemble(self, name: str, grid: Grid, chunk: Chunk) -> Block:
        assert self.layout is not None
        slices = self.layout.by_source[name]
        first = slices[0].slice
        if first.derived == "shape":
            shape = np.array(first.source_dense_shape, "<i8").view(np.uint8)
            return Block(shape.reshape(grid.shape_of(chunk)), ())
        whole = None
        reads = []
        for stored in slices:
            piece = stored.slice
            parts = list(overlaps(piece.intervals, chunk))
            if not parts:
                continue
            local = Grid.of(piece.dtype, piece.shape, piece.dim)
            # The slice's own elements are contiguous in its file, so the parts of a chunk are read at once.
            low, high = parts[0][2], parts[-1][2] + parts[-1][1] - parts[-1][0]
            if grid.outer > 1:
                low, high = 0, local.length
            read = self._bytes(self._located(stored), *local.bytes_of(Chunk(chunk.top, chunk.bottom, low, high)))
            reads.append(read)
            data = _rebased(read.data, piece.first_group).reshape(-1, high - low, grid.inner)
            if parts == [(chunk.start, chunk.stop, low)]:
                return Block(data, (*reads,))
            if whole is None:
                whole = np.empty(grid.shape_of(chunk), np.uint8)
            for start, stop, offset in parts:
                whole[:, start - chunk.start : stop - chunk.start] = data[:, offset - low : offset - low + stop - start]
        assert whole is not None, "a layout without gaps has all of a chunk"
        return Block(whole, (*reads,))


def _rebased(data: Bytes, first_group: int) -> Bytes:
    """Group indices counted from the source's first group; others have `first_group` 0."""
    return (data.view("<i4") + np.int32(first_group)).view(np.uint8) if first_group else data
