"""Local copies of remote checkpoints, below XDG_CACHE_HOME or ~/.cache.

Commands work on the copies.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llmkit.checkpoint.hub import HUB_SCHEME, download_from_hub, is_hub_url
from llmkit.checkpoint.output_directory import output_lock
from llmkit.checkpoint.registry.open_store import open_store
from llmkit.checkpoint.registry.transfer import read_remote_manifest, receive
from llmkit.common.progress import Progress, SilentProgress

# The local copy of each URL. Within a process, the content of a URL is assumed not to change.
_copies: dict[str, Path] = {}


def local_copy(reference: str, progress: Progress | None = None) -> Path:
    """The local copy of the checkpoint at a URL, downloaded when there is none.

    Its folder is named by the SHA-256 of its manifest.
    Raises as `open_store` does; InputError when the URL holds no complete checkpoint.
    """
    if reference in _copies:
        return _copies[reference]
    if is_hub_url(reference):
        copy = download_from_hub(reference.removeprefix(HUB_SCHEME))
        return _copies.setdefault(reference, copy)
    with open_store(reference) as store:
        remote = read_remote_manifest(store)
        out = copies_folder() / hashlib.sha256(remote.text).hexdigest()
        with output_lock(out, wait=True):
            if not out.is_dir():
                receive(store, remote, out, progress or SilentProgress())
    return _copies.setdefault(reference, out)


def copies_folder() -> Path:
    """The folder of all local copies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llmkit" / "checkpoints"
