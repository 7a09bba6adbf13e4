"""The folder of the prefix cache on disk: its permissions and its files.

Without torch; see prefix_store.py.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llmkit.common.errors import InputError, ShortageError

PAGE_SUFFIX = ".kv"
PARTIAL_SUFFIX = ".part"  # of a page that is being written


def private_folder(path: str, what: str = "the prefix cache's folder") -> Path:
    """Create the folder if it is missing, readable by its owner only.

    what: its name in errors.

    Raises InputError when it is a file or other users can read it, ShortageError when it cannot be
    created or written.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
    except FileExistsError:
        raise InputError(f"{what} is a file ({folder})", "A folder was expected") from None
    except OSError as error:
        raise ShortageError(f"{what} cannot be made ({folder}: {error.strerror})") from None
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise InputError(
            f"others may look into {what} ({folder}: "
            f"mode {info.st_mode & 0o777:o}, owner {info.st_uid})",
            "A folder of your own with mode 700 was expected: "
            "prompts can be worked out from what is in it",
            f"chmod 700 {folder}, or name a folder that does not exist yet",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ShortageError(f"{what} cannot be written to ({folder})")
    return folder


def files_in(folder: Path, suffix: str) -> list[tuple[int, int, Path]]:
    """The files with this suffix, the least recently used first.

    For each the time in ns, the size in bytes and the path.
    """
    files = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                with suppress(OSError):  # it has been removed meanwhile
                    info = entry.stat(follow_symlinks=False)
                    files.append((info.st_mtime_ns, info.st_size, Path(entry.path)))
    return sorted(files)
