"""The work of `--mode agentic`: a trace, its loads, and how each round plays it."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random

from llmkit.bench.agentic.agent_trace import AgentSession, AgentTrace, trace_error
from llmkit.bench.agentic.play_sessions import AgentLoad
from llmkit.bench.agentic.trace_tokens import TraceTokens
from llmkit.bench.workload import PromptDataset, Scenario, Workload, build_workload
from llmkit.checkpoint.tokenizer import Tokenizer
from llmkit.common.errors import InputError
from llmkit.common.formatting import count_text

TRACE_TIMES = "trace"  # the scenario in which each session starts at its time of the trace


@dataclass(frozen=True)
class AgentWorkload(Workload):
    """The loads of each round by scenario name, and the warm-up requests. `rounds` is empty."""

    trace: AgentTrace
    loads: tuple[dict[str, AgentLoad], ...]
    recorded_history: bool
    corpus_sha256: str  # of the tokens that stand for the trace's

    @property
    def num_rounds(self) -> int:
        """How often each scenario runs."""
        return len(self.loads)

    @property
    def sha256(self) -> str:
        """Hash of the sessions, the loads and what their tokens depend on."""
        content = [
            [asdict(session) for session in self.trace.sessions],
            [
                [name, load.name, load.max_sessions, load.starts_s]
                for loads in self.loads
                for name, load in loads.items()
            ],
            self.recorded_history,
            self.corpus_sha256,
        ]
        text = json.dumps(content, separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> list[dict[str, int | float | str]]:
        """The report's entry for each scenario."""
        return [
            self._describe(scenario, self.loads[0][scenario.name]) for scenario in self.scenarios
        ]

    def _describe(self, scenario: Scenario, load: AgentLoad) -> dict[str, int | float | str]:
        num_roots = len(self.trace.roots)
        num_branches = len(self.trace.sessions) - num_roots
        turns = [turn for session in self.trace.sessions for turn in session.turns]
        work = count_text(num_roots, "sessions")
        if num_branches:
            work += f" with {count_text(num_branches, 'branches')}"
        work += f", {count_text(len(turns), 'requests')}"
        pace = f"{load.max_sessions} at a time"
        if load.starts_s is not None:
            span_s = max(load.starts_s) - min(load.starts_s)
            pace = f"started within {span_s:.3g} s"
        entry: dict[str, int | float | str] = {
            "name": scenario.name,
            "requests": len(turns),
            "sessions": num_roots,
            "branches": num_branches,
            "clients": load.max_sessions,
            "output_tokens": sum(turn.output_tokens or 0 for turn in turns),
            "history": "trace" if self.recorded_history else "server",
            "about": f"{work}, {pace}",
        }
        if scenario.load_level:
            entry["load"] = scenario.load_level
        return entry


def build_agent_workload(
    trace: AgentTrace,
    scenarios: Sequence[Scenario],
    data: PromptDataset,
    tokenizer: Tokenizer,
    hash_block_tokens: int,
    recorded_history: bool = False,
    rounds: int = 1,
    seed: int = 0,
) -> AgentWorkload:
    """The loads of each scenario and round.

    recorded_history: prompts have the trace's answers. Raises InputError when one is missing, and
    when the text of the prompts is too short.
    """
    if recorded_history:
        _check_recorded(trace)
    loads = []
    for round_number in range(rounds):
        by_name = {}
        for scenario in scenarios:
            starts_s: Sequence[float] | None = None
            if scenario.name == TRACE_TIMES:
                starts_s = [root.start_s or 0.0 for root in trace.roots]
            elif scenario.draw_arrivals:
                random = Random(f"{seed}/agents/arrivals")  # noqa: S311
                starts_s = scenario.draw_arrivals(random, len(trace.roots))
            # As a cache salt: vLLM refuses slashes.
            name = f"{seed}-{scenario.name}-{round_number}"
            tokens = TraceTokens(data.tokens, tokenizer, hash_block_tokens, name)
            sessions = min(scenario.max_concurrency, len(trace.roots))
            by_name[scenario.name] = AgentLoad(
                trace, name, sessions, starts_s, recorded_history, tokens, tokenizer
            )
        loads.append(by_name)
    warmup = build_workload(data, (), seed=seed).warmup
    corpus = hashlib.sha256(array("q", data.tokens).tobytes()).hexdigest()
    return AgentWorkload(
        seed, tuple(scenarios), warmup, (), trace, tuple(loads), recorded_history, corpus
    )


def keep_fitting(trace: AgentTrace, context_tokens: int, target: str) -> AgentTrace:
    """The trace without the sessions whose prompts and answers are longer than the context.

    Only counts of tokens tell how long they are; of messages the server decides. Raises InputError
    when no session is left.
    """
    if not trace.sends_tokens:
        return trace
    by_id = {session.id: session for session in trace.sessions}
    fitting = [
        root
        for root in trace.roots
        if all(_longest(s, by_id) <= context_tokens for s in trace.tree(root))
    ]
    if not fitting:
        shortest = min(max(_longest(s, by_id) for s in trace.tree(root)) for root in trace.roots)
        raise InputError(
            f"no session of trace {trace.path} fits the context of {target}, {context_tokens}"
            " tokens",
            f"The shortest one needs {shortest}",
            "Use a model with a longer context, or another trace",
        )
    return trace if len(fitting) == len(trace.roots) else trace.keep_roots(fitting)


def _longest(session: AgentSession, by_id: Mapping[str, AgentSession]) -> int:
    """The tokens of a session's longest request, its answer included."""
    return max(_lengths(session, by_id))


def _lengths(session: AgentSession, by_id: Mapping[str, AgentSession]) -> list[int]:
    """The tokens of each request of a session, its answer included."""
    history = 0
    if session.branch is not None and session.branch.inherits:
        history = _lengths(by_id[session.branch.parent], by_id)[session.branch.turn]
    lengths: list[int] = []
    for turn in session.turns:
        assert turn.tokens is not None
        if turn.replaces_history:
            history = 0
        history += turn.tokens.num_tokens + (turn.output_tokens or 1)
        lengths.append(history)
    return lengths


def _check_recorded(trace: AgentTrace) -> None:
    """Every answer that a later prompt holds must be in the trace, or have a length."""
    for session in trace.sessions:
        branch_turns = {s.branch.turn for s in trace.branches(session) if s.branch}
        for index, turn in enumerate(session.turns):
            is_last = index + 1 == len(session.turns)
            is_used = index in branch_turns or not (
                is_last or session.turns[index + 1].replaces_history
            )
            is_known = turn.answer is not None or turn.tokens is not None
            if is_used and not is_known:
                raise trace_error(
                    trace.path,
                    turn.line,
                    f"turn {index} of {session.id!r} has no answer",
                    "--history trace needs the answers before each turn",
                    "Add them, or use --history server",
                )
