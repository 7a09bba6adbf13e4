"""The report of `llmkit bench semantic-cache`: JSON, a table and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmkit.bench.semantic.cache_quality import CacheQuality, embed_texts, measure_all
from llmkit.bench.semantic.question_pairs import read_pairs
from llmkit.common.svg_charts import (
    WIDTH,
    Plot,
    polyline,
    series_marker,
    standalone_svg,
    svg,
    text,
)
from llmkit.runtime.engine.sampling_params import Pooling

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SCHEMA = 1
_HEIGHT = 400
_SERIES = ("with facts compared", "similarity alone")


@dataclass(frozen=True)
class SemanticReport:
    """The quality of the cache for one model."""

    model: str
    pairs: str  # the file, or "builtin"
    pooling: Pooling
    results: list[CacheQuality]  # of all pairs
    held_out: list[CacheQuality]  # of those that are held out; empty without any

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "schema": SCHEMA,
            "kind": "semantic-cache",
            "model": self.model,
            "pairs": self.pairs,
            "pooling": self.pooling,
            "results": [_json_row(row) for row in self.results],
            "held_out": [_json_row(row) for row in self.held_out],
        }


def semantic_report(
    model: str, pairs_name: str, pooling: Pooling, device: str = "auto"
) -> SemanticReport:
    """Embed all questions with the model, and measure the cache. Raises InputError."""
    pairs = read_pairs(pairs_name)
    questions = [question for pair in pairs for question in (pair.first, pair.second)]
    vectors = embed_texts(model, questions, pooling, device)
    held_out = [pair for pair in pairs if pair.held_out]
    tuned = [pair for pair in pairs if not pair.held_out] or pairs
    return SemanticReport(
        model,
        pairs_name,
        pooling,
        measure_all(tuned, vectors),
        measure_all(held_out, vectors) if held_out else [],
    )


def render_report(report: SemanticReport) -> Group:
    """The report for a terminal."""
    from rich.console import Group

    parts: list[Any] = [f"{report.model} · {report.pooling} pooling · pairs: {report.pairs}"]
    for title, rows in (("", report.results), ("Held-out pairs", report.held_out)):
        if rows:
            parts += [title, _table(rows)]
    return Group(*parts)


def chart(report: SemanticReport) -> str:
    """The share of right answers over that of wrong ones, as an SVG file."""
    plot = Plot(80, 50, WIDTH - 120, _HEIGHT - 110, 1.0, 1.0)
    parts = plot.axes("questions without an answer in the cache that get one", "that get theirs")
    for series, compares_facts in enumerate((True, False)):
        rows = [row for row in report.results if row.compares_facts is compares_facts]
        points = plot.points((row.wrong_hit_rate, row.hit_rate) for row in rows)
        parts.append(polyline(f"line s{series}", points))
        parts += [series_marker(series, *point) for point in points]
    parts += [
        part
        for series, name in enumerate(_SERIES)
        for part in (
            series_marker(series, 100 + 300 * series, 24),
            text("tick", 112 + 300 * series, 28, name, "start"),
        )
    ]
    label = "Right hits over wrong hits of the semantic cache, a point for each threshold"
    return standalone_svg(svg(parts, _HEIGHT, label))


def _table(rows: Sequence[CacheQuality]) -> Table:
    from rich.table import Table

    head = ("Threshold", "Facts", "Right hits", "Mixed up", "Wrong hits", "Hits that are right")
    table = Table(*head, "Wrong hits by kind", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        kinds = ", ".join(f"{kind} {count}" for kind, count in row.wrong_by_kind.items() if count)
        table.add_row(
            f"{row.threshold:g}",
            "yes" if row.compares_facts else "no",
            f"{row.right_hits} of {row.num_same}",
            f"{row.mixed_up}",
            f"{row.wrong_hits} of {row.num_different}",
            "-" if row.precision is None else f"{100 * row.precision:.0f} %",
            kinds,
        )
    return table


def _json_row(row: CacheQuality) -> dict[str, Any]:
    rates = {
        "hit_rate": row.hit_rate,
        "wrong_hit_rate": row.wrong_hit_rate,
        "precision": row.precision,
    }
    return asdict(row) | rates
