"""Scripted models that think and call tools; some of their thoughts never end."""

from __future__ import annotations

from pathlib import Path

from support.scripted_model import FORMATS, scripted_checkpoint

_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} Call them as FORMAT{% endif %}"
    "{% for message in messages %}{{ message.role }}:"
    "{% if message.reasoning_content %}(thought: {{ message.reasoning_content }}){% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "CALL {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
)
_CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
_SECOND = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
# "agent", "sum" and "final" are the turns of an agent with two tools, whose results are the
# triggers of the next turn.
_SCRIPTS = {
    "endless": "<think>Hm so",
    "closed": "</think>Enough said.",
    "agent": f"<think>\nThe weather first.\n</think>\n\n{_CALL}",
    "sum": f"<think>\nNow the sum.\n</think>\n\n{_SECOND}",
    "final": "<think>\nBoth are here.\n</think>\n\nSunny, and 2.",
}


def thinking_checkpoint(folder: Path) -> Path:
    """Write the model to `folder` and return its path."""
    return scripted_checkpoint(
        folder,
        _SCRIPTS,
        _TEMPLATE.replace("FORMAT", FORMATS["thinker"]),
        ("<think>", "</think>"),
        endless=("endless",),
        special_in=("endless", "closed"),
    )


def harmony_checkpoint(folder: Path) -> Path:
    """Write a model whose thoughts never end, and who begins another one after each that is closed.

    It writes messages in channels, as gpt-oss does.
    """
    scripts = {
        "endless": "<|channel|>analysis<|message|>Hm so",
        "closed": "<|end|><|start|>assistant",
    }
    return scripted_checkpoint(
        folder,
        scripts,
        "{% for message in messages %}{{ message.role }}:<|message|>{{ message.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
        "{# <|channel|> #}",
        ("<|channel|>", "<|message|>", "<|end|>", "<|start|>"),
        endless=("endless",),
        continued={"closed": "endless"},
    )
