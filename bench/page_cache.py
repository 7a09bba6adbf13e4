"""Whether files are in the operating system's page cache, and how to get them in or out (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from llmkit.common.errors import ShortageError

PAGE_CACHE_STATES = ("warm", "cold")
_READ_BYTES = 1 << 24
_MAX_COLD_SHARE = 0.05  # of the pages may stay in the cache


def set_page_cache_state(files: Sequence[Path], state: str) -> float:
    """Read the files into the page cache ("warm") or drop them from it ("cold").

    Returns the share of the files' pages that is then in the cache. Raises ShortageError when they
    cannot be dropped: on tmpfs, when another process has them mapped, or outside Linux.
    """
    for path in files:
        with path.open("rb", buffering=0) as file:
            if state == "warm":
                while file.read(_READ_BYTES):
                    pass
            elif hasattr(os, "posix_fadvise"):
                os.fsync(file.fileno())  # only pages without unwritten changes are dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = resident_share(files)
    if state == "cold" and share > _MAX_COLD_SHARE:
        raise ShortageError(
            f"{share:.0%} of the weights stay in the page cache",
            "A cold start wants them out of it",
            "Put the model on a disk, end what has it open, or measure with --page-cache warm",
        )
    return share


def resident_share(files: Sequence[Path]) -> float:
    """The share of the files' pages that is in memory, by mincore(2).

    A file that the kernel gives no answer for counts as in memory.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pages = 0
    resident_pages = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        file_pages = -(-size // mmap.PAGESIZE)
        # ctypes takes the address of writable mappings only. This one is private, and not written.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping,
        ):
            states = (ctypes.c_ubyte * file_pages)()
            first_byte = ctypes.c_char.from_buffer(mapping)
            failed = libc.mincore(
                ctypes.c_void_p(ctypes.addressof(first_byte)), ctypes.c_size_t(size), states
            )
            del first_byte  # the mapping cannot be closed while it is referenced
        pages += file_pages
        resident_pages += file_pages if failed else sum(state & 1 for state in states)
    return resident_pages / pages if pages else 1.0
