"""Loading tool cases: the built-in ones, llmkit's own files and BFCL's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmkit.bench.tool_accuracy.bfcl_cases import is_bfcl_file, read_bfcl_cases
from llmkit.bench.tool_accuracy.tool_case import (
    ToolCase,
    check_calls,
    check_references,
)
from llmkit.bench.tool_accuracy.tool_case_file import parse_tool_cases
from llmkit.common.errors import InputError

BUILTIN = "builtin"
_BUILTIN_FILE = Path(__file__).parent / "builtin_tool_cases.json"


def load_tool_cases(sources: Sequence[str], limit: int | None) -> list[ToolCase]:
    """The cases of all sources, `builtin` or files.

    limit: take at most so many, as many of each category as possible, the first ones.
    Raises InputError for a file that cannot be read, and for a case that contradicts itself.
    """
    cases = [case for source in dict.fromkeys(sources) for case in read_tool_cases(source)]
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise InputError(f"two tool cases have the id {case.id}", "Unique ids were expected")
        seen.add(case.id)
    return cases if limit is None else _spread(cases, limit)


def read_tool_cases(source: str) -> list[ToolCase]:
    """The cases of one source. Raises as `load_tool_cases` does."""
    path = _BUILTIN_FILE if source == BUILTIN else Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"tool cases {source} cannot be read ({error.strerror})") from error
    is_bfcl = is_bfcl_file(data)
    cases = read_bfcl_cases(path, data) if is_bfcl else parse_tool_cases(path, data)
    if not cases:
        raise InputError(f"{path} has no tool cases", "One or more were expected")
    for case in cases:
        check_calls(case)
        if not is_bfcl:
            check_references(case)
    return cases


def _spread(cases: Sequence[ToolCase], limit: int) -> list[ToolCase]:
    """The first cases of each category in turn, in the order of `cases`."""
    waiting: dict[str, list[ToolCase]] = {}
    for case in cases:
        waiting.setdefault(case.category, []).append(case)
    taken: set[str] = set()
    while len(taken) < min(limit, len(cases)):
        for category in waiting.values():
            if category and len(taken) < limit:
                taken.add(category.pop(0).id)
    return [case for case in cases if case.id in taken]
