"""Where the results of a batch go, and what an earlier run has left there."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from llmkit.checkpoint.errors import OutputError
from llmkit.checkpoint.output import sibling, sync_directory, write_synced, writing
from llmkit.runtime.batch_lines import Line, Tally


def now() -> int:
    """Unix seconds, or SOURCE_DATE_EPOCH for an output that is the same every time."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(given) if given.isdigit() else int(time.time())


class Output:
    """Where results go; `out` is the file's name in the end."""

    def __init__(self, file: BinaryIO, out: Path | None) -> None:
        self._file, self._out = file, out

    def write(self, result: bytes) -> None:
        with writing(self._out or Path("-")):
            self._file.write(result)
            self._file.flush()  # what is written outlives this process

    def finish(self) -> None:
        if self._out is not None:
            partial = sibling(self._out, ".partial")
            with writing(self._out):
                os.fsync(self._file.fileno())
                partial.replace(self._out)
                sibling(self._out, ".partial.json").unlink()
                sync_directory(self._out.parent)

    def discard_if_empty(self) -> None:
        """Leave no files of a run that has written nothing; another would find nothing to take up."""
        if self._out is not None and self._file.tell() == 0:
            for suffix in (".partial", ".partial.json"):
                sibling(self._out, suffix).unlink(missing_ok=True)


def resume(
    out: Path, ours: dict[str, Any], lines: Iterator[Line], tally: Tally, stack: contextlib.ExitStack
) -> tuple[Output, int]:
    """The output after what an earlier run has written, whose lines are taken from `lines`, and when that began.

    ours: what the run must share with the earlier one. Raises OutputError when the output or another run's is there.
    """
    partial, identity = sibling(out, ".partial"), sibling(out, ".partial.json")
    if out.exists():
        raise OutputError(f"The output {out} exists", todo="Remove it or choose another output")
    ours = ours | {"created": now()}
    if partial.exists() and identity.exists():
        theirs = msgspec.json.decode(identity.read_bytes(), type=dict[str, Any])
        ours["created"] = theirs.get("created")
        for name in ours.keys() | theirs.keys():
            if ours.get(name) != theirs.get(name):
                was = f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
                raise OutputError(
                    f"{partial} is of another run ({was})", todo="Give the same options, or remove it to start again"
                )
    else:
        with writing(out):
            partial.unlink(missing_ok=True)
            write_synced(identity, msgspec.json.encode(ours))
    with writing(partial):
        file = stack.enter_context(partial.open("a+b"))
    file.seek(0)
    kept = 0
    while (written := file.readline()).endswith(b"\n"):
        line = next(lines, None)
        try:
            result = tally.add(written)
        except msgspec.DecodeError:
            raise OutputError(f"{partial} is damaged at byte {kept}", todo="Remove it to start again") from None
        if line is None or line.custom_id != result.custom_id:
            what = f"{partial} is of another input (result {tally.requests} is of {result.custom_id!r})"
            raise OutputError(what, todo="Give the same input, or remove it to start again")
        kept += len(written)
    file.truncate(kept)  # a line that was being written when the run ended
    tally.resumed = tally.requests
    return Output(file, out), int(ours["created"])
