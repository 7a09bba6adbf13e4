"""How families of models write tool calls and reasoning: each dialect is data.

An answer with calls is

    [text] section_start call (separator call)* section_end [text]

and a call is `call_start`, a call in the dialect's syntax, and `call_end`. Any of these marks may
be empty; an answer may have several sections. White space around marks means nothing.
`new_output_parser` in `output_parser.py` reads answers by this data, `tool_call_grammar.py` makes
grammars from it, `dialect_detection.py` finds the dialect of a checkpoint.

The formats are those of the models' chat templates and of vLLM's and SGLang's parsers of them;
Harmony is described in https://cookbook.openai.com/articles/openai-harmony.
"""

# ruff: noqa: RUF001 - DeepSeek's marks have fullwidth vertical lines

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

# A mark, or a part of one, that a tokenizer may have as a special token.
_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]|｜\w+｜")
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")  # of a call, as Mistral's templates want it


@dataclass(frozen=True)
class JsonObjectCall:
    """`{"name": NAME, "arguments": {...}}`; keys other than these are ignored."""

    # As the model was taught; "arguments" and "parameters" are read, too.
    arguments_key: str = "arguments"


@dataclass(frozen=True)
class NamedJsonCall:
    """A name between marks, then the arguments as a JSON object."""

    before_name: str = ""
    # Between the name and `after_name` may stand this mark and an id of the call.
    before_id: str = ""
    after_name: str = ""
    after_arguments: str = ""


@dataclass(frozen=True)
class ParameterCall:
    """A name and parameters between XML-like marks; a value's JSON type is that of the schema."""

    before_name: str
    after_name: str  # empty: the name ends before white space or the next mark
    before_key: str
    after_key: str
    after_value: str
    before_value: str = ""  # after `after_key` and white space
    end: str = ""  # of the parameters
    # Stands in place of `after_key` before a value that is JSON; then others are strings.
    after_key_of_json: str = ""
    # A value may stand on lines of its own: one line feed before and one after are not part of it.
    on_lines: bool = False


@dataclass(frozen=True)
class PythonCall:
    """`NAME(key=value, ...)`, where values are Python's literals."""


@dataclass(frozen=True)
class MapCall:
    """`NAME{key:value,...}` after a mark; keys have no quotes, strings have marks of their own.

    Values are strings, numbers, true, false, null, such maps, and lists in brackets.
    """

    before_name: str
    quote: str  # before and after a string, in which nothing is escaped


@dataclass(frozen=True)
class ChannelCall:
    """Harmony: the whole answer is messages in channels, each with a header and a body.

    A header is [role] and, in either order, ` to=RECIPIENT` and `channel` NAME; then may come
    `constrain` and a format, or the format alone. The body is text, or the JSON of a call's
    arguments if the recipient begins with `recipient`.
    """

    start: str = "<|start|>"  # of a message; the prompt ends with the one of the first
    role: str = "assistant"  # which follows `start`
    channel: str = "<|channel|>"
    constrain: str = "<|constrain|>"
    message: str = "<|message|>"  # between the header and the body
    ends: tuple[str, ...] = ("<|end|>", "<|call|>", "<|return|>")  # of a message
    recipient: str = "functions."
    # The channel of thoughts. Text of the others is shown: "commentary" before calls, and the
    # answer.
    reasoning_channel: str = "analysis"
    answer_channel: str = "final"
    call_channel: str = "commentary"

    def header(self, channel: str) -> str:
        """What stands between the end of one message and the text of the next one in `channel`."""
        return f"{self.start}{self.role}{self.channel}{channel}{self.message}"


CallSyntax = JsonObjectCall | NamedJsonCall | ParameterCall | PythonCall | MapCall | ChannelCall


@dataclass(frozen=True)
class ReasoningMarks:
    """What stands before and after reasoning."""

    start: str
    end: str

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The marks' parts that a tokenizer may have as special tokens."""
        return _special_tokens(self)


THINK = ReasoningMarks("<think>", "</think>")


@dataclass(frozen=True)
class ToolDialect:
    """How one family of models writes calls."""

    name: str  # the value of --tool-parser
    syntax: CallSyntax
    section_start: str = ""
    # What models write in place of `section_start`, too.
    other_section_starts: tuple[str, ...] = ()
    # The calls of a section are a list in brackets. (A list, or a single call where there should
    # be a list, is read in every dialect of JsonObjectCall.)
    in_list: bool = False
    call_start: str = ""
    # Models sometimes leave out `call_start` (and `call_end`): `before_name` begins a call, too.
    call_start_optional: bool = False
    # Between calls. "\n" and "" are read alike, and so is white space around a comma or semicolon.
    separator: str = ""
    call_end: str = ""
    section_end: str = ""
    # The answer consists of calls and nothing else; `section_start` may be missing.
    whole_answer: bool = False
    # Ids that the model's chat template accepts: "call": call_ and 24 digits; "short": 9 letters
    # and digits; "indexed": functions.NAME:INDEX.
    ids: Literal["call", "short", "indexed"] = "call"
    reasoning: ReasoningMarks | None = THINK  # if the chat template has them, or --reasoning-parser
    # A chat template that has all of these, and none of the others, is of this dialect. A mark may
    # be alternatives, of which it has one.
    template_marks: tuple[str | tuple[str, ...], ...] = ()
    not_in_template: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()  # that --tool-parser takes, too: those of other servers

    @property
    def channels(self) -> ChannelCall | None:
        """How the model writes messages in channels; None: it writes none."""
        return self.syntax if isinstance(self.syntax, ChannelCall) else None

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The marks' parts that a tokenizer may have as special tokens: decoding must keep them."""
        return _special_tokens(
            replace(self, template_marks=(), not_in_template=(), other_names=(), name="")
        )


def _special_tokens(marks: Any) -> tuple[str, ...]:
    """Return the texts in a dataclass's fields that may be special tokens, each once."""
    found: dict[str, None] = {}
    values = list(astuple(marks))
    while values:
        value = values.pop(0)
        if isinstance(value, str):
            found |= dict.fromkeys(_SPECIAL_TOKEN.findall(value))
        elif isinstance(value, tuple):
            values = [*value, *values]
    return tuple(found)


HERMES = ToolDialect(
    "hermes",
    JsonObjectCall(),
    call_start="<tool_call>",
    separator="\n",
    call_end="</tool_call>",
    template_marks=("<tool_call>",),
    not_in_template=("<function=", "<arg_key>", "<invoke", "<|tool_call|>"),
    other_names=("granite4", "qwen", "qwen25", "qwen3_json"),
)
QWEN3_CODER = ToolDialect(
    "qwen3_coder",
    ParameterCall(
        before_name="<function=",
        after_name=">",
        before_key="<parameter=",
        after_key=">",
        after_value="</parameter>",
        end="</function>",
        on_lines=True,
    ),
    call_start="<tool_call>",
    call_start_optional=True,
    separator="\n",
    call_end="</tool_call>",
    template_marks=("<tool_call>", "<function=", "<parameter="),
    other_names=("qwen3_xml", "step3p5"),
)
LLAMA3_JSON = ToolDialect(
    "llama3_json",
    JsonObjectCall("parameters"),
    section_start="<|python_tag|>",
    separator="; ",
    whole_answer=True,
    template_marks=('{"name": function name, "parameters":',),
    other_names=("llama4_json", "llama3"),
)
PYTHONIC = ToolDialect(
    "pythonic",
    PythonCall(),
    section_start="<|python_start|>",
    in_list=True,
    separator=", ",
    section_end="<|python_end|>",
    whole_answer=True,
    template_marks=("[func_name1(",),
    other_names=("llama4_pythonic", "llama4"),
)
LFM2 = ToolDialect(
    "lfm2",
    PythonCall(),
    section_start="<|tool_call_start|>",
    in_list=True,
    separator=", ",
    section_end="<|tool_call_end|>",
    template_marks=("<|tool_call_start|>",),
)
MISTRAL_V3 = ToolDialect(
    "mistral_v3",
    JsonObjectCall(),
    section_start="[TOOL_CALLS]",
    in_list=True,
    separator=", ",
    ids="short",
    reasoning=None,
    template_marks=("[TOOL_CALLS]",),
    not_in_template=("[ARGS]",),
)
MISTRAL = ToolDialect(
    "mistral",
    NamedJsonCall(before_id="[CALL_ID]", after_name="[ARGS]"),
    call_start="[TOOL_CALLS]",
    ids="short",
    reasoning=ReasoningMarks("[THINK]", "[/THINK]"),
    template_marks=("[TOOL_CALLS]", "[ARGS]"),
)
HARMONY = ToolDialect(
    "harmony",
    ChannelCall(),
    whole_answer=True,
    reasoning=None,  # the analysis channel
    template_marks=("<|channel|>", "<|message|>"),
    other_names=("openai", "gpt-oss"),
)
GEMMA4 = ToolDialect(
    "gemma4",
    MapCall(before_name="call:", quote='<|"|>'),
    call_start="<|tool_call>",
    call_end="<tool_call|>",
    reasoning=ReasoningMarks("<|channel>thought\n", "<channel|>"),
    template_marks=("<|tool_call>", "<tool_call|>"),
)
GLM45 = ToolDialect(
    "glm45",
    ParameterCall(
        before_name="",
        after_name="",
        before_key="<arg_key>",
        after_key="</arg_key>",
        before_value="<arg_value>",
        after_value="</arg_value>",
    ),
    call_start="<tool_call>",
    separator="\n",
    call_end="</tool_call>",
    template_marks=("<arg_key>", "<arg_value>"),
    other_names=("glm47", "glm"),
)
DEEPSEEK_V3 = ToolDialect(
    "deepseek_v3",
    NamedJsonCall(
        before_name="function<｜tool▁sep｜>", after_name="\n```json\n", after_arguments="\n```"
    ),
    section_start="<｜tool▁calls▁begin｜>",
    call_start="<｜tool▁call▁begin｜>",
    separator="\n",
    call_end="<｜tool▁call▁end｜>",
    section_end="<｜tool▁calls▁end｜>",
    template_marks=("<｜tool▁sep｜>", "```json"),
    other_names=("deepseekv3",),
)
DEEPSEEK_V31 = ToolDialect(
    "deepseek_v31",
    NamedJsonCall(after_name="<｜tool▁sep｜>"),
    section_start="<｜tool▁calls▁begin｜>",
    call_start="<｜tool▁call▁begin｜>",
    call_end="<｜tool▁call▁end｜>",
    section_end="<｜tool▁calls▁end｜>",
    template_marks=("<｜tool▁sep｜>",),
    not_in_template=("```json",),
    other_names=("deepseekv31",),
)
DEEPSEEK_V32 = ToolDialect(
    "deepseek_v32",
    ParameterCall(
        before_name='<｜DSML｜invoke name="',
        after_name='">',
        before_key='<｜DSML｜parameter name="',
        after_key='" string="true">',
        after_key_of_json='" string="false">',
        after_value="</｜DSML｜parameter>",
        end="</｜DSML｜invoke>",
    ),
    section_start="<｜DSML｜function_calls>",
    separator="\n",
    section_end="</｜DSML｜function_calls>",
    template_marks=("｜DSML｜", "function_calls"),
    other_names=("deepseekv32",),
)
DEEPSEEK_V4 = replace(
    DEEPSEEK_V32,
    name="deepseek_v4",
    section_start="<｜DSML｜tool_calls>",
    section_end="</｜DSML｜tool_calls>",
    template_marks=("｜DSML｜",),
    not_in_template=("function_calls",),
    other_names=("deepseekv4",),
)
KIMI_K2 = ToolDialect(
    "kimi_k2",
    NamedJsonCall(
        before_name="functions.", before_id=":", after_name="<|tool_call_argument_begin|>"
    ),
    section_start="<|tool_calls_section_begin|>",
    call_start="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    section_end="<|tool_calls_section_end|>",
    ids="indexed",
    template_marks=("<|tool_calls_section_begin|>",),
)
MINIMAX_M2 = ToolDialect(
    "minimax_m2",
    ParameterCall(
        before_name='<invoke name="',
        after_name='">',
        before_key='<parameter name="',
        after_key='">',
        after_value="</parameter>",
        end="</invoke>",
        on_lines=True,
    ),
    section_start="<minimax:tool_call>",
    separator="\n",
    section_end="</minimax:tool_call>",
    template_marks=("<minimax:tool_call>",),
    other_names=("minimax-m2",),
)
GRANITE = ToolDialect(
    "granite",
    JsonObjectCall(),
    section_start="<|tool_call|>",
    other_section_starts=("<tool_call>",),
    in_list=True,
    separator=", ",
    template_marks=("<|tool_call|>", "<|start_of_role|>"),
)
PHI4_MINI = ToolDialect(
    "phi4_mini",
    JsonObjectCall(),
    section_start="<|tool_call|>",
    other_section_starts=("functools",),
    in_list=True,
    separator=", ",
    section_end="<|/tool_call|>",
    reasoning=None,
    template_marks=(("<|/tool|>", "functools["),),
    other_names=("phi4_mini_json",),
)

DIALECTS = (
    HARMONY,
    GEMMA4,
    GRANITE,
    PHI4_MINI,
    MINIMAX_M2,
    KIMI_K2,
    DEEPSEEK_V32,
    DEEPSEEK_V4,
    DEEPSEEK_V31,
    DEEPSEEK_V3,
    GLM45,
    LFM2,
    MISTRAL,
    MISTRAL_V3,
    QWEN3_CODER,
    HERMES,
    LLAMA3_JSON,
    PYTHONIC,
)
