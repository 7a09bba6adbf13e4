"""Calls as the chat templates of each dialect's models write them."""

# ruff: noqa: RUF001 - DeepSeek's marks have fullwidth vertical lines

from __future__ import annotations

import json
from typing import Any

Call = tuple[str, dict[str, Any]]


def json_form(call: Call, key: str = "arguments") -> str:
    name, arguments = call
    return f'{{"name": "{name}", "{key}": {as_json(arguments)}}}'


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def gemma(value: Any) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            items = (f"{key}:{gemma(item)}" for key, item in value.items())
            return "{" + ",".join(items) + "}"
        case list():
            return "[" + ",".join(map(gemma, value)) + "]"
        case _:
            return as_json(value)


def xml(calls: list[Call], call: str, key: str, between: str = "\n") -> str:
    """`call` has the name and the parameters, `key` the key and the value."""
    written = []
    for name, arguments in calls:
        parameters = between.join(key.format(k, plain(v)) for k, v in arguments.items())
        form = call if arguments else call.replace("\n{}", "{}", 1)
        written.append(form.format(name, parameters))
    return between.join(written)


def dsml(calls: list[Call], section: str) -> str:
    written = []
    for name, arguments in calls:
        lines = [f'<｜DSML｜invoke name="{name}">']
        for key, value in arguments.items():
            is_string = str(isinstance(value, str)).lower()
            lines.append(
                f'<｜DSML｜parameter name="{key}" string="{is_string}">{plain(value)}'
                "</｜DSML｜parameter>"
            )
        written.append("\n".join([*lines, "</｜DSML｜invoke>"]))
    return f"<｜DSML｜{section}>\n" + "\n".join(written) + f"\n</｜DSML｜{section}>"


def deepseek(call: str, calls: list[Call]) -> str:
    body = "".join(
        f"<｜tool▁call▁begin｜>{call.format(name, as_json(arguments))}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"


def kimi(calls: list[Call]) -> str:
    body = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
        f"{as_json(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


def pythonic(calls: list[Call]) -> str:
    written = []
    for name, arguments in calls:
        pairs = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        written.append(f"{name}({pairs})")
    return "[" + ", ".join(written) + "]"


def rendered(name: str, calls: list[Call]) -> str:
    """Calls as the chat template of the dialect's models writes them."""
    json_list = "[" + ", ".join(map(json_form, calls)) + "]"
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{json_form(call)}\n</tool_call>" for call in calls)
        case "llama3_json":
            return "; ".join(json_form(call, "parameters") for call in calls)
        case "mistral_v3":
            return f"[TOOL_CALLS] {json_list}"
        case "granite":
            return f"<|tool_call|>{json_list}"
        case "phi4_mini":
            return f"functools{json_list}"
        case "mistral":
            return "".join(f"[TOOL_CALLS]{n}[ARGS]{as_json(a)}" for n, a in calls)
        case "deepseek_v3":
            return deepseek("function<｜tool▁sep｜>{}\n```json\n{}\n```", calls)
        case "deepseek_v31":
            return deepseek("{}<｜tool▁sep｜>{}", calls)
        case "deepseek_v32":
            return dsml(calls, "function_calls")
        case "deepseek_v4":
            return dsml(calls, "tool_calls")
        case "kimi_k2":
            return kimi(calls)
        case "qwen3_coder":
            return xml(
                calls,
                "<tool_call>\n<function={}>\n{}\n</function>\n</tool_call>",
                "<parameter={}>\n{}\n</parameter>",
            )
        case "minimax_m2":
            key = '<parameter name="{}">{}</parameter>'
            body = xml(calls, '<invoke name="{}">\n{}\n</invoke>', key)
            return f"<minimax:tool_call>\n{body}\n</minimax:tool_call>"
        case "glm45":
            key = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>"
            return xml(calls, "<tool_call>{}\n{}\n</tool_call>", key)
        case "pythonic":
            return pythonic(calls)
        case "lfm2":
            return f"<|tool_call_start|>{pythonic(calls)}<|tool_call_end|>"
        case "gemma4":
            return "".join(f"<|tool_call>call:{n}{gemma(a)}<tool_call|>" for n, a in calls)
        case "harmony":
            start = "<|start|>assistant"
            text = start.join(
                f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>"
                f"{as_json(a)}<|call|>"
                for n, a in calls
            )
            return text
    raise AssertionError(name)
