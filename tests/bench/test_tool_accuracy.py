"""Tool cases: the built-in ones, how answers are checked, and the metrics that follow."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llmkit.bench.bench_metrics import find_metric
from llmkit.bench.bench_report import BenchReport, TargetReport
from llmkit.bench.confidence_intervals import share_interval
from llmkit.bench.report_tables import sections
from llmkit.bench.tool_accuracy.ask_tool_cases import parse_answer
from llmkit.bench.tool_accuracy.check_answer import ChatAnswer, check_answer, find_leftover_call
from llmkit.bench.tool_accuracy.expected_calls import AllowedValues, TextRule
from llmkit.bench.tool_accuracy.load_tool_cases import load_tool_cases
from llmkit.bench.tool_accuracy.tool_case import ToolCase
from llmkit.bench.tool_accuracy.tool_report import failure_rows, tool_notes
from llmkit.bench.tool_accuracy.tool_results import (
    FailedCheck,
    ToolCaseResult,
    mcnemar_differs,
    tool_metrics,
)
from llmkit.common.errors import InputError
from llmkit.runtime.server.text.tool_dialects import DIALECTS

ROOT = Path(__file__).parents[2]
BUILTIN_FILE = ROOT / "bench" / "tool_accuracy" / "builtin_tool_cases.json"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def load_case(tmp_path: Path, calls: list[dict[str, Any]], **fields: Any) -> ToolCase:
    """A case that offers weather and clock, read from a file."""
    case = {
        "id": "one",
        "category": "simple",
        "messages": "How is the weather?",
        "tools": [WEATHER, CLOCK],
        "calls": calls,
        **fields,
    }
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(case))
    (loaded,) = load_tool_cases([str(path)], None)
    return loaded


def answer(*calls: tuple[str, Any], text: str = "") -> ChatAnswer:
    """An answer with calls, whose arguments are values or the text that a server sent."""
    sent = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in calls]
    return ChatAnswer(text, tuple(sent))


# The built-in cases.


def test_builtin_tool_cases_are_many_and_of_all_kinds() -> None:
    cases = load_tool_cases(["builtin"], None)
    counts = Counter(case.category for case in cases)
    assert len(cases) >= 200
    assert min(counts.values()) >= 15
    assert {"simple", "multiple", "parallel", "parallel_multiple", "nested"} <= counts.keys()
    assert {"optional", "unicode", "irrelevance", "multi_turn"} <= counts.keys()
    assert all(not case.expects_call for case in cases if case.category == "irrelevance")
    assert any(
        not case.expects_call for case in cases if case.category == "multi_turn"
    )  # a tool's result may end the work
    assert {len(case.calls or ()) for case in cases if case.category == "simple"} == {1}
    assert all(len(case.tools) == 1 for case in cases if case.category == "simple")
    assert all(len(case.tools) > 1 for case in cases if case.category == "multiple")
    assert all(len(case.calls or ()) > 1 for case in cases if case.category.startswith("parallel"))


def test_builtin_tool_cases_are_consistent() -> None:
    """Loading them has checked that references keep their schemas and name offered tools."""
    cases = load_tool_cases(["builtin"], None)
    assert len({case.id for case in cases}) == len(cases)
    conversations = [
        " ".join(json.dumps(case.messages, sort_keys=True).casefold().split()) for case in cases
    ]
    assert len(set(conversations)) == len(cases)
    for case in cases:
        assert case.id.startswith(f"{case.category}_")
        assert all(tool["function"]["description"] for tool in case.tools), case.id
        assert case.messages[-1]["role"] in ("user", "tool"), case.id
        right = answer(*[(call.name, dict(call.reference)) for call in reversed(case.calls or ())])
        assert check_answer(case, right).is_right, case.id


def test_builtin_tool_cases_tell_each_call_apart() -> None:
    """No answer is right that lacks a call, has one twice, or has another one's arguments."""
    for case in load_tool_cases(["builtin"], None):
        calls = [(call.name, dict(call.reference)) for call in case.calls or ()]
        assert not check_answer(
            case, answer(*calls, *(calls[:1] or [(first_tool(case), {})]))
        ).is_right
        if not calls:
            continue
        assert not check_answer(case, answer(*calls[1:])).is_right
        assert not check_answer(case, answer(*[calls[0]] * len(calls))).is_right or len(calls) == 1


def first_tool(case: ToolCase) -> str:
    return str(case.tools[0]["function"]["name"])


def test_builtin_tool_results_belong_to_calls() -> None:
    for case in load_tool_cases(["builtin"], None):
        open_calls: set[str] = set()
        for message in case.messages:
            for call in message.get("tool_calls", ()):
                name = call["function"]["name"]
                assert name in case.tool_names, case.id
                arguments = json.loads(call["function"]["arguments"])
                assert case.schema_error(name, arguments) == "", case.id
                open_calls.add(call["id"])
            if message["role"] == "tool":
                json.loads(message["content"])
                open_calls.remove(message["tool_call_id"])
        assert not open_calls, case.id


def test_builtin_tool_cases_have_a_license_and_no_unused_tools() -> None:
    document = json.loads(BUILTIN_FILE.read_text())
    assert document["license"] == "Apache-2.0"
    used = {name for case in document["cases"] for name in case["tools"]}
    assert used == document["tools"].keys()


def test_builtin_tool_cases_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]
    assert BUILTIN_FILE.name in data["llmkit.bench.tool_accuracy"]
    assert json.loads(BUILTIN_FILE.read_text())["license"] == project["project"]["license"]


def test_tool_limit_spreads_over_categories() -> None:
    cases = load_tool_cases(["builtin"], 20)
    counts = Counter(case.category for case in cases)
    assert len(cases) == 20
    assert len(counts) == 9
    assert set(counts.values()) == {2, 3}
    assert load_tool_cases(["builtin"], 10_000) == load_tool_cases(["builtin"], None)


# Files that contradict themselves.


def tool_with(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "x", "parameters": parameters}}


@pytest.mark.parametrize(
    ("calls", "fields", "message"),
    [
        ([{"name": "tides"}], {}, "expects a call of tides, which is not offered. It offers clock"),
        ([{"name": "weather"}], {}, "break its schema .'city' is a required property"),
        (
            [{"name": "weather", "arguments": {"city": "Bonn"}, "also": {"city": [7]}}],
            {},
            "break its schema .city: 7 is not of type 'string'",
        ),
        (
            [{"name": "weather", "arguments": {"city": "Bonn"}, "exact": ["unit"]}],
            {},
            "says something of the argument unit of weather",
        ),
        ([], {"tools": ["tides"]}, "offers tides, which is not among the file's tools"),
        ([], {"tools": [{"function": {}}]}, "has a tool without a name"),
        ([], {"tools": [CLOCK, CLOCK]}, "offers two tools of one name"),
        (
            [],
            {"tools": [{"function": {"name": "x", "parameters": {"type": "dict"}}}]},
            "the parameters of x are no JSON Schema",
        ),
        (
            [{"name": "x"}],
            {"tools": [{"function": {"name": "x", "parameters": {"$ref": "http://127.0.0.1/x"}}}]},
            "the parameters of x refer to http://127.0.0.1/x. References within the schema",
        ),
        (
            [{"name": "x"}],
            {"tools": [tool_with({"type": "object", "properties": {"a": {"type": "float"}}})]},
            "the parameters of x are no JSON Schema",
        ),
        ([], {"tools": [tool_with([])]}, "are no JSON Schema .*"),
        ([], {"kind": "simple"}, "has no tool cases .*unknown field `kind`"),
    ],
)
def test_tool_case_that_contradicts_itself_is_refused(
    tmp_path: Path, calls: list[dict[str, Any]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_case(tmp_path, calls, **fields)


def test_tool_cases_with_one_id_are_refused(tmp_path: Path) -> None:
    load_case(tmp_path, [])
    (tmp_path / "again.jsonl").write_text((tmp_path / "cases.jsonl").read_text())
    sources = [str(tmp_path / "cases.jsonl"), str(tmp_path / "again.jsonl")]
    with pytest.raises(InputError, match="two tool cases have the id one"):
        load_tool_cases(sources, None)
    assert len(load_tool_cases([sources[0], sources[0]], None)) == 1
    with pytest.raises(InputError, match=r"absent.json cannot be read \(No such file"):
        load_tool_cases([str(tmp_path / "absent.json")], None)


# Answers.

BONN = {"name": "weather", "arguments": {"city": "Bonn"}}


@pytest.mark.parametrize(
    ("given", "failed", "problem"),
    [
        (answer(("weather", {"city": "Bonn"})), "", ""),
        (answer(("weather", {"city": " bonn."})), "", ""),
        (answer(("weather", {"city": "Bonn", "unit": "celsius"})), "", ""),
        (answer(("weather", {"city": "Bonn"}), text="Let me look."), "", ""),
        (answer(("weather", {"city": "Bonn", "tags": []})), "", ""),
        (answer(("weather", {"city": "Bonn", "tags": ""})), "schema", "is not of type 'array'"),
        (answer(("weather", {"city": "Bonn", "tags": ["x"]})), "equal", "tags has another value"),
        (answer(("weather", {"city": "Köln"})), "equal", "argument city has another value"),
        (answer(("weather", {"city": "Bonn", "days": 2})), "equal", "days is not expected"),
        (
            answer(("weather", {"city": "Bonn", "unit": "fahrenheit"})),
            "equal",
            "argument unit has another value",
        ),
        (answer(("clock", {})), "equal", "clock was called, not weather"),
        (
            answer(("weather", {"city": "Bonn"}), ("clock", {})),
            "equal",
            "2 calls, 1 expected",
        ),
        (answer(("weather", {})), "schema", "'city' is a required property"),
        (answer(("weather", {"city": "Bonn", "days": 0})), "schema", "days: 0 is less than"),
        (answer(("weather", {"city": ["Bonn"]})), "schema", "is not of type 'string'"),
        (answer(("tides", {"city": "Bonn"})), "name", "tides is not offered"),
        (answer(text="It rains."), "name", "no call was made"),
        (answer(), "name", "no call was made"),
        (answer(("weather", '{"city": "Bonn"')), "well_formed", "not a JSON object"),
        (answer(("weather", '["Bonn"]')), "well_formed", "not a JSON object"),
        (answer(("weather", '{"city": NaN}')), "well_formed", "not a JSON object"),
        (answer(("weather", "")), "well_formed", "not a JSON object"),
        (ChatAnswer(calls=(("weather", {"city": "Bonn"}),)), "well_formed", "not a JSON object"),
        (
            answer(
                text='<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
            ),
            "well_formed",
            "a call that was not read",
        ),
        (
            answer(text='<tool_call>{"name": "tides", "arguments": {}}</tool_call>'),
            "name",
            "calls tides, which is not offered",
        ),
        (ChatAnswer(refusal="HTTP 400: no"), "well_formed", "refused the request: HTTP 400: no"),
    ],
)
def test_tool_answer_fails_its_first_wrong_check(
    tmp_path: Path, given: ChatAnswer, failed: FailedCheck, problem: str
) -> None:
    result = check_answer(load_case(tmp_path, [BONN]), given)
    assert (result.failed, result.expects_call) == (failed, True)
    assert problem in result.problem
    if failed:
        assert result.expected == [BONN]
        assert result.got is not None
        assert result.got["text"] == given.text
    else:
        assert result.got is None


@pytest.mark.parametrize(
    ("given", "failed"),
    [
        (answer(text="Just words."), ""),
        (answer(), ""),
        (answer(("clock", {})), "no_call"),
        (answer(text='{"name": "tides", "parameters": {"at": 3}}'), "no_call"),
        (answer(text="[TOOL_CALLS] hm"), "well_formed"),
        (answer(text='An object such as {"name": "x"} is no call.'), ""),
    ],
)
def test_tool_case_without_calls_wants_text(
    tmp_path: Path, given: ChatAnswer, failed: FailedCheck
) -> None:
    assert check_answer(load_case(tmp_path, []), given).failed == failed


def test_tool_answer_may_have_parallel_calls_in_any_order(tmp_path: Path) -> None:
    loose = {"name": "weather", "arguments": {"city": "Bonn"}, "also": {"city": ["Kiel"]}}
    case = load_case(tmp_path, [loose, BONN])
    kiel = ("weather", {"city": "Kiel"})
    bonn = ("weather", {"city": "Bonn"})
    assert check_answer(case, answer(kiel, bonn)).is_right
    # Bonn fits both expected calls: the match must not spend it on the first.
    assert check_answer(case, answer(bonn, kiel)).is_right
    assert check_answer(case, answer(bonn, bonn)).is_right
    twice = check_answer(case, answer(kiel, kiel))
    assert twice.problem == "no call is the expected one of weather"
    assert check_answer(case, answer(bonn)).problem == "1 call, 2 expected"
    assert check_answer(case, answer(bonn, kiel, kiel)).problem == "3 calls, 2 expected"
    narrow = load_case(tmp_path, [{**loose, "also": {}}, BONN])
    two = check_answer(narrow, answer(bonn, kiel))
    assert two.problem == "two expected calls are the same call of the answer"


def test_unordered_lists_of_equal_values_are_compared_at_once() -> None:
    """Trying every order of 30 values would never end."""
    allowed = AllowedValues((["a"] * 30 + ["b"],), unordered=True)
    assert allowed.accepts(["a"] * 10 + ["b"] + ["a"] * 20)
    assert not allowed.accepts(["a"] * 31)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"choices": []},
        {"choices": ["text"]},
        {"choices": [{"message": "text"}]},
        {"choices": [{"message": {"tool_calls": [{"function": "name"}]}}]},
    ],
)
def test_document_that_is_no_chat_answer_is_refused(document: Any) -> None:
    with pytest.raises((LookupError, TypeError, AttributeError)):
        parse_answer(document)


def test_tool_arguments_have_options_of_comparison(tmp_path: Path) -> None:
    call = {
        "name": "weather",
        "arguments": {"city": "Bonn", "days": 3, "tags": ["a", "b"]},
        "optional": ["days"],
        "exact": ["city"],
        "unordered": ["tags"],
    }
    case = load_case(tmp_path, [call])

    def is_right(**arguments: Any) -> bool:
        return check_answer(case, answer(("weather", arguments))).is_right

    assert is_right(city="Bonn", tags=["b", "A"])
    assert is_right(city="Bonn", tags=["a", "b"], days=3.0)
    assert not is_right(city="bonn", tags=["a", "b"])
    assert not is_right(city="Bonn", tags=["a", "a"])
    assert not is_right(city="Bonn", tags=["a", "b", "c"])
    assert not is_right(city="Bonn", tags=["a", "b"], days=4)


@pytest.mark.parametrize(
    ("expected", "value", "is_accepted"),
    [
        (1, 1.0, True),
        (1.5, 1.5, True),
        (1, True, False),
        (True, 1, False),
        (False, False, True),
        (None, None, True),
        (None, 0, False),
        ("1", 1, False),
        ([1, 2], [2, 1], False),
        ({"a": [1, {"b": "X"}]}, {"a": [1, {"b": "x"}]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, ["a"], False),
        ("Ångström", "Ångström", True),  # composed and decomposed
    ],
)
def test_json_values_are_compared_by_type_and_value(
    expected: Any, value: Any, is_accepted: bool
) -> None:
    assert AllowedValues((expected,)).accepts(value) is is_accepted


def test_text_rules_ignore_more_or_less() -> None:
    def accepts(rule: TextRule, expected: str, value: str) -> bool:
        return AllowedValues((expected,), text_rule=rule).accepts(value)

    assert accepts(TextRule.PLAIN, "See you  soon", "see you soon.")
    assert not accepts(TextRule.PLAIN, "a/b", "ab")
    assert not accepts(TextRule.EXACT, "a", "A")
    assert accepts(TextRule.EXACT, "a", "a")
    assert accepts(TextRule.BFCL, "April 1, 2024", "april 1 2024")
    assert accepts(TextRule.BFCL, "it's", 'IT"S')
    assert not accepts(TextRule.BFCL, "a(b)", "ab")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_leftover_calls_of_each_dialect_are_found(dialect: Any) -> None:
    mark = dialect.section_start or dialect.call_start
    if len(mark) > 1 and not mark.isalpha():
        found = find_leftover_call(f"Well: {mark}weather", {"weather"})
        assert found is not None
        assert found.name is None


def test_leftover_calls_are_no_ordinary_text() -> None:
    assert find_leftover_call('[weather(city="Bonn")]', {"weather"}) is not None
    assert find_leftover_call("weather(x) is a function of mine", {"clock"}) is None
    assert find_leftover_call("Use `weather` [1] <b>now</b> {a} {", {"weather"}) is None
    assert find_leftover_call('{"name": "Ann", "age": 3}', {"weather"}) is None
    nested = find_leftover_call('[{"name": "clock", "arguments": {}}]', {"clock"})
    assert nested is not None
    assert nested.name == "clock"


# Metrics.


def results(**failed: FailedCheck) -> list[ToolCaseResult]:
    """Results by id; ids that begin with n expect no call."""
    return [
        ToolCaseResult(id_, "none" if id_[0] == "n" else "calls", id_[0] != "n", check)
        for id_, check in failed.items()
    ]


def test_tool_metrics_are_a_funnel() -> None:
    metrics = tool_metrics(
        results(a="", b="", c="equal", d="schema", e="name", f="well_formed", n1="", n2="no_call")
    )
    assert metrics == {
        "tool_accuracy": 3 / 8,
        "tool_well_formed": 7 / 8,
        "tool_name": 4 / 6,
        "tool_schema": 3 / 6,
        "tool_equal": 2 / 6,
        "tool_no_call": 1 / 2,
        "tool.calls.accuracy": 2 / 6,
        "tool.none.accuracy": 1 / 2,
    }
    assert all(find_metric(name) is not None for name in metrics)
    assert find_metric("tool..accuracy") is None
    assert "tool_no_call" not in tool_metrics(results(a=""))
    assert "tool_name" not in tool_metrics(results(n=""))


@pytest.mark.parametrize(
    ("only_a", "only_b", "differs"), [(0, 5, False), (0, 6, True), (1, 7, False), (8, 1, True)]
)
def test_targets_are_compared_by_mcnemars_exact_test(
    only_a: int, only_b: int, differs: bool
) -> None:
    """By hand: 2 * P(X <= min) of a fair coin: 0.0625, 0.03125, 0.0703, 0.0391."""
    a = {f"a{i}": True for i in range(only_a)} | {f"b{i}": False for i in range(only_b)}
    b = {case: not passed for case, passed in a.items()}
    both = {f"c{i}": True for i in range(50)}
    assert mcnemar_differs(a | both, b | both) is differs
    assert mcnemar_differs(a, {"other": True}) is None
    assert mcnemar_differs(both, both) is False


def test_share_interval_is_wilsons() -> None:
    """Values of the formula for 45 of 50 and for 20 of 20, computed by hand to four digits."""
    assert share_interval(45, 50) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    assert share_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert share_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def report_of(**targets: Iterable[ToolCaseResult]) -> BenchReport:
    entries = []
    for name, answers in targets.items():
        checked = list(answers)
        entries.append(TargetReport(name, name, "url", tool_metrics(checked), tool_results=checked))
    return BenchReport(entries, baseline=next(iter(targets)))


def test_tool_report_marks_chance_and_keeps_its_answers() -> None:
    base = [ToolCaseResult(str(i), "calls", True) for i in range(20)]
    chance = [ToolCaseResult(str(i), "calls", True, "equal" if i < 5 else "") for i in range(20)]
    worse = [ToolCaseResult(str(i), "calls", True, "equal" if i < 6 else "") for i in range(20)]
    report = report_of(base=base, chance=chance, worse=worse)
    rows = {row.title: row.cells for _, lines in sections(report) for row in lines}
    cells = rows["tool cases answered right"]
    assert [cell.value for cell in cells] == ["100", "75", "70"]
    assert [cell.ratio for cell in cells] == ["", "~0.75x", "0.70x"]
    assert [cell.spread for cell in cells] == [" (83.9 to 100)", " ±18", " ±19"]
    assert rows["tool cases answered right: calls"][2].ratio == "0.70x"
    document = report.to_json()
    low, high = document["targets"][1]["intervals"]["tool_accuracy"]
    assert low < 0.75 < high
    again = BenchReport.from_json(json.loads(json.dumps(document)))
    assert again == report


def test_tool_notes_count_what_failed() -> None:
    cut = ToolCaseResult("b", "calls", True, "name", "no call was made", [BONN], {"cut": True})
    report = report_of(base=[*results(a="equal", n=""), cut], other=results(a="", b="", n=""))
    first, second, third = tool_notes(report.targets, "base")
    kinds = "not the expected calls (1), no call of an offered tool (1)"
    assert f"tool cases of base: 2 of 3 answered wrong: {kinds}." in first
    assert "cut at --tool-max-tokens" in second
    assert "made no right call: a gate on tool accuracy relative to it shows nothing" in third
    assert tool_notes(report.targets, "other") == [first, second]
    (_, row) = failure_rows(report.targets)
    assert row[:3] == ("b", "base", "no call of an offered tool: no call was made")
    assert row[3] == 'weather {"city": "Bonn"}'
    assert row[4] == "an empty answer"
