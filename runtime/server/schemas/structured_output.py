"""Structured output: reads what an answer must look like, and builds the grammar for the engine.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.sandbox import Sandbox, SandboxError
from llmkit.runtime.server.sandbox_process import CompileGrammar
from llmkit.runtime.server.schemas.base_request import GenerationRequest, StrictModel, any_of_schema
from llmkit.runtime.server.text.lark_grammar import WHITE_SPACE, Mark, lark_string
from llmkit.runtime.server.text.tool_call_grammar import answer_frame, final_message
from llmkit.runtime.server.text.tool_dialects import ChannelCall, ReasoningMarks

MAX_GRAMMAR_BYTES = 64 * 1024  # of a schema, a regular expression or a grammar, as JSON
MAX_COMBINED_GRAMMAR_BYTES = 256 * 1024  # of the grammar that is built, with all tools
MAX_DEPTH = 64  # of a schema
_SCHEMA = any_of_schema({"type": "object"}, {"type": "string"})  # a JSON schema, or the text of one

# An entry of llguidance's list: {"json_schema": ...} or {"lark_grammar": ...}.
Grammar = dict[str, Any]


class OutputConstraint(NamedTuple):
    """What an answer must look like."""

    kind: Literal["json", "regex", "choice", "lark"]
    value: Any  # a JSON schema, a regular expression, a list of texts, or a Lark grammar
    param: str  # the request's field that holds it


class JsonSchema(StrictModel):
    """`json_schema` of a response_format; every answer follows it, whatever `strict` says."""

    model_config = ConfigDict(populate_by_name=True)

    name: Annotated[str, Field(max_length=256)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`, whose fields are also known as `guided_json` and so on."""

    neutral_values = {  # noqa: RUF012
        "structural_tag": (),
        "whitespace_pattern": (),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
    }
    no_effect_fields = frozenset({"disable_fallback"})

    json_: Annotated[Any, _SCHEMA] = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredOutputRequest(GenerationRequest):
    """Adds the fields of structured output."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Any, _SCHEMA] = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None

    def check(self) -> None:
        super().check()
        constraint = self.output_constraint
        if constraint is not None and self.ignore_eos:
            raise invalid(
                "ignore_eos",
                f"ignore_eos cannot be used with {constraint.param}, which decides the end.",
            )

    @property
    def output_constraint(self) -> OutputConstraint | None:
        """What the answer must look like; None when it may be any text.

        Raises ApiError when two fields contradict, or for one that is invalid or too large.
        """
        constraints = list(self._constraints())
        if not constraints:
            return None
        if len(constraints) > 1:
            first, second = constraints[:2]
            raise invalid(
                second.param, f"{first.param} and {second.param} cannot be given together."
            )
        return _checked(constraints[0])

    def _constraints(self) -> Iterator[OutputConstraint]:
        """Yield the constraint of each field that has one."""
        response_format = self.response_format
        if response_format is not None:
            json_schema = response_format.json_schema
            if (response_format.type == "json_schema") != (json_schema is not None):
                raise invalid(
                    "response_format.json_schema",
                    "json_schema must be given with the type json_schema, and with no other.",
                )
            if json_schema is not None:
                param = "response_format.json_schema.schema"
                yield OutputConstraint("json", json_schema.schema_, param)
            elif response_format.type == "json_object":
                yield OutputConstraint("json", {"type": "object"}, "response_format")
        nested = self.structured_outputs or StructuredOutputs.model_construct()
        json_object = {"type": "object"} if nested.json_object else None
        # Kind, name, and the values of the fields `guided_NAME` and `structured_outputs.NAME`.
        fields: list[tuple[Literal["json", "regex", "choice", "lark"], str, Any, Any]] = [
            ("json", "json", self.guided_json, nested.json_),
            ("regex", "regex", self.guided_regex, nested.regex),
            ("choice", "choice", self.guided_choice, nested.choice),
            ("lark", "grammar", self.guided_grammar, nested.grammar),
            ("json", "json_object", None, json_object),
        ]
        for kind, name, guided_value, nested_value in fields:
            if guided_value is not None:
                yield OutputConstraint(kind, guided_value, f"guided_{name}")
            if nested_value is not None:
                yield OutputConstraint(kind, nested_value, f"structured_outputs.{name}")


def _checked(constraint: OutputConstraint) -> OutputConstraint:
    """Return `constraint` with a JSON schema that was given as text parsed."""
    param = constraint.param
    if constraint.kind == "json" and isinstance(constraint.value, str):
        try:
            constraint = constraint._replace(value=json.loads(constraint.value))
        except (ValueError, RecursionError):
            raise invalid(
                param, f"{param} is not the text of a JSON schema.", "invalid_grammar"
            ) from None
    if constraint.kind == "json" and not isinstance(constraint.value, dict):
        raise invalid(param, f"{param} must be a JSON schema: an object.", "invalid_type")
    check_schema_size(constraint.value, param)
    if constraint.kind == "choice" and not all(constraint.value):
        raise invalid(param, "A choice must not be empty.")
    return constraint


def check_schema_size(value: Any, param: str) -> None:
    """Raise ApiError for a schema or grammar that would take long to compile."""
    if _depth(value) > MAX_DEPTH:
        raise invalid(
            param, f"{param} is nested deeper than {MAX_DEPTH} levels.", "invalid_grammar"
        )
    size = len(json.dumps(value))
    if size > MAX_GRAMMAR_BYTES:
        raise invalid(
            param,
            f"{param} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are possible.",
            "invalid_grammar",
        )


def _depth(value: Any) -> int:
    """The number of nested levels of a JSON value, counted up to MAX_DEPTH + 1."""
    depth = 0
    level = [value]
    while level and depth <= MAX_DEPTH:
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.values()
            elif isinstance(item, list):
                children += item
        level = children
        depth += 1
    return depth


def constraint_grammar(constraint: OutputConstraint) -> Grammar:
    """Return the grammar of an answer that follows `constraint`."""
    match constraint.kind:
        case "json":
            return {"json_schema": WHITE_SPACE | constraint.value}
        case "choice":
            return {"lark_grammar": "start: " + " | ".join(map(lark_string, constraint.value))}
        case "regex":
            return {"lark_grammar": f"start: /{_escape_slashes(constraint.value)}/"}
        case "lark":
            return {"lark_grammar": constraint.value}


def _escape_slashes(regex: str) -> str:
    """Escape what cannot stand between the slashes of a Lark expression, unless it is escaped."""
    replacements = {"/": r"\/", "\n": r"\n"}
    return re.sub(
        r"\\.|/|\n",
        lambda match: replacements.get(match[0], match[0]),
        regex,
        flags=re.DOTALL,
    )


def combined_grammar(
    answer: Grammar | None,
    calls: str | None,
    reasoning: ReasoningMarks | None,
    starts_in_reasoning: bool,
    mark: Mark,
    channels: ChannelCall | None = None,
) -> str:
    """Return the grammar of everything that the model may write, as llguidance's JSON.

    The model writes `calls`, a Lark grammar, or `answer`. See `answer_frame` for the others.
    """
    named: list[Grammar] = []
    alternatives = []
    if answer:
        named.append({"name": "answer", **answer})
        shown = "@answer"
        alternatives.append(final_message(channels, shown, mark) if channels else shown)
    if calls is not None:
        named.append({"name": "calls", "lark_grammar": calls})
        alternatives.append("@calls")
    frame = answer_frame(channels, alternatives, reasoning, starts_in_reasoning, mark)
    return json.dumps({"grammars": [{"name": "top", "lark_grammar": frame}, *named]})


async def check_grammar(sandbox: Sandbox, grammar: str, param: str) -> None:
    """Compile `grammar`, which was built from the field `param`, in the sandbox.

    Raises ApiError 400 when it is invalid, too large, or takes too long to compile.
    """
    if len(grammar) > MAX_COMBINED_GRAMMAR_BYTES:
        raise invalid(
            param,
            f"{param} makes a grammar of over {MAX_COMBINED_GRAMMAR_BYTES} bytes.",
            "invalid_grammar",
        )
    try:
        await sandbox.run(CompileGrammar(grammar))
    except SandboxError as error:
        raise invalid(
            param, f"{param} cannot be compiled to a grammar: {error}", "invalid_grammar"
        ) from None
