"""Opening a model: a directory, a hub id or a .gguf file, all seen through one `Checkpoint`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.files import (
    CONFIG,
    PICKLES,
    ModelFiles,
    generation_config,
    listing,
    load_json,
    locate,
    pickled,
    side_files,
)
from llmkit.checkpoint.formats import parse_quantization
from llmkit.checkpoint.manifest import check_files, is_plain_name, load_manifest, mismatch, tensor_key
from llmkit.checkpoint.quantized import QuantizationConfig
from llmkit.checkpoint.reading import (
    CHUNK_BYTES,
    ReadAhead,
    RowReader,
    SafetensorsRows,
    read_range,
    row_chunks,
    sha256_file,
    sha256_range,
    tensor_bytes,
)
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass
class Checkpoint(ModelFiles):
    """An opened model. Headers are read and checked; tensors are read when asked for, none is kept.

    `tensors` has HF names, also for GGUF, whose tensors are read as float32 (dequantized, q and k rows in HF order).
    It is empty for an output of `llmkit shard`; `layout` then says what lies where.
    """

    tensors: dict[str, TensorInfo]
    quantization: QuantizationConfig | None
    manifest: dict[str, Any] | None
    weight_files: tuple[str, ...]
    _rows: RowReader = field(repr=False)
    _verified: set[str] = field(default_factory=set, repr=False)
    _stamps: dict[str, tuple[int, int, int]] = field(default_factory=dict, repr=False)  # of the files, when opened
    _ahead: ReadAhead | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self._stamps:
            self._stamps = {name: _stamp(self.folder / name) for name in self._files}

    @property
    def _files(self) -> tuple[str, ...]:
        return self.weight_files if self.kind == "gguf" else (CONFIG, *self.weight_files)

    def require_unchanged(self) -> None:
        """Raises InputError, naming the file, when one of the files is not what it was when the model was opened."""
        for name, stamp in self._stamps.items():
            if _stamp(self.folder / name) != stamp:
                raise InputError(
                    f"{self.folder / name} was changed while it was read",
                    "A source that stays as it is was expected",
                    "Run the command again",
                )

    @property
    def layout(self) -> dict[str, Any] | None:
        """How the tensors are split, when this is an output of `llmkit shard`."""
        return (self.manifest or {}).get("layout")

    @property
    def folder(self) -> Path:
        """The directory that holds the weight files."""
        return self.path if self.kind == "safetensors" else self.path.parent

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in memory of its own. KeyError when there is none of that name.

        Raises InputError when the file is cut short or the bytes differ from the manifest.
        """
        info = self.tensors[name]
        found = self._ahead.take(name) if self._ahead is not None else None
        return self.read_info(info) if found is None else found

    def read_info(self, info: TensorInfo) -> torch.Tensor:
        """As `read`, for a tensor found through a file's own header (sharded layouts)."""
        count = info.shape[0] if info.shape else 1
        found = self._read_rows(info if info.shape else _as_vector(info), 0, count).reshape(info.shape)
        if self.kind == "safetensors":
            self._verify(info, found)
        return found

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[ReadAhead]:
        """Within, `read` of these tensors is faster in this order: threads read and check those that come next.

        Other tensors, and these in another order, are read as ever. Raises what `read` does, from `read`.
        """
        assert self._ahead is None, "already reading ahead"
        self._ahead = ReadAhead(self.read_info, [self.tensors[name] for name in names])
        try:
            yield self._ahead
        finally:
            self._ahead.close()
            self._ahead = None

    def read_slice(self, name: str, intervals: Sequence[tuple[int, int]], dim: int) -> torch.Tensor:
        """The slices [start, stop) along `dim`, concatenated along `dim`; in memory of its own.

        Along dimension 0 only the rows asked for are read; along others whole rows in chunks, so that no more
        than the result and one chunk is in memory. Raises as `read` does.
        """
        info = self.tensors[name]
        self._verify(info)
        for start, stop in intervals:
            assert 0 <= start <= stop <= info.shape[dim], f"{name}: [{start}, {stop}) of {info.shape[dim]}"
        if dim == 0:
            parts = [self._read_rows(info, start, stop) for start, stop in intervals]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        shape = list(info.shape)
        shape[dim] = sum(stop - start for start, stop in intervals)
        result = torch.empty(shape, dtype=info.torch_dtype)
        for row, end in row_chunks(info, CHUNK_BYTES):
            chunk = self._read_rows(info, row, end)
            pieces = [chunk.narrow(dim, start, stop - start) for start, stop in intervals]
            torch.cat(pieces, dim, out=result[row:end])
        return result

    def read_bytes(self, info: TensorInfo, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a tensor, counted from its first. Not checked against the manifest.

        For safetensors they are those of the file; for GGUF, of what `read` gives. Raises InputError when the file
        is cut short.
        """
        assert 0 <= start <= stop <= info.nbytes
        if self.kind == "safetensors":
            return read_range(self.folder / info.file, info.start + start, stop - start).numpy().tobytes()
        row_bytes = max(1, info.nbytes // max(1, info.shape[0]))
        first = start // row_bytes
        data = tensor_bytes(self._read_rows(info, first, -(-stop // row_bytes)))
        return data[start - first * row_bytes : stop - first * row_bytes].tobytes()

    def require_whole(self) -> None:
        """Raises InputError for an output of `llmkit shard`, telling how to merge it."""
        if self.layout is not None:
            tp, pp = self.layout["tp"], self.layout["pp"]
            raise InputError(
                f"{self.reference} is sharded already (TP {tp}, PP {pp}): it is split over {tp * pp} ranks",
                "A whole checkpoint was expected",
                f"Merge it first: llmkit shard merge {self.reference} -o DIR",
            )

    def imported(self, dtype: str) -> Checkpoint:
        """A GGUF model as the checkpoint that importing it would give: its tensors rounded to `dtype` when read."""
        assert self.kind == "gguf"
        return replace(self, tensors={name: replace(info, dtype=dtype) for name, info in self.tensors.items()})

    def untied(self) -> Checkpoint:
        """The same model with an output projection of its own, which holds what the embedding does."""
        head = {"lm_head.weight": self.tensors["model.embed_tokens.weight"]}
        return replace(self, config=self.config | {"tie_word_embeddings": False}, tensors=self.tensors | head)

    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return self._rows.rows(info, start, stop).to(info.torch_dtype)

    @cached_property
    def _source_hashes(self) -> dict[str, str]:
        return {name: sha256_file(self.folder / name) for name in self._files}

    def source_hashes(self) -> dict[str, str]:
        """SHA-256 of each weight file and of config.json; reads them all on the first call."""
        return dict(self._source_hashes)

    def set_source_hashes(self, hashes: Mapping[str, str]) -> None:
        """Tell `source_hashes`, worked out while the files were read for something else."""
        self._source_hashes = dict(hashes)

    @property
    def stamps(self) -> dict[str, tuple[int, int, int]]:
        """What changes when one of the files does: its size, time and inode, as they were when it was opened."""
        return dict(self._stamps)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weight files on disk."""
        return sum((self.folder / name).stat().st_size for name in self.weight_files)

    def _verify(self, info: TensorInfo, whole: torch.Tensor | None = None) -> None:
        """Compare the stored bytes with the manifest, once per tensor. `whole`: the tensor, when it is read already."""
        if self.manifest is None:
            return
        key = tensor_key(info.name, info.file, self.layout is not None)
        if key in self._verified:
            return
        entry = self.manifest["tensors"].get(key)
        if entry is None:
            raise mismatch(f"{self.folder / info.file}: tensor {info.name} is not in llmkit.json")
        if whole is not None:
            digest = hashlib.sha256(tensor_bytes(whole)).hexdigest()
        else:
            digest = sha256_range(self.folder / info.file, info.start, info.end - info.start)
        if digest != entry["sha256"]:
            place = f"{self.folder / info.file}: tensor {info.name}"
            raise mismatch(f"{place} has SHA-256 {digest}, llmkit.json says {entry['sha256']}")
        self._verified.add(key)


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open a model directory, a hub id (organization/name) or a .gguf file, and check all its headers.

    Raises InputError when there is nothing there, when files are missing, malformed, cut short or changed since
    llmkit wrote them, and when the weights are pickled.
    """
    path, text = locate(reference), str(reference)
    if path.is_dir():
        return _open_directory(text, path)
    from llmkit.checkpoint.gguf import open_gguf  # the gguf package is needed by few

    model = open_gguf(path)
    return Checkpoint(
        text, path, "gguf", model.config, model.generation_config, model.side_files, model.tensors, None, None,
        (path.name,), model,
    )  # fmt: skip


def _open_directory(reference: str, path: Path) -> Checkpoint:
    config = load_json(path / CONFIG)
    manifest = load_manifest(path)
    if manifest is not None:
        check_files(path, manifest)
    if manifest is not None and manifest.get("layout") is not None:
        files = tuple(sorted(name for name in manifest["files"] if name.endswith(".safetensors")))
        tensors: dict[str, TensorInfo] = {}
    else:
        files, tensors = _find_tensors(path)
    return Checkpoint(
        reference, path, "safetensors", config, generation_config(path), lambda: side_files(path), tensors,
        _quantization(path, config), manifest, files, SafetensorsRows(path),
    )  # fmt: skip


def _quantization(path: Path, config: Mapping[str, Any]) -> QuantizationConfig | None:
    entry = config.get("quantization_config")
    legacy = path / "quantize_config.json"
    if entry is None and legacy.is_file():  # AutoGPTQ once wrote only this file
        entry = {"quant_method": "gptq", **load_json(legacy)}
    if entry is None:
        return None
    return parse_quantization(entry)


def _find_tensors(path: Path) -> tuple[tuple[str, ...], dict[str, TensorInfo]]:
    """The weight files of a directory and all tensors in them."""
    located: dict[str, str] = {}
    if (path / SINGLE).is_file():  # transformers, too, prefers it to an index
        files = [SINGLE]
    elif (path / INDEX).is_file():
        located = _weight_map(path)
        files = sorted(set(located.values()))
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise pickled(pickles[0])
        raise InputError(f"{path} has no weights; it holds {listing(path)}", "Files named *.safetensors were expected")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(path / file).items():
            if name in tensors:
                raise InputError(
                    f"{path}: tensor {name} is in both {tensors[name].file} and {file}", "Each tensor was expected once"
                )
            tensors[name] = info
    wrong = [name for name, file in located.items() if name not in tensors or tensors[name].file != file]
    if wrong:
        raise InputError(
            f"{path / INDEX} places {len(wrong)} tensors in files that lack them ({', '.join(wrong[:5])})",
            "An index that agrees with its files was expected",
        )
    return tuple(files), tensors


def _weight_map(path: Path) -> dict[str, str]:
    index = load_json(path / INDEX)
    located = index.get("weight_map")
    if not isinstance(located, dict) or not located:
        raise InputError(f"{path / INDEX} has no weight_map", "An object of tensor names and files was expected")
    for name, file in located.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise InputError(
                f"{path / INDEX} places {name} in {str(file)!r}", "A .safetensors file of the same folder was expected"
            )
    absent = sorted(file for file in set(located.values()) if not (path / file).is_file())
    if absent:
        raise InputError(
            f"{path} lacks {len(absent)} of the files that {INDEX} names ({', '.join(absent[:5])})",
            todo="Download them again",
        )
    return located


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file does: size, time, inode; zeros for one that is not there."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ino


def _as_vector(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.name, info.dtype, (1,), info.file, info.start, info.end)
