"""Playing a trace of sessions on a server: closed loop, or each session at its time."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from llmkit.bench.agentic.agent_trace import AgentSession, AgentTrace, AgentTurn, HashedTokens
from llmkit.bench.agentic.client_work import ClientWork
from llmkit.bench.agentic.ideal_prefix_cache import SentRequest
from llmkit.bench.agentic.session_history import (
    ChatHistory,
    Message,
    TokenHistory,
    served_answer,
)
from llmkit.bench.agentic.trace_tokens import TraceTokens
from llmkit.bench.answer_stream import RequestRecord, StreamedAnswer, read_answer
from llmkit.bench.bench_metrics import RequestTimeline
from llmkit.bench.load_client import (
    READ_TIMEOUT_S,
    Server,
    answer_timeline,
    open_session,
    post_json,
    send_request,
)
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import ShortageError

_TOKENIZE_CONCURRENCY = 8
_CHAT_FIELDS = ("messages", "tools", "chat_template_kwargs")  # what a chat's prompt depends on


@dataclass(frozen=True)
class AgentLoad:
    """A trace with the way it is played in one run."""

    trace: AgentTrace
    name: str  # unique among the runs of a benchmark; chats of other runs share no prefix cache
    max_sessions: int  # roots in flight at once
    starts_s: Sequence[float] | None  # of the roots; None: each when one before it has ended
    recorded_history: bool  # prompts have the trace's answers, not the server's
    tokens: TraceTokens
    tokenizer: Tokenizer


@dataclass
class PlayedTurn:
    """A turn that was sent, with its answer."""

    timeline: RequestTimeline
    answer: StreamedAnswer
    body: Mapping[str, Any]
    prompt: Sequence[int] = ()  # token ids; empty for a chat until `tokenize_prompts`


@dataclass
class PlayedSessions:
    """The result of a run. It is complete when no turn has an error."""

    wall_s: float = 0.0
    client_cpu_s: float = 0.0
    turns: list[PlayedTurn] = field(default_factory=list)
    session_s: list[float] = field(default_factory=list)  # of each root, with its branches
    work_s: list[float] = field(default_factory=list)  # stretches of the client's own work

    def sent_requests(self) -> Iterator[SentRequest]:
        """The prompts and answers as token ids."""
        for turn in self.turns:
            timeline = turn.timeline
            last_s = timeline.arrivals_s[-1]
            yield SentRequest(timeline.sent_s, last_s, turn.prompt, turn.answer.token_ids)


def play_sessions(server: Server, load: AgentLoad) -> PlayedSessions:
    """Play all sessions. The first failed turn ends the run."""
    return asyncio.run(_Player(server, load).play())


def tokenize_prompts(server: Server, played: PlayedSessions) -> bool:
    """Set the token ids of chats' prompts, after the run.

    vLLM sends them with the answer. llmkit has `/tokenize`, as vLLM does; other servers may not.
    Returns whether all are known.
    """
    asked = []
    for turn in played.turns:
        if turn.answer.prompt_token_ids:
            turn.prompt = array("q", turn.answer.prompt_token_ids)
        else:
            asked.append(turn)
    return asyncio.run(_tokenize_prompts(server, asked))


class _TurnFailedError(Exception):
    """A turn has failed; the run ends."""


class _Player:
    """Plays one load once."""

    def __init__(self, server: Server, load: AgentLoad) -> None:
        self._server = server
        self._load = load
        self._work = ClientWork()
        self._played = PlayedSessions(work_s=self._work.stretches_s)
        self._last_answers: dict[str, str] = {}  # the text of each session's last answer
        # Made before the run, which they would delay.
        self._messages = {
            (session.id, index): [
                load.tokens.message(message, f"{session.id}, turn {index}, message {number}")
                for number, message in enumerate(turn.messages)
            ]
            for session in load.trace.sessions
            for index, turn in enumerate(session.turns)
        }

    async def play(self) -> PlayedSessions:
        load = self._load
        starts_s: Sequence[float | None] = load.starts_s or [None] * len(load.trace.roots)
        waiting = iter(zip(load.trace.roots, starts_s, strict=True))
        async with open_session(READ_TIMEOUT_S) as http:
            self._http = http
            start_s = time.perf_counter()
            start_cpu_s = time.thread_time()
            try:
                async with asyncio.TaskGroup() as group:
                    self._group = group
                    for _ in range(min(load.max_sessions, len(load.trace.roots))):
                        group.create_task(self._play_roots(waiting, start_s))
            except* _TurnFailedError:
                pass  # its error is in its timeline
            self._played.wall_s = time.perf_counter() - start_s
            self._played.client_cpu_s = time.thread_time() - start_cpu_s
        return self._played

    async def _play_roots(
        self, waiting: Iterator[tuple[AgentSession, float | None]], start_s: float
    ) -> None:
        """One client: it plays the next root when its last one has ended."""
        for root, root_start_s in waiting:
            due_s = None
            if root_start_s is not None:
                due_s = start_s + root_start_s
                await _sleep_until(due_s)
            started_s = due_s or time.perf_counter()
            await self._play_session(root, self._new_history(), due_s)
            self._played.session_s.append(time.perf_counter() - started_s)

    async def _play_session(
        self, session: AgentSession, history: TokenHistory | ChatHistory, due_s: float | None
    ) -> None:
        """Play a session and its branches. due_s: when its first turn should be sent.

        Returns when the branches have ended too.
        """
        branches: list[tuple[int | None, asyncio.Task[None]]] = []  # with the turns that wait
        started_s = due_s or time.perf_counter()
        if session.turns[0].delay_s:
            due_s = started_s + session.turns[0].delay_s
        for index, turn in enumerate(session.turns):
            joining = [task for joins_at, task in branches if joins_at == index]
            if joining:
                # Think time begins when the last branch has answered.
                self._work.end()
                await asyncio.gather(*joining)
            if index and (turn.delay_s or joining or turn.offset_s is not None):
                due_s = time.perf_counter() + turn.delay_s
            if turn.offset_s is not None:
                due_s = max(due_s or 0.0, started_s + turn.offset_s)
            if due_s is not None:
                self._work.end()
                await _sleep_until(due_s)
            await self._play_turn(session, index, history, due_s)
            due_s = None
            for child in self._load.trace.branches(session):
                assert child.branch
                if child.branch.turn == index:
                    task = self._group.create_task(self._play_branch(child, history))
                    branches.append((child.branch.joins_at, task))
        self._work.end()
        await asyncio.gather(*(task for _, task in branches))

    def _play_branch(
        self, session: AgentSession, parent: TokenHistory | ChatHistory
    ) -> Coroutine[Any, Any, None]:
        """Play a session with its parent's history of this moment, or with a new one."""
        assert session.branch
        if session.branch.inherits:
            return self._play_session(session, parent.copy(), None)
        return self._play_session(session, self._new_history(), None)

    def _new_history(self) -> TokenHistory | ChatHistory:
        return TokenHistory() if self._load.trace.sends_tokens else ChatHistory()

    async def _play_turn(
        self,
        session: AgentSession,
        index: int,
        history: TokenHistory | ChatHistory,
        due_s: float | None,
    ) -> None:
        """Send a turn and add it to the history with its answer. Raises _TurnFailedError."""
        self._work.begin()
        turn = session.turns[index]
        place = f"{session.id}, turn {index}"
        prompt: Sequence[int] = ()
        if isinstance(history, TokenHistory):
            assert turn.tokens is not None
            if turn.replaces_history:
                history.token_ids = []
            history.token_ids += self._load.tokens.ids(turn.tokens, place)
            prompt = array("q", history.token_ids)
            body: dict[str, Any] = {"prompt": history.token_ids}
            path = "/v1/completions"
        else:
            body = self._chat_fields(session, index, history)
            path = "/v1/chat/completions"
        body |= {
            "model": self._server.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "temperature": 0,
        }
        if turn.output_tokens is not None:
            body |= {"max_tokens": turn.output_tokens, "ignore_eos": True}
        body |= turn.extra or {}
        data = json.dumps(body).encode()
        record = RequestRecord()
        if due_s is not None:
            record.schedule_lag_s = time.perf_counter() - due_s
        self._work.end()
        await send_request(self._http, f"{self._server.url}{path}", data, record)
        self._work.begin()  # until what awaits next
        answer = read_answer(record)
        timeline = answer_timeline(place, record, answer, len(prompt), turn.output_tokens)
        if not answer.token_ids and timeline.error is None:
            text = answer.text or answer.reasoning
            answer.token_ids = self._load.tokenizer.encode(text, add_special_tokens=False)
        kept = {name: body[name] for name in _CHAT_FIELDS if name in body}
        self._played.turns.append(PlayedTurn(timeline, answer, kept, prompt))
        if timeline.error is not None:
            raise _TurnFailedError
        self._end_turn(session, index, history, answer)

    def _chat_fields(
        self, session: AgentSession, index: int, history: ChatHistory
    ) -> dict[str, Any]:
        """The messages and tools of a chat's turn."""
        turn = session.turns[index]
        if turn.replaces_history:
            history.messages = []
            history.answer = None
        if turn.tools is not None:
            history.tools = turn.tools
        history.add([self._with_answer(m) for m in self._messages[session.id, index]])
        fields: dict[str, Any] = {
            "messages": list(history.messages),
            "cache_salt": self._load.name,
        }
        if history.tools:
            fields["tools"] = list(history.tools)
        return fields

    def _with_answer(self, message: Message) -> Message:
        """A message whose content is the last answer of a branch gets it."""
        name = message.get("answer_of")
        if name is None:
            return message
        rest = {key: value for key, value in message.items() if key != "answer_of"}
        return rest | {"content": self._last_answers[name]}

    def _end_turn(
        self,
        session: AgentSession,
        index: int,
        history: TokenHistory | ChatHistory,
        answer: StreamedAnswer,
    ) -> None:
        """Add the answer, the server's or the trace's, to the history."""
        turn = session.turns[index]
        if isinstance(history, TokenHistory):
            history.token_ids += self._next_tokens(turn, f"{session.id}, answer {index}", answer)
            return
        recorded = None
        if turn.answer is not None:
            recorded = self._load.tokens.message(turn.answer, f"{session.id}, answer {index}")
        message = served_answer(answer)
        if self._load.recorded_history and recorded is not None:
            message = recorded
        history.end_turn(message, recorded)
        self._last_answers[session.id] = str(message.get("content") or "")

    def _next_tokens(self, turn: AgentTurn, place: str, answer: StreamedAnswer) -> list[int]:
        """The tokens of an answer in the prompts that follow."""
        if not self._load.recorded_history:
            return answer.token_ids
        count = turn.output_tokens or len(answer.token_ids)
        return self._load.tokens.ids(HashedTokens((), count), place)


async def _sleep_until(due_s: float) -> None:
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))


async def _tokenize_prompts(server: Server, turns: Sequence[PlayedTurn]) -> bool:
    waiting = iter(turns)
    told: list[bool] = []

    async def run_client(http: aiohttp.ClientSession) -> None:
        for turn in waiting:
            told.append(await _tokenize_prompt(http, server, turn))
            if not told[-1]:
                return

    async with open_session(READ_TIMEOUT_S) as http:
        await asyncio.gather(*(run_client(http) for _ in range(_TOKENIZE_CONCURRENCY)))
    return all(told)


async def _tokenize_prompt(http: aiohttp.ClientSession, server: Server, turn: PlayedTurn) -> bool:
    fields = {"add_generation_prompt": True, **turn.body}
    with suppress(ShortageError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        status, content = await post_json(http, server, "/tokenize", fields)
        if status == 200:
            turn.prompt = array("q", json.loads(content)["tokens"])
            # A prompt of another length than the server counted is another prompt.
            return len(turn.prompt) == turn.timeline.prompt_tokens
    return False
