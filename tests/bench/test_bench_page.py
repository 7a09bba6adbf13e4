"""The report as a page, as drawings, and as files for CI."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

import pytest
from PIL import Image
from support.html_parser import Page

from llmkit.bench.bench_charts import MAX_TIMELINE_REQUESTS
from llmkit.bench.bench_options import ReportOutputs
from llmkit.bench.bench_page import drawings, report_page
from llmkit.bench.bench_report import BenchReport, RequestMetrics, TargetReport
from llmkit.bench.ci_report import csv_text, junit, summary
from llmkit.bench.gates import GateResult
from llmkit.bench.report_files import check_outputs, write_files, write_report
from llmkit.common.errors import ShortageError, UsageError
from llmkit.common.svg_charts import linear_ticks

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EVIL = '<script>alert("x")</script>|\x07'


def target(name: str, speed: float, **metrics: float) -> TargetReport:
    rounds = {
        f"c{load}": [
            {
                "output_tps": speed * load + step,
                "ttft_p50_ms": 10.0 * load,
                "tpot_mean_ms": 2.0 * load,
                "e2e_p50_ms": 50.0,
            }
            for step in (0.0, 1.0, 2.0)
        ]
        for load in (1, 2)
    }
    requests = [RequestMetrics(0.1 * i, 0.05, 0.05 + 0.01 * i, 8, 0, i) for i in range(1, 6)]
    scenarios = {scenario: runs[1] for scenario, runs in rounds.items()}
    return TargetReport(
        name,
        f"models/{name}",
        "served",
        metrics,
        scenarios,
        rounds,
        {"c1": requests, "c2": requests},
    )


def report(**changes: object) -> BenchReport:
    fields: dict[str, object] = {
        "targets": [
            target("bf16", 100.0, perplexity=10.0, peak_memory_bytes=2.0**30),
            target(EVIL, 150.0, perplexity=10.5, mean_kl=0.05, peak_memory_bytes=2.0**28),
        ],
        "baseline": "bf16",
        "environment": {"cpu": "A CPU", "cores": 2, "gpu": None, "dtype": "float32"},
        "command": "llmkit bench a b",
        "workload": {
            "sha256": "ab" * 32,
            "rounds": 3,
            "scenarios": [
                {"name": f"c{n}", "requests": 5, "clients": n, "load": float(n)} for n in (1, 2)
            ],
        },
        "gates": [
            GateResult("mean_kl<=0.02", EVIL, "mean_kl", 0.05, 0.02, False),
            GateResult("output_tps>=baseline", EVIL, "c1.output_tps", 151.0, 101.0, True),
        ],
        "notes": ["a note"],
    }
    return BenchReport(**(fields | changes))  # type: ignore[arg-type]


def test_page_is_complete_escaped_and_loads_nothing() -> None:
    content = report_page(report())
    page = Page(content)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onload"} & attrs.keys()]
    assert "default-src 'none'" in content.decode()
    for words in ("1 of 2 checks failed", "time to first token", "A CPU", "a note.", "TTFT", "±"):
        assert words in page.text
    assert EVIL[:-1] in page.text
    for heading in (
        "Gates",
        "Figures",
        "Quality, speed and memory",
        "Latency over throughput",
        "Latencies",
        "Requests",
    ):
        assert heading in page.within("h2")


def test_page_marks_failed_gates_without_colour_and_with_it() -> None:
    content = report_page(report()).decode()
    (table,) = re.findall(r'<div class="scroll gates".*?</div>', content, re.DOTALL)
    rows = re.findall(r'<tr class="(\w+)">\s*<th scope="row">([^<]+)</th>', table)
    assert rows == [("fail", "✗ FAIL"), ("pass", "✓ pass")], "failed ones first"
    assert '<p class="outcome fail">✗ 1 of 2 checks failed</p>' in content
    for style in ("fail", "pass"):
        assert f".{style} > th, .outcome.{style} {{ color: var(--{style})" in content
    passed = report_page(report(gates=[report().gates[1]])).decode()
    assert '<p class="outcome pass">✓ all checks passed</p>' in passed


@pytest.mark.browser
def test_wide_tables_of_a_page_scroll_on_a_phone_and_show_a_cue(
    tmp_path: Path, browser: Browser
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    (tmp_path / "report.html").write_bytes(report_page(report()))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    table = page.locator(".scroll.gates")
    assert table.evaluate("(it) => it.scrollWidth > it.clientWidth"), "the table is wide"
    at_start = _edge_darkness(table.screenshot())
    table.evaluate("(it) => { it.scrollLeft = it.scrollWidth }")
    at_end = _edge_darkness(table.screenshot())
    assert at_start[1] > 30 > at_start[0], "it goes on at the right"
    assert at_end[0] > 30 > at_end[1], "it goes on at the left"
    page.close()


def _edge_darkness(image: bytes) -> tuple[int, int]:
    """How much darker than paper the left and the right edge of a table's last row are."""
    picture = Image.open(io.BytesIO(image)).convert("L")
    row = picture.height - 6
    return 252 - picture.getpixel((3, row)), 252 - picture.getpixel((picture.width - 1, row))


def test_page_leaves_out_what_was_not_measured() -> None:
    alone = BenchReport(
        [TargetReport("a", "a", "checkpoint", {"perplexity": math.inf, "checkpoint_bytes": 5})]
    )
    page = Page(report_page(alone))
    assert "perplexity" in page.text and "Latencies" not in page.text
    assert drawings(alone) == {}


def test_charts_are_written_as_svg_files(tmp_path: Path) -> None:
    write_report(report(), ReportOutputs(charts=str(tmp_path / "new" / "charts")))
    files = sorted(path.name for path in (tmp_path / "new" / "charts").iterdir())
    assert files == [
        "latencies-c1.svg",
        "latencies-c2.svg",
        "load.svg",
        "pareto.svg",
        "timeline-c1-0.svg",
        "timeline-c1-1.svg",
        "timeline-c2-0.svg",
        "timeline-c2-1.svg",
    ]
    for name in files:
        root = Xml.parse(tmp_path / "new" / "charts" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        numbers = [
            float(n)
            for n in re.findall(
                r'\b[xy][12]?="([^"]+)"', (tmp_path / "new" / "charts" / name).read_text()
            )
        ]
        assert all(-1 <= n <= 961 for n in numbers)


def test_svg_files_have_colours_and_pngs_beside_them(tmp_path: Path) -> None:
    written = write_report(report(), ReportOutputs(charts=str(tmp_path), png=True))
    assert {path.suffix for path in written} == {".svg", ".png"}
    for path in written:
        if path.suffix == ".svg":
            assert "var(" not in path.read_text() and "#2a78d6" in path.read_text()
            height = int(Xml.parse(path).getroot().attrib["viewBox"].split()[3])
            image = path.with_suffix(".png").read_bytes()
            assert image[:8] == b"\x89PNG\r\n\x1a\n"
            assert [int.from_bytes(image[i : i + 4]) for i in (16, 20)] == [2 * 960, 2 * height]
            assert len(zlib.decompress(b"".join(_chunks(image, b"IDAT"))).strip(b"\0")) > 1000, (
                "something is drawn"
            )


def _chunks(image: bytes, kind: bytes) -> Iterator[bytes]:
    at = 8
    while at < len(image):
        size = int.from_bytes(image[at : at + 4])
        if image[at + 4 : at + 8] == kind:
            yield image[at + 8 : at + 8 + size]
        at += 12 + size


def test_png_needs_its_extra_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--charts"):
        check_outputs(ReportOutputs(png=True))
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(ShortageError, match=r"llmkit\[png\]"):
        check_outputs(ReportOutputs(charts=str(tmp_path), png=True))


def test_page_names_a_reason_once_for_all_its_targets() -> None:
    one = target("one", 1.0)
    other = target("other", 1.0)
    one.absent = {"goodput": "no --slo", "mbu, mfu": "no peaks"}
    other.absent = {"goodput": "no --slo"}
    text = Page(report_page(report(targets=[one, other], baseline="one"))).text
    assert text.count("no --slo") == 1
    assert "mbu, mfu of one: no peaks" in text


def test_pareto_chart_joins_the_pareto_front() -> None:
    both = drawings(report())["pareto"]
    worse = target("worse", 90.0, mean_kl=0.2, peak_memory_bytes=2.0**28)
    three = drawings(report(targets=[*report().targets, worse]))["pareto"]
    (front,) = re.findall(r'class="front" points="([^"]+)"', three)
    assert len(front.split()) == 2, "the third is slower and worse"
    radii = [float(radius) for radius in re.findall(r' r="([^"]+)"', both)]
    assert radii[0] ** 2 / radii[1] ** 2 == pytest.approx(4, rel=0.02), "the area is the memory"


def test_timeline_chart_draws_a_bounded_number_of_requests() -> None:
    many = [RequestMetrics(0.01 * i, 0.05, 0.5, 8, 0, 4) for i in range(300)]
    one = report()
    one.targets[0].requests["c1"] = many
    assert drawings(one)["timeline-c1-0"].count('class="run') == MAX_TIMELINE_REQUESTS


@pytest.mark.parametrize("high", [0.003, 1.0, 4.9, 7.0, 100.0, 123456.0])
def test_linear_ticks_are_round_and_few(high: float) -> None:
    found = linear_ticks(high)
    assert found[0] == 0 and found[-1] <= high * 1.001 and 3 <= len(found) <= 6


def test_junit_lists_the_gates() -> None:
    root = Xml.fromstring(junit(report()))
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    bad, good = suite
    assert [child.tag for child in good] == []
    failure = bad.find("failure")
    assert (
        failure is not None
        and failure.get("message") == "mean_kl is 0.05 (mean_kl<=0.02, limit 0.02)"
    )
    assert bad.get("name") == "mean_kl<=0.02"
    assert good.get("name") == "output_tps>=baseline [c1.output_tps]"


def test_summary_shows_failed_gates_first() -> None:
    text = summary(report())
    assert text.startswith("### llmkit bench: 1 of 2 gate checks failed\n")
    assert "<script" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert "**FAIL**" in tables[2], "failed ones first"
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert widths[:4] == [7] * 4 and set(widths[4:]) == {5}
    assert any(
        "KL divergence from baseline, mean" in line and "| 0.05000 |" in line for line in tables
    )
    assert any("c1: output throughput" in line and "(1.50x)" in line for line in tables)
    assert "all gate checks passed" in summary(report(gates=[report().gates[1]]))


def test_csv_has_a_row_for_each_metric() -> None:
    rows = list(csv.DictReader(csv_text(report()).splitlines()))
    (row,) = [
        r for r in rows if (r["target"], r["scenario"], r["metric"]) == ("bf16", "c2", "output_tps")
    ]
    assert (row["value"], row["unit"], row["repetitions"]) == ("201.0", "tokens/s", "3")
    assert float(row["low"]) < 201 < float(row["high"])
    (once,) = [r for r in rows if (r["target"], r["metric"]) == ("bf16", "perplexity")]
    assert (once["value"], once["low"], once["repetitions"]) == ("10.0", "", "1")


def test_write_report_writes_every_file(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / name) for name in ("json", "html", "csv", "junit", "summary")}
    assert len(write_report(report(), ReportOutputs(**paths))) == 5
    assert write_report(report(), ReportOutputs()) == []
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(ShortageError, match="blocked"):
        write_report(report(), ReportOutputs(html=str(tmp_path / "blocked" / "x.html")))


def test_report_files_are_replaced_whole(tmp_path: Path) -> None:
    """A link stays a link, a device is written in place, and nothing else is left."""
    kept = tmp_path / "kept.json"
    kept.write_text("old and longer")
    (tmp_path / "link.json").symlink_to(kept)
    write_files({tmp_path / "link.json": b"new", Path("/dev/null"): b"gone"})
    assert kept.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "link.json"]
    with pytest.raises(ShortageError, match="cannot be written"):
        write_files({tmp_path / "kept.json" / "under": b"x"})
    assert kept.read_text() == "new"
