"""Structured output: reads what an answer must look like, and builds the grammar for the engine.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.sandbox import Sandbox, SandboxError
from llmkit.runtime.server.sandbox_process import CompileGrammar
from llmkit.runtime.server.schemas.base_request import GenerationRequest, StrictModel, any_of_schema
from llmkit.runtime.server.text.output_parser import THINK_END, THINK_START
from llmkit.runtime.server.text.tool_calls import ToolCallFormat

MAX_GRAMMAR_BYTES = 64 * 1024  # of a schema, a regular expression or a grammar, as JSON
MAX_COMBINED_GRAMMAR_BYTES = 256 * 1024  # of the grammar that is built, with all tools
MAX_DEPTH = 64  # of a schema
# White space between JSON tokens: a space, or a line feed and its indentation. A model that cannot
# stop writing white space would fill the answer with it.
_WHITE_SPACE = {"x-guidance": {"whitespace_pattern": r" |\n(?: {0,16}|\t{0,8})"}}

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
            return {"json_schema": _WHITE_SPACE | constraint.value}
        case "choice":
            return {"lark_grammar": "start: " + " | ".join(map(lark_string, constraint.value))}
        case "regex":
            return {"lark_grammar": f"start: /{_escape_slashes(constraint.value)}/"}
        case "lark":
            return {"lark_grammar": constraint.value}


def lark_string(text: str) -> str:
    """Return `text` as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _escape_slashes(regex: str) -> str:
    """Escape what cannot stand between the slashes of a Lark expression, unless it is escaped."""
    replacements = {"/": r"\/", "\n": r"\n"}
    return re.sub(
        r"\\.|/|\n",
        lambda match: replacements.get(match[0], match[0]),
        regex,
        flags=re.DOTALL,
    )


def tool_call_grammars(
    call_format: ToolCallFormat,
    tools: Sequence[dict[str, Any]],
    parallel: bool,
    optional: bool,
    lark: Callable[[str], str],
) -> list[Grammar]:
    """Return the grammar of tool calls in `call_format`, and the grammars that it refers to.

    `parallel`: there may be several calls. `optional`: there may be other text and no call, but
    text that begins like a call must be one. `lark` converts a text to a Lark expression.
    """
    rules = []
    for index, tool in enumerate(tools):
        head = call_format.call_head(tool["function"]["name"])
        rules.append(f"c{index}: {lark_string(head)} @args_{index} " + '"}"')
    call = "(" + " | ".join(f"c{index}" for index in range(len(tools))) + ")"
    opener = lark(call_format.opener)
    opener_is_token = not opener.startswith('"')
    if optional:
        rules.append("TEXT: /(.|\\n)*/")
        rules.append("NO_JSON: /([^{](.|\\n)*)?/")
        if opener_is_token:
            rules.append("lead: TEXT " + opener)
        else:
            rules.append(f"lead[lazy]: /(.|\\n)*{re.escape(call_format.opener)}/")
    if call_format.closer:
        rules.append(f'one: "\\n"? {call} "\\n"? {lark(call_format.closer)}')
        if optional:
            start = "(lead one)* TEXT"
        else:
            more = f'("\\n"? {opener} one)*' if parallel else ""
            start = f"{opener} one {more}"
    elif call_format.whole_answer:
        start = f"{opener}? {call}"
        if parallel:
            start += f' ("; " {call})*'
        if optional:
            start += " | NO_JSON"
    else:
        more = f' (", " {call})*' if parallel else ""
        call_list = f'"[" {call}{more} "]"'
        if not optional:
            start = f"{opener} {call_list}"
        elif opener_is_token:
            start = f"TEXT ({opener} {call_list})?"
        else:
            start = f"(lead {call_list})? TEXT"
    schemas = []
    for index, tool in enumerate(tools):
        parameters = tool["function"].get("parameters", {})
        schema = _WHITE_SPACE | {"type": "object"} | parameters
        schemas.append({"name": f"args_{index}", "json_schema": schema})
    return [{"lark_grammar": "\n".join([f"start: {start}", *rules])}, *schemas]


def combined_grammar(
    answer: Grammar | None,
    calls: Sequence[Grammar],
    may_reason: bool,
    starts_in_reasoning: bool,
    lark: Callable[[str], str],
) -> str:
    """Return the grammar of everything that the model may write, as llguidance's JSON.

    The model writes `calls` or `answer`. Reasoning may come first if `may_reason`, and
    must come first if the prompt has begun it (`starts_in_reasoning`).
    """
    named: list[Grammar] = []
    alternatives = []
    if answer:
        named.append({"name": "answer", **answer})
        alternatives.append("@answer")
    if calls:
        named += [{"name": "calls", **calls[0]}, *calls[1:]]
        alternatives.append("@calls")
    body = " | ".join(alternatives)
    lines = [f"start: {body}"]
    if may_reason or starts_in_reasoning:
        end = lark(THINK_END)
        thought = "thought /\\n{0,2}/"
        if not starts_in_reasoning:
            thought = f"({lark(THINK_START)} {thought})?"
        end_is_string = end.startswith('"')
        if end_is_string:
            rule = f"thought[suffix={end}]: /(.|\\n)*/"
        else:
            rule = f"thought: /(.|\\n)*/ {end}"
        lines = [f"start: {thought} ({body})", rule]
    top = {"name": "top", "lark_grammar": "\n".join(lines)}
    return json.dumps({"grammars": [top, *named]})


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
