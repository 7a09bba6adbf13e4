"""Pages of the KV cache in files: what long prompts began with outlives the memory it was computed in.

A page is what PAGE_TOKENS tokens of a prompt have in the caches of all layers. Its file is named by a hash of the
model and of the page's last block, whose own name stands for all tokens up to there and for the client's salt: it is
found by those only who may share it. A file is a SHA-256 of its name and its bytes, and the bytes; one that differs is
removed.
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

from llmkit.checkpoint.reading import tensor_bytes
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.version import version
from llmkit.runtime.engine.types import EngineConfig
from llmkit.runtime.prefix_files import PAGE, PART, files_in

PAGE_TOKENS = 256
_PART_S = 3600.0  # after which a file that was not finished never will be
_DIGEST_BYTES = 32
_SAMPLE_BYTES = 4096  # of every tensor, which tell one model from another


class PrefixStore:
    """Pages in a folder that only its owner can read, at most so many bytes of them: those used last.

    `read` and `write` are for other threads than the engine's. Several processes may use a folder at once.
    """

    def __init__(self, folder: Path, limit_bytes: int, identity: bytes, page_bytes: int) -> None:
        """identity: what the bytes of a page depend on besides its tokens and its client; see `identity_of`."""
        self.folder, self.limit_bytes, self.page_bytes = folder, limit_bytes, page_bytes
        self.damaged = 0  # files that were not what was written, and are gone
        self._identity = identity
        self._known: set[str] = set()
        self._tidy()

    def key(self, name: bytes) -> str:
        """The key of the page whose last block has this name."""
        return hashlib.sha256(self._identity + name).hexdigest()

    def has(self, key: str) -> bool:
        """Whether the page was there when the folder was last looked through."""
        return key in self._known

    def read(self, key: str, used_ns: int) -> torch.Tensor | None:
        """The bytes of a page, uint8 [page_bytes]; None when it is gone, or damaged and therefore removed.

        used_ns: the time that it counts as last used.
        """
        data = torch.empty(_DIGEST_BYTES + self.page_bytes, dtype=torch.uint8)
        view = tensor_bytes(data)
        with suppress(OSError):
            with self._path(key).open("rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == len(view) and _read_into(file.fileno(), view)
            if whole and _digest(key, view[_DIGEST_BYTES:]) == view[:_DIGEST_BYTES]:
                os.utime(self._path(key), ns=(used_ns, used_ns))
                return data[_DIGEST_BYTES:]
            self.damaged += 1
            self._path(key).unlink()
        self._known.discard(key)
        return None

    def write(self, key: str, page: torch.Tensor, used_ns: int) -> None:
        """Keep a page, uint8 [page_bytes]; those that were not used for longest make room. A full disk ends nothing."""
        view = tensor_bytes(page)
        with suppress(OSError):
            file = tempfile.NamedTemporaryFile(dir=self.folder, suffix=PART, delete=False)  # noqa: SIM115  (mode 0600)
            try:
                with file:
                    file.write(_digest(key, view))
                    file.write(view)
                os.utime(file.name, ns=(used_ns, used_ns))
                Path(file.name).replace(self._path(key))
            except OSError:
                Path(file.name).unlink()
                raise
            self._known.add(key)
        self._tidy()

    def _tidy(self) -> None:
        """Look through the folder, and remove what is over its limit; the files of other models count too."""
        for used_ns, _, path in files_in(self.folder, PART):
            if time.time() - used_ns / 1e9 > _PART_S:
                with suppress(OSError):
                    path.unlink()
        found = files_in(self.folder, PAGE)
        total = sum(size for _, size, _ in found)
        while found and total > self.limit_bytes:
            _, size, path = found.pop(0)
            with suppress(OSError):
                path.unlink()
            total -= size
        self._known = {path.stem for _, _, path in found}

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{PAGE}"


def identity_of(models: Sequence[Checkpoint], config: EngineConfig) -> bytes:
    """What keys and values depend on besides tokens: the models and how they are computed and laid out.

    A model is its config, its tensors' headers and the first bytes of each: to hash all of it would take longer than
    what is saved. No training and no quantization leaves the first 4 KiB of every tensor as they were.
    """
    digest = hashlib.sha256()
    form = (version(), PAGE_TOKENS, config.block_size, str(config.dtype), config.kv_dtype, config.device.type)
    digest.update(repr(form).encode())
    for model in models:
        digest.update(json.dumps(model.config, sort_keys=True, default=str).encode())
        for name, info in sorted(model.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            digest.update(model.read_bytes(info, 0, min(info.nbytes, _SAMPLE_BYTES)))
    return digest.digest()


def _digest(key: str, page: memoryview) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(page)
    return digest.digest()


def _read_into(file: int, view: memoryview) -> bool:
    """Fill `view`; False when the file ends before."""
    done = 0
    while done < len(view) and (count := os.preadv(file, [view[done:]], done)):
        done += count
    return done == len(view)
