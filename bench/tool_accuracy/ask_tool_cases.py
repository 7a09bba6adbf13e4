"""Asks a server all tool cases over `/v1/chat/completions`, greedy, and checks its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

from llmkit.bench.answer_stream import server_error_message
from llmkit.bench.load_client import READ_TIMEOUT_S, Server, open_session, post_json
from llmkit.bench.tool_accuracy.check_answer import ChatAnswer, check_answer
from llmkit.bench.tool_accuracy.tool_case import ToolCase
from llmkit.bench.tool_accuracy.tool_results import ToolCaseResult
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress

MAX_CONCURRENCY = 8  # requests in flight
# A request that the server refuses for what is in it, such as a schema, is an answer of the server.
# Other errors say nothing of the model.
_REFUSED = (400, 413, 422)


def ask_tool_cases(
    server: Server, cases: Sequence[ToolCase], max_tokens: int, progress: Progress, name: str
) -> list[ToolCaseResult]:
    """The checked answers, in the order of the cases.

    name: of the target, for the progress. Raises InputError when a request fails for another reason
    than what is in it, and when the server refuses all of them, and ShortageError when it does not
    answer.
    """
    progress.start("tool cases", len(cases), "cases")
    answers = asyncio.run(_ask_all(server, cases, max_tokens, progress, name))
    progress.finish()
    if all(answer.refusal for answer in answers):
        raise InputError(
            f"{name} refused all {len(cases)} tool cases (the first, {cases[0].id}:"
            f" {answers[0].refusal})",
            "A server that answers some of them was expected",
        )
    return [check_answer(case, answer) for case, answer in zip(cases, answers, strict=True)]


def tools_refusal(server: Server, case: ToolCase) -> str:
    """Why a server refuses tools at all, found by a short request; "": it takes them."""
    question = {"role": "user", "content": "Hello"}
    fields = {"messages": [question], "tools": list(case.tools), "tool_choice": "auto"}

    async def ask() -> ChatAnswer:
        async with open_session(READ_TIMEOUT_S) as session:
            return await _post(session, server, {**fields, "temperature": 0, "max_tokens": 1})

    return asyncio.run(ask()).refusal


async def _ask_all(
    server: Server, cases: Sequence[ToolCase], max_tokens: int, progress: Progress, name: str
) -> list[ChatAnswer]:
    answers = [ChatAnswer()] * len(cases)
    waiting = iter(enumerate(cases))  # shared by all clients

    async def run_client(session: aiohttp.ClientSession) -> None:
        for index, case in waiting:
            fields = {
                "messages": list(case.messages),
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            if case.tools:
                fields |= {"tools": list(case.tools), "tool_choice": "auto"}
            try:
                answers[index] = await _post(session, server, fields)
            except InputError as error:
                raise InputError(
                    f"tool case {case.id}: {error.what}",
                    "Tool accuracy is only reported when all requests are answered",
                ) from error
            progress.advance(1, name)

    async with open_session(READ_TIMEOUT_S) as session:
        clients = [run_client(session) for _ in range(min(MAX_CONCURRENCY, len(cases)))]
        await asyncio.gather(*clients)
    return answers


async def _post(
    session: aiohttp.ClientSession, server: Server, fields: dict[str, Any]
) -> ChatAnswer:
    path = "/v1/chat/completions"
    status, content = await post_json(session, server, path, fields)
    if status in _REFUSED:
        return ChatAnswer(refusal=f"HTTP {status}: {server_error_message(content)}")
    if status != 200:
        message = server_error_message(content)
        raise InputError(f"{server.url} answered HTTP {status}: {message}")
    try:
        return parse_answer(json.loads(content))
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{server.url}{path} did not answer as a chat ({type(error).__name__}: {error})"
        ) from error


def parse_answer(document: dict[str, Any]) -> ChatAnswer:
    """The answer in a response.

    Raises LookupError, TypeError or AttributeError for another document.
    """
    choice = document["choices"][0]
    message = choice["message"]
    calls = [
        (str(call["function"]["name"]), call["function"].get("arguments"))
        for call in message.get("tool_calls") or ()
    ]
    text = message.get("content") or ""
    if not isinstance(text, str):
        raise TypeError("content is not a text")
    return ChatAnswer(text, tuple(calls), choice.get("finish_reason") == "length")
