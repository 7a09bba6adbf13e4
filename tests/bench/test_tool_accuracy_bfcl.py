"""Tool cases in BFCL's file format. The cases here are our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from llmkit.bench.tool_accuracy.bfcl_cases import is_bfcl_file, json_schema
from llmkit.bench.tool_accuracy.check_answer import ChatAnswer, check_answer
from llmkit.bench.tool_accuracy.load_tool_cases import load_tool_cases
from llmkit.bench.tool_accuracy.tool_case import ToolCase
from llmkit.common.errors import InputError

HEATING = {
    "name": "heating.set",
    "description": "Set the heating.",
    "parameters": {
        "type": "dict",
        "properties": {
            "degrees": {"type": "float", "description": "Temperature."},
            "room": {"type": "string"},
            "span": {"type": "tuple", "items": {"type": "integer"}},
            "boost": {"type": "boolean", "default": False, "optional": True},
            "note": {"type": "any"},
            "plan": {
                "type": "dict",
                "properties": {"from": {"type": "integer"}, "name": {"type": "string"}},
            },
            "steps": {
                "type": "array",
                "items": {"type": "dict", "properties": {"at": {"type": "float"}}},
            },
        },
        "required": ["degrees", "room"],
    },
}
RIGHT = {"degrees": 20, "room": "Living Room"}
ANSWER = {
    "heating.set": {
        "degrees": [20.0],
        "room": ["living-room", "lounge"],
        "span": [[6, 22], ""],
        "boost": ["", False],
        "note": ["", "soon"],
        "plan": ["", {"from": [7, 8], "name": ["", "winter"]}],
        "steps": ["", [{"at": [1.5, 2]}, {"at": [3]}]],
    }
}


def write(folder: Path, name: str, questions: list[Any], answers: list[Any] | None = None) -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(entry) for entry in questions) + "\n")
    if answers is not None:
        (folder / "possible_answer").mkdir(exist_ok=True)
        lines = "\n".join(json.dumps(entry) for entry in answers)
        (folder / "possible_answer" / name).write_text(lines)
    return str(path)


def question(case_id: str, **fields: Any) -> dict[str, Any]:
    turn = [{"role": "user", "content": "Heat the living room to 20 degrees."}]
    return {"id": case_id, "question": [turn], "function": [HEATING], **fields}


def read_one(folder: Path, case_id: str, ground_truth: list[Any]) -> ToolCase:
    answers = [{"id": case_id, "ground_truth": ground_truth}]
    (case,) = load_tool_cases([write(folder, "BFCL.json", [question(case_id)], answers)], None)
    return case


def failed(case: ToolCase, *calls: dict[str, Any]) -> str:
    """The check that an answer with calls of heating.set fails."""
    sent = tuple(("heating_set", json.dumps(arguments)) for arguments in calls)
    return check_answer(case, ChatAnswer(calls=sent)).failed


def test_bfcl_types_become_json_schema() -> None:
    schema = json_schema(HEATING["parameters"])
    Draft202012Validator.check_schema(schema)
    assert schema == {
        "type": "object",
        "properties": {
            "degrees": {"type": "number", "description": "Temperature."},
            "room": {"type": "string"},
            "span": {"type": "array", "items": {"type": "integer"}},
            "boost": {"type": "boolean", "default": False},
            "note": {},
            "plan": {
                "type": "object",
                "properties": {"from": {"type": "integer"}, "name": {"type": "string"}},
            },
            "steps": {
                "type": "array",
                "items": {"type": "object", "properties": {"at": {"type": "number"}}},
            },
        },
        "required": ["degrees", "room"],
    }


def test_bfcl_case_becomes_a_request(tmp_path: Path) -> None:
    case = read_one(tmp_path, "live_simple_4-2-0", [ANSWER])
    assert case.category == "live_simple"
    assert [message["role"] for message in case.messages] == ["user"]
    (tool,) = case.tools
    assert tool["type"] == "function"
    assert tool["function"]["name"] == "heating_set"  # OpenAI's names have no dots
    assert tool["function"]["description"] == "Set the heating."
    assert case.references == [
        {"name": "heating_set", "arguments": {"degrees": 20.0, "room": "living-room"}}
    ]


@pytest.mark.parametrize(
    ("extra", "check"),
    [
        ({}, ""),
        ({"degrees": 20.0}, ""),  # an integer passes for a float, too
        ({"degrees": 21}, "equal"),
        ({"degrees": "20"}, "schema"),
        ({"room": "LOUNGE"}, ""),
        ({"room": "attic"}, "equal"),
        ({"span": [6, 22]}, ""),
        ({"span": [22, 6]}, "equal"),
        ({"boost": False}, ""),
        ({"boost": True}, "equal"),
        ({"note": "Soon!"}, "equal"),
        ({"note": "SO-ON"}, ""),
        ({"plan": {"from": 8}}, ""),
        ({"plan": {"from": 7, "name": "Winter"}}, ""),
        ({"plan": {"name": "winter"}}, "equal"),
        ({"plan": {"from": 9}}, "equal"),
        ({"plan": {"from": 7, "to": 9}}, "equal"),
        ({"steps": [{"at": 2}, {"at": 3.0}]}, ""),
        ({"steps": [{"at": 3}, {"at": 2}]}, "equal"),
        ({"steps": [{"at": 2}]}, "equal"),
        ({"loud": True}, "equal"),
    ],
)
def test_bfcl_arguments_are_compared_as_bfcl_does(
    tmp_path: Path, extra: dict[str, Any], check: str
) -> None:
    case = read_one(tmp_path, "simple_python_0", [ANSWER])
    assert failed(case, RIGHT | extra) == check


def test_bfcl_parallel_calls_may_have_any_order(tmp_path: Path) -> None:
    second = {"heating.set": {"degrees": [5], "room": ["cellar"]}}
    case = read_one(tmp_path, "parallel_3", [ANSWER, second])
    cellar = {"degrees": 5, "room": "cellar"}
    assert failed(case, cellar, RIGHT) == ""
    assert failed(case, RIGHT) == "equal"
    assert failed(case, RIGHT, RIGHT) == "equal"


def test_bfcl_reference_counts_more_than_the_schema(tmp_path: Path) -> None:
    """Some of BFCL's answers are a variable's name where the schema has a number."""
    case = read_one(
        tmp_path, "simple_python_1", [{"heating.set": {"degrees": ["target"], "room": ["", "x"]}}]
    )
    assert failed(case, {"degrees": "target", "room": "x"}) == ""
    assert failed(case, {"degrees": "other", "room": "x"}) == "schema"
    assert failed(case, {"degrees": "target"}) == "schema"  # room is required


def test_bfcl_irrelevance_and_relevance_need_no_answers(tmp_path: Path) -> None:
    path = write(
        tmp_path, "BFCL.json", [question("irrelevance_0"), question("live_relevance_1-1-0")]
    )
    irrelevant, relevant = load_tool_cases([path], None)
    assert (irrelevant.category, relevant.category) == ("irrelevance", "live_relevance")
    assert not irrelevant.expects_call
    assert relevant.expects_call
    assert (failed(irrelevant), failed(irrelevant, RIGHT)) == ("", "no_call")
    assert (failed(relevant), failed(relevant, RIGHT), failed(relevant, {})) == (
        "name",
        "",
        "schema",
    )


@pytest.mark.parametrize(
    ("entry", "answers", "message"),
    [
        (question("simple_python_0"), None, "answers cannot be read .*possible_answer"),
        (question("simple_python_0"), [], "is not a case of BFCL .ValueError: no answer"),
        (question("simple_java_0"), [], "simple_java of BFCL is not supported: its arguments are"),
        (question("multi_turn_base_0"), [], "multi_turn_base of BFCL .* its tools must be run"),
        (
            question("irrelevance_0", question=[[], []]),
            [],
            "irrelevance_0 is not a case of BFCL .ValueError: too many values",
        ),
        (
            question("simple_python_0"),
            [{"id": "simple_python_0", "ground_truth": [{"heating.set": {"room": "x"}}]}],
            "is not a case of BFCL .TypeError: 'x' is not a list of accepted values",
        ),
        (
            question("simple_python_0"),
            [{"id": "simple_python_0", "ground_truth": [{"cooling": {}}]}],
            "expects a call of cooling, which is not offered",
        ),
        (question("simple_python_0"), [[1]], "BFCL.json, line 1: a line without an id"),
    ],
)
def test_bfcl_file_that_cannot_be_used_is_refused(
    tmp_path: Path, entry: dict[str, Any], answers: list[Any] | None, message: str
) -> None:
    path = write(tmp_path, "BFCL.json", [entry], answers)
    with pytest.raises(InputError, match=message):
        load_tool_cases([path], None)


def test_bfcl_file_is_known_by_its_first_line() -> None:
    assert is_bfcl_file(json.dumps(question("a_0")).encode())
    assert not is_bfcl_file(b'{"cases": []}')
    assert not is_bfcl_file(b"{\n")
    assert not is_bfcl_file(b"[1]")
