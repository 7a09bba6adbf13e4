"""Checks the answer to a tool case: its form, the tools it names, their schemas, the calls.

Every check is made on what the client gets. So a call that the server left in the text, because it
does not read how the model writes calls, fails as a call that the model wrote wrongly does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.bench.tool_accuracy.expected_calls import match_calls
from llmkit.bench.tool_accuracy.tool_case import ToolCase
from llmkit.bench.tool_accuracy.tool_results import FailedCheck, ToolCaseResult
from llmkit.runtime.server.text.tool_dialects import DIALECTS, ParameterCall, ToolDialect

_MAX_TEXT_CHARS = 2000  # of an answer, in a report
_MAX_OBJECTS = 64  # that are looked for in an answer's text
_MARK = re.compile(r"[<\[|｜]")  # noqa: RUF001 - as DeepSeek writes it; words alone are no marks


@dataclass(frozen=True)
class ChatAnswer:
    """What a server answered to a case."""

    text: str = ""
    # (name, arguments) of each call; the arguments should be the text of a JSON object.
    calls: tuple[tuple[str, Any], ...] = ()
    is_cut: bool = False  # it ended because of the limit of its tokens
    refusal: str = ""  # why the server refused the request; "": it did not


@dataclass(frozen=True)
class _LeftoverCall:
    """A call that is still in the text of an answer."""

    name: str | None  # None: it cannot be read


def check_answer(case: ToolCase, answer: ChatAnswer) -> ToolCaseResult:
    """The result of a case: the first check that the answer fails, or none."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def failed(check: FailedCheck, problem: str) -> ToolCaseResult:
        got: dict[str, Any] = {
            "calls": [{"name": name, "arguments": value} for name, value in calls or answer.calls],
            "text": answer.text[:_MAX_TEXT_CHARS],
        }
        if answer.is_cut:
            got["cut"] = True  # at the limit of its tokens
        return ToolCaseResult(
            case.id, case.category, case.expects_call, check, problem, case.references, got
        )

    if answer.refusal:
        return failed("well_formed", f"the server refused the request: {answer.refusal}")
    for name, text in answer.calls:
        arguments = _json_object(text)
        if arguments is None:
            return failed("well_formed", f"the arguments of {name} are not a JSON object")
        calls.append((name, arguments))
    leftover = find_leftover_call(answer.text, case.tool_names)
    if leftover is not None:
        if leftover.name is None or leftover.name in case.tool_names:
            return failed("well_formed", "the text has a call that was not read")
        return failed(
            "name" if case.expects_call else "no_call",
            f"the text calls {leftover.name}, which is not offered",
        )
    if not case.expects_call and calls:
        names = ", ".join(name for name, _ in calls)
        return failed("no_call", f"{names} was called, and no call was expected")
    if case.expects_call and not calls:
        return failed("name", "no call was made")
    for name, _ in calls:
        if name not in case.tool_names:
            return failed("name", f"{name} is not offered")
    for name, arguments in calls:
        # Values that the case accepts are right, whatever the schema says: BFCL has such cases.
        is_expected = any(not call.differences(name, arguments) for call in case.calls or ())
        problem = case.schema_error(name, arguments, only_required=is_expected)
        if problem:
            return failed("schema", f"{name}: {problem}")
    differences = [] if case.calls is None else match_calls(case.calls, calls)
    if differences:
        return failed("equal", "; ".join(differences))
    return case.right_result()


def find_leftover_call(text: str, tool_names: Collection[str]) -> _LeftoverCall | None:
    """A call that a server left in an answer's text; None: there is none.

    A call is an object with a name and arguments, a mark of any dialect of calls, or an answer that
    begins with the Python call of an offered tool.
    """
    for value in _objects(text):
        name = value.get("name")
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(name, str) and isinstance(arguments, (dict, str)):
            return _LeftoverCall(name)
    if any(mark in text for mark in _CALL_MARKS):
        return _LeftoverCall(None)
    python_call = re.match(r"\s*\[?\s*([\w.-]+)\(", text)
    if python_call and python_call[1] in tool_names:
        return _LeftoverCall(python_call[1])
    return None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text that are not inside of others, the first _MAX_OBJECTS."""
    decoder = json.JSONDecoder()
    position = text.find("{")
    for _ in range(_MAX_OBJECTS):
        if position < 0:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            yield value
        position = text.find("{", end)


def _json_object(text: Any) -> dict[str, Any] | None:
    """The object in the text of a call's arguments; None: it is none."""
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    """NaN and Infinity are not JSON."""
    raise ValueError(name)


def _call_marks(dialects: Sequence[ToolDialect]) -> frozenset[str]:
    """The marks that begin calls in any dialect."""
    marks = set()
    for dialect in dialects:
        marks |= {dialect.section_start, *dialect.other_section_starts, dialect.call_start}
        if isinstance(dialect.syntax, ParameterCall):
            marks.add(dialect.syntax.before_name)
    return frozenset(mark for mark in marks if _MARK.search(mark))


_CALL_MARKS = _call_marks(DIALECTS)
