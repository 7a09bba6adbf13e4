"""The log of shadows: one JSON document for each comparison, one in a line."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from llmkit.common.errors import ShortageError
from llmkit.runtime.server.async_waits import run_in_thread


class ShadowLog:
    """Appends to a file. A new one can be read by its owner only: it may hold texts of clients."""

    def __init__(self, path: Path) -> None:
        """Raises ShortageError when the file cannot be written."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise ShortageError(
                f"--shadow-log {path} cannot be written ({error.strerror})",
                todo="Give a file in a folder that exists and is writable",
            ) from None
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._lock = asyncio.Lock()

    async def write(self, record: dict[str, Any]) -> None:
        """Append a record. Raises OSError when the disk is full."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        async with self._lock:
            await run_in_thread(lambda: self._file.write(line))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
