"""Finds how a checkpoint writes tool calls and reasoning.

In this order: the names that the options give, the `response_template` (or the older
`response_schema`) of its tokenizer_config.json, which transformers parses answers by, and the marks
in its chat template. A known dialect has more data than a response template (ids, what models leave
out): if all its marks are in there, it is meant. Otherwise the template itself is the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from llmkit.common.errors import UsageError
from llmkit.runtime.server.text.response_template import (
    dialect_of_response_template,
    reasoning_of_response_template,
)
from llmkit.runtime.server.text.tool_dialects import (
    DIALECTS,
    GEMMA4,
    HARMONY,
    MISTRAL,
    THINK,
    ChannelCall,
    JsonObjectCall,
    ReasoningMarks,
    ToolDialect,
)

Source = Literal["option", "response_template", "chat template", ""]

NO_REASONING = "none"  # of --reasoning-parser
# The values of --reasoning-parser: vLLM's names. None: the marks are those of channels.
_THINK_NAMES = (
    "deepseek_r1",
    "deepseek_v3",
    "deepseek_v4",
    "glm45",
    "glm47",
    "granite",
    "holo2",
    "kimi_k2",
    "minimax_m2",
    "nemotron_v3",
    "olmo3",
    "qwen3",
    "step3",
    "step3p5",
)
REASONING_MARKS: dict[str, ReasoningMarks | None] = {
    **dict.fromkeys(_THINK_NAMES, THINK),
    "gemma4": GEMMA4.reasoning,
    "mistral": MISTRAL.reasoning,
    "openai_gptoss": None,
    "gpt_oss": None,
    "openai": None,
    NO_REASONING: None,
}
# Marks in chat templates, for models that write no tool calls, too. A template may have only the
# mark at the end of a thought: it drops the thoughts of earlier answers.
_MARKS_IN_TEMPLATES = (
    (("<think>", "</think>"), THINK),
    (("[THINK]",), MISTRAL.reasoning),
    (("<|channel>thought", "<channel|>"), GEMMA4.reasoning),
)


@dataclass(frozen=True)
class ChatDialect:
    """How a model writes tool calls and reasoning, and how that is known."""

    tools: ToolDialect | None = None  # None: unknown
    tools_source: Source = ""
    reasoning: ReasoningMarks | None = None  # None: none, or that of the dialect's channels
    reasoning_source: Source = ""

    @property
    def channels(self) -> ChannelCall | None:
        """How the model writes messages in channels; None: it writes none."""
        return self.tools.channels if self.tools is not None else None

    @property
    def has_reasoning(self) -> bool:
        """Whether the model may reason: between marks or in a channel."""
        return self.thought_marks is not None

    @property
    def thought_marks(self) -> ReasoningMarks | None:
        """What stands before and after a thought, in a channel too; None: the model has none."""
        channels = self.channels
        if channels is None:
            return self.reasoning
        start = f"{channels.channel}{channels.reasoning_channel}{channels.message}"
        return ReasoningMarks(start, channels.ends[0])

    @property
    def description(self) -> str:
        """A line for people, such as `tool calls: qwen3_coder (chat template)`."""
        calls = f"{self.tools.name} ({self.tools_source})" if self.tools else "unknown"
        marks = self.reasoning
        thoughts = "none"
        if marks is not None:
            thoughts = f"{marks.start.strip()} ({self.reasoning_source})"
        elif self.tools is HARMONY:
            thoughts = f"channels ({self.tools_source})"
        return f"tool calls: {calls}; reasoning: {thoughts}"


def dialect_names() -> list[str]:
    """Return the values of --tool-parser."""
    names = {name for dialect in DIALECTS for name in (dialect.name, *dialect.other_names)}
    return sorted(names)


def check_tool_parser(option: str, name: str) -> None:
    """Raise UsageError for a dialect that is not known."""
    if name not in dialect_names():
        raise UsageError(f"{option} is {name!r}", f"One of {', '.join(dialect_names())}")


def check_reasoning_parser(option: str, name: str) -> None:
    """Raise UsageError for marks of reasoning that are not known."""
    if name not in REASONING_MARKS:
        raise UsageError(f"{option} is {name!r}", f"One of {', '.join(sorted(REASONING_MARKS))}")


def detect_chat_dialect(
    templates: Mapping[str, str],
    settings: Mapping[str, Any],
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> ChatDialect:
    """Return how a model writes calls and reasoning.

    templates: its chat templates by name. settings: its tokenizer_config.json. tool_parser,
    reasoning_parser: the options' values, which `check_...` accept.
    """
    # Calls are described in the template for tools, if there is one.
    template = templates.get("tool_use") or templates.get("default") or ""
    response = settings.get("response_template") or settings.get("response_schema")
    tools: ToolDialect | None = None
    tools_source: Source = ""
    if tool_parser is not None:
        tools, tools_source = _named(tool_parser), "option"
    if tools is None and (tools := _dialect_of_response(response)) is not None:
        tools_source = "response_template"
    if tools is None and (tools := dialect_of_response_template(response)) is not None:
        tools_source = "response_template"
    if tools is None and (tools := dialect_of_template(template)) is not None:
        tools_source = "chat template"
    if reasoning_parser is not None:
        return ChatDialect(tools, tools_source, REASONING_MARKS[reasoning_parser], "option")
    if tools is not None and tools.channels is not None:
        return ChatDialect(tools, tools_source)
    reasoning = reasoning_in(_text_of(response)) or reasoning_of_response_template(response)
    if reasoning is not None:
        return ChatDialect(tools, tools_source, reasoning, "response_template")
    reasoning = reasoning_in("\n".join(templates.values()))
    return ChatDialect(tools, tools_source, reasoning, "chat template" if reasoning else "")


def dialect_of_template(template: str) -> ToolDialect | None:
    """Return the dialect whose marks a chat template has."""
    for dialect in DIALECTS:
        has_marks = bool(dialect.template_marks) and all(
            any(mark in template for mark in ((marks,) if isinstance(marks, str) else marks))
            for marks in dialect.template_marks
        )
        if has_marks and not any(mark in template for mark in dialect.not_in_template):
            return dialect
    return None


def reasoning_in(text: str) -> ReasoningMarks | None:
    """Return the marks of reasoning in a chat template or a response template."""
    for found, marks in _MARKS_IN_TEMPLATES:
        if any(mark in text for mark in found):
            return marks
    return None


def _named(name: str) -> ToolDialect | None:
    for dialect in DIALECTS:
        if name == dialect.name or name in dialect.other_names:
            return dialect
    return None


def _dialect_of_response(response: object) -> ToolDialect | None:
    """Return the dialect whose marks a response template has; of several, the one with most."""
    text = _text_of(response)
    found = [(len("".join(marks)), d) for d in DIALECTS if (marks := _marks_of(d))]
    matching = [
        (size, dialect)
        for size, dialect in found
        if all(mark in text for mark in _marks_of(dialect))
    ]
    return max(matching, key=lambda entry: entry[0])[1] if matching else None


def _marks_of(dialect: ToolDialect) -> list[str]:
    """Return the marks that a response template of a dialect has; []: it cannot be told."""
    syntax = dialect.syntax
    if isinstance(syntax, ChannelCall):
        return [syntax.channel, syntax.message, syntax.recipient]
    marks = [dialect.section_start, dialect.call_start]
    if not any(marks):
        return []
    if not isinstance(syntax, JsonObjectCall):
        names = {field.name for field in fields(syntax)} & {"before_name", "before_key", "quote"}
        marks += [getattr(syntax, name) for name in sorted(names)]
        marks += [getattr(syntax, "after_name", "").strip()]
    return [mark for mark in marks if mark]


def _text_of(value: object) -> str:
    """Return all texts in a JSON value, a line each, with regular expressions' escapes removed."""
    texts: list[str] = []
    values = [value]
    while values:
        item = values.pop()
        if isinstance(item, str):
            texts.append(item.replace("\\n", "\n").replace("\\", ""))
        elif isinstance(item, Mapping):
            values += [*item, *item.values()]
        elif isinstance(item, list):
            values += item
    return "\n".join(texts)
