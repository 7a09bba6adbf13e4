"""A report as files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.bench.chart import as_file
from llmkit.bench.ci import csv_text, junit, summary
from llmkit.bench.page import drawings, report_page
from llmkit.checkpoint.errors import ShortageError, UsageError

if TYPE_CHECKING:
    from llmkit.bench.report import BenchReport


@dataclass(frozen=True)
class Outputs:
    """Where a report goes besides the terminal; None: nowhere."""

    json: str | None = None
    html: str | None = None
    csv: str | None = None
    charts: str | None = None  # a directory, made if need be
    png: bool = False  # beside each SVG in `charts`
    junit: str | None = None
    summary: str | None = None

    def check(self) -> None:
        """Raises, before anything is measured, UsageError for options that do not go together and ShortageError for
        files that cannot be written and PNGs that cannot be made."""
        for name in filter(None, (self.json, self.html, self.csv, self.charts, self.junit, self.summary)):
            there = next(one for one in (Path(name).absolute(), *Path(name).absolute().parents) if one.exists())
            directory = name == self.charts or there != Path(name).absolute()
            if there.is_dir() != directory or not os.access(there, os.W_OK):
                wanted = f"{there} is no {'directory' if directory else 'file'} that may be"
                raise ShortageError(f"{name} cannot be written", wanted, "Choose another place")
        if self.png and not self.charts:
            raise UsageError("--png writes beside the SVG files", "A directory was expected", "Give one with --charts")
        if self.png:
            png(b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>')

    def write(self, report: BenchReport) -> list[Path]:
        """Write the files that are wanted, over those that are there. Raises ShortageError where that is impossible."""
        self.check()
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
            for name, drawing in drawings(report).items():
                content = as_file(drawing).encode()
                files[Path(self.charts) / f"{name}.svg"] = content
                if self.png:
                    files[Path(self.charts) / f"{name}.png"] = png(content)
        for path, content in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError as error:
                raise ShortageError(
                    f"{path} cannot be written ({error.strerror})", todo="Choose another place"
                ) from error
        return list(files)


def png(drawing: bytes) -> bytes:
    """An SVG file as a PNG of twice its size. Raises ShortageError without CairoSVG, or the library it calls."""
    try:
        import cairosvg
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ShortageError(
            f"--png needs CairoSVG and the Cairo library ({reason})",
            todo="Run pip install 'llmkit[png]'; Cairo is libcairo2 in Debian",
        ) from error
    image: bytes = cairosvg.svg2png(bytestring=drawing, scale=2)
    return image
