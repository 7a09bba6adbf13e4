"""Cases in the format of the Berkeley Function Calling Leaderboard (BFCL, versions 3 and 4).

A file has on each line an `id`, a `question` (turns, each a list of messages) and `function`s whose
types have Python's names. The answers are in a file of the same name in the folder
`possible_answer`: for each argument the list of its accepted values, "" where it may be left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.bench.tool_accuracy.expected_calls import (
    AllowedObject,
    AllowedValues,
    ExpectedCall,
    TextRule,
)
from llmkit.bench.tool_accuracy.tool_case import ToolCase, check_tools
from llmkit.common.errors import InputError
from llmkit.common.json_lines import read_json_lines

ANSWERS_FOLDER = "possible_answer"
_JSON_TYPES = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "tuple": "array",
    "list": "array",
    "bool": "boolean",
    "long": "integer",
}
_MAYBE_MISSING = ""  # among an argument's values
_ID = re.compile(r"(?P<category>[a-z_]+?)_\d+(?:-\d+-\d+)?")
# Beginnings of categories that are executed, or whose arguments are code of another language.
_NOT_SUPPORTED = ("multi_turn", "web_search", "memory", "format_sensitivity")
_OTHER_LANGUAGES = ("simple_java", "java")
Json = dict[str, Any]


def is_bfcl_file(data: bytes) -> bool:
    """Whether the first line is a BFCL question."""
    try:
        first = json.loads(data.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and {"id", "question"} <= first.keys()


def read_bfcl_cases(path: Path, data: bytes) -> list[ToolCase]:
    """The cases of a file of questions.

    Raises InputError for a category that is executed, for Java and JavaScript, and where an answer
    is missing.
    """
    questions = _read_lines(path, data)
    categories = {
        str(question["id"]): _category(path, str(question["id"])) for question in questions
    }
    answers_path = path.parent / ANSWERS_FOLDER / path.name
    answers: dict[str, Any] = {}
    if not all("relevance" in category for category in categories.values()):
        try:
            answers_data = answers_path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path} are questions of BFCL, and their answers cannot be read"
                f" ({answers_path}: {error.strerror})",
                f"A file of the same name in a folder {ANSWERS_FOLDER} beside it was expected",
            ) from error
        for entry in _read_lines(answers_path, answers_data):
            answers[str(entry["id"])] = entry.get("ground_truth")
    cases = []
    for question in questions:
        case_id = str(question["id"])
        try:
            cases.append(_case(question, categories[case_id], answers.get(case_id)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: {case_id} is not a case of BFCL ({type(error).__name__}: {error})",
                "One turn of messages, functions with parameters, and an answer were expected",
            ) from error
    return cases


def json_schema(schema: Json) -> Json:
    """A BFCL parameter description as JSON Schema."""
    converted: Json = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            if value != "any":
                converted["type"] = _JSON_TYPES.get(value, value)
        elif key == "properties":
            converted[key] = {name: json_schema(entry) for name, entry in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            converted[key] = json_schema(value)
        elif key == "optional":
            continue  # says again what `required` says
        else:
            converted[key] = value
    return converted


def _read_lines(path: Path, data: bytes) -> list[Json]:
    entries = []
    for number, entry in read_json_lines(data, str(path)):
        if not isinstance(entry, dict) or "id" not in entry:
            raise InputError(f"{path}, line {number}: a line without an id")
        entries.append(entry)
    return entries


def _category(path: Path, case_id: str) -> str:
    """The category in a case's id: "live_simple" of "live_simple_3-2-0"."""
    match = _ID.fullmatch(case_id)
    category = match["category"] if match else path.stem
    if category.startswith((*_NOT_SUPPORTED, *_OTHER_LANGUAGES)):
        reason = "its tools must be run"
        if category.startswith(_OTHER_LANGUAGES):
            reason = "its arguments are code of another language"
        raise InputError(
            f"{path}: category {category} of BFCL is not supported: {reason}",
            "simple_python, multiple, parallel, parallel_multiple, irrelevance and live_* are",
        )
    return category


def _case(question: Json, category: str, answer: Any) -> ToolCase:
    (messages,) = question["question"]
    functions = {entry["name"]: entry for entry in question["function"]}
    calls: tuple[ExpectedCall, ...] | None
    if "irrelevance" in category:
        calls = ()
    elif "relevance" in category:
        calls = None
    elif answer is None:
        raise ValueError("no answer")
    else:
        calls = tuple(
            _expected_call(name, call) for entry in answer for name, call in entry.items()
        )
    schemas = {
        name: {**json_schema(entry["parameters"]), "type": "object"}
        for name, entry in functions.items()
    }
    tools = tuple(
        {
            "type": "function",
            "function": {
                "name": _tool_name(name),
                "description": entry.get("description", ""),
                "parameters": schemas[name],
            },
        }
        for name, entry in functions.items()
    )
    check_tools(str(question["id"]), tools)
    return ToolCase(str(question["id"]), category, tuple(messages), tools, calls)


def _tool_name(name: str) -> str:
    """The name as APIs take it: OpenAI's allows no dots."""
    return name.replace(".", "_")


def _expected_call(name: str, arguments: Mapping[str, Any]) -> ExpectedCall:
    allowed = {key: _allowed(values) for key, values in arguments.items()}
    reference = {
        key: _example(entry)
        for key, entry in allowed.items()
        if entry.values and not entry.optional
    }
    return ExpectedCall(_tool_name(name), allowed, reference)


def _allowed(values: Any, in_object: bool = False) -> AllowedValues:
    """An argument's accepted values.

    in_object: of a member of an object. Objects in there are plain.
    """
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list of accepted values")
    accepted = [value for value in values if value != _MAYBE_MISSING]
    return AllowedValues(
        tuple(accepted if in_object else map(_allowed_value, accepted)),
        optional=_MAYBE_MISSING in values,
        text_rule=TextRule.BFCL,
    )


def _allowed_value(value: Any) -> Any:
    """An accepted value. Members of objects, also in a list, have lists of accepted values."""
    if isinstance(value, dict):
        members = {key: _allowed(values, in_object=True) for key, values in value.items()}
        return AllowedObject(members)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_allowed_value(item) for item in value]
    return value


def _example(allowed: AllowedValues) -> Any:
    """The first accepted value, for reports."""
    return _example_value(allowed.values[0])


def _example_value(value: Any) -> Any:
    if isinstance(value, AllowedObject):
        return {
            key: _example(entry)
            for key, entry in value.members.items()
            if entry.values and not entry.optional
        }
    if isinstance(value, list):
        return [_example_value(item) for item in value]
    return value
