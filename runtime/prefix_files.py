"""The folder of the prefix cache on disk, as it looks from outside; see prefix_store.py. No torch here."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llmkit.checkpoint.errors import InputError, ShortageError

PAGE = ".kv"  # suffix of a page
PART = ".part"  # of one that is being written


def private_folder(path: str) -> Path:
    """The folder, made where there is none, with nobody but its owner let in.

    Raises InputError when it is none or others may look into it, ShortageError when it cannot be made or written to.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
    except FileExistsError:
        raise InputError(f"the prefix cache's folder is a file ({folder})", "A folder was expected") from None
    except OSError as error:
        raise ShortageError(f"the prefix cache's folder cannot be made ({folder}: {error.strerror})") from None
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise InputError(
            f"others may look into the prefix cache's folder ({folder}: mode {info.st_mode & 0o777:o}, "
            f"owner {info.st_uid})",
            "A folder of your own with mode 700 was expected: prompts can be worked out from what is in it",
            f"chmod 700 {folder}, or name a folder that does not exist yet",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ShortageError(f"the prefix cache's folder cannot be written to ({folder})")
    return folder


def files_in(folder: Path, suffix: str) -> list[tuple[int, int, Path]]:
    """When each file of this suffix was used last in ns, its size in bytes and its path, the oldest first."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                with suppress(OSError):  # it is gone meanwhile
                    info = entry.stat(follow_symlinks=False)
                    found.append((info.st_mtime_ns, info.st_size, Path(entry.path)))
    return sorted(found)
