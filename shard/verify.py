"""`llmkit shard verify`: whether a sharded directory is still what was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.reading import CHUNK_BYTES, read_range
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count, read_header
from llmkit.checkpoint.writer import verify_manifest
from llmkit.shard.layout import Layout, StoredSlice, is_foreign, read_layout, sharded_manifest


@dataclass
class VerifyResult:
    """What was checked and everything that is wrong; no problems means every byte is as written."""

    tp: int
    pp: int
    ep: int
    files: int  # rank files
    tensors: int  # over all ranks
    bytes: int  # of those tensors
    replica_groups: int  # slices that several ranks store
    padding_bytes: int
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON-ready document."""
        return {"ok": self.ok, **vars(self)}


def verify(path: str | Path) -> VerifyResult:
    """Check a sharded directory: each file and tensor against the manifest, replicas equal, padding zero, no gaps.

    Raises InputError when the directory is not sharded or its manifest is malformed; everything else that is
    wrong is told in `problems`.
    """
    folder = Path(path).expanduser()
    manifest = sharded_manifest(folder)
    if is_foreign(manifest):
        return _verify_foreign(folder, manifest)
    layout = read_layout(folder)
    pieces = [stored.slice for stored in layout.slices]
    return VerifyResult(
        tp=layout.tp,
        pp=layout.pp,
        ep=layout.ep,
        files=len(layout.files),
        tensors=len(pieces),
        bytes=sum(piece.nbytes for piece in pieces),
        replica_groups=sum(stored.replicas[0] == stored.file and len(stored.replicas) > 1 for stored in layout.slices),
        padding_bytes=sum(piece.padding_bytes for piece in pieces),
        problems=verify_manifest(folder) + layout.gaps() + _replicas(layout) + _stored(folder, layout),
    )


def _verify_foreign(folder: Path, manifest: dict[str, Any]) -> VerifyResult:
    """By digests alone: which parts of the source the tensors are is not recorded."""
    layout = manifest["layout"]
    sizes = [byte_count(entry["dtype"], entry["shape"]) for entry in manifest["tensors"].values()]
    return VerifyResult(
        layout["tp"], 1, 1, len(layout["ranks"]), len(sizes), sum(sizes), 0, 0, verify_manifest(folder)
    )  # fmt: skip


def _replicas(layout: Layout) -> list[str]:
    """Replicas that are not identical. That the digests are those of the bytes is `verify_manifest`'s to check."""
    by_place = {(stored.file, stored.slice.name): stored for stored in layout.slices}
    problems = []
    for stored in layout.slices:
        for file in stored.replicas:
            other = by_place.get((file, stored.slice.name))
            if other is None or stored.file not in other.replicas:
                problems.append(f"{stored.key} and {file} do not agree on being replicas")
            elif stored.file < file and stored.sha256 != other.sha256:
                problems.append(f"{stored.key} differs from its replica in {file}")
    return problems


def _stored(folder: Path, layout: Layout) -> list[str]:
    """Tensors that are not of the layout's dtype and shape, and padding that is not zero."""
    problems = []
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in layout.files:
        try:
            headers[file] = read_header(folder / file)
        except InputError:
            headers[file] = {}  # `verify_manifest` has told
    for stored in layout.slices:
        info = headers[stored.file].get(stored.slice.name)
        if info is None:
            continue
        if (info.dtype, info.shape) != (stored.slice.dtype, stored.slice.shape):
            problems.append(
                f"{stored.key} is {info.dtype} {list(info.shape)}, "
                f"the layout says {stored.slice.dtype} {list(stored.slice.shape)}"
            )
        elif _nonzero_padding(folder, stored, info):
            problems.append(f"{stored.key}: its {stored.slice.padding} rows of padding are not all zero")
    return problems


def _nonzero_padding(folder: Path, stored: StoredSlice, info: TensorInfo) -> bool:
    start = info.end - stored.slice.padding_bytes
    return any(
        bool(read_range(folder / stored.file, position, min(CHUNK_BYTES, info.end - position)).any())
        for position in range(start, info.end, CHUNK_BYTES)
    )
