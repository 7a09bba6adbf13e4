"""Progress on the terminal: bars, or one line a stage where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from llmkit.common.formatting import bytes_text, count_text
from llmkit.common.progress import Progress

# The width of a bar by the least width of the terminal.
BAR_WIDTHS = ((110, 30), (80, 16), (70, 10))
MIN_BAR_WIDTH = 5


class StageLines(Progress):
    """One line when a stage starts: for log files."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def start(self, stage: str, total: int, unit: str) -> None:
        """Writes the stage's name and its amount of work."""
        self._write(f"{stage} ({_amount(total, unit)})")

    def advance(self, n: int = 1, note: str = "") -> None:
        """Nothing: one line a stage is enough in a log file."""

    def finish(self) -> None:
        """Nothing: the next stage's line follows."""

    def message(self, text: str) -> None:
        """Writes a line."""
        self._write(text)


class _Bar(ProgressColumn):
    """The bar, as wide as the terminal leaves room for."""

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> ProgressBar:
        width = next(
            (width for least, width in BAR_WIDTHS if self._console.width >= least), MIN_BAR_WIDTH
        )
        return BarColumn(bar_width=width).render(task)


class _Amount(ProgressColumn):
    """The finished and the total amount, in the stage's unit."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        unit = str(task.fields.get("unit", ""))
        done = int(task.completed)
        total = int(task.total or 0)
        text = (
            f"{bytes_text(done)} of {bytes_text(total)}"
            if unit == "bytes"
            else f"{done} of {count_text(total, unit)}"
        )
        return Text(text, style="progress.download")


class _Note(ProgressColumn):
    """What is being worked on. It is cut at the end of the line, so that a bar is one line."""

    def render(self, task: Task) -> Text:
        return Text(
            str(task.fields.get("note", "")), style="dim", no_wrap=True, overflow="ellipsis"
        )


class Bars(Progress):
    """A bar for each stage; the bar of a finished stage stays and shows its time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, stage: str, total: int, unit: str) -> None:
        """Opens a bar of `total` units, and closes the one before."""
        self.finish()
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            _Bar(self._console),
            _Amount(),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            _Note(),
        ]
        self._bars = RichProgress(*columns, console=self._console, refresh_per_second=5)
        self._task = self._bars.add_task(stage, total=max(total, 1), unit=unit, note="")
        self._bars.start()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Adds `n` finished units; `note` says what is being worked on."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=n, note=note)

    def finish(self) -> None:
        """Closes the bar."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, note="")
            self._bars.stop()
        self._bars = self._task = None

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _amount(total: int, unit: str) -> str:
    return bytes_text(total) if unit == "bytes" else count_text(total, unit)
