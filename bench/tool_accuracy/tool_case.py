"""Tool cases: a conversation, the tools that are offered, and the calls that it asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from llmkit.bench.tool_accuracy.expected_calls import ExpectedCall
from llmkit.bench.tool_accuracy.tool_results import ToolCaseResult
from llmkit.common.errors import InputError

_NO_REMOTE_SCHEMAS: Registry[Any] = Registry()  # a schema cannot make bench open an address


@dataclass(frozen=True)
class ToolCase:
    """A conversation, the tools that are offered, and what the next answer must call."""

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]  # as requests have them
    # (): the answer must have no call. None: it must have one or more, of any offered tool.
    calls: tuple[ExpectedCall, ...] | None

    @property
    def expects_call(self) -> bool:
        """Whether a right answer has a call."""
        return self.calls is None or bool(self.calls)

    @property
    def tool_names(self) -> frozenset[str]:
        """The names of the offered tools."""
        return frozenset(tool["function"]["name"] for tool in self.tools)

    @property
    def references(self) -> list[dict[str, Any]]:
        """The expected calls, for reports."""
        if self.calls is None:
            return [{"name": "any offered tool", "arguments": {}}]
        return [{"name": call.name, "arguments": dict(call.reference)} for call in self.calls]

    def right_result(self) -> ToolCaseResult:
        """The result of a right answer."""
        return ToolCaseResult(self.id, self.category, self.expects_call)

    def schema_error(self, name: str, arguments: Any, only_required: bool = False) -> str:
        """Why arguments do not keep the schema of an offered tool; "": they keep it.

        only_required: check only that no required argument is missing.
        Raises InputError when the schema refers to something that it does not hold.
        """
        (tool,) = (tool for tool in self.tools if tool["function"]["name"] == name)
        schema = tool["function"].get("parameters") or {"type": "object"}
        if only_required:
            schema = {"required": schema.get("required", [])}
        validator = Draft202012Validator(schema, registry=_NO_REMOTE_SCHEMAS)
        try:
            error = next(validator.iter_errors(arguments), None)
        except Unresolvable as unresolvable:
            raise InputError(
                f"tool case {self.id}: the parameters of {name} refer to {unresolvable.ref}",
                "References within the schema were expected",
            ) from unresolvable
        if error is None:
            return ""
        place = ".".join(map(str, error.absolute_path))
        return f"{place}: {error.message}" if place else str(error.message)


def check_tools(case_id: str, tools: Iterable[Mapping[str, Any]]) -> None:
    """Raises InputError for two tools of one name, and for parameters that are no JSON Schema."""
    names = set()
    for tool in tools:
        name = tool["function"]["name"]
        if name in names:
            raise InputError(f"tool case {case_id} offers two tools of one name, {name}")
        names.add(name)
        parameters = tool["function"].get("parameters", {})
        problem = "" if isinstance(parameters, dict) else "an object was expected"
        try:
            Draft202012Validator.check_schema(parameters)
        except SchemaError as error:
            problem = error.message
        if problem:
            raise InputError(
                f"tool case {case_id}: the parameters of {name} are no JSON Schema ({problem})"
            )


def check_calls(case: ToolCase) -> None:
    """Raises InputError for a case that expects a call of a tool that it does not offer."""
    where = f"tool case {case.id}"
    for call in case.calls or ():
        if call.name not in case.tool_names:
            raise InputError(
                f"{where} expects a call of {call.name}, which is not offered",
                f"It offers {', '.join(sorted(case.tool_names)) or 'no tools'}",
            )


def check_references(case: ToolCase) -> None:
    """Raises InputError when an argument that the case accepts breaks the tool's schema.

    BFCL has such arguments, so this check is for other files.
    """
    for call in case.calls or ():
        for arguments in _variants(call):
            problem = case.schema_error(call.name, arguments)
            if problem:
                raise InputError(
                    f"tool case {case.id}: the expected arguments of {call.name} break its schema"
                    f" ({problem})"
                )


def cases_sha256(cases: Iterable[ToolCase], max_tokens: int) -> str:
    """A hash of what is asked and expected."""
    digest = hashlib.sha256(f"{max_tokens}".encode())
    for case in cases:
        content = [case.id, case.category, case.messages, case.tools, repr(case.calls)]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _variants(call: ExpectedCall) -> Iterable[Mapping[str, Any]]:
    """The reference's arguments, and each with one of its other values."""
    yield call.reference
    for key, allowed in call.arguments.items():
        for value in allowed.values:
            yield {**call.reference, key: value}
