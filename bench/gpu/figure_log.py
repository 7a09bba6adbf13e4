"""The figures of `make gpu`: JSON lines in one file, each written as soon as it is measured.

A part that was cut off loses nothing, and measures in its next run what is still missing. A figure
that hung or killed its process is known by its line that says "begun": it is not tried again in the
same run.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
FILE_NAME = "figures.jsonl"


@dataclass(frozen=True)
class PartOptions:
    """How a part is measured."""

    device: torch.device
    results: Path
    # Small models and few repetitions: it shows that the code runs, and the times mean nothing.
    is_tiny: bool = False

    @property
    def figures_path(self) -> Path:
        """The file of the figures. Those of small models are not mixed with real ones."""
        return self.results / ("tiny.jsonl" if self.is_tiny else FILE_NAME)


class NotInstalledError(Exception):
    """A baseline that this machine does not have. Its figure is skipped, which is no failure."""


class DeviceLostError(RuntimeError):
    """The GPU does no more work for this process, for instance after an illegal memory access."""


class FigureLog:
    """The figures of one part, and the time that is left for them."""

    def __init__(self, path: Path, part: str, budget_s: float, run: str = "") -> None:
        """budget_s: seconds for the whole part. run: names this run of `make gpu`; a figure that
        failed in it is not measured again.
        """
        self.path = path
        self.part = part
        self.is_complete = True  # nothing failed, and nothing was left out
        self._run = run
        self._start_s = time.monotonic()
        self._end_s = self._start_s + budget_s
        path.parent.mkdir(parents=True, exist_ok=True)
        self._earlier = latest(path, part)

    @property
    def time_left_s(self) -> float:
        """Seconds until the part's time is over."""
        return self._end_s - time.monotonic()

    def has(self, figure: str, name: str) -> bool:
        """Whether the figure was measured before, or failed in this run."""
        record = self._earlier.get((figure, name))
        if record is None:
            return False
        if record["status"] in ("measured", "skipped"):
            return True
        return bool(record["status"] in ("failed", "begun") and record["run"] == self._run)

    def measure(
        self, figure: str, name: str, run: Callable[[], Mapping[str, Any]], needs_s: float = 1.0
    ) -> Record | None:
        """Measure a figure and write it. Returns its values; None where there are none.

        figure: the kind, such as "decode". name: which one of them. needs_s: a guess of the time;
        with less time left the figure is written as not measured. An error is written and does not
        end the part. Raises DeviceLostError when no further figure can be measured.
        """
        if self.has(figure, name):
            return self._known(figure, name)
        if self.time_left_s < needs_s:
            self.note_missing(figure, name)
            return None
        self._write(figure, name, "begun", {})
        start_s = time.monotonic()
        try:
            values = dict(run())
        except NotInstalledError as error:
            self._write(figure, name, "skipped", {"reason": str(error)})
            return None
        except Exception as error:  # the other figures are measured
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"[:500]
            self.is_complete = False
            self._write(figure, name, "failed", {"reason": reason})
            # The traceback refers to the tensors of the failed figure.
            error.__traceback__ = None
            _free_memory()
            return None
        self._write(figure, name, "measured", {**values, "took_s": time.monotonic() - start_s})
        return values

    def note_missing(self, figure: str, name: str, reason: str = "no time was left") -> None:
        """Write that a figure was not measured."""
        if not self.has(figure, name):
            self.is_complete = False
            self._write(figure, name, "not measured", {"reason": reason})

    def heartbeat(self) -> None:
        """Show that a long figure is still making progress."""
        if self.path.exists():
            os.utime(self.path)

    def end_part(self, status: str) -> None:
        """Write how the part ended: "complete", "incomplete" or a reason."""
        took_s = time.monotonic() - self._start_s
        self._write("part", self.part, "ended", {"how": status, "took_s": took_s})

    def _known(self, figure: str, name: str) -> Record | None:
        record = self._earlier[figure, name]
        if record["status"] in ("failed", "begun"):
            self.is_complete = False
        return record if record["status"] == "measured" else None

    def _write(self, figure: str, name: str, status: str, values: Mapping[str, Any]) -> None:
        record = {"part": self.part, "figure": figure, "name": name, "status": status}
        record |= {"run": self._run, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
        self._earlier[figure, name] = record
        if status != "begun":
            sys.stderr.write(f"{self.part:9} {figure}: {name}: {_summary(record)}\n")


def read_records(path: Path) -> list[Record]:
    """All lines of a file of figures, which may be missing. A line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"part", "figure", "name", "status"} <= record.keys():
            records.append({"run": ""} | record)
    return records


def latest(path: Path, part: str) -> dict[tuple[str, str], Record]:
    """The last line of each figure of a part, by figure and name.

    A figure that was measured once stays measured, whatever comes after it.
    """
    found: dict[tuple[str, str], Record] = {}
    for record in read_records(path):
        key = (record["figure"], record["name"])
        if record["part"] != part:
            continue
        if record["status"] == "measured" or found.get(key, record)["status"] != "measured":
            found[key] = record
    return found


def part_is_complete(path: Path, part: str) -> bool:
    """Whether a part has ended well."""
    ended = latest(path, part).get(("part", part))
    return ended is not None and ended["how"] == "complete"


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def _free_memory() -> None:
    """Free what a failed figure has left on the GPU. Raises DeviceLostError if that fails."""
    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLostError(str(error)) from error


def _summary(record: Record) -> str:
    if record["status"] != "measured":
        return f"{record['status']} ({record.get('how') or record.get('reason', '')})"
    numbers = {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and name != "took_s"
    }
    return ", ".join(f"{name} {value:,.4g}" for name, value in numbers.items()) or "measured"
