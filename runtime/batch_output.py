"""The output file of a batch, and how a stopped run is continued."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from llmkit.checkpoint.output_directory import sibling, sync_directory, write_errors, write_synced
from llmkit.common.errors import OutputError
from llmkit.runtime.batch_lines import Line, Tally


def creation_time() -> int:
    """Unix seconds now, or SOURCE_DATE_EPOCH for an output that is the same every time."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(fixed) if fixed.isdigit() else int(time.time())


class BatchOutput:
    """The results of a batch. `out` is the final path of the file; None for stdout."""

    def __init__(self, file: BinaryIO, out: Path | None) -> None:
        self._file = file
        self._out = out

    def write(self, result: bytes) -> None:
        """Write a line."""
        with write_errors(self._out or Path("-")):
            self._file.write(result)
            self._file.flush()  # a written result survives this process

    def finish(self) -> None:
        """Give the file its final name."""
        if self._out is not None:
            partial = sibling(self._out, ".partial")
            with write_errors(self._out):
                os.fsync(self._file.fileno())
                partial.replace(self._out)
                sibling(self._out, ".partial.json").unlink()
                sync_directory(self._out.parent)

    def discard_if_empty(self) -> None:
        """Remove the files of a run that has written nothing: there is nothing to continue."""
        if self._out is not None and self._file.tell() == 0:
            for suffix in (".partial", ".partial.json"):
                sibling(self._out, suffix).unlink(missing_ok=True)


def resume(
    out: Path,
    identity: dict[str, Any],
    lines: Iterator[Line],
    tally: Tally,
    stack: contextlib.ExitStack,
) -> tuple[BatchOutput, int]:
    """Open the output after the results of a stopped run, and skip their requests in `lines`.

    Returns the output and the creation time of the batch. identity: what both runs must have in
    common. Raises OutputError when the output exists, or a stopped run of another batch.
    """
    partial = sibling(out, ".partial")
    identity_file = sibling(out, ".partial.json")
    if out.exists():
        raise OutputError(f"The output {out} exists", todo="Remove it or choose another output")
    identity = identity | {"created": creation_time()}
    if partial.exists() and identity_file.exists():
        stopped = msgspec.json.decode(identity_file.read_bytes(), type=dict[str, Any])
        identity["created"] = stopped.get("created")
        for name in identity.keys() | stopped.keys():
            if identity.get(name) != stopped.get(name):
                difference = f"{name} was {stopped.get(name)!r} and is {identity.get(name)!r}"
                raise OutputError(
                    f"{partial} was written by a run with other options ({difference})",
                    todo="Give the same options, or remove it to start again",
                )
    else:
        with write_errors(out):
            partial.unlink(missing_ok=True)
            write_synced(identity_file, msgspec.json.encode(identity))
    with write_errors(partial):
        file = stack.enter_context(partial.open("a+b"))
    file.seek(0)
    kept_bytes = 0
    while True:
        written = file.readline()
        if not written.endswith(b"\n"):
            break
        line = next(lines, None)
        try:
            result = tally.add(written)
        except msgspec.DecodeError:
            raise OutputError(
                f"{partial} is damaged at byte {kept_bytes}", todo="Remove it to start again"
            ) from None
        if line is None or line.custom_id != result.custom_id:
            raise OutputError(
                f"{partial} was written from another input (result {tally.requests} belongs to "
                f"{result.custom_id!r})",
                todo="Give the same input, or remove it to start again",
            )
        kept_bytes += len(written)
    file.truncate(kept_bytes)  # drop a last line that was not written completely
    tally.resumed = tally.requests
    return BatchOutput(file, out), int(identity["created"])
