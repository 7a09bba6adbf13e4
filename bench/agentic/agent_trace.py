"""A trace of agents' sessions: what is sent in which turn, and which session starts which.

A session is a list of turns; each turn is one request, whose prompt holds the session's history. A
session may start others after a turn (sub-agents), and waits for those that join it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from llmkit.common.errors import InputError

HashId = int | str


class HashedTokens(NamedTuple):
    """Tokens by the ids of their blocks: equal ids are equal tokens. Text without ids is unique."""

    hash_ids: tuple[HashId, ...]
    num_tokens: int


@dataclass(frozen=True)
class AgentTurn:
    """One request. Either `tokens` or `messages` say what it adds to the session's history."""

    line: int  # of the trace, for messages
    tokens: HashedTokens | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None  # None: those of the turn before
    replaces_history: bool = False  # the prompt is complete
    delay_s: float = 0.0  # after the answer before it
    offset_s: float | None = None  # not before this time after the session's first turn
    output_tokens: int | None = None  # None: as many as the model writes
    answer: Mapping[str, Any] | None = None  # the recorded assistant message
    extra: Mapping[str, Any] | None = None  # more fields of the request


@dataclass(frozen=True)
class Branch:
    """How a session is started by another one, its parent."""

    parent: str
    turn: int  # of the parent; the session starts when it is answered
    inherits: bool = True  # whether the history begins with the parent's
    joins_at: int | None = None  # the parent's turn that waits for the session; None: none does


@dataclass(frozen=True)
class AgentSession:
    """The turns of one agent."""

    id: str
    line: int  # of the trace, for messages
    turns: tuple[AgentTurn, ...]
    start_s: float | None = None  # after the trace's first session; None: the trace has no times
    branch: Branch | None = None  # None: a root


@dataclass(frozen=True)
class AgentTrace:
    """The sessions of a trace, in its order. `check_trace` has found every parent."""

    path: str
    sessions: tuple[AgentSession, ...]

    @cached_property
    def roots(self) -> list[AgentSession]:
        """The sessions that no other one starts."""
        return [session for session in self.sessions if session.branch is None]

    @cached_property
    def _branches(self) -> dict[str, list[AgentSession]]:
        branches: dict[str, list[AgentSession]] = {}
        for session in self.sessions:
            if session.branch is not None:
                branches.setdefault(session.branch.parent, []).append(session)
        return branches

    def branches(self, session: AgentSession) -> Sequence[AgentSession]:
        """The sessions that a session starts."""
        return self._branches.get(session.id, ())

    def tree(self, root: AgentSession) -> list[AgentSession]:
        """A root and all sessions below it."""
        found = [root]
        for session in found:
            found += self.branches(session)
        return found

    @property
    def is_timed(self) -> bool:
        """Whether the trace says when each root starts."""
        return all(session.start_s is not None for session in self.roots)

    @property
    def sends_tokens(self) -> bool:
        """Whether prompts are token ids (/v1/completions), not messages (/v1/chat/completions)."""
        return self.sessions[0].turns[0].tokens is not None

    def keep_roots(self, roots: Sequence[AgentSession]) -> AgentTrace:
        """The trace with these roots and the sessions below them only."""
        kept = {session.id for root in roots for session in self.tree(root)}
        return AgentTrace(self.path, tuple(s for s in self.sessions if s.id in kept))


def check_trace(trace: AgentTrace) -> None:
    """Check what holds between sessions.

    Raises InputError for an empty trace, two sessions of one id, unknown parents, turns that the
    parent does not have, sessions that start each other, answers of sessions that have not joined,
    and a trace with both tokens and messages.
    """
    if not trace.sessions:
        raise InputError(f"trace {trace.path} is empty", "A session on each line was expected")
    by_id: dict[str, AgentSession] = {}
    for session in trace.sessions:
        if session.id in by_id:
            raise trace_error(
                trace.path,
                session.line,
                f"session {session.id!r} is on line {by_id[session.id].line} too",
                "Each session has an id of its own",
            )
        by_id[session.id] = session
    for session in trace.sessions:
        if session.branch is not None:
            _check_branch(trace, session, session.branch, by_id)
    for session in trace.sessions:
        _check_ancestors(trace, session, by_id)
    for session in trace.sessions:
        for index, turn in enumerate(session.turns):
            if (turn.tokens is not None) != trace.sends_tokens:
                raise trace_error(
                    trace.path,
                    turn.line,
                    "the trace has turns of token counts and turns of messages",
                    "One kind was expected",
                )
            _check_answers(trace, session, index)


def _check_branch(
    trace: AgentTrace, session: AgentSession, branch: Branch, by_id: Mapping[str, AgentSession]
) -> None:
    parent = by_id.get(branch.parent)
    if parent is None:
        raise trace_error(
            trace.path,
            session.line,
            f"session {session.id!r} has an unknown parent, {branch.parent!r}",
            "The id of another session was expected",
        )
    last = len(parent.turns) - 1
    if not 0 <= branch.turn <= last:
        raise trace_error(
            trace.path,
            session.line,
            f"session {session.id!r} starts after turn {branch.turn} of {parent.id!r}",
            f"Its turns are 0 to {last}",
        )
    if branch.joins_at is not None and not branch.turn < branch.joins_at <= last:
        raise trace_error(
            trace.path,
            session.line,
            f"session {session.id!r} joins {parent.id!r} at turn {branch.joins_at}",
            f"A later turn than {branch.turn}, up to {last}, was expected",
        )
    if session.start_s is not None:
        raise trace_error(
            trace.path,
            session.line,
            f"session {session.id!r} has a parent and a timestamp",
            "It starts when the parent's turn is answered",
            "Remove the timestamp, or use delay",
        )


def _check_ancestors(
    trace: AgentTrace, session: AgentSession, by_id: Mapping[str, AgentSession]
) -> None:
    path = [session.id]
    while (branch := by_id[path[-1]].branch) is not None:
        path.append(branch.parent)
        if branch.parent in path[:-1]:
            raise trace_error(
                trace.path,
                session.line,
                f"sessions start each other: {' <- '.join(path)}",
                "A parent that no branch leads back to was expected",
            )


def _check_answers(trace: AgentTrace, session: AgentSession, index: int) -> None:
    """Every `answer_of` names a branch that has joined by this turn."""
    joined = {
        child.id
        for child in trace.branches(session)
        if child.branch and child.branch.joins_at is not None and child.branch.joins_at <= index
    }
    for message in session.turns[index].messages:
        name = message.get("answer_of")
        if name is not None and name not in joined:
            raise trace_error(
                trace.path,
                session.turns[index].line,
                f"turn {index} of {session.id!r} has the answer of {name!r}",
                f"A branch that has joined by then was expected: {', '.join(joined) or 'none has'}",
            )


def trace_error(path: str, line: int, what: str, expected: str = "", todo: str = "") -> InputError:
    """The error for a line of a trace."""
    return InputError(f"trace {path}, line {line}: {what}", expected, todo)
