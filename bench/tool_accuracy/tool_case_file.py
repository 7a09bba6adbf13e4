"""llmkit's own files of tool cases: JSON with `tools` by name and `cases`, or JSONL of cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator

from llmkit.bench.tool_accuracy.expected_calls import AllowedValues, ExpectedCall, TextRule
from llmkit.bench.tool_accuracy.tool_case import ToolCase, check_tools
from llmkit.common.errors import InputError

_EMPTY: tuple[Any, ...] = ("", [], {})


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    """An expected call, as files have it."""

    name: str
    arguments: dict[str, Any] = {}
    # By argument: other values that are right, too.
    also: dict[str, list[Any]] = {}
    optional: list[str] = []  # arguments that may be left out
    exact: list[str] = []  # arguments whose strings are compared character by character
    unordered: list[str] = []  # arguments whose lists may have any order


class _Case(msgspec.Struct, forbid_unknown_fields=True):
    """A case, as files have it."""

    id: str
    category: str
    messages: str | list[dict[str, Any]]  # a text is one message of the user
    tools: list[str | dict[str, Any]]  # names of the document's tools, or tools as in requests
    calls: list[_Call]


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON file of cases."""

    cases: list[_Case]
    tools: dict[str, dict[str, Any]] = {}  # description and parameters, by name
    about: str = ""
    license: str = ""


def parse_tool_cases(path: Path, data: bytes) -> list[ToolCase]:
    """The cases of a file with this content. Raises InputError for another content."""
    document = _decode(path, data)
    return [_make_case(case, document.tools, path) for case in document.cases]


def _decode(path: Path, data: bytes) -> _Document:
    try:
        if path.suffix == ".jsonl":
            return _Document(msgspec.json.Decoder(_Case).decode_lines(data))
        return msgspec.json.decode(data, type=_Document)
    except msgspec.DecodeError as error:
        raise InputError(
            f"{path} has no tool cases ({error})",
            'JSON with "tools" and "cases", JSONL with a case on each line ("id", "category",'
            ' "messages", "tools", "calls"), or a BFCL file ("id", "question", "function")',
        ) from error


def _make_case(case: _Case, tools: Mapping[str, dict[str, Any]], path: Path) -> ToolCase:
    messages: list[dict[str, Any]]
    if isinstance(case.messages, str):
        messages = [{"role": "user", "content": case.messages}]
    else:
        messages = case.messages
    offered = []
    for tool in case.tools:
        if isinstance(tool, str):
            if tool not in tools:
                raise InputError(
                    f"{path}: case {case.id} offers {tool}, which is not among the file's tools"
                )
            tool = {"type": "function", "function": {"name": tool, **tools[tool]}}
        elif not isinstance(tool.get("function"), dict) or "name" not in tool["function"]:
            raise InputError(
                f"{path}: case {case.id} has a tool without a name",
                '{"type": "function", "function": {"name": ..., "parameters": {...}}} was expected',
            )
        offered.append(tool)
    check_tools(case.id, offered)
    schemas = {
        tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in offered
    }
    calls = []
    for call in case.calls:
        unknown = {*call.also, *call.optional, *call.exact, *call.unordered} - {*call.arguments}
        if unknown:
            raise InputError(
                f"{path}: case {case.id} says something of the argument {min(unknown)} of"
                f" {call.name}, which its reference does not have"
            )
        calls.append(_expected_call(call, schemas.get(call.name, {})))
    return ToolCase(case.id, case.category, tuple(messages), tuple(offered), tuple(calls))


def _expected_call(call: _Call, schema: Mapping[str, Any]) -> ExpectedCall:
    """The call with what its tool's schema adds.

    A default may be given or left out. An optional argument that the reference does not have may be
    given empty.
    """
    properties = {
        key: entry for key, entry in schema.get("properties", {}).items() if isinstance(entry, dict)
    }
    defaults = {key: entry["default"] for key, entry in properties.items() if "default" in entry}
    arguments = {
        key: AllowedValues(
            (value, *call.also.get(key, ())),
            optional=key in call.optional or (key in defaults and defaults[key] == value),
            text_rule=TextRule.EXACT if key in call.exact else TextRule.PLAIN,
            unordered=key in call.unordered,
        )
        for key, value in call.arguments.items()
    }
    for key, entry in properties.items():
        values = [defaults[key]] if key in defaults else []
        if key not in schema.get("required", ()):
            values += [value for value in _EMPTY if Draft202012Validator(entry).is_valid(value)]
        if values:
            arguments.setdefault(key, AllowedValues(tuple(values), optional=True))
    return ExpectedCall(call.name, arguments, call.arguments)
