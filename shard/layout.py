"""A sharded directory as it is on disk: its manifest's `layout`, checked and turned back into slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.manifest import MANIFEST, load_manifest, manifest_digest, tensor_key
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.shard.slices import Slice


@dataclass(frozen=True)
class StoredSlice:
    """A slice and where it lies."""

    file: str
    slice: Slice
    replicas: tuple[str, ...]  # the files that store the very same slice, `file` among them
    sha256: str

    @property
    def key(self) -> str:
        """Its key in the manifest."""
        return tensor_key(self.slice.name, self.file, sharded=True)


@dataclass(frozen=True)
class Layout:
    """The layout of a directory that `llmkit shard` wrote."""

    tp: int
    pp: int
    ep: int
    stages: tuple[tuple[int, ...], ...]
    files: tuple[str, ...]  # by stage, then by tensor-parallel rank
    order: tuple[str, ...]  # the source's tensors, as they lay in its files
    left_out: tuple[str, ...]  # what the source had besides
    slices: tuple[StoredSlice, ...]

    @cached_property
    def by_source(self) -> dict[str, list[StoredSlice]]:
        """The slices of each source tensor, one of each group of replicas, by their place in it."""
        found: dict[str, dict[Slice, StoredSlice]] = {}
        for stored in self.slices:
            found.setdefault(stored.slice.name, {}).setdefault(stored.slice, stored)
        return {name: sorted(kept.values(), key=lambda stored: stored.slice.intervals) for name, kept in found.items()}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The source's tensors in its order; where they lay is not known any more."""
        first = {name: self.by_source[name][0].slice for name in self.order}
        return {name: TensorInfo(name, s.dtype, s.source_shape, "", 0, 0) for name, s in first.items()}

    def gaps(self) -> list[str]:
        """What is wrong with the layout itself: slices of a tensor that disagree, overlap or leave parts out."""
        return [problem for name, slices in self.by_source.items() if (problem := _gap(name, slices))]


def is_foreign(manifest: Mapping[str, Any]) -> bool:
    """Whether the ranks' files are another program's, so that only their digests can be checked."""
    layout = manifest["layout"]
    return isinstance(layout, Mapping) and "format" in layout


def sharded_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a sharded directory. Raises InputError when it has none or its digest is wrong."""
    manifest = load_manifest(path) if path.is_dir() else None
    if manifest is None or not manifest.get("layout"):
        raise InputError(f"{path} is not sharded", "A directory that `llmkit shard` wrote was expected")
    if "sha256" not in manifest:
        maker = manifest.get("tool", {}).get("version", "0.1.0")
        raise InputError(
            f"{path} was sharded by llmkit {maker}, whose layouts had another form",
            "A layout whose llmkit.json has a SHA-256 of its own",
            f"Shard its source again, or merge it with that version: llmkit shard merge {path} -o DIR",
        )
    if (said := manifest["sha256"]) != (found := manifest_digest(manifest)):
        raise InputError(
            f"{path / MANIFEST} has SHA-256 {found}, itself it says {said}",
            "The manifest as `llmkit shard` wrote it",
            "Shard the source again",
        )
    return manifest


def read_layout(path: Path) -> Layout:
    """The layout of a sharded directory, from its manifest alone: rank files are not opened.

    Raises InputError when the directory has none, when it is malformed and when the files are another program's.
    """
    manifest = sharded_manifest(path)
    if is_foreign(manifest):
        raise InputError(
            f"{path} holds the files of {manifest['layout']['format']} (--format)",
            "A directory that `llmkit shard` wrote for llmkit was expected",
            "Use the checkpoint that it was made from",
        )
    try:
        return _parse(manifest["layout"], manifest["tensors"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path / MANIFEST}: layout is malformed ({type(error).__name__}: {error})",
            "The manifest as `llmkit shard` wrote it",
            "Shard the source again",
        ) from error


def _parse(layout: Mapping[str, Any], tensors: Mapping[str, Any]) -> Layout:
    tp, pp, ep = int(layout["tp"]), int(layout["pp"]), int(layout["ep"])
    ranks = [(int(rank["pp"]), int(rank["tp"]), str(rank["file"])) for rank in layout["ranks"]]
    if [(stage, rank) for stage, rank, _ in ranks] != [(stage, rank) for stage in range(pp) for rank in range(tp)]:
        raise ValueError(f"{len(ranks)} ranks for TP {tp} and PP {pp}")
    if ep < 1 or tp % ep:
        raise ValueError(f"EP {ep} for TP {tp}")
    files = tuple(file for _, _, file in ranks)
    if layout["tensors"].keys() != tensors.keys():
        raise ValueError("layout and manifest list different tensors")
    slices = []
    for key, entry in layout["tensors"].items():
        file, _, name = key.partition("::")
        if file not in files or entry["source"] != name:
            raise ValueError(f"{key} belongs to no rank")
        replicas = tuple(files[index] for index in entry["replicas"])
        slices.append(StoredSlice(file, _slice(entry), replicas, tensors[key]["sha256"]))
    order = tuple(map(str, layout["order"]))
    if sorted(order) != sorted({stored.slice.name for stored in slices}):
        raise ValueError("order does not list the tensors of the ranks")
    stages = tuple(tuple(map(int, stage)) for stage in layout["stages"])
    return Layout(tp, pp, ep, stages, files, order, tuple(map(str, layout["left_out"])), tuple(slices))


def _slice(entry: Mapping[str, Any]) -> Slice:
    derived = entry.get("derived", {"kind": ""})
    shape = tuple(map(int, entry["source_shape"]))
    dim, padding = int(entry["dim"]), int(entry["padding"])
    intervals = tuple((int(start), int(stop)) for start, stop in entry["intervals"])
    position = 0
    for start, stop in intervals:
        if not position <= start < stop <= shape[dim]:
            raise ValueError(f"{entry['source']} has the interval [{start}, {stop}) of {shape[dim]}")
        position = stop
    if padding < 0 or dim < 0:
        raise ValueError(f"{entry['source']} has padding {padding} along dimension {dim}")
    place = (str(entry["source"]), str(entry["dtype"]), shape, dim, intervals, padding)
    if derived["kind"] == "group_index":
        return Slice(*place, derived="group_index", first_group=int(derived["first_group"]))
    if derived["kind"] == "shape":
        local, source = tuple(map(int, derived["shape"])), tuple(map(int, derived["source_shape"]))
        return Slice(*place, derived="shape", dense_shape=local, source_dense_shape=source)
    if derived["kind"]:
        raise ValueError(f"{entry['source']} is derived by {derived['kind']}, which this llmkit does not know")
    return Slice(*place)


def _gap(name: str, slices: list[StoredSlice]) -> str | None:
    first = slices[0].slice
    if first.derived == "shape":
        return None
    if any(
        (s.slice.source_shape, s.slice.dtype, s.slice.dim) != (first.source_shape, first.dtype, first.dim)
        for s in slices
    ):
        return f"{name}: its slices are of different tensors"
    position, length = 0, first.source_shape[first.dim]
    # KV heads that several ranks share are an interval of each, in a fused tensor next to intervals of its own.
    for start, stop in sorted({interval for stored in slices for interval in stored.slice.intervals}):
        if start != position:
            return f"{name}: its slices {'overlap at' if start < position else 'leave out'} {start} of {length}"
        position = stop
    return None if position == length else f"{name}: its slices end at {position} of {length}"
