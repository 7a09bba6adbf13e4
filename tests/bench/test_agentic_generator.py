"""`llmkit bench trace`: the same seed writes the same trace, with what was asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from llmkit.bench.agentic.generate_trace import generate_trace
from llmkit.bench.agentic.read_trace import read_agent_trace
from llmkit.bench.agentic.trace_options import TraceOptions
from llmkit.cli import main
from llmkit.common.errors import UsageError

OPTIONS = TraceOptions(Path("unused"), sessions=40, turns=(2, 5), tools=3, branches=0.3, rate=5.0)


def test_seed_decides_everything() -> None:
    content = generate_trace(OPTIONS).to_jsonl()
    assert generate_trace(OPTIONS).to_jsonl() == content
    assert generate_trace(replace(OPTIONS, seed=1)).to_jsonl() != content


def test_generated_trace_holds_what_was_asked_for(tmp_path: Path) -> None:
    options = replace(
        OPTIONS, output_tokens=(7, 9), system_tokens=600, agents=2, user_tokens=(11, 13)
    )
    made = generate_trace(options)
    file = tmp_path / "trace.jsonl"
    file.write_bytes(made.to_jsonl())
    trace = read_agent_trace(str(file))
    assert len(trace.roots) == made.num_sessions == 40
    turns = [turn for session in trace.sessions for turn in session.turns]
    assert len(turns) == made.num_turns
    assert sum(turn.output_tokens or 0 for turn in turns) == made.output_tokens
    assert {turn.output_tokens for turn in turns} == {7, 8, 9}
    assert {len(root.turns) for root in trace.roots} == {2, 3, 4, 5}
    systems = {root.turns[0].messages[0]["tokens"] for root in trace.roots}
    assert {system.num_tokens for system in systems} == {600}
    assert len(systems) == 2, "one for each kind of agent"
    users = {root.turns[0].messages[1]["tokens"] for root in trace.roots}
    assert len(users) == 40, "no other text is shared"
    assert {user.num_tokens for user in users} == {11, 12, 13}
    starts = [root.start_s for root in trace.roots]
    assert starts[0] == 0.0
    assert all(a is not None and b is not None and a <= b for a, b in pairwise(starts))
    for root in trace.roots:
        assert root.turns[0].tools is not None
        names = [tool["function"]["name"] for tool in root.turns[0].tools]
        assert names == ["search_files", "read_files", "write_files", "delegate_task"]


def test_share_of_branches_is_that_of_turns_that_another_one_follows() -> None:
    made = generate_trace(replace(OPTIONS, sessions=400, branches=0.25))
    parents = [line for line in made.lines if "parent_session_id" not in line]
    num_chances = sum(len(line["turns"]) - 1 for line in parents)
    assert made.num_branches / num_chances == pytest.approx(0.25, abs=0.04)
    assert not generate_trace(replace(OPTIONS, branches=0.0)).num_branches


def test_think_time_is_the_mean_delay() -> None:
    made = generate_trace(replace(OPTIONS, sessions=400, think_time=2.0))
    delays = [t["delay"] for line in made.lines for t in line["turns"] if "delay" in t]
    assert sum(delays) / len(delays) == pytest.approx(2000, rel=0.1)
    assert "delay" not in json.dumps(generate_trace(replace(OPTIONS, think_time=0.0)).lines)


def test_results_answer_the_calls_of_the_turn_before() -> None:
    made = generate_trace(OPTIONS)
    num_results = 0
    for line in made.lines:
        for before, after in pairwise(line["turns"]):
            calls = [call["id"] for call in before["answer"].get("tool_calls", [])]
            results = [m["tool_call_id"] for m in after["messages"] if m["role"] == "tool"]
            assert calls == results
            num_results += len(results)
    assert num_results > 50


def test_sub_agents_need_tools() -> None:
    with pytest.raises(
        UsageError, match=r"started by a tool call\. --branches needs --tools of at"
    ):
        generate_trace(replace(OPTIONS, tools=0))
    assert "tool" not in json.dumps(generate_trace(replace(OPTIONS, tools=0, branches=0)).lines)


def test_command_writes_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "trace.jsonl"
    arguments = ["bench", "trace", "-o", str(file), "--sessions", "2", "--turns", "3"]
    assert main.run([*arguments, "--output-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(file),
        "sessions": 2,
        "branches": 0,
        "requests": 6,
        "output_tokens": 30,
    }
    assert len(read_agent_trace(str(file)).sessions) == 2
    assert main.run(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{file}: 2 sessions, 0 branches, 6 requests, ")
    assert main.run([*arguments, "--branches", "1.5"]) == 2
    message = "--branches: 1.5 is out of range. A number from 0 to 1 was expected."
    assert message in capsys.readouterr().err
