"""Reading traces of sessions: JSON lines of llmkit's own form, of Mooncake and of AIPerf.

Each line is a session with its `turns`, or one request. Requests with one `session_id` are turns of
one session, in the order of the lines; a request without one is a session of its own, as in
Mooncake's traces. The field names are AIPerf's, whose documentation defines them: times are
milliseconds, lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.bench.agentic.agent_trace import (
    AgentSession,
    AgentTrace,
    AgentTurn,
    Branch,
    check_trace,
    trace_error,
)
from llmkit.bench.agentic.trace_fields import Fields
from llmkit.common.errors import InputError
from llmkit.common.json_lines import read_json_lines

HASH_BLOCK_TOKENS = 512  # of Mooncake's traces
_REQUEST_FIELDS = (
    "timestamp",
    "delay",
    "session_id",
    "input_length",
    "output_length",
    "hash_ids",
    "text_input",
    "messages",
    "tools",
    "extra",
    # What AIPerf's generator notes about a session. It does not change what is sent.
    "group_id",
    "is_restart",
    "type",
)
_BRANCH_FIELDS = ("join_turn", "context", "background")
_SESSION_FIELDS = (
    "session_id",
    "timestamp",
    "tools",
    "turns",
    "context_mode",
    "parent_session_id",
    "parent_turn",
    *_BRANCH_FIELDS,
)
_TURN_FIELDS = (
    "messages",
    "text",
    "role",
    "tools",
    "delay",
    "timestamp",
    "output_length",
    "max_tokens",
    "answer",
    "forks",
    "spawns",
    "extra",
)
_MESSAGE_FIELDS = (
    "role",
    "content",
    "hash_ids",
    "tokens",
    "answer_of",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "refusal",
)
_ROLES = ("system", "developer", "user", "assistant", "tool")
# AIPerf's names of two ways to write a session: turns that add to the history, complete prompts.
_CONTEXT_MODES = ("deltas_without_responses", "message_array_with_responses")
# What the replay sets itself.
_RESERVED = ("model", "messages", "prompt", "tools", "stream", "stream_options", "max_tokens", "n")


def read_agent_trace(
    path: str, limit: int | None = None, hash_block_tokens: int = HASH_BLOCK_TOKENS
) -> AgentTrace:
    """Read a trace. limit: its first roots only, with their branches.

    Raises InputError with file and line for what is wrong, and as `check_trace` does.
    """
    reader = _TraceReader(path, hash_block_tokens)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"trace {path} cannot be read ({error.strerror})") from error
    for number, document in read_json_lines(data, f"trace {path}"):
        reader.add_line(Fields(path, number, "the line", document))
    trace = reader.trace()
    check_trace(trace)
    if limit is not None:
        trace = trace.keep_roots(trace.roots[:limit])
    return trace


class _TraceReader:
    """Collects the sessions of the lines."""

    def __init__(self, path: str, hash_block_tokens: int) -> None:
        self._path = path
        self._block_tokens = hash_block_tokens
        # By the id that requests share, or by the number of a session's own line.
        self._sessions: dict[str | int, AgentSession] = {}
        self._joins_next: set[str] = set()  # branches for which their parent's next turn waits
        self._started_by: dict[str, tuple[int, Branch]] = {}  # by `forks` and `spawns`; (line, ...)

    def add_line(self, line: Fields) -> None:
        if "turns" in line:
            self._sessions[line.line] = self._session(line)
            return
        turn, start_s = self._request(line)
        session_id = line.text("session_id")
        if session_id is None:
            # The name cannot be one of the trace's.
            session = AgentSession(f"line {line.line}", line.line, (turn,), start_s)
            self._sessions[line.line] = session
        elif session_id in self._sessions:
            first = self._sessions[session_id]
            if start_s is not None and first.start_s is not None:
                turn = replace(turn, offset_s=max(0.0, start_s - first.start_s))
            self._sessions[session_id] = replace(first, turns=(*first.turns, turn))
        else:
            self._sessions[session_id] = AgentSession(session_id, line.line, (turn,), start_s)

    def trace(self) -> AgentTrace:
        num_turns = {session.id: len(session.turns) for session in self._sessions.values()}
        for name, (line, branch) in self._started_by.items():
            if name not in num_turns:
                raise trace_error(
                    self._path,
                    line,
                    f"turn {branch.turn} of {branch.parent!r} starts an unknown session, {name!r}",
                    "The id of another session was expected",
                )
        sessions = [self._with_branch(session, num_turns) for session in self._sessions.values()]
        starts = [s.start_s for s in sessions if s.start_s is not None and s.branch is None]
        first_s = min(starts, default=0.0)
        return AgentTrace(
            self._path,
            tuple(
                session
                if session.start_s is None or session.branch is not None
                else replace(session, start_s=session.start_s - first_s)
                for session in sessions
            ),
        )

    def _with_branch(self, session: AgentSession, num_turns: Mapping[str, int]) -> AgentSession:
        branch = session.branch
        if session.id in self._started_by:
            line, started = self._started_by[session.id]
            if branch is not None:
                raise trace_error(
                    self._path,
                    line,
                    f"session {session.id!r} is started by {started.parent!r} and has a"
                    " parent_session_id",
                    "A session is started once",
                )
            branch = started
        if branch is not None and session.id in self._joins_next:
            is_last = branch.turn + 1 == num_turns.get(branch.parent)
            branch = replace(branch, joins_at=None if is_last else branch.turn + 1)
        return replace(session, branch=branch)

    def _request(self, line: Fields) -> tuple[AgentTurn, float | None]:
        """A request, and its time in seconds."""
        line.only(_REQUEST_FIELDS)
        kinds = [name for name in ("input_length", "text_input", "messages") if name in line]
        if len(kinds) != 1:
            raise line.error(
                f"the line has {' and '.join(kinds) or 'no prompt'}",
                "One of input_length, text_input, messages or turns was expected",
            )
        turn = AgentTurn(
            line.line,
            delay_s=line.milliseconds("delay") or 0.0,
            output_tokens=line.whole("output_length", 1),
            extra=_extra(line),
        )
        if kinds == ["input_length"]:
            if "tools" in line or "extra" in line:
                raise line.error("tools and extra go with messages", "input_length alone")
            # A request of a session adds to its history; in Mooncake's traces each one is complete.
            tokens = line.hashed_tokens("input_length", self._block_tokens)
            turn = replace(turn, tokens=tokens, replaces_history="session_id" not in line)
        elif kinds == ["text_input"]:
            if "tools" in line or "hash_ids" in line:
                raise line.error("tools and hash_ids do not go with text_input")
            message = {"role": "user", "content": line.text("text_input")}
            turn = replace(turn, messages=(message,))
        else:
            messages = self._messages(line)
            tools = _tools(line)
            turn = replace(turn, messages=messages, tools=tools, replaces_history=True)
        return turn, line.milliseconds("timestamp")

    def _session(self, line: Fields) -> AgentSession:
        line.only(_SESSION_FIELDS)
        session_id = line.text("session_id") or f"line {line.line}"
        replaces = line.choice("context_mode", _CONTEXT_MODES) == _CONTEXT_MODES[1]
        turns: list[AgentTurn] = []
        system: tuple[Mapping[str, Any], ...] = ()
        times: list[float | None] = []
        documents = list(line.items("turns"))
        for document in documents:
            fields = Fields(line.path, line.line, f"turn {len(turns)}", document)
            fields.only(_TURN_FIELDS)
            messages = self._turn_messages(fields)
            is_system = "text" in fields and messages[0]["role"] == "system"
            if is_system and not turns and not system and len(documents) > 1:
                system = messages  # AIPerf's system prompt is not a request of its own
                continue
            self._add_branches(fields, session_id, len(turns), len(documents) - bool(system))
            turns.append(
                AgentTurn(
                    line.line,
                    messages=(*system, *messages) if not turns else messages,
                    tools=_tools(fields),
                    replaces_history=replaces,
                    delay_s=fields.milliseconds("delay") or 0.0,
                    output_tokens=_output_tokens(fields),
                    answer=self._answer(fields),
                    extra=_extra(fields),
                )
            )
            times.append(fields.milliseconds("timestamp"))
        if "tools" in line and turns[0].tools is None:
            turns[0] = replace(turns[0], tools=_tools(line))
        start_s = line.milliseconds("timestamp")
        if start_s is None:
            start_s = times[0]
        if start_s is not None:
            turns = [
                turn if time_s is None else replace(turn, offset_s=max(0.0, time_s - start_s))
                for turn, time_s in zip(turns, times, strict=True)
            ]
        branch = self._branch(line, session_id)
        return AgentSession(session_id, line.line, tuple(turns), start_s, branch)

    def _branch(self, line: Fields, session_id: str) -> Branch | None:
        parent = line.text("parent_session_id")
        turn = line.whole("parent_turn", 0)
        if (parent is None) != (turn is None) or (
            parent is None and any(name in line for name in _BRANCH_FIELDS)
        ):
            raise line.error(
                "a branch is described in part", "parent_session_id and parent_turn go together"
            )
        if parent is None or turn is None:
            return None
        inherits = line.choice("context", ("parent", "new")) == "parent"
        joins_at = line.whole("join_turn", 1)
        is_background = line.flag("background")
        if joins_at is not None and is_background:
            raise line.error(
                "a branch has join_turn and background", "No turn waits for one in the background"
            )
        if joins_at is None and not is_background:
            self._joins_next.add(session_id)
        return Branch(parent, turn, inherits, joins_at)

    def _add_branches(self, fields: Fields, parent: str, turn: int, num_turns: int) -> None:
        """The sessions that AIPerf's `forks` (with the history) and `spawns` (without) start."""
        next_turn = turn + 1 if turn + 1 < num_turns else None
        for name, inherits in (("forks", True), ("spawns", False)):
            for item in fields.items(name, empty=True):
                joins_at = next_turn
                children = [item]
                if isinstance(item, dict):
                    entry = Fields(fields.path, fields.line, f"{name} of {fields.what}", item)
                    if inherits:
                        entry.only(("child", "background"))
                        children = [entry.text("child")]
                        if entry.flag("background"):
                            joins_at = None
                    else:
                        entry.only(("children", "join_at"))
                        children = list(entry.items("children"))
                        joins_at = entry.whole("join_at", turn + 1) or next_turn
                for child in children:
                    if not isinstance(child, str):
                        raise fields.error(
                            f"{name} of {fields.what} has {child!r}", "Session ids were expected"
                        )
                    if child in self._started_by:
                        raise fields.error(
                            f"session {child!r} is started by two turns",
                            "A session is started once",
                        )
                    branch = Branch(parent, turn, inherits, joins_at)
                    self._started_by[child] = (fields.line, branch)

    def _turn_messages(self, fields: Fields) -> tuple[Mapping[str, Any], ...]:
        if ("messages" in fields) == ("text" in fields):
            raise fields.error(f"{fields.what} has messages and text, or neither", "One of them")
        if "messages" in fields:
            if "role" in fields:
                raise fields.error(f"{fields.what} has a role and messages", "role goes with text")
            return self._messages(fields)
        role = fields.choice("role", ("user", "system", "assistant"))
        return ({"role": role, "content": fields.text("text")},)

    def _messages(self, fields: Fields) -> tuple[Mapping[str, Any], ...]:
        return tuple(
            self._message(fields, f"message {index} of {fields.what}", item)
            for index, item in enumerate(fields.items("messages"))
        )

    def _answer(self, fields: Fields) -> Mapping[str, Any] | None:
        if "answer" not in fields:
            return None
        what = f"the answer of {fields.what}"
        document = {"role": "assistant", **(fields.mapping("answer") or {})}
        message = self._message(fields, what, document)
        if message["role"] != "assistant":
            raise fields.error(f"role of {what} is {message['role']!r}", "assistant was expected")
        return message

    def _message(self, fields: Fields, what: str, document: Any) -> Mapping[str, Any]:
        message = Fields(fields.path, fields.line, what, document)
        message.only(_MESSAGE_FIELDS)
        if "role" not in message:
            raise message.error(f"{what} has no role", f"One of {', '.join(_ROLES)}")
        message.choice("role", _ROLES)
        contents = [name for name in ("content", "hash_ids", "answer_of") if name in message]
        if len(contents) > 1 or ("tokens" in message and contents not in ([], ["hash_ids"])):
            raise message.error(
                f"{what} has {' and '.join([*contents, 'tokens'][:2])}",
                "Either content, hash_ids with tokens, or answer_of is the message's text",
            )
        if "tokens" in message:
            contents.append("tokens")
        if not contents and "tool_calls" not in message and message.document["role"] != "assistant":
            raise message.error(f"{what} has no content", "content, hash_ids or answer_of")
        if "hash_ids" in message or "tokens" in message:
            tokens = message.hashed_tokens("tokens", self._block_tokens)
            rest = {k: v for k, v in message.document.items() if k != "hash_ids"}
            return rest | {"tokens": tokens}
        return message.document


def _output_tokens(fields: Fields) -> int | None:
    if "output_length" in fields and "max_tokens" in fields:
        raise fields.error(f"{fields.what} has output_length and max_tokens", "One of them")
    return fields.whole("output_length", 1) or fields.whole("max_tokens", 1)


def _tools(fields: Fields) -> tuple[Mapping[str, Any], ...] | None:
    if "tools" not in fields:
        return None
    tools = tuple(fields.items("tools", empty=True))
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fields.error(
                f"a tool of {fields.what} has no function with a name",
                "OpenAI's form of tools was expected",
            )
    return tools


def _extra(fields: Fields) -> Mapping[str, Any] | None:
    extra = fields.mapping("extra")
    reserved = [name for name in _RESERVED if extra and name in extra]
    if reserved:
        raise fields.error(
            f"extra of {fields.what} has {reserved[0]!r}", "The replay sets this field itself"
        )
    return extra
