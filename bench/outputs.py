"""A report as files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.bench.chart import as_file
from llmkit.bench.ci import csv_text, junit, summary
from llmkit.bench.page import drawings, report_page
from llmkit.checkpoint.errors import ShortageError

if TYPE_CHECKING:
    from llmkit.bench.report import BenchReport


@dataclass(frozen=True)
class Outputs:
    """Where a report goes besides the terminal; None: nowhere."""

    json: str | None = None
    html: str | None = None
    csv: str | None = None
    charts: str | None = None  # a directory, made if need be
    junit: str | None = None
    summary: str | None = None

    def write(self, report: BenchReport) -> list[Path]:
        """Write the files that are wanted, over those that are there. Raises ShortageError where that is impossible."""
        files: dict[Path, bytes] = {}
        if self.json:
            files[Path(self.json)] = (json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
        if self.html:
            files[Path(self.html)] = report_page(report)
        if self.csv:
            files[Path(self.csv)] = csv_text(report).encode()
        if self.junit:
            files[Path(self.junit)] = junit(report)
        if self.summary:
            files[Path(self.summary)] = summary(report).encode()
        if self.charts:
            files |= {
                Path(self.charts) / f"{name}.svg": as_file(one).encode() for name, one in drawings(report).items()
            }
        for path, content in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError as error:
                raise ShortageError(
                    f"{path} cannot be written ({error.strerror})", todo="Choose another place"
                ) from error
        return list(files)
