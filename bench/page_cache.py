"""Whether files lie in the operating system's page cache, and seeing to it that they do or do not. Linux."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from llmkit.checkpoint.errors import ShortageError

STATES = ("warm", "cold")
_CHUNK = 1 << 24
_LEFT = 0.05  # of the pages that may stay after dropping them


def prepare(files: Sequence[Path], state: str) -> float:
    """Bring the files into the page cache ("warm") or out of it ("cold"); the share that is in it then.

    Raises ShortageError when they cannot be dropped: on tmpfs, when others have them mapped, or outside Linux.
    """
    for file in files:
        with file.open("rb", buffering=0) as one:
            if state == "warm":
                while one.read(_CHUNK):
                    pass
            elif hasattr(os, "posix_fadvise"):
                os.fsync(one.fileno())  # only what is written can be dropped
                os.posix_fadvise(one.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = resident_share(files)
    if state == "cold" and share > _LEFT:
        raise ShortageError(
            f"{share:.0%} of the weights stay in the page cache",
            "A cold start wants them out of it",
            "Put the model on a disk, end what has it open, or measure with --page-cache warm",
        )
    return share


def resident_share(files: Sequence[Path]) -> float:
    """The share of the files' pages that is in memory, by mincore(2); where the kernel does not tell, 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = resident = 0
    for file in files:
        size = file.stat().st_size
        if not size:
            continue
        count = -(-size // mmap.PAGESIZE)
        # A private mapping may be written to, which ctypes needs to find its address; nothing is.
        with file.open("rb") as one, mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            states, place = (ctypes.c_ubyte * count)(), ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(size), states)
            del place
        pages += count
        resident += count if failed else sum(state & 1 for state in states)
    return resident / pages if pages else 1.0
