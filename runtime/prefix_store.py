"""The files of the prefix cache on disk: pages of the KV cache that outlive the engine.

A page holds the keys and values of PAGE_TOKENS prompt tokens in all layers, or the states of all
recurrent layers at the end of such a page. Its file name is a hash of the model and of the page's
last block hash, which covers all tokens up to there and the client's salt. Only clients who may
share the prefix can compute it. A file is a SHA-256 of its name and its bytes, followed by the
bytes; a file that does not match is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tensor_reader import tensor_bytes
from llmkit.common.version import version
from llmkit.kernels.cpu import cpu_kernels
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.prefix_folder import PAGE_SUFFIX, PARTIAL_SUFFIX, files_in

PAGE_TOKENS = 256
_STALE_PARTIAL_S = 3600.0  # an unfinished file of this age belongs to a process that has ended
_DIGEST_BYTES = 32
_SAMPLE_BYTES = 4096  # of every tensor, to tell models apart


class PrefixStore:
    """Pages in a folder that only its owner can read, up to a maximum size.

    The most recently used pages are kept. `read` and `write` run in other threads than the
    engine's. Several processes may use one folder.
    """

    def __init__(self, folder: Path, limit_bytes: int, identity: bytes) -> None:
        """identity: what a page's bytes depend on besides tokens and salt; see `model_identity`."""
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.num_damaged = 0  # files that did not match their digest and were removed
        self._identity = identity
        self._known_keys: set[str] = set()
        self._remove_old_files()

    def key(self, block_hash: bytes, kind: str = "") -> str:
        """The key of the page that ends with this block. kind: of another page that ends there."""
        return hashlib.sha256(self._identity + block_hash + kind.encode()).hexdigest()

    def has(self, key: str) -> bool:
        """Whether the page was there when the folder was last listed."""
        return key in self._known_keys

    def read(self, key: str, num_bytes: int, used_ns: int) -> torch.Tensor | None:
        """The bytes of a page, uint8 [num_bytes]; None when it is missing or damaged.

        A damaged page is removed. used_ns: the time of last use to record.
        """
        data = torch.empty(_DIGEST_BYTES + num_bytes, dtype=torch.uint8)
        view = tensor_bytes(data)
        path = self._path(key)
        with suppress(OSError):
            with path.open("rb", buffering=0) as file:
                has_right_size = os.fstat(file.fileno()).st_size == len(view)
                is_complete = has_right_size and _read_into(file.fileno(), view)
            if is_complete and _digest(key, view[_DIGEST_BYTES:]) == view[:_DIGEST_BYTES]:
                os.utime(path, ns=(used_ns, used_ns))
                return data[_DIGEST_BYTES:]
            self.num_damaged += 1
            path.unlink()
        self._known_keys.discard(key)
        return None

    def write(self, key: str, page: torch.Tensor, used_ns: int) -> None:
        """Store a page, uint8 [n], and remove the least recently used ones over the limit.

        Errors, such as a full disk, are ignored: then the page is not stored.
        """
        view = tensor_bytes(page)
        with suppress(OSError):
            file = tempfile.NamedTemporaryFile(  # noqa: SIM115
                dir=self.folder, suffix=PARTIAL_SUFFIX, delete=False
            )
            try:
                with file:
                    file.write(_digest(key, view))
                    file.write(view)
                os.utime(file.name, ns=(used_ns, used_ns))
                Path(file.name).replace(self._path(key))
            except OSError:
                Path(file.name).unlink()
                raise
            self._known_keys.add(key)
        self._remove_old_files()

    def _remove_old_files(self) -> None:
        """List the folder and remove files over the limit; the files of other models count too."""
        for used_ns, _, path in files_in(self.folder, PARTIAL_SUFFIX):
            if time.time() - used_ns / 1e9 > _STALE_PARTIAL_S:
                with suppress(OSError):
                    path.unlink()
        files = files_in(self.folder, PAGE_SUFFIX)
        total_bytes = sum(size for _, size, _ in files)
        while files and total_bytes > self.limit_bytes:
            _, size, path = files.pop(0)
            with suppress(OSError):
                path.unlink()
            total_bytes -= size
        self._known_keys = {path.stem for _, _, path in files}

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{PAGE_SUFFIX}"


def model_identity(checkpoints: Sequence[Checkpoint], config: EngineConfig) -> bytes:
    """A hash of the models and of how keys and values are computed and stored.

    It covers a model's config, its tensors' headers and the first bytes of each tensor. Hashing
    everything would take longer than the cache saves, and any training or quantization changes the
    first 4 KiB of at least one tensor.
    """
    digest = hashlib.sha256()
    layout = (
        version(),
        PAGE_TOKENS,
        config.block_size,
        str(config.dtype),
        config.dtype_name,
        config.kv_cache_dtype,
        config.device.type,
        cpu_kernels.library is not None,  # the order of a block's elements
    )
    digest.update(repr(layout).encode())
    for checkpoint in checkpoints:
        digest.update(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
        for name, info in sorted(checkpoint.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            digest.update(checkpoint.read_bytes(info, 0, min(info.nbytes, _SAMPLE_BYTES)))
    return digest.digest()


def _digest(key: str, page: memoryview) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(page)
    return digest.digest()


def _read_into(file: int, view: memoryview) -> bool:
    """Fill `view`; False when the file is shorter."""
    num_read = 0
    while num_read < len(view):
        count = os.preadv(file, [view[num_read:]], num_read)
        if not count:
            return False
        num_read += count
    return True
