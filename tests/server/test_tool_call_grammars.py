"""Grammars of calls in each dialect: what they allow, refuse, and what the parser makes of it."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from support.tool_call_texts import Call, rendered

from llmkit.runtime.grammar_compiler import compile_grammar
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.schemas.structured_output import (
    OutputConstraint,
    combined_grammar,
    constraint_grammar,
)
from llmkit.runtime.server.text.lark_grammar import lark_mark
from llmkit.runtime.server.text.output_parser import new_output_parser
from llmkit.runtime.server.text.output_parts import (
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)
from llmkit.runtime.server.text.tool_call_grammar import tool_call_grammar
from llmkit.runtime.server.text.tool_dialects import (
    DIALECTS,
    GEMMA4,
    HARMONY,
    HERMES,
    MISTRAL,
    PYTHONIC,
    QWEN3_CODER,
    THINK,
    ChannelCall,
    ReasoningMarks,
    ToolDialect,
)

BY_NAME = {dialect.name: dialect for dialect in DIALECTS}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "its name"},
        "days": {"type": "integer", "minimum": 1},
        "share": {"type": ["number", "null"]},
        "exact": {"type": "boolean"},
        "unit": {"enum": ["C", "F", "as it is"]},
        "level": {"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 9}]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-", "maxLength": 6},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {
                "x": {"oneOf": [{"type": "null"}, {"type": "number"}]},
                "inner": {"$ref": "#/$defs/place"},
            },
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in (("get_weather", SCHEMA), ("get_weather_now", SCHEMA), ("stop", {}))
]
MINIMAL: Call = ("get_weather", {"city": "Paris"})
FULL: Call = (
    "get_weather_now",
    {
        "city": 'Par"is\\ \n{}[] é 🌍 ',
        "days": 3,
        "share": None,
        "exact": True,
        "unit": "as it is",
        "level": "high up",
        "code": "AB-\U0001f600x",
        "tags": ["", "a, b"],
        "place": {"x": -0.5, "inner": {"x": None}},
    },
)
VIOLATIONS: list[Call] = [
    ("get_weather", {}),
    ("get_weather", {"city": "Paris", "days": 0}),
    ("get_weather", {"city": "Paris", "days": [1]}),
    ("get_weather", {"city": "Paris", "unit": "K"}),
    ("get_weather", {"city": "Paris", "level": 10}),
    ("get_weather", {"city": "Paris", "code": "AB"}),
    ("get_weather", {"city": "Paris", "code": "AB-1234"}),
    ("get_weather", {"city": "Paris", "tags": ["long one"]}),
    ("get_weather", {"city": "Paris", "tags": ["a", "b", "c"]}),
    ("get_weather", {"city": "Paris", "place": {}}),
    ("get_weather", {"city": "Paris", "place": {"x": None, "inner": {"x": True}}}),
    ("get_weather", {"city": "Paris", "other": 1}),
    ("get_whether", {"city": "Paris"}),
]


@cache
def tokenizer(dialect: ToolDialect, special: bool) -> tuple[LLTokenizer, Any]:
    """A tokenizer of bytes, in which the marks of `dialect` are special tokens if `special`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    marks: list[str] = ["<eos>"]
    if special:
        reasoning = dialect.reasoning.special_tokens if dialect.reasoning else ()
        marks += [*dialect.special_tokens, *reasoning]
    words.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    size = words.get_vocab_size()
    return LLTokenizer(words.to_str(), n_vocab=size, eos_token=words.token_to_id("<eos>")), words


def grammar(
    dialect: ToolDialect,
    special: bool = False,
    *,
    tools: list[Any] = TOOLS,
    parallel: bool = True,
    optional: bool = False,
    reasoning: ReasoningMarks | None = None,
    starts_in_reasoning: bool = False,
    choices: list[str] | None = None,
) -> str:
    """The grammar of an answer, as the server makes it. choices: the answer may be one of them."""
    words = tokenizer(dialect, special)[1]
    taken = {token.content: index for index, token in words.get_added_tokens_decoder().items()}

    def mark(text: str) -> str:
        return lark_mark(text, taken.get)

    calls = tool_call_grammar(dialect, tools, parallel, optional, mark) if tools else None
    answer = None
    if choices is not None:
        answer = constraint_grammar(OutputConstraint("choice", choices, "guided_choice"))
    channels = dialect.syntax if isinstance(dialect.syntax, ChannelCall) else None
    return combined_grammar(answer, calls, reasoning, starts_in_reasoning, mark, channels)


class Checker:
    """Says which texts a grammar allows."""

    def __init__(self, dialect: ToolDialect, special: bool = False, **options: Any) -> None:
        self._tokenizer, self._words = tokenizer(dialect, special)
        self._matcher = compile_grammar(self._tokenizer, grammar(dialect, special, **options))

    def new_matcher(self) -> LLMatcher:
        return self._matcher.deep_copy()

    def allows(self, text: str) -> bool:
        matcher = self.new_matcher()
        ids = self._words.encode(text).ids
        return matcher.validate_tokens(ids) == len(ids) and (
            matcher.consume_tokens(ids) and bool(matcher.is_accepting())
        )


@cache
def checker(name: str, special: bool = False, **options: Any) -> Checker:
    return Checker(BY_NAME[name], special, **options)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", BY_NAME)
def test_tool_call_grammar_keeps_the_schema_in_each_dialect(name: str, special: bool) -> None:
    required = checker(name, special)
    optional = checker(name, special, optional=True)
    single = checker(name, special, parallel=False)
    for calls in ([MINIMAL], [FULL], [MINIMAL, ("stop", {}), FULL]):
        text = rendered(name, calls)
        assert required.allows(text)
        assert optional.allows(text)
        assert single.allows(text) == (len(calls) == 1)
        assert not required.allows(text[:-12])
        assert not required.allows(f"Well. {text}")
    for violation in VIOLATIONS:
        text = rendered(name, [violation])
        assert not required.allows(text), violation
        assert not optional.allows(text), violation


@pytest.mark.parametrize("name", BY_NAME)
def test_tool_call_grammar_allows_text_that_begins_no_call(name: str) -> None:
    dialect = BY_NAME[name]
    optional = checker(name, optional=True)
    head, end = "", ""
    if dialect is HARMONY:
        head, end = "<|channel|>final<|message|>", "<|return|>"
    for text in ("", "Well.", "a <b> {} [c](d) \n", "<tool", "<|"):
        assert optional.allows(f"{head}{text}{end}"), text
        assert not checker(name).allows(f"{head}{text}{end}"), text
    call = rendered(name, [MINIMAL])
    if dialect is HARMONY:
        preamble = "<|channel|>commentary<|message|>Well.<|end|><|start|>assistant"
        assert optional.allows(preamble + call)
    elif not dialect.whole_answer:
        assert optional.allows(f"Well. \n{call}")
        assert optional.allows(f"{call}\nDone.")
        assert optional.allows(f"Well.{call}Again:{call}")
        opener = dialect.section_start or dialect.call_start
        assert not optional.allows(f"Well. {opener}no call")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", BY_NAME)
def test_tool_call_grammar_has_reasoning_first(name: str, special: bool) -> None:
    dialect = BY_NAME[name]
    call = rendered(name, [MINIMAL])
    if dialect is HARMONY:
        thought = "<|channel|>analysis<|message|>Hm <b> {.<|end|><|start|>assistant"
        assert checker(name, special).allows(thought + call)
        assert checker(name, special).allows(thought + thought + call)
        return
    marks = dialect.reasoning or THINK
    plain = checker(name, special)
    assert not plain.allows(f"{marks.start}Hm.{marks.end}{call}")
    for optional in (False, True):
        first = checker(name, special, reasoning=marks, optional=optional)
        assert first.allows(f"{marks.start}Hm <b> {{\n{marks.end}\n\n{call}")
        assert first.allows(call)
        begun = checker(name, special, reasoning=marks, starts_in_reasoning=True, optional=optional)
        assert begun.allows(f"Hm.\n{marks.end}\n\n{call}")
        assert not begun.allows(call)
        assert not begun.allows("Hm.")


@pytest.mark.parametrize("name", BY_NAME)
def test_tool_call_grammar_has_an_answer_instead(name: str) -> None:
    dialect = BY_NAME[name]
    for tools in (TOOLS, []):
        found = Checker(dialect, tools=tools, choices=["left", "right"])
        answer = "left"
        if dialect is HARMONY:
            answer = "<|channel|>final<|message|>left<|return|>"
            thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
            assert found.allows(thought + answer)
        assert found.allows(answer)
        assert not found.allows(answer.replace("left", "down"))
        assert found.allows(rendered(name, [MINIMAL])) == bool(tools)


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="<"))
PLACES: Any = st.recursive(
    st.fixed_dictionaries({"x": st.none() | st.integers()}),
    lambda places: places.map(lambda inner: {"x": None, "inner": inner}),
    max_leaves=3,
)
ARGUMENTS = st.fixed_dictionaries(
    {"city": TEXTS},
    optional={
        "days": st.integers(1, 10**9),
        "share": st.none() | st.floats(-1e9, 1e9, allow_nan=False).map(lambda x: round(x, 3)),
        "exact": st.booleans(),
        "unit": st.sampled_from(["C", "F", "as it is"]),
        "level": st.text("abc xyz", min_size=1).map(lambda t: "A" + t) | st.integers(-9, 9),
        "code": st.text("aB1 ", max_size=3).map(lambda t: "XY-" + t),
        "tags": st.lists(st.text("ab,] ", max_size=4), max_size=2),
        "place": PLACES,
    },
)


@given(st.sampled_from(sorted(BY_NAME)), st.lists(ARGUMENTS, min_size=1, max_size=2))
@settings(max_examples=40)
def test_tool_call_grammar_allows_any_arguments_of_the_schema(
    name: str, arguments: list[dict[str, Any]]
) -> None:
    # Grammars have the schema's order.
    order = list(SCHEMA["properties"])
    calls = [
        ("get_weather", {key: one[key] for key in sorted(one, key=order.index)})
        for one in arguments
    ]
    for call in calls:
        jsonschema.validate(call[1], SCHEMA)
    assert checker(name).allows(rendered(name, calls))
    assert checker(name, optional=True).allows(rendered(name, calls))


def marks_of(dialect: ToolDialect) -> list[str]:
    """Texts that end what could go on forever."""
    values = [dialect.section_start, dialect.section_end, dialect.call_start, dialect.call_end]
    values += [value for value in vars(dialect.syntax).values() if isinstance(value, str)]
    values += [*getattr(dialect.syntax, "ends", ()), "</think>", *"\"'}]),"]
    return [value for value in values if value]


def walk(found: Checker, dialect: ToolDialect, chance: random.Random) -> str | None:
    """A random text that the grammar allows; None: it became too long."""
    words = tokenizer(dialect, False)[1]
    eos = words.token_to_id("<eos>")
    marks = [words.encode(mark).ids for mark in marks_of(dialect)]
    # Characters of more than a byte would often stay incomplete.
    letters = [words.token_to_id(chr(code)) for code in range(33, 127)]
    letters += words.encode(" \n").ids
    matcher = found.new_matcher()
    ids: list[int] = []
    while len(ids) < 3000:
        allowed = set(bits(matcher))
        if eos in allowed and (allowed == {eos} or chance.random() < 0.1):
            return str(words.decode(ids))
        fitting = [mark for mark in marks if matcher.validate_tokens(mark) == len(mark)]
        if fitting and chance.random() < 0.4:
            step = chance.choice(fitting)
        else:
            fitting_letters = [letter for letter in letters if letter in allowed]
            step = [chance.choice(fitting_letters or sorted(allowed - {eos}))]
        assert matcher.consume_tokens(step)
        ids += step
    return None


def bits(matcher: LLMatcher) -> list[int]:
    """The tokens that may come next."""
    mask = matcher.compute_bitmask()
    return [i for i in range(len(mask) * 8) if mask[i // 8] >> i % 8 & 1]


def parsed(dialect: ToolDialect, text: str, **options: Any) -> list[Any]:
    """What the server makes of `text`: calls as (name, arguments)."""
    parts = join_parts(new_output_parser(dialect, TOOLS, **options).feed(text, final=True))
    found: list[Any] = []
    for part in parts:
        if isinstance(part, ToolCallPart):
            assert part.is_complete, text
            found.append((part.name, json.loads(part.arguments)))
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("name", BY_NAME)
def test_tool_call_grammar_makes_valid_calls_of_random_tokens(name: str) -> None:
    dialect = BY_NAME[name]
    chance = random.Random(name)
    marks = None if dialect is HARMONY else dialect.reasoning
    for optional, reasoning, parallel, rounds in (
        (False, None, True, 8),
        (False, marks, False, 2),
        (True, None, True, 3),
    ):
        found = checker(name, optional=optional, reasoning=reasoning, parallel=parallel)
        num_calls = 0
        for _ in range(rounds):
            text = walk(found, dialect, chance)
            if text is None:
                continue
            parts = parsed(
                dialect,
                text,
                required=not optional,
                strict=True,
                parallel=parallel,
                may_reason=reasoning is not None,
            )
            for part in parts:
                if isinstance(part, (TextPart, ReasoningPart)):
                    has_text = optional or reasoning is not None or dialect is HARMONY
                    assert has_text, (text, part)
                    continue
                tool, arguments = part
                assert tool in ("get_weather", "get_weather_now", "stop")
                if tool != "stop":
                    jsonschema.validate(arguments, SCHEMA)
                num_calls += 1
            if not optional:
                assert any(isinstance(part, tuple) and len(part) == 2 for part in parts), text
        assert num_calls or optional, "every walk was too long"


def offered(schema: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", "parameters": schema}}]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"properties": {"a": {"type": "object", "patternProperties": {"^x": {}}}}},
        {"properties": {"a": {"not": {"type": "string"}}}},
        {"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
        {"properties": {"a": {"allOf": [{"type": "string"}, {"minLength": 3}]}}},
        {"properties": {"a": {"$ref": "https://example.org/schema"}}},
        {"properties": {"a b": {"type": "string"}}},
        {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"properties": {"a": {"type": "string", "pattern": "^a|b$"}}},
        {"properties": 5},
        {"required": [5]},
        {"properties": {"a": {"items": [5]}}},
        {"properties": {"a": {"type": "array", "minItems": "x"}}},
        {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {
            "properties": {"a": {"$ref": "#/$defs/d0"}},
            "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 50} for i in range(12)}
            | {"d12": {"type": "string"}},
        },
    ],
)
@pytest.mark.parametrize("dialect", [PYTHONIC, GEMMA4], ids=lambda found: found.name)
def test_tool_call_grammar_refuses_what_literals_cannot_keep(
    schema: Any, dialect: ToolDialect
) -> None:
    with pytest.raises(ApiError) as caught:
        grammar(dialect, tools=offered(schema))
    assert (caught.value.status, caught.value.code) == (400, "invalid_grammar")
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("dialect", "schema", "allowed", "refused"),
    [
        (
            QWEN3_CODER,
            {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "array"}]}}},
            ["word", "[1, 2]"],
            ["1, [", "true]"],
        ),
        (QWEN3_CODER, {"properties": {"a": {"type": ["string", "null"]}}}, ["null", "-"], []),
        (
            QWEN3_CODER,
            {"properties": {"a": {"enum": ["5", 5, "x"]}}},
            ["5", "x"],
            ["6", "y", "5x"],
        ),
        (
            QWEN3_CODER,
            {"properties": {"a": {"type": "array", "prefixItems": [{"const": 1}], "items": False}}},
            ["[1]"],
            ["[2]", "1"],
        ),
        (
            QWEN3_CODER,
            {"properties": {"a": {"type": "string", "minLength": 2, "pattern": "b"}}},
            ["ab", "a\nb", "bbb"],
            ["b", "aa", ""],
        ),
    ],
)
def test_tool_call_grammar_writes_a_parameter_as_its_type_is_read(
    dialect: ToolDialect, schema: Any, allowed: list[str], refused: list[str]
) -> None:
    found = Checker(dialect, tools=offered(schema))
    form = "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"
    for text in allowed:
        assert found.allows(form.format(text)), text
    for text in refused:
        assert not found.allows(form.format(text)), text


def test_tool_call_grammar_takes_an_optional_call_id() -> None:
    found = checker(MISTRAL.name, special=True)
    assert found.allows("[TOOL_CALLS]stop[CALL_ID]a1B2c3D4e[ARGS]{}")
    assert found.allows("[TOOL_CALLS]stop[ARGS]{}")
    assert not found.allows("[TOOL_CALLS]stop[CALL_ID]a1[ARGS]{}")


def test_tool_call_grammar_spells_no_special_token() -> None:
    found = checker(HERMES.name, special=True)
    call = rendered(HERMES.name, [MINIMAL])
    words = tokenizer(HERMES, False)[1]  # spells all marks
    assert found.allows(call)
    matcher = found.new_matcher()
    assert matcher.validate_tokens(words.encode(call).ids) == 0


def test_tool_call_grammar_follows_each_reference_of_many_once() -> None:
    levels: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 50} for i in range(12)
    }
    schema = {
        "properties": {"a": {"$ref": "#/$defs/d0"}},
        "$defs": levels | {"d12": {"type": "string"}},
    }
    with pytest.raises(ApiError, match="choices"):  # and soon
        grammar(QWEN3_CODER, tools=offered(schema))
