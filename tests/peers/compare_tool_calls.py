"""Do vLLM's parsers read the tool calls that our dialects write? (make tool-calls)

Every dialect's text comes from `tests/support/tool_call_texts.py`, and llmkit reads it, too. A line
for each: equal, or what vLLM reads. Harmony is left out: vLLM's parser takes token ids of gpt-oss.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tool_call_texts import Call, rendered

from llmkit.runtime.server.text.output_parser import new_output_parser
from llmkit.runtime.server.text.output_parts import ToolCallPart, join_parts
from llmkit.runtime.server.text.tool_dialects import DIALECTS, ToolDialect

ROOT = Path(__file__).parents[2]
# vLLM's names, where they differ from ours.
PARSERS = {
    "phi4_mini": "phi4_mini_json",
    "pythonic": "llama4_pythonic",
    "mistral_v3": "mistral",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "share": {"type": "number"},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {"type": "object"},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("get_weather", "get_weather_now")
]
CALLS: list[Call] = [
    (
        "get_weather",
        {
            "city": 'Zürich, "Paris" and 東京',
            "days": -3,
            "share": 0.5,
            "exact": True,
            "tags": ["a", "b c"],
            "place": {"a": {"b": "x"}},
        },
    ),
    ("get_weather_now", {"city": "Oslo"}),
]


# Calls by kind. vLLM's parser of Phi-4-mini ends at the first bracket of a list.
KINDS = {"one call": CALLS[:1], "two calls": CALLS, "no list": CALLS[1:]}


def ours(dialect: ToolDialect, text: str) -> list[list[Any]]:
    """The calls that llmkit reads."""
    parts = join_parts(new_output_parser(dialect, TOOLS).feed(text, final=True))
    return [
        [part.name, json.loads(part.arguments)] for part in parts if isinstance(part, ToolCallPart)
    ]


def main() -> int:
    """Compare; the exit code is 1 where llmkit does not read its own text."""
    rows = [
        (dialect, kind, rendered(dialect.name, calls))
        for dialect in DIALECTS
        if dialect.name != "harmony"
        for kind, calls in KINDS.items()
    ]
    sent = [
        {
            "parser": PARSERS.get(dialect.name, dialect.name),
            "text": text,
            "tools": TOOLS,
            "special_tokens": list(dialect.special_tokens),
        }
        for dialect, _, text in rows
    ]
    child = subprocess.run(
        [ROOT / ".venv-vllm" / "bin" / "python", Path(__file__).with_name("vllm_tool_calls.py")],
        input=json.dumps(sent),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    theirs = json.loads(child.stdout.splitlines()[-1])
    failed = False
    for (dialect, kind, text), read in zip(rows, theirs, strict=True):
        expected = [list(call) for call in KINDS[kind]]
        failed |= ours(dialect, text) != expected
        verdict = "equal" if read == expected else f"vLLM reads {read!r}"
        sys.stdout.write(f"{dialect.name:14} {kind:10} {verdict}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
