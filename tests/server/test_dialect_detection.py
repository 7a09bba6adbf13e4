"""Which dialect of tool calls and which marks of reasoning a checkpoint has."""

# ruff: noqa: RUF001 - DeepSeek's marks have fullwidth vertical lines

from typing import Any

import pytest

from llmkit.common.errors import UsageError
from llmkit.runtime.server.text.dialect_detection import (
    check_reasoning_parser,
    check_tool_parser,
    detect_chat_dialect,
    dialect_names,
)
from llmkit.runtime.server.text.tool_dialects import DIALECTS

TEMPLATES = {
    "hermes": "<tool_call>{{ call.function | tojson }}</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=k>\n</parameter></function></tool_call>",
    "llama3_json": '{"name": function name, "parameters": dictionary}',
    "pythonic": "calls look like [func_name1(params)]",
    "lfm2": "<|tool_call_start|>[f()]<|tool_call_end|>",
    "mistral_v3": "[TOOL_CALLS][{}]",
    "mistral": "[TOOL_CALLS]name[ARGS]{}",
    "harmony": "<|start|>assistant<|channel|>final<|message|>",
    "gemma4": '<|tool_call>call:f{k:<|"|>v<|"|>}<tool_call|>',
    "glm45": "<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>",
    "deepseek_v3": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```",
    "deepseek_v31": "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}",
    "deepseek_v32": "<｜DSML｜function_calls>",
    "deepseek_v4": "<｜DSML｜tool_calls>",
    "kimi_k2": "<|tool_calls_section_begin|>",
    "minimax_m2": '<minimax:tool_call><invoke name="f">',
    "granite": "<|start_of_role|>assistant<|end_of_role|><|tool_call|>[]",
    "phi4_mini": "<|tool|>[]<|/tool|>",
}


def test_dialect_templates_cover_every_dialect() -> None:
    assert set(TEMPLATES) == {dialect.name for dialect in DIALECTS}


@pytest.mark.parametrize("name", TEMPLATES)
def test_dialect_is_found_in_the_chat_template(name: str) -> None:
    found = detect_chat_dialect({"default": TEMPLATES[name]}, {})
    assert found.tools is not None
    assert found.tools.name == name
    assert found.tools_source == "chat template"
    assert f"tool calls: {name} (chat template)" in found.description


def test_dialect_of_phi4_is_found_by_either_mark() -> None:
    for template in ('functools[{"name": [function name]}]', "<|tool|>{{ tools }}<|/tool|>"):
        found = detect_chat_dialect({"default": template}, {})
        assert found.tools is not None
        assert found.tools.name == "phi4_mini"


@pytest.mark.parametrize("template", ["", "{{ messages }}", "<tool_calls>", "<tools>"])
def test_dialect_of_other_templates_is_unknown(template: str) -> None:
    found = detect_chat_dialect({"default": template}, {})
    assert found.tools is None
    assert found.reasoning is None
    assert found.description == "tool calls: unknown; reasoning: none"


def test_dialect_is_read_from_the_template_for_tools() -> None:
    templates = {"default": TEMPLATES["mistral"], "tool_use": TEMPLATES["hermes"]}
    found = detect_chat_dialect(templates, {})
    assert found.tools is not None
    assert found.tools.name == "hermes"


def response_template(*calls: tuple[str, str]) -> dict[str, Any]:
    """A response template in which tool calls begin and end with the patterns `calls`."""
    fields = {
        f"field_{index}": {"open_pattern": begin, "close_pattern": end, "content": "text"}
        for index, (begin, end) in enumerate(calls)
    }
    return {"start_anchor": "<|im_start|>assistant\n", "fields": fields}


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("hermes", [(r"<tool_call>\s*", r"\s*</tool_call>")]),
        ("qwen3_coder", [(r"<tool_call>\s*<function=(?P<n>\w+)>", "<parameter=")]),
        ("glm45", [(r"<tool_call>(?P<n>\w+)", "<arg_key>(?P<key>.*?)</arg_key>")]),
        (
            "harmony",
            [(r"<\|channel\|>commentary to=functions\.(?P<n>\w+).*?<\|message\|>", "x")],
        ),
        ("gemma4", [(r"<\|tool_call>call:(?P<n>\w+)", r'<tool_call\|><\|"\|>')]),
        ("lfm2", [(r"<\|tool_call_start\|>", r"<\|tool_call_end\|>")]),
    ],
)
def test_dialect_of_the_response_template_wins_over_the_chat_template(
    name: str, patterns: list[tuple[str, str]]
) -> None:
    settings = {"response_template": response_template(*patterns)}
    other = "mistral" if name != "mistral" else "hermes"
    found = detect_chat_dialect({"default": TEMPLATES[other]}, settings)
    assert found.tools is not None
    assert found.tools.name == name
    assert found.tools_source == "response_template"


@pytest.mark.parametrize("settings", [{"response_template": value} for value in (1, [], "x", {})])
def test_dialect_falls_through_unknown_response_templates(settings: dict[str, Any]) -> None:
    found = detect_chat_dialect({"default": TEMPLATES["hermes"]}, settings)
    assert found.tools_source == "chat template"


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("openai", "harmony"),
        ("qwen3_xml", "qwen3_coder"),
        ("qwen3_json", "hermes"),
        ("llama4_pythonic", "pythonic"),
        ("glm47", "glm45"),
        ("phi4_mini_json", "phi4_mini"),
        ("kimi_k2", "kimi_k2"),
    ],
)
def test_dialect_of_the_option_wins(option: str, name: str) -> None:
    check_tool_parser("--tool-parser", option)
    found = detect_chat_dialect({"default": TEMPLATES["mistral"]}, {}, option)
    assert found.tools is not None
    assert found.tools.name == name
    assert found.tools_source == "option"


def test_dialect_names_are_in_the_errors_of_unknown_ones() -> None:
    with pytest.raises(UsageError) as error:
        check_tool_parser("--tool-parser", "morse")
    for name in dialect_names():
        assert name in str(error.value)
    with pytest.raises(UsageError, match="deepseek_r1"):
        check_reasoning_parser("--reasoning-parser", "morse")


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("{{ '<think>\n' }}", "<think>"),
        ("{{ content.split('</think>')[-1] }}", "<think>"),
        ("[THINK]x[/THINK]", "[THINK]"),
        ("<|channel>thought\n", "<|channel>thought\n"),
    ],
)
def test_dialect_detection_finds_the_marks_of_reasoning(template: str, start: str) -> None:
    found = detect_chat_dialect({"default": template}, {})
    assert found.reasoning is not None
    assert found.reasoning.start == start


def test_dialect_detection_takes_marks_of_reasoning_from_the_option() -> None:
    found = detect_chat_dialect({"default": "<think>"}, {}, None, "mistral")
    assert found.reasoning is not None
    assert found.reasoning.start == "[THINK]"
    assert found.reasoning_source == "option"
    assert detect_chat_dialect({"default": "<think>"}, {}, None, "none").reasoning is None
