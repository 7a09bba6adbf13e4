"""What a report says of tool cases: the cases, the wrong answers, and notes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmkit.bench.tool_accuracy.tool_case import ToolCase, cases_sha256
from llmkit.common.formatting import count_text

if TYPE_CHECKING:
    from llmkit.bench.bench_report import TargetReport

FAILURES_HEAD = ("Case", "Target", "What is wrong", "Expected", "Got")
# By the check that an answer failed first.
_FAILURES = {
    "well_formed": "not well formed",
    "name": "no call of an offered tool",
    "schema": "breaks the schema",
    "equal": "not the expected calls",
    "no_call": "a needless call",
}
MAX_FAILURES = 300  # on a page; the JSON report has all
_MAX_CELL_CHARS = 400


def describe_tool_cases(
    sources: Sequence[str], cases: Sequence[ToolCase], max_tokens: int
) -> dict[str, Any]:
    """The report's entry. Two reports with the same `sha256` asked the same."""
    return {
        "sources": list(sources),
        "cases": len(cases),
        "categories": dict(Counter(case.category for case in cases)),
        "max_tokens": max_tokens,
        "sha256": cases_sha256(cases, max_tokens),
    }


def tool_notes(targets: Sequence[TargetReport], baseline: str | None) -> list[str]:
    """Notes about wrong answers, a sentence for each target that has them."""
    notes = []
    for target in targets:
        results = target.tool_results
        wrong = [result for result in results if not result.is_right]
        if not wrong:
            continue
        checks = Counter(result.failed for result in wrong)
        parts = ", ".join(f"{_FAILURES[check]} ({count})" for check, count in checks.most_common())
        notes.append(
            f"tool cases of {target.name}: {len(wrong)} of {len(results)} answered wrong: {parts}."
            " The JSON and HTML reports list them"
        )
        num_cut = sum(bool(result.got and result.got.get("cut")) for result in wrong)
        if num_cut:
            notes.append(
                f"{count_text(num_cut, 'wrong answers')} of {target.name} to tool cases were cut at"
                " --tool-max-tokens"
            )
        right_calls = [result for result in results if result.expects_call and result.is_right]
        if target.name == baseline and not right_calls:
            notes.append(
                f"the baseline {target.name} made no right call: a gate on tool accuracy relative"
                " to it shows nothing"
            )
    return notes


def failure_rows(targets: Sequence[TargetReport]) -> list[tuple[str, ...]]:
    """The wrong answers of all targets, by case."""
    rows = []
    for target in targets:
        for index, result in enumerate(target.tool_results):
            if result.is_right:
                continue
            got = result.got or {}
            calls = _calls_text(got.get("calls") or [])
            text = str(got.get("text") or "")
            row = (
                result.id,
                target.name,
                f"{_FAILURES[result.failed]}: {result.problem}",
                _calls_text(result.expected or []) or "no call",
                _short("; ".join(filter(None, (calls, text))) or "an empty answer"),
            )
            rows.append((index, row))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


def _calls_text(calls: Sequence[dict[str, Any]]) -> str:
    """Calls as `name {"argument": value}`."""
    texts = []
    for call in calls:
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        texts.append(f"{call['name']} {arguments}")
    return _short("; ".join(texts))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CELL_CHARS else f"{text[:_MAX_CELL_CHARS]}…"
