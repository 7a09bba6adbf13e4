"""Making a trace of agents' sessions from a few parameters. The seed decides everything.

An agent gets a system prompt, tools and a task, calls tools, reads their results and answers. It
may let a sub-agent, which knows its history, do a part: the sub-agent's answer is a tool's result.
Texts are numbers of tokens and ids of their blocks, so that a trace has its lengths with any
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

from llmkit.bench.agentic.read_trace import HASH_BLOCK_TOKENS
from llmkit.bench.agentic.trace_options import TraceOptions
from llmkit.common.errors import UsageError

_VERBS = ("search", "read", "write", "list", "run", "check", "update", "fetch")
_NOUNS = ("files", "code", "tests", "issues", "pages", "tables", "logs", "tickets")
_DELEGATE = "delegate_task"
_MAX_BRANCH_TURNS = 3
_CALL_CHOICES = (1, 1, 1, 2)  # tool calls of an answer
_USER_SHARE = 0.2  # of the turns: the user writes instead of a tool


@dataclass
class GeneratedTrace:
    """The lines of a trace, and what they hold."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    num_sessions: int = 0
    num_branches: int = 0
    num_turns: int = 0
    output_tokens: int = 0

    def to_jsonl(self) -> bytes:
        """The content of the file."""
        return "".join(f"{json.dumps(line)}\n" for line in self.lines).encode()


def generate_trace(options: TraceOptions) -> GeneratedTrace:
    """The trace. Raises UsageError for sub-agents without tools, which nothing could call."""
    if options.branches and not options.tools:
        raise UsageError(
            "a sub-agent is started by a tool call", "--branches needs --tools of at least 1"
        )
    return _Generator(options).run()


class _Generator:
    def __init__(self, options: TraceOptions) -> None:
        self._options = options
        self._random = Random(f"{options.seed}/agents")  # noqa: S311
        self._trace = GeneratedTrace()
        self._num_blocks = 0
        self._num_calls = 0

    def run(self) -> GeneratedTrace:
        options = self._options
        agents = [
            (self._text(options.system_tokens), list(_tools(agent, options.tools)))
            for agent in range(options.agents)
        ]
        starts_ms: list[float | None] = [None] * options.sessions
        if options.rate:
            gaps = [self._random.expovariate(options.rate) for _ in range(options.sessions - 1)]
            starts_ms = [round(1000 * start_s, 1) for start_s in accumulate([0.0, *gaps])]
        for index, start_ms in enumerate(starts_ms):
            system, tools = agents[self._random.randrange(options.agents)]
            session: dict[str, Any] = {"session_id": f"session-{index}"}
            if start_ms is not None:
                session["timestamp"] = start_ms
            if tools:
                session["tools"] = tools
            first = [{"role": "system", **system}, self._user_message()]
            num_turns = self._random.randint(*options.turns)
            self._trace.num_sessions += 1
            self._add_session(session, first, num_turns, tools)
        return self._trace

    def _add_session(
        self,
        session: dict[str, Any],
        messages: list[dict[str, Any]],
        num_turns: int,
        tools: list[dict[str, Any]],
        may_branch: bool = True,
    ) -> None:
        """Add a session with its branches. messages: of its first turn."""
        options = self._options
        turns: list[dict[str, Any]] = []
        self._trace.lines.append(session)
        branches: list[tuple[dict[str, Any], int]] = []
        for index in range(num_turns):
            turn: dict[str, Any] = {}
            if turns and options.think_time:
                turn["delay"] = round(1000 * self._random.expovariate(1 / options.think_time), 1)
            output_tokens = self._random.randint(*options.output_tokens)
            self._trace.output_tokens += output_tokens
            answer = self._text(output_tokens)
            turn |= {"messages": messages, "output_length": output_tokens, "answer": answer}
            turns.append(turn)
            if index + 1 == num_turns:
                break
            if may_branch and self._random.random() < options.branches:
                branch_id = f"{session['session_id']}/{len(branches)}"
                branch = {
                    "session_id": branch_id,
                    "parent_session_id": session["session_id"],
                    "parent_turn": index,
                }
                branches.append((branch, self._random.randint(1, _MAX_BRANCH_TURNS)))
                call = self._call(_DELEGATE)
                answer["tool_calls"] = [call]
                messages = [_result(call) | {"answer_of": branch_id}]
            elif not tools or self._random.random() < _USER_SHARE:
                messages = [self._user_message()]
            else:
                names = [tool["function"]["name"] for tool in tools[: options.tools]]
                count = self._random.choice(_CALL_CHOICES)
                calls = [self._call(self._random.choice(names)) for _ in range(count)]
                answer["tool_calls"] = calls
                messages = [
                    _result(call) | self._text(self._random.randint(*options.result_tokens))
                    for call in calls
                ]
        self._trace.num_turns += len(turns)
        session["turns"] = turns
        for branch, branch_turns in branches:
            self._trace.num_branches += 1
            self._add_session(branch, [self._user_message()], branch_turns, tools, may_branch=False)

    def _user_message(self) -> dict[str, Any]:
        return {"role": "user", **self._text(self._random.randint(*self._options.user_tokens))}

    def _text(self, num_tokens: int) -> dict[str, Any]:
        """New text: its length, and ids of its blocks that no other text has."""
        first = self._num_blocks
        self._num_blocks += -(-num_tokens // HASH_BLOCK_TOKENS)
        return {"hash_ids": list(range(first, self._num_blocks)), "tokens": num_tokens}

    def _call(self, name: str) -> dict[str, Any]:
        self._num_calls += 1
        arguments = {"query": f"{self._random.choice(_NOUNS)} {self._num_calls}"}
        return {
            "id": f"call_{self._num_calls}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }


def _result(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call["id"]}


def _tools(agent: int, count: int) -> Iterator[dict[str, Any]]:
    """The definitions of an agent's tools; with any, one more that starts sub-agents."""
    names = []
    for index in range(count):
        noun, verb = divmod(index, len(_VERBS))
        name = f"{_VERBS[verb]}_{_NOUNS[noun % len(_NOUNS)]}"
        repeat = noun // len(_NOUNS)
        names.append(f"{name}_{repeat}" if repeat else name)
    if count:
        names.append(_DELEGATE)
    for name in names:
        words = name.replace("_", " ")
        yield {
            "type": "function",
            "function": {
                "name": name,
                "description": f"{words.capitalize()} of project {agent}; returns what was found.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "query": {"type": "string", "description": f"What to {words}."},
                        "limit": {"type": "integer", "minimum": 1},
                    },
                    "required": ["query"],
                },
            },
        }
