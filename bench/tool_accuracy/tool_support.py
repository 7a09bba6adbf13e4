"""Whether a target can be asked tool cases at all, found before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.bench.load_client import Server
from llmkit.bench.tool_accuracy.ask_tool_cases import tools_refusal
from llmkit.bench.tool_accuracy.tool_case import ToolCase
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.server.text.dialect_detection import detect_chat_dialect


def why_no_tools(target: Checkpoint | Server, cases: Sequence[ToolCase]) -> str:
    """Why a target cannot be asked the cases; "": it can.

    A checkpoint needs a chat template with a place for tools, and a dialect of calls that its
    server finds. A server is asked. Raises as `ask_tool_cases` does.
    """
    with_tools = [case for case in cases if case.tools]
    if not with_tools:
        return ""
    if isinstance(target, Server):
        refusal = tools_refusal(target, with_tools[0])
        return f"the server refuses tools ({refusal})" if refusal else ""
    tokenizer = load_tokenizer(target)
    if "tools" not in (tokenizer.template(tools=True) or ""):
        return "its chat template has no place for tools"
    if detect_chat_dialect(tokenizer.chat_templates, tokenizer.settings).tools is None:
        return "how it writes tool calls is not known from its chat template"
    return ""
