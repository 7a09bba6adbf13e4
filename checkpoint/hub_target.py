"""Checkpoints to the Hugging Face hub: one commit, so that every revision is a whole checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import OutputError
from llmkit.checkpoint.manifest import MANIFEST
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.remote import HUB, damaged


class HubTarget:
    """A model repository, made private where there is none. See `Target`."""

    def __init__(self, repository: str) -> None:
        self._repository = repository
        self._reference = HUB + repository

    def publish(
        self, folder: Path, files: Mapping[str, Mapping[str, Any]], manifest: bytes, force: bool, progress: Progress
    ) -> str:
        """See `Target.publish`. What has arrived is compared by the hub's SHA-256, or git's hash of small files."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        api.create_repo(self._repository, private=True, exist_ok=True)
        there = set(api.list_repo_files(self._repository))
        stale = set[str]()
        if MANIFEST in there:
            old = Path(api.hf_hub_download(self._repository, MANIFEST)).read_bytes()
            if old != manifest and not force:
                raise OutputError(f"{self._reference} holds another checkpoint", todo="Push elsewhere or pass --force")
            stale = there & set(json.loads(old)["files"]) - files.keys()
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in files]
        operations += [CommitOperationAdd(MANIFEST, manifest), *(CommitOperationDelete(name) for name in stale)]
        progress.start("send", len(files) + 1, "files")  # the hub's client has bars of its own for bytes
        done = api.create_commit(self._repository, operations, commit_message="Checkpoint from llmkit")
        found = {
            entry.path: entry
            for entry in api.get_paths_info(self._repository, [*files, MANIFEST], revision=done.oid)
            if isinstance(entry, RepoFile)
        }
        expected = {**files, MANIFEST: {"sha256": hashlib.sha256(manifest).hexdigest(), "bytes": len(manifest)}}
        for name, entry in expected.items():
            if (info := found.get(name)) is None or info.size != entry["bytes"]:
                raise damaged(self._reference, name)
            data = manifest if name == MANIFEST else None
            same = (
                info.lfs.sha256 == entry["sha256"]
                if info.lfs
                else info.blob_id == _git_hash(data if data is not None else (folder / name).read_bytes())
            )
            if not same:
                raise damaged(self._reference, name)
            progress.advance(1, name)
        return self._reference


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
