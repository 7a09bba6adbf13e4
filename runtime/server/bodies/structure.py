"""What form an answer must have: read from a request's fields, and made into a grammar for the engine.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from llmkit.runtime.server.bodies.base import GenerationBody, Strict, one_of
from llmkit.runtime.server.http.errors import invalid
from llmkit.runtime.server.sandbox import Sandbox, SandboxError
from llmkit.runtime.server.sandbox_process import Compile
from llmkit.runtime.server.text.calls import CallFormat
from llmkit.runtime.server.text.parts import END_THINK, THINK

MAX_GRAMMAR_BYTES = 64 * 1024  # of a schema, an expression or a grammar, as JSON
MAX_WHOLE_BYTES = 256 * 1024  # of the grammar that comes of it, with all tools
MAX_DEPTH = 64  # of a schema
# White space of a model that cannot stop writing it would fill the answer.
_WHITE_SPACE = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{0,32}"}}

_SCHEMA = one_of({"type": "object"}, {"type": "string"})  # a JSON schema, or the text of one

Grammar = dict[str, Any]  # one of llguidance's list: {"json_schema": ...} or {"lark_grammar": ...}


class Form(NamedTuple):
    """What an answer must be. kind: json (a schema), regex, choice (texts) or lark; param: the field that says so."""

    kind: str
    value: Any
    param: str


class JsonSchema(Strict):
    """`json_schema` of a response_format; every answer follows it, whatever `strict` says."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(max_length=256)]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`, whose fields are also known as `guided_json` and so on."""

    json_: Annotated[Any, _SCHEMA] = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredBody(GenerationBody):
    """Adds what can be asked of an answer's form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Any, _SCHEMA] = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None

    def check(self) -> None:
        super().check()
        form = self.form
        if form is not None and self.ignore_eos:
            raise invalid("ignore_eos", f"An answer of the form of {form.param} ends where that does.")

    @property
    def form(self) -> Form | None:
        """What the answer must be. ApiError when two fields ask for different things, or for too much."""
        forms = list(self._forms())
        if len(forms) > 1:
            raise invalid(forms[1].param, f"{forms[0].param} and {forms[1].param} cannot be given together.")
        return _checked(forms[0]) if forms else None

    def _forms(self) -> Iterator[Form]:
        if (wanted := self.response_format) is not None:
            schema = wanted.json_schema
            if (wanted.type == "json_schema") != (schema is not None):
                raise invalid("response_format.json_schema", "json_schema is what the type json_schema has.")
            if schema is not None:
                yield Form("json", schema.schema_, "response_format.json_schema.schema")
            elif wanted.type == "json_object":
                yield Form("json", {"type": "object"}, "response_format")
        nested = self.structured_outputs or StructuredOutputs.model_construct()
        for kind, name, direct, inner in (
            ("json", "json", self.guided_json, nested.json_),
            ("regex", "regex", self.guided_regex, nested.regex),
            ("choice", "choice", self.guided_choice, nested.choice),
            ("lark", "grammar", self.guided_grammar, nested.grammar),
            ("json", "json_object", None, {"type": "object"} if nested.json_object else None),
        ):
            if direct is not None:
                yield Form(kind, direct, f"guided_{name}")
            if inner is not None:
                yield Form(kind, inner, f"structured_outputs.{name}")


def _checked(form: Form) -> Form:
    if form.kind == "json" and isinstance(form.value, str):
        try:
            form = form._replace(value=json.loads(form.value))
        except (ValueError, RecursionError):
            raise invalid(form.param, f"{form.param} is not the text of a JSON schema.", "invalid_grammar") from None
    if form.kind == "json" and not isinstance(form.value, dict):
        raise invalid(form.param, f"{form.param} must be a JSON schema: an object.", "invalid_type")
    check_size(form.value, form.param)
    if form.kind == "choice" and not all(form.value):
        raise invalid(form.param, "A choice must not be empty.")
    return form


def check_size(value: Any, param: str) -> None:
    """ApiError for what would take long to compile."""
    if _depth(value) > MAX_DEPTH:
        raise invalid(param, f"{param} is nested deeper than {MAX_DEPTH} levels.", "invalid_grammar")
    if (size := len(json.dumps(value))) > MAX_GRAMMAR_BYTES:
        raise invalid(param, f"{param} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are possible.", "invalid_grammar")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
        depth += 1
    return depth


def answer_grammar(form: Form) -> Grammar:
    """The grammar of an answer of `form`."""
    if form.kind == "json":
        return {"json_schema": _WHITE_SPACE | form.value}
    if form.kind == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(quoted, form.value))}
    if form.kind == "regex":
        return {"lark_grammar": f"start: /{_between_slashes(form.value)}/"}
    return {"lark_grammar": form.value}


def quoted(text: str) -> str:
    """`text` as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def _between_slashes(regex: str) -> str:
    return re.sub(r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), regex, flags=re.DOTALL)


def call_grammars(
    form: CallFormat, tools: Sequence[dict[str, Any]], parallel: bool, free: bool, mark: Callable[[str], str]
) -> list[Grammar]:
    """The grammar of one or more calls as `form` writes them, and those that it refers to.

    free: there may be other text, and no call, but what begins as a call is one. mark: text as Lark.
    """
    key = "parameters" if form.whole else "arguments"
    rules = [f"c{i}: {quoted(_head(tool, key))} @args_{i} " + '"}"' for i, tool in enumerate(tools)]
    call = "(" + " | ".join(f"c{i}" for i in range(len(tools))) + ")"
    opener = mark(form.opener)
    special = not opener.startswith('"')
    if free:
        rules += ["TEXT: /(.|\\n)*/", "NO_JSON: /([^{](.|\\n)*)?/"]
        rules.append("lead: TEXT " + opener if special else f"lead[lazy]: /(.|\\n)*{re.escape(form.opener)}/")
    if form.closer:
        rules.append(f'one: "\\n"? {call} "\\n"? {mark(form.closer)}')
        more = f'("\\n"? {opener} one)*' if parallel else ""
        start = "(lead one)* TEXT" if free else f"{opener} one {more}"
    elif form.whole:
        start = f"{opener}? {call}" + (f' ("; " {call})*' if parallel else "") + (" | NO_JSON" if free else "")
    else:
        body = f'"[" {call}' + (f' (", " {call})*' if parallel else "") + ' "]"'
        start = (
            f"TEXT ({opener} {body})?" if free and special else f"(lead {body})? TEXT" if free else f"{opener} {body}"
        )
    schemas = [
        {"name": f"args_{i}", "json_schema": _WHITE_SPACE | {"type": "object"} | tool["function"].get("parameters", {})}
        for i, tool in enumerate(tools)
    ]
    return [{"lark_grammar": "\n".join([f"start: {start}", *rules])}, *schemas]


def _head(tool: dict[str, Any], key: str) -> str:
    return f'{{"name": {json.dumps(tool["function"]["name"])}, "{key}": '


def whole_grammar(
    answer: Grammar | None, calls: Sequence[Grammar], thinks: bool, begun: bool, mark: Callable[[str], str]
) -> str:
    """All that a model may write: a thought where it `thinks` or has `begun` one, then `calls` or `answer`."""
    named = [{"name": "answer", **answer}] if answer else []
    if calls:
        named += [{"name": "calls", **calls[0]}, *calls[1:]]
    body = " | ".join(f"@{one['name']}" for one in named if one["name"] in ("answer", "calls"))
    lines = [f"start: {body}"]
    if thinks or begun:
        end = mark(END_THINK)
        thought = "thought /\\n{0,2}/" if begun else f"({mark(THINK)} thought /\\n{{0,2}}/)?"
        plain = end.startswith('"')
        rule = f"thought[suffix={end}]: /(.|\\n)*/" if plain else f"thought: /(.|\\n)*/ {end}"
        lines = [f"start: {thought} ({body})", rule]
    return json.dumps({"grammars": [{"name": "top", "lark_grammar": "\n".join(lines)}, *named]})


async def check_grammar(grammars: Sandbox, grammar: str, param: str) -> None:
    """ApiError 400 when `grammar`, which is made of `param`, is none, too large or takes too long to compile."""
    if len(grammar) > MAX_WHOLE_BYTES:
        raise invalid(param, f"{param} makes a grammar of over {MAX_WHOLE_BYTES} bytes.", "invalid_grammar")
    try:
        await grammars.ask(Compile(grammar))
    except SandboxError as error:
        raise invalid(param, f"{param} cannot be followed: {error}", "invalid_grammar") from None
