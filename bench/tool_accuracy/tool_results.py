"""The checked answers of a target to tool cases, and the metrics that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# The first check that an answer fails. The order is that of the checks.
FailedCheck = Literal["", "well_formed", "name", "schema", "equal", "no_call"]
TOOL_PREFIX = "tool."  # of metrics of one category: "tool.parallel.accuracy"
_CATEGORY_SUFFIX = ".accuracy"


@dataclass(frozen=True)
class ToolCaseResult:
    """The checked answer to one case."""

    id: str
    category: str
    expects_call: bool
    failed: FailedCheck = ""  # "": the answer is right
    problem: str = ""  # what is wrong, for people
    # Of wrong answers: calls as {"name": ..., "arguments": {...}}, and the answer's text.
    expected: list[dict[str, Any]] | None = None
    got: dict[str, Any] | None = None  # with "cut" if it ended at the limit of its tokens

    @property
    def is_right(self) -> bool:
        """Whether the answer passed all checks."""
        return self.failed == ""


_Passed = Callable[[ToolCaseResult], bool]
# By metric: which cases count, and which of them pass.
_CHECKS: dict[str, tuple[_Passed, _Passed]] = {
    "tool_accuracy": (lambda _: True, lambda r: r.is_right),
    "tool_well_formed": (lambda _: True, lambda r: r.failed != "well_formed"),
    "tool_name": (lambda r: r.expects_call, lambda r: r.failed in ("", "equal", "schema")),
    "tool_schema": (lambda r: r.expects_call, lambda r: r.failed in ("", "equal")),
    "tool_equal": (lambda r: r.expects_call, lambda r: r.is_right),
    "tool_no_call": (lambda r: not r.expects_call, lambda r: r.is_right),
}
TOOL_METRICS = tuple(_CHECKS)


def category_metric(category: str) -> str:
    """The full name of a category's metric."""
    return f"{TOOL_PREFIX}{category}{_CATEGORY_SUFFIX}"


def category_of_metric(name: str) -> str | None:
    """The category of a metric's full name; None for another metric."""
    if not (name.startswith(TOOL_PREFIX) and name.endswith(_CATEGORY_SUFFIX)):
        return None
    return name.removeprefix(TOOL_PREFIX).removesuffix(_CATEGORY_SUFFIX) or None


def outcomes(results: Sequence[ToolCaseResult], metric: str) -> dict[str, bool]:
    """By case, whether its answer passes what a metric counts; {} for other metrics."""
    category = category_of_metric(metric)
    if category is not None:
        return {result.id: result.is_right for result in results if result.category == category}
    if metric not in _CHECKS:
        return {}
    counts, passes = _CHECKS[metric]
    return {result.id: passes(result) for result in results if counts(result)}


def tool_metrics(results: Sequence[ToolCaseResult]) -> dict[str, float]:
    """The metrics by full name: shares of the cases that each metric counts."""
    categories = dict.fromkeys(result.category for result in results)
    names = [*TOOL_METRICS, *map(category_metric, categories)]
    passed = {name: list(outcomes(results, name).values()) for name in names}
    return {name: sum(values) / len(values) for name, values in passed.items() if values}


def mcnemar_differs(a: Mapping[str, bool], b: Mapping[str, bool]) -> bool | None:
    """Whether two targets differ at the 5 % level on the cases that both answered.

    An exact McNemar test: of the cases that only one of them has right, either has as many by
    chance. None without common cases.
    """
    common = a.keys() & b.keys()
    if not common:
        return None
    only_a = sum(a[case] and not b[case] for case in common)
    only_b = sum(b[case] and not a[case] for case in common)
    total = only_a + only_b
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    p_value: float = 2 * tail / 2**total
    return p_value < 0.05
