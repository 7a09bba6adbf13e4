"""Reads the layout of a sharded directory from its manifest as `TensorSlice`s, and checks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import MANIFEST, load_manifest, manifest_digest
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError
from llmkit.shard.tensor_slice import TensorSlice, length_along


@dataclass(frozen=True)
class ShardedLayout:
    """The layout of a directory that `llmkit shard` wrote."""

    tp: int
    pp: int
    ep: int
    stages: tuple[tuple[int, ...], ...]  # the layers of each pipeline stage
    files: tuple[str, ...]  # of the ranks: by stage, then by tensor-parallel rank
    order: tuple[str, ...]  # the source's tensors, in the order of its files
    left_out: tuple[str, ...]  # the source's tensors that are not stored
    slices: tuple[TensorSlice, ...]
    carried_files: tuple[str, ...] = ()  # with the tensors that no rank loads: one or none

    @property
    def all_files(self) -> tuple[str, ...]:
        """Every weight file."""
        return self.files + self.carried_files

    @cached_property
    def slices_by_source(self) -> dict[str, list[TensorSlice]]:
        """The distinct slices of each source tensor, in the order of their intervals."""
        distinct: dict[str, dict[TensorSlice, TensorSlice]] = {}
        for piece in self.slices:
            distinct.setdefault(piece.name, {}).setdefault(piece, piece)
        return {
            name: sorted(slices.values(), key=lambda piece: piece.intervals)
            for name, slices in distinct.items()
        }

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The source's tensors, in its order. Their byte ranges in its files are not known."""
        first = {name: self.slices_by_source[name][0] for name in self.order}
        return {
            name: TensorInfo(name, piece.dtype, piece.source_shape) for name, piece in first.items()
        }

    def gaps(self) -> list[str]:
        """The errors of the layout: slices of a tensor that disagree, overlap or leave a gap."""
        problems = [_find_gap(name, slices) for name, slices in self.slices_by_source.items()]
        return [problem for problem in problems if problem is not None]


def is_vllm_layout(manifest: Mapping[str, Any]) -> bool:
    """Whether the files are in another program's format, so that only digests can be checked."""
    layout = manifest["layout"]
    return isinstance(layout, Mapping) and "format" in layout


def load_sharded_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a sharded directory. Raises InputError when it is missing or was changed."""
    manifest = load_manifest(path) if path.is_dir() else None
    if manifest is None or not manifest.get("layout"):
        raise InputError(
            f"{path} is not sharded", "A directory that `llmkit shard` wrote was expected"
        )
    if "sha256" not in manifest:
        version = manifest.get("tool", {}).get("version", "0.1.0")
        raise InputError(
            f"{path} was sharded by llmkit {version}, whose layouts had another form",
            "A layout whose llmkit.json has its own SHA-256",
            "Shard its source again, or merge it with that version:"
            f" llmkit shard merge {path} -o DIR",
        )
    recorded = manifest["sha256"]
    digest = manifest_digest(manifest)
    if recorded != digest:
        raise InputError(
            f"{path / MANIFEST} has SHA-256 {digest}, but its own sha256 field says {recorded}",
            "The manifest as `llmkit shard` wrote it",
            "Shard the source again",
        )
    return manifest


def read_layout(path: Path) -> ShardedLayout:
    """The layout of a sharded directory. Only the manifest is read; rank files are not opened.

    Raises InputError when there is no layout, when it is malformed, and when the files are in
    another program's format.
    """
    manifest = load_sharded_manifest(path)
    if is_vllm_layout(manifest):
        raise InputError(
            f"{path} holds the files of {manifest['layout']['format']} (--format)",
            "A directory that `llmkit shard` wrote for llmkit was expected",
            "Use the checkpoint that it was made from",
        )
    try:
        return _parse_layout(manifest["layout"], manifest["tensors"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path / MANIFEST}: layout is malformed ({type(error).__name__}: {error})",
            "The manifest as `llmkit shard` wrote it",
            "Shard the source again",
        ) from error


def _parse_layout(layout: Mapping[str, Any], tensors: Mapping[str, Any]) -> ShardedLayout:
    tp = int(layout["tp"])
    pp = int(layout["pp"])
    ep = int(layout["ep"])
    ranks = [(int(rank["pp"]), int(rank["tp"]), str(rank["file"])) for rank in layout["ranks"]]
    expected_ranks = [(stage, rank) for stage in range(pp) for rank in range(tp)]
    if [(stage, rank) for stage, rank, _ in ranks] != expected_ranks:
        raise ValueError(f"{len(ranks)} ranks for TP {tp} and PP {pp}")
    if ep < 1 or tp % ep:
        raise ValueError(f"EP {ep} for TP {tp}")
    files = tuple(file for _, _, file in ranks)
    carried_files = tuple(map(str, layout.get("carried_files", ())))
    if layout["tensors"].keys() != tensors.keys():
        raise ValueError("layout and manifest list different tensors")
    slices = []
    for key, entry in layout["tensors"].items():
        file, _, name = key.partition("::")
        if file not in files + carried_files or entry["source"] != name:
            raise ValueError(f"{key} belongs to no rank")
        slices.append(
            replace(
                _parse_slice(entry),
                file=file,
                target=name,
                replicas=tuple(files[index] for index in entry["replicas"]),
                sha256=tensors[key]["sha256"],
            )
        )
    order = tuple(map(str, layout["order"]))
    if sorted(order) != sorted({piece.name for piece in slices}):
        raise ValueError("order does not list the tensors of the ranks")
    stages = tuple(tuple(map(int, stage)) for stage in layout["stages"])
    left_out = tuple(map(str, layout["left_out"]))
    return ShardedLayout(tp, pp, ep, stages, files, order, left_out, tuple(slices), carried_files)


def _parse_slice(entry: Mapping[str, Any]) -> TensorSlice:
    shape = tuple(map(int, entry["source_shape"]))
    dim = int(entry["dim"])
    padding = int(entry["padding"])
    intervals = tuple((int(start), int(stop)) for start, stop in entry["intervals"])
    position = 0
    for start, stop in intervals:
        if not position <= start < stop <= length_along(shape, dim):
            raise ValueError(
                f"{entry['source']} has the interval [{start}, {stop})"
                f" of {length_along(shape, dim)}"
            )
        position = stop
    if padding < 0 or dim < 0:
        raise ValueError(f"{entry['source']} has padding {padding} along dimension {dim}")
    piece = TensorSlice(
        str(entry["source"]),
        str(entry["dtype"]),
        shape,
        dim,
        intervals,
        padding,
        may_overlap=bool(entry.get("may_overlap", False)),
    )
    derived = entry.get("derived", {"kind": ""})
    if derived["kind"] == "group_index":
        return replace(piece, derived="group_index", first_group=int(derived["first_group"]))
    if derived["kind"] == "shape":
        return replace(
            piece,
            derived="shape",
            dense_shape=tuple(map(int, derived["shape"])),
            source_dense_shape=tuple(map(int, derived["source_shape"])),
        )
    if derived["kind"]:
        raise ValueError(
            f"{entry['source']} is derived by {derived['kind']}, which this llmkit does not know"
        )
    return piece


def _find_gap(name: str, slices: list[TensorSlice]) -> str | None:
    """What is wrong with the slices of a tensor; None when they cover it exactly."""
    first = slices[0]
    if first.derived == "shape":
        return None
    if any(
        (piece.source_shape, piece.dtype, piece.dim) != (first.source_shape, first.dtype, first.dim)
        for piece in slices
    ):
        return f"{name}: its slices are of different tensors"
    position = 0
    length = length_along(first.source_shape, first.dim)
    # Several ranks can share the interval of a KV head and have other intervals that they do not
    # share.
    intervals = {interval for piece in slices for interval in piece.intervals}
    for start, stop in sorted(intervals):
        if first.may_overlap and position - 1 <= start < position:
            start = position  # the next slice begins inside the same block
        if start != position:
            problem = "overlap at" if start < position else "leave out"
            return f"{name}: its slices {problem} {start} of {length}"
        position = stop
    return None if position == length else f"{name}: its slices end at {position} of {length}"
