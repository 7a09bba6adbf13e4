"""`Checkpoint`: an opened model whose tensors are read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.manifest import manifest_mismatch, tensor_key
from llmkit.checkpoint.model_files import CONFIG, ModelFiles
from llmkit.checkpoint.quantized_weight import QuantizationConfig
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.tensor_reader import (
    CHUNK_BYTES,
    ReadAhead,
    RowReader,
    read_range,
    row_chunks,
    sha256_file,
    sha256_range,
    tensor_bytes,
)
from llmkit.common.errors import InputError

# Size, modification time and inode of a file: they change when the file does.
FileStamp = tuple[int, int, int]


@dataclass
class Checkpoint(ModelFiles):
    """An opened model. Its headers are checked; a tensor is read on request and not kept.

    `tensors` has Hugging Face names, for GGUF too. GGUF tensors are read as float32: dequantized,
    with the rows of q and k in Hugging Face order. Only experts in MXFP4 stay as they are.
    `tensors` is empty for an output of `llmkit shard`, whose `layout` says which file holds what.
    """

    tensors: dict[str, TensorInfo]
    quantization: QuantizationConfig | None
    manifest: dict[str, Any] | None  # llmkit.json; None when another program wrote the checkpoint
    weight_files: tuple[str, ...]
    row_reader: RowReader = field(repr=False)
    # The stamps of config.json and the weight files at the time the model was opened.
    stamps: dict[str, FileStamp] = field(default_factory=dict, repr=False)
    # Manifest keys of the tensors whose bytes were already compared with the manifest.
    _verified: set[str] = field(default_factory=set, repr=False)
    _read_ahead: ReadAhead | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.stamps:
            self.stamps = {name: _file_stamp(self.folder / name) for name in self._files}

    @property
    def _files(self) -> tuple[str, ...]:
        if self.file_format == "gguf":
            return self.weight_files
        return (CONFIG, *self.weight_files)

    def require_unchanged(self) -> None:
        """Raises InputError, naming the file, when a file changed since the model was opened."""
        for name, stamp in self.stamps.items():
            if _file_stamp(self.folder / name) != stamp:
                raise InputError(
                    f"{self.folder / name} was changed while it was read",
                    "A source that stays as it is was expected",
                    "Run the command again",
                )

    @property
    def layout(self) -> dict[str, Any] | None:
        """The manifest's `layout`: how an output of `llmkit shard` is split. None for others."""
        return (self.manifest or {}).get("layout")

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name; of a sharded checkpoint, those of its source."""
        if self.layout is None:
            return {name: info.shape for name, info in self.tensors.items()}
        shapes = {}
        for entry in self.layout.get("tensors", {}).values():
            shapes[str(entry["source"])] = tuple(entry["source_shape"])
        return shapes

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of `tensor_shapes`."""
        return tuple(self.tensor_shapes)

    @property
    def folder(self) -> Path:
        """The directory that holds the weight files."""
        return self.path if self.file_format == "safetensors" else self.path.parent

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in its own memory. KeyError when there is no such tensor.

        Raises InputError when the file is cut short or the bytes differ from the manifest.
        """
        info = self.tensors[name]
        if self._read_ahead is not None:
            tensor = self._read_ahead.take(name)
            if tensor is not None:
                return tensor
        return self.read_info(info)

    def read_info(self, info: TensorInfo) -> torch.Tensor:
        """Like `read`, but the caller gives the tensor's header entry (used for rank files)."""
        row_count = info.shape[0] if info.shape else 1
        # A reader needs at least one dimension.
        rows_info = info if info.shape else replace(info, shape=(1,))
        tensor = self._read_rows(rows_info, 0, row_count).reshape(info.shape)
        if self.file_format == "safetensors":
            self._verify(info, tensor)
        return tensor

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[ReadAhead]:
        """Within the block, threads read the tensors `names` before `read` is called for them.

        It helps when `read` is called in about this order; any other call works as before.
        `read` raises the errors of these threads.
        """
        assert self._read_ahead is None, "already reading ahead"
        self._read_ahead = ReadAhead(self.read_info, [self.tensors[name] for name in names])
        try:
            yield self._read_ahead
        finally:
            self._read_ahead.close()
            self._read_ahead = None

    def read_slice(self, name: str, intervals: Sequence[tuple[int, int]], dim: int) -> torch.Tensor:
        """The intervals [start, stop) along `dim`, concatenated along `dim`, in their own memory.

        Along dimension 0 only the rows of the intervals are read. Along others whole rows are read
        in chunks, so that memory holds the result and one chunk at most. Raises as `read` does.
        """
        info = self.tensors[name]
        self._verify(info)
        if not info.shape:  # a number is read as one row
            info = replace(info, shape=(1,))
        for start, stop in intervals:
            assert 0 <= start <= stop <= info.shape[dim], (
                f"{name}: [{start}, {stop}) of {info.shape[dim]}"
            )
        if dim == 0:
            parts = [self._read_rows(info, start, stop) for start, stop in intervals]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        shape = list(info.shape)
        shape[dim] = sum(stop - start for start, stop in intervals)
        result = torch.empty(shape, dtype=info.torch_dtype)
        for first_row, end_row in row_chunks(info, CHUNK_BYTES):
            chunk = self._read_rows(info, first_row, end_row)
            parts = [chunk.narrow(dim, start, stop - start) for start, stop in intervals]
            torch.cat(parts, dim, out=result[first_row:end_row])
        return result

    def read_bytes(self, info: TensorInfo, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a tensor; byte 0 is its first. The manifest is not checked.

        For safetensors these are the bytes of the file; for GGUF, those of the dequantized tensor.
        Raises InputError when the file is cut short.
        """
        assert 0 <= start <= stop <= info.nbytes
        if self.file_format == "safetensors":
            data = read_range(self.folder / info.file, info.start + start, stop - start)
            return data.numpy().tobytes()
        if not info.shape:  # a number is read as one row
            info = replace(info, shape=(1,))
        row_bytes = max(1, info.nbytes // max(1, info.shape[0]))
        first_row = start // row_bytes
        rows = tensor_bytes(self._read_rows(info, first_row, -(-stop // row_bytes)))
        return rows[start - first_row * row_bytes : stop - first_row * row_bytes].tobytes()

    def require_unsharded(self) -> None:
        """Raises InputError for an output of `llmkit shard`; the message says how to merge it."""
        if self.layout is not None:
            tp = self.layout["tp"]
            pp = self.layout["pp"]
            raise InputError(
                f"{self.reference} is sharded already (TP {tp}, PP {pp}):"
                f" it is split over {tp * pp} ranks",
                "A whole checkpoint was expected",
                f"Merge it first: llmkit shard merge {self.reference} -o DIR",
            )

    def with_dtype(self, dtype: str) -> Checkpoint:
        """A GGUF model whose tensors are rounded to `dtype` when they are read.

        It equals the checkpoint that `llmkit quantize` would write for it in this dtype.
        """
        assert self.file_format == "gguf"
        tensors = {
            name: info if info.dtype == "U8" else replace(info, dtype=dtype)  # U8: MXFP4 experts
            for name, info in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def with_untied_embeddings(self, embedding: str, lm_head: str) -> Checkpoint:
        """The same model with a separate tensor `lm_head` that equals the tensor `embedding`."""
        config = self.config | {"tie_word_embeddings": False}
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
        tensors = self.tensors | {lm_head: self.tensors[embedding]}
        return replace(self, config=config, tensors=tensors)

    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return self.row_reader.rows(info, start, stop).to(info.torch_dtype)

    @cached_property
    def _source_hashes(self) -> dict[str, str]:
        return {name: sha256_file(self.folder / name) for name in self._files}

    def source_hashes(self) -> dict[str, str]:
        """The SHA-256 of each weight file and of config.json. The first call reads all of them."""
        return dict(self._source_hashes)

    def set_source_hashes(self, hashes: Mapping[str, str]) -> None:
        """Set the result of `source_hashes`, when the files were hashed while they were copied."""
        self._source_hashes = dict(hashes)

    @cached_property
    def weight_bytes(self) -> int:
        """The size of all weight files on disk."""
        return sum((self.folder / name).stat().st_size for name in self.weight_files)

    def _verify(self, info: TensorInfo, tensor: torch.Tensor | None = None) -> None:
        """Compare the stored bytes with the manifest, once per tensor.

        tensor: the whole tensor, when it has been read.
        """
        if self.manifest is None:
            return
        key = tensor_key(info.name, info.file, self.layout is not None)
        if key in self._verified:
            return
        path = self.folder / info.file
        entry = self.manifest["tensors"].get(key)
        if entry is None:
            raise manifest_mismatch(f"{path}: tensor {info.name} is not in llmkit.json")
        if tensor is not None:
            digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        else:
            digest = sha256_range(path, info.start, info.end - info.start)
        if digest != entry["sha256"]:
            raise manifest_mismatch(
                f"{path}: tensor {info.name} has SHA-256 {digest},"
                f" llmkit.json says {entry['sha256']}"
            )
        self._verified.add(key)


def _file_stamp(path: Path) -> FileStamp:
    """The stamp of a file; zeros when it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ino
