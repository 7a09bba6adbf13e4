"""Writing a report's files: JSON, HTML, CSV, charts, JUnit and a Markdown summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.bench.bench_options import ReportOutputs
from llmkit.bench.bench_page import drawings, report_page
from llmkit.bench.ci_report import csv_text, junit, summary
from llmkit.common.errors import ShortageError, UsageError
from llmkit.common.svg_charts import standalone_svg

if TYPE_CHECKING:
    from llmkit.bench.bench_report import BenchReport


def check_outputs(outputs: ReportOutputs) -> None:
    """Check the options before anything is measured.

    Raises UsageError for options that exclude each other, and ShortageError for files that cannot
    be written and PNGs that cannot be made.
    """
    names = (
        outputs.json,
        outputs.html,
        outputs.csv,
        outputs.charts,
        outputs.junit,
        outputs.summary,
    )
    for name in filter(None, names):
        path = Path(name).absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        needs_directory = name == outputs.charts or existing != path
        if existing.is_dir() != needs_directory or not os.access(existing, os.W_OK):
            kind = "directory" if needs_directory else "file"
            raise ShortageError(
                f"{name} cannot be written",
                f"{existing} is not a writable {kind}",
                "Choose another place",
            )
    if outputs.png and not outputs.charts:
        raise UsageError(
            "--png writes beside the SVG files",
            "A directory was expected",
            "Give one with --charts",
        )
    if outputs.png:
        png(b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>')


def write_report(report: BenchReport, outputs: ReportOutputs) -> list[Path]:
    """Write the chosen files and replace existing ones. Returns their paths.

    Raises as `check_outputs` does, and ShortageError when a file cannot be written.
    """
    check_outputs(outputs)
    files: dict[Path, bytes] = {}
    if outputs.json:
        text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
        files[Path(outputs.json)] = f"{text}\n".encode()
    if outputs.html:
        files[Path(outputs.html)] = report_page(report)
    if outputs.csv:
        files[Path(outputs.csv)] = csv_text(report).encode()
    if outputs.junit:
        files[Path(outputs.junit)] = junit(report)
    if outputs.summary:
        files[Path(outputs.summary)] = summary(report).encode()
    if outputs.charts:
        for name, drawing in drawings(report).items():
            content = standalone_svg(drawing).encode()
            files[Path(outputs.charts) / f"{name}.svg"] = content
            if outputs.png:
                files[Path(outputs.charts) / f"{name}.png"] = png(content)
    write_files(files)
    return list(files)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files and replace existing ones. Raises ShortageError when one cannot be written."""
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, content)
        except OSError as error:
            raise ShortageError(
                f"{path} cannot be written ({error.strerror})", todo="Choose another place"
            ) from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file. An interrupted or failed write leaves what was there before.

    Devices, and files in a folder that takes no new ones, are written in place.
    """
    path = path.resolve()
    if (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def png(drawing: bytes) -> bytes:
    """An SVG file as a PNG of twice its size. Raises ShortageError without CairoSVG or Cairo."""
    try:
        import cairosvg  # optional
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ShortageError(
            f"--png needs CairoSVG and the Cairo library ({reason})",
            todo="Run pip install 'llmkit[png]'; Cairo is libcairo2 in Debian",
        ) from error
    image: bytes = cairosvg.svg2png(bytestring=drawing, scale=2)
    return image
