"""`llmkit shard verify`: checks that a sharded directory is as it was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import MANIFEST, Difference, find_differences
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count, read_header
from llmkit.checkpoint.tensor_reader import CHUNK_BYTES, read_range
from llmkit.common.errors import InputError
from llmkit.shard.sharded_layout import (
    ShardedLayout,
    is_vllm_layout,
    load_sharded_manifest,
    read_layout,
)
from llmkit.shard.tensor_slice import TensorSlice


@dataclass
class VerifyResult:
    """What was checked, and all problems. Without problems, every byte is as it was written."""

    tp: int
    pp: int
    ep: int
    files: int  # of ranks, and one with carried tensors if there are any
    tensors: int  # over all ranks
    bytes: int  # the size of these tensors
    replica_groups: int  # slices that several ranks store
    padding_bytes: int
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.differences

    @property
    def problems(self) -> list[str]:
        """A sentence for each problem."""
        return [difference.text for difference in self.differences]

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON document."""
        figures = {name: value for name, value in vars(self).items() if name != "differences"}
        return {"ok": self.ok, **figures, "problems": self.problems}


def verify(path: str | Path) -> VerifyResult:
    """Check a sharded directory.

    Each file and tensor is compared with the manifest, replicas are compared with each other,
    padding must be zero, and the slices must cover every tensor.
    Raises InputError when the directory is not sharded or its manifest is malformed; every other
    problem is in `problems`.
    """
    folder = Path(path).expanduser()
    manifest = load_sharded_manifest(folder)
    if is_vllm_layout(manifest):
        return _verify_foreign(folder, manifest)
    layout = read_layout(folder)
    differences = find_differences(folder)
    differences += [Difference(MANIFEST, text) for text in layout.gaps()]
    differences += [Difference(MANIFEST, text) for text in _check_replicas(layout)]
    differences += _check_tensors(folder, layout)
    return VerifyResult(
        tp=layout.tp,
        pp=layout.pp,
        ep=layout.ep,
        files=len(layout.all_files),
        tensors=len(layout.slices),
        bytes=sum(piece.nbytes for piece in layout.slices),
        replica_groups=sum(
            len(piece.replicas) > 1 and piece.replicas[0] == piece.file for piece in layout.slices
        ),
        padding_bytes=sum(piece.padding_bytes for piece in layout.slices),
        differences=differences,
    )


def _verify_foreign(folder: Path, manifest: dict[str, Any]) -> VerifyResult:
    """Check digests only: the manifest does not record which slices the tensors hold."""
    layout = manifest["layout"]
    sizes = [byte_count(entry["dtype"], entry["shape"]) for entry in manifest["tensors"].values()]
    return VerifyResult(
        tp=layout["tp"],
        pp=1,
        ep=1,
        files=len(layout["ranks"]),
        tensors=len(sizes),
        bytes=sum(sizes),
        replica_groups=0,
        padding_bytes=0,
        differences=find_differences(folder),
    )


def _check_replicas(layout: ShardedLayout) -> list[str]:
    """Replicas whose digests differ. `find_differences` compares the digests with the bytes."""
    by_file_and_name = {(piece.file, piece.name): piece for piece in layout.slices}
    problems = []
    for piece in layout.slices:
        for file in piece.replicas:
            replica = by_file_and_name.get((file, piece.name))
            if replica is None or piece.file not in replica.replicas:
                problems.append(f"{piece.key} and {file} do not both name each other as replicas")
            elif piece.file < file and piece.sha256 != replica.sha256:
                problems.append(f"{piece.key} differs from its replica in {file}")
    return problems


def _check_tensors(folder: Path, layout: ShardedLayout) -> list[Difference]:
    """Tensors whose dtype or shape differs from the layout, and padding that is not zero."""
    differences = []
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in layout.all_files:
        try:
            headers[file] = read_header(folder / file)
        except InputError:
            headers[file] = {}  # `find_differences` reports the error
    for piece in layout.slices:
        info = headers[piece.file].get(piece.name)
        if info is None:
            continue
        if (info.dtype, info.shape) != (piece.dtype, piece.shape):
            text = (
                f"{piece.key} is {info.dtype} {list(info.shape)}, "
                f"the layout says {piece.dtype} {list(piece.shape)}"
            )
            differences.append(Difference(piece.file, text))
        elif _has_nonzero_padding(folder, piece, info):
            text = f"{piece.key}: its {piece.padding} rows of padding are not all zero"
            differences.append(Difference(piece.file, text))
    return differences


def _has_nonzero_padding(folder: Path, piece: TensorSlice, info: TensorInfo) -> bool:
    for start in range(info.end - piece.padding_bytes, info.end, CHUNK_BYTES):
        data = read_range(folder / piece.file, start, min(CHUNK_BYTES, info.end - start))
        if bool(data.any()):
            return True
    return False
