"""Changed files of a sharded directory whose manifest agrees with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmkit.checkpoint.manifest import manifest_digest
from llmkit.checkpoint.safetensors_header import read_header


def edit_manifest(ranks: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the manifest of the directory `ranks`, and write its new digest."""
    manifest = json.loads((ranks / "llmkit.json").read_text())
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    (ranks / "llmkit.json").write_text(json.dumps(manifest))


def overwrite(ranks: Path, file: str, name: str, position: int, new: bytes) -> None:
    """Change bytes of a tensor and the digests. A negative `position` counts from its end."""
    info = read_header(ranks / file)[name]
    start = info.start + position % (info.end - info.start)
    data = bytearray((ranks / file).read_bytes())
    data[start : start + len(new)] = new
    (ranks / file).write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"][f"{file}::{name}"]["sha256"] = sha256(
            data[info.start : info.end]
        ).hexdigest()
        manifest["files"][file]["sha256"] = sha256(data).hexdigest()

    edit_manifest(ranks, change)
