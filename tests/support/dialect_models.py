"""Scripted models that write tool calls and thoughts in the newer dialects.

Each has a chat template with the marks of its dialect, which writes earlier thoughts, calls and
results back, and special tokens where the tokenizers of such models have them.
"""

# ruff: noqa: RUF001 - DeepSeek's marks have fullwidth vertical lines

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.scripted_model import scripted_checkpoint
from support.server_process import serving

THOUGHT = "First the weather."
TEXT = "Sure."
WEATHER = ("get_weather", {"city": "Oslo by the fjord", "days": 3})
SUM = ("add", {"a": 1})
ANSWER = "Just words."
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": properties},
        },
    }
    for name, properties in (
        ("get_weather", {"city": {"type": "string"}, "days": {"type": "integer"}}),
        ("add", {"a": {"type": "integer"}}),
    )
]


@dataclass(frozen=True)
class DialectModel:
    """How a model writes calls: Jinja for one call, and the marks around calls."""

    call: str  # of `name`, `arguments`, `id`, `index`
    before: str = ""
    between: str = ""
    after: str = ""
    thought: str = "<think>\nTHOUGHT\n</think>\n\n"
    text: str = TEXT
    special: tuple[str, ...] = ()
    eos: str = ""  # a special token that ends an answer, too
    result: str = "<result>%RESULT</result>"


_XML_PARAMETERS = (
    "{% for key, value in arguments.items() %}<parameter=KEY>\n{{ value }}\n</parameter>\n"
    "{% endfor %}"
).replace("KEY", "{{ key }}")
MODELS = {
    "qwen3_coder": DialectModel(
        "<tool_call>\n<function={{ name }}>\n" + _XML_PARAMETERS + "</function>\n</tool_call>",
        between="\n",
    ),
    "glm45": DialectModel(
        "<tool_call>{{ name }}\n{% for key, value in arguments.items() %}"
        "<arg_key>{{ key }}</arg_key>\n<arg_value>{{ value }}</arg_value>\n{% endfor %}"
        "</tool_call>",
        between="\n",
        special=("<tool_call>", "</tool_call>"),
    ),
    "minimax_m2": DialectModel(
        '<invoke name="{{ name }}">\n{% for key, value in arguments.items() %}'
        '<parameter name="{{ key }}">{{ value }}</parameter>\n{% endfor %}</invoke>',
        before="<minimax:tool_call>\n",
        between="\n",
        after="\n</minimax:tool_call>",
        special=("<minimax:tool_call>", "</minimax:tool_call>"),
    ),
    "mistral": DialectModel(
        "[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}[ARGS]{{ arguments | tojson }}",
        thought="[THINK]THOUGHT[/THINK]",
        special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
        result="[TOOL_RESULTS]%ID[TOOL_CONTENT]%RESULT[/TOOL_RESULTS]",
    ),
    "kimi_k2": DialectModel(
        "<|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>{{ arguments | tojson }}"
        "<|tool_call_end|>",
        before="<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
        special=(
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        ),
        result="## Return of %ID\n%RESULT",
    ),
    # Its template wants arguments as text.
    "deepseek_v31": DialectModel(
        "{{ '<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments }}<｜tool▁call▁end｜>",
        before="<｜tool▁calls▁begin｜>",
        after="<｜tool▁calls▁end｜>",
        special=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>"),
    ),
    "gemma4": DialectModel(
        "<|tool_call>call:{{ name }}{% raw %}{{% endraw %}{% for key, value in arguments.items() %}"
        '{{ key }}:{% if value is string %}<|"|>{{ value }}<|"|>{% else %}{{ value }}{% endif %}'
        "{% if not loop.last %},{% endif %}{% endfor %}{% raw %}}{% endraw %}<tool_call|>",
        thought="<|channel>thought\nTHOUGHT<channel|>",
        special=("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"),
    ),
    "lfm2": DialectModel(
        "{{ name }}({% for key, value in arguments.items() %}{{ key }}={{ value | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %})",
        before="<|tool_call_start|>[",
        between=", ",
        after="]<|tool_call_end|>",
        special=("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "harmony": DialectModel(
        "<|channel|>commentary to=functions.{{ name }} <|constrain|>json<|message|>"
        "{{ arguments | tojson }}<|call|>",
        before="<|start|>assistant",
        between="<|start|>assistant",
        thought="<|channel|>analysis<|message|>THOUGHT<|end|>",
        text="<|start|>assistant<|channel|>commentary<|message|>Sure.<|end|>",
        special=(
            "<|channel|>",
            "<|message|>",
            "<|end|>",
            "<|start|>",
            "<|constrain|>",
            "<|call|>",
        ),
        eos="<|call|>",
        result="<|start|>tool<|message|>%RESULT<|end|>",
    ),
}


def _literal(text: str) -> str:
    """Jinja for `text`, which may begin with a line feed after a block."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


def _template(name: str) -> str:
    """The chat template: it writes what the model writes."""
    model = MODELS[name]
    is_harmony = name == "harmony"
    thought_name = "thinking" if is_harmony else "reasoning_content"
    thought = model.thought.replace("THOUGHT", "{{ message." + thought_name + " }}")
    result = model.result.replace("%ID", "{{ message.tool_call_id }}")
    refusal = (
        "{% if message.tool_calls | length > 1 or (message.content and message.thinking) %}"
        "{{ raise_exception('one call without text in a message') }}{% endif %}"
    )
    return (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'tool' %}"
        + result.replace("%RESULT", "{{ message.content }}")
        + "\n"
        "{% else %}{{ message.role }}: "
        "{% if message." + thought_name + " %}" + thought + "{% endif %}{{ message.content }}"
        "{% if message.tool_calls %}" + (refusal if is_harmony else "") + model.before + ""
        "{% for call in message.tool_calls %}"
        "{% set name = call.function.name %}{% set arguments = call.function.arguments %}"
        "{% set id = call.id %}" + model.call + ""
        "{% if not loop.last %}"
        + _literal(model.between)
        + "{% endif %}{% endfor %}"
        + _literal(model.after)
        + ""
        "{% endif %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}answer:{{ messages[-1].content }}{% endif %}"
    )


def written_calls(name: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """Calls as the model writes them."""
    from jinja2 import Environment

    model = MODELS[name]
    environment = Environment(keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    template = environment.from_string(model.call)
    ids = (
        ("functions.get_weather:0", "functions.add:1") if name == "kimi_k2" else ("abcdefghi",) * 2
    )
    written = [
        template.render(
            name=called,
            arguments=json.dumps(arguments) if name == "deepseek_v31" else arguments,
            id=call_id,
        )
        for (called, arguments), call_id in zip(calls, ids, strict=False)
    ]
    return model.before + model.between.join(written) + model.after


def start_dialect_server(folder: Path, name: str, **options: Any) -> Any:
    """Start a server of a model named "said" whose scripts are "call", "two", "cut" and "plain"."""
    model = MODELS[name]
    thought = model.thought.replace("THOUGHT", THOUGHT)
    two = written_calls(name, WEATHER, SUM)
    scripts = {
        "call": thought + model.text + written_calls(name, WEATHER),
        "two": two.removeprefix("<|start|>assistant"),
        "cut": two[: two.index("fjord")].removeprefix("<|start|>assistant"),
        "plain": ANSWER,
    }
    if name == "harmony":
        scripts["final"] = (
            f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
            f"<|channel|>final<|message|>{ANSWER}"
        )
    path = scripted_checkpoint(
        folder / "model", scripts, _template(name), model.special, special_in=("call",)
    )
    if model.eos:
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        ids = [entry["id"] for entry in tokenizer["added_tokens"] if entry["content"] == model.eos]
        settings = path / "generation_config.json"
        given = json.loads(settings.read_text()) if settings.exists() else {}
        settings.write_text(json.dumps(given | {"eos_token_id": [2, *ids]}))
    options = {"served_model_name": "said", "kv_cache_memory": 2**26, "max_num_seqs": 8, **options}
    return serving(folder / "log", path, **options)
