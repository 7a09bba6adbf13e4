"""Traces of sessions: llmkit's own form, Mooncake's and AIPerf's, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.bench.agentic.agent_modes import agentic_scenarios
from llmkit.bench.agentic.agent_trace import AgentTrace, Branch, HashedTokens
from llmkit.bench.agentic.read_trace import read_agent_trace
from llmkit.bench.agentic.trace_tokens import TraceTokens
from llmkit.bench.bench_options import LoadOptions
from llmkit.cli import main
from llmkit.common.errors import InputError, UsageError

USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "read_files", "parameters": {}}}


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], "output_length": 4} | fields


def session(name: str, num_turns: int = 1, **fields: Any) -> dict[str, Any]:
    return {"session_id": name, "turns": [turn() for _ in range(num_turns)]} | fields


def write(path: Path, *lines: Any) -> str:
    file = path / "trace.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts))
    return str(file)


def read(path: Path, *lines: Any, **options: Any) -> AgentTrace:
    return read_agent_trace(write(path, *lines), **options)


class TestMooncake:
    def test_each_line_is_a_session_at_its_time(self, tmp_path: Path) -> None:
        trace = read(
            tmp_path,
            {"timestamp": 5000, "input_length": 600, "output_length": 7, "hash_ids": [3, 4]},
            "",
            {"timestamp": 4500, "input_length": 512, "output_length": 9, "hash_ids": [3]},
        )
        assert [s.start_s for s in trace.sessions] == [0.5, 0.0], "seconds after the first"
        assert [s.id for s in trace.sessions] == ["line 1", "line 3"]
        (first,) = trace.sessions[0].turns
        assert first.tokens == HashedTokens((3, 4), 600)
        assert first.output_tokens == 7
        assert first.replaces_history
        assert trace.sends_tokens
        assert trace.is_timed

    def test_hash_ids_must_fit_the_length(self, tmp_path: Path) -> None:
        row = {"input_length": 512, "hash_ids": [1, 2]}
        with pytest.raises(InputError) as caught:
            read(tmp_path, row)
        assert str(caught.value) == (
            f"trace {tmp_path}/trace.jsonl, line 1: 2 hash_ids are too many for 512 tokens. An id"
            " stands for a block of 512 tokens. Set --hash-block-tokens to the block size of the"
            " trace."
        )
        trace = read(tmp_path, row, hash_block_tokens=256)
        assert trace.sessions[0].turns[0].tokens == HashedTokens((1, 2), 512)


class TestAIPerf:
    def test_lines_of_one_session_are_its_turns(self, tmp_path: Path) -> None:
        trace = read(
            tmp_path,
            {
                "session_id": "a",
                "timestamp": 100,
                "group_id": 1,
                "input_length": 30,
                "output_length": 4,
                "hash_ids": [0],
            },
            {"session_id": "b", "timestamp": 300, "input_length": 20},
            {"session_id": "a", "delay": 250, "input_length": 15, "hash_ids": ["x"]},
            {"session_id": "b", "timestamp": 900, "input_length": 20},
        )
        a, b = trace.sessions
        assert [t.tokens for t in a.turns] == [HashedTokens((0,), 30), HashedTokens(("x",), 15)]
        assert a.turns[1].delay_s == 0.25
        assert not a.turns[1].replaces_history, "it adds to the history"
        assert a.turns[1].output_tokens is None
        assert b.start_s == pytest.approx(0.2)
        assert b.turns[1].offset_s == pytest.approx(0.6), "after the session's first turn"

    def test_complete_messages_replace_the_history(self, tmp_path: Path) -> None:
        trace = read(
            tmp_path,
            {"session_id": 7, "messages": [USER], "tools": [TOOL], "extra": {"top_p": 0.5}},
            {"text_input": "Hi", "output_length": 3},
        )
        first, second = trace.sessions
        assert first.id == "7"
        assert first.turns[0].replaces_history
        assert first.turns[0].tools == (TOOL,)
        assert first.turns[0].extra == {"top_p": 0.5}
        assert second.turns[0].messages == ({"role": "user", "content": "Hi"},)
        assert not trace.sends_tokens
        assert not trace.is_timed

    def test_multi_turn_texts(self, tmp_path: Path) -> None:
        trace = read(
            tmp_path,
            {
                "session_id": "a",
                "turns": [
                    {"role": "system", "text": "Be brief."},
                    {"text": "Hello", "timestamp": 50},
                    {"text": "More", "delay": 1500},
                ],
            },
        )
        (only,) = trace.sessions
        assert [[m["role"] for m in t.messages] for t in only.turns] == [
            ["system", "user"],
            ["user"],
        ]
        assert only.turns[1].delay_s == 1.5

    def test_forks_and_spawns_are_branches(self, tmp_path: Path) -> None:
        parent = session("p", 4)
        parent["turns"][0]["forks"] = [{"child": "background", "background": True}]
        parent["turns"][1]["spawns"] = ["next", {"children": ["later"], "join_at": 3}]
        parent["turns"][3]["forks"] = ["last"]
        others = [session(name) for name in ("background", "next", "later", "last")]
        trace = read(tmp_path, parent, *others)
        assert {s.id: s.branch for s in trace.sessions} == {
            "p": None,
            "background": Branch("p", 0, inherits=True, joins_at=None),
            "next": Branch("p", 1, inherits=False, joins_at=2),
            "later": Branch("p", 1, inherits=False, joins_at=3),
            "last": Branch("p", 3, inherits=True, joins_at=None),
        }
        assert [s.id for s in trace.tree(trace.roots[0])] == [s.id for s in trace.sessions]

    def test_isolated_turns_are_complete(self, tmp_path: Path) -> None:
        line = session("a", 2, context_mode="message_array_with_responses")
        assert all(t.replaces_history for t in read(tmp_path, line).sessions[0].turns)


class TestOwnForm:
    def test_branches_and_shared_text(self, tmp_path: Path) -> None:
        system = {"role": "system", "hash_ids": [1], "tokens": 40}
        parent = {
            "session_id": "p",
            "timestamp": 20,
            "tools": [TOOL],
            "turns": [
                turn(messages=[system, USER], answer={"content": "Wait."}),
                turn(
                    delay=10,
                    messages=[{"role": "tool", "tool_call_id": "c", "answer_of": "c"}],
                    answer={"hash_ids": [2], "tokens": 9},
                ),
            ],
        }
        child = session("c", parent_session_id="p", parent_turn=0, context="new")
        trace = read(tmp_path, parent, child)
        p, c = trace.sessions
        assert p.turns[0].messages[0]["tokens"] == HashedTokens((1,), 40)
        assert p.turns[0].tools == (TOOL,)
        assert p.turns[1].tools is None, "those of the turn before"
        assert p.turns[0].answer == {"role": "assistant", "content": "Wait."}
        assert p.turns[1].answer == {"role": "assistant", "tokens": HashedTokens((2,), 9)}
        assert c.branch == Branch("p", 0, inherits=False, joins_at=1)
        assert trace.roots == [p]

    def test_a_branch_of_the_last_turn_joins_nothing(self, tmp_path: Path) -> None:
        child = session("c", parent_session_id="p", parent_turn=1)
        trace = read(tmp_path, child, session("p", 2))
        assert trace.sessions[0].branch == Branch("p", 1, inherits=True, joins_at=None)

    def test_limit_keeps_the_first_roots_with_their_branches(self, tmp_path: Path) -> None:
        child = session("c", parent_session_id="a", parent_turn=0)
        other = session("d", parent_session_id="b", parent_turn=0)
        trace = read(tmp_path, session("a", 2), session("b", 2), other, child, limit=1)
        assert [s.id for s in trace.sessions] == ["a", "c"]


BRANCH = {"parent_session_id": "p", "parent_turn": 0}
REFUSED: list[tuple[list[Any], str]] = [
    ([], " is empty. A session on each line was expected."),
    (["{"], ", line 1: not JSON (Expecting property name"),
    ([[1]], ", line 1: the line is [1]. An object was expected."),
    (
        [session("a"), {"input_lenght": 5}],
        ", line 2: the line has an unknown field, 'input_lenght'. The nearest is input_length.",
    ),
    ([{"timestamp": 5}], ", line 1: the line has no prompt. One of input_length, text_input,"),
    (
        [{"input_length": 5, "text_input": "a"}],
        ", line 1: the line has input_length and text_input. One of",
    ),
    ([{"input_length": 0}], "input_length of the line is 0. A whole number of at least 1 was"),
    ([{"input_length": True}], "input_length of the line is True. A whole number of at least 1"),
    (
        [{"input_length": 5, "delay": -1}],
        "delay of the line is -1. Milliseconds of at least 0 were",
    ),
    ([{"input_length": 5, "hash_ids": 3}], "hash_ids of the line is 3. A list was expected."),
    ([{"input_length": 5, "hash_ids": [None]}], "hash_ids of the line is None. Whole numbers or"),
    (
        [{"input_length": 5, "tools": [TOOL]}],
        "tools and extra go with messages. input_length alone",
    ),
    ([session("a"), session("a")], ", line 2: session 'a' is on line 1 too. Each session has an"),
    ([session("a", turns=[])], "turns of the line is []. A list that is not empty was expected."),
    ([session("a", turns=[{"output_length": 3}])], "turn 0 has messages and text, or neither"),
    ([session("a", turns=[turn(temperature=1)])], "turn 0 has an unknown field, 'temperature'."),
    (
        [session("a", turns=[turn(messages=[{"role": "robot", "content": ""}])])],
        "role of message 0 of turn 0 is 'robot'. One of system, developer, user, assistant, tool",
    ),
    (
        [session("a", turns=[turn(messages=[{"role": "user"}])])],
        "message 0 of turn 0 has no content. content, hash_ids or answer_of.",
    ),
    (
        [session("a", turns=[turn(messages=[USER | {"tokens": 4}])])],
        "message 0 of turn 0 has content and tokens. Either content,",
    ),
    (
        [session("a", turns=[turn(messages=[{"role": "user", "hash_ids": [1]}])])],
        "message 0 of turn 0 has no tokens. Its number of tokens.",
    ),
    ([session("a", tools=[{"name": "f"}])], "a tool of the line has no function with a name."),
    ([session("a", turns=[turn(extra={"n": 2})])], "extra of turn 0 has 'n'. The replay sets this"),
    (
        [session("a", turns=[turn(max_tokens=3)])],
        "turn 0 has output_length and max_tokens. One of them.",
    ),
    ([session("c", **BRANCH)], "session 'c' has an unknown parent, 'p'. The id of another session"),
    (
        [session("p"), session("c", parent_session_id="p", parent_turn=3)],
        ", line 2: session 'c' starts after turn 3 of 'p'. Its turns are 0 to 0.",
    ),
    (
        [session("p", 2), session("c", **BRANCH, join_turn=2)],
        "session 'c' joins 'p' at turn 2. A later turn than 0, up to 1, was expected.",
    ),
    (
        [session("p", 2), session("c", **BRANCH, timestamp=5)],
        "session 'c' has a parent and a timestamp. It starts when the parent's turn is answered."
        " Remove the timestamp, or use delay.",
    ),
    (
        [
            session("a", **BRANCH | {"parent_session_id": "b"}),
            session("b", **BRANCH | {"parent_session_id": "a"}),
        ],
        ", line 1: sessions start each other: a <- b <- a. A parent that no branch leads back to",
    ),
    (
        [session("p", 2), session("c", join_turn=1)],
        "a branch is described in part. parent_session_id and parent_turn go together.",
    ),
    (
        [session("p", 2), session("c", **BRANCH, join_turn=1, background=True)],
        "a branch has join_turn and background. No turn waits for one in the background.",
    ),
    (
        [session("p", turns=[turn(forks=["x"])])],
        ", line 1: turn 0 of 'p' starts an unknown session, 'x'.",
    ),
    (
        [session("p", turns=[turn(forks=["c"]), turn(spawns=["c"])]), session("c")],
        "session 'c' is started by two turns. A session is started once.",
    ),
    (
        [session("p", turns=[turn(forks=["c"]), turn()]), session("c", **BRANCH)],
        "session 'c' is started by 'p' and has a parent_session_id. A session is started once.",
    ),
    (
        [session("p", turns=[turn(messages=[{"role": "user", "answer_of": "c"}])])],
        "turn 0 of 'p' has the answer of 'c'. A branch that has joined by then was expected: none",
    ),
    (
        [session("a"), {"input_length": 5}],
        ", line 2: the trace has turns of token counts and turns of messages. One kind was",
    ),
]


@pytest.mark.parametrize(("lines", "message"), REFUSED)
def test_trace_is_refused(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, *lines)
    assert f"trace {tmp_path}/trace.jsonl" in str(caught.value)
    assert message in str(caught.value)


def test_trace_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trace .*/none cannot be read \(No such file"):
        read_agent_trace(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"{}\n\xff")
    with pytest.raises(InputError, match=r"binary is not UTF-8 \(byte 3\)"):
        read_agent_trace(str(tmp_path / "binary"))


def test_equal_block_ids_are_equal_tokens_within_a_run() -> None:
    corpus = list(range(1000))
    tokens = TraceTokens(corpus, None, 8, "run 0")  # type: ignore[arg-type]
    first = tokens.ids(HashedTokens((1, 2), 16), "a")
    assert len(first) == 16
    assert first == tokens.ids(HashedTokens((1, 2), 16), "b")
    assert first[:13] == tokens.ids(HashedTokens((1, 2), 13), "b"), "a part of the last block"
    assert first[8:] == tokens.ids(HashedTokens((2,), 8), "c")
    assert first[:8] != first[8:]
    tail = tokens.ids(HashedTokens((1, 2), 37), "a")
    assert len(tail) == 37
    assert tail[:16] == first
    assert tail[16:] != tokens.ids(HashedTokens((1, 2), 37), "b")[16:], "no id, no sharing"
    other_run = TraceTokens(corpus, None, 8, "run 1")  # type: ignore[arg-type]
    assert other_run.ids(HashedTokens((1, 2), 16), "a") != first
    with pytest.raises(InputError, match=r"is 1000 tokens long\. More than a block of 1000 is"):
        TraceTokens(corpus, None, 1000, "run 0")  # type: ignore[arg-type]


def test_loads_of_a_trace(tmp_path: Path) -> None:
    timed = write(
        tmp_path, {"input_length": 5, "timestamp": 0}, {"input_length": 5, "timestamp": 9}
    )

    def names(**load: Any) -> list[tuple[str, int]]:
        options = LoadOptions("agentic", **{"trace": timed} | load)
        scenarios, _ = agentic_scenarios(options)
        return [(scenario.name, scenario.max_concurrency) for scenario in scenarios]

    assert names() == [("trace", 2)]
    assert names(concurrency=(4, 1)) == [("c1", 1), ("c4", 4)]
    assert names(rates=(2.0, 0.5)) == [("rate0.5", 2), ("rate2", 2)]
    assert names(requests=1) == [("trace", 1)]
    _, shorter = agentic_scenarios(LoadOptions("agentic", trace=timed, requests=2), limit=1)
    assert len(shorter.roots) == 1
    untimed = tmp_path / "untimed"
    untimed.write_text('{"input_length": 5}')
    assert names(trace=str(untimed)) == [("c8", 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "--mode agentic plays a trace. --trace FILE was expected. `llmkit bench trace -o FILE`",
        ),
        (["--trace", "t", "--turns", "2"], "--turns does not go with --mode agentic. The trace"),
        (
            ["--trace", "t", "--input-tokens", "9"],
            "--input-tokens does not go with --mode agentic.",
        ),
        (
            ["--trace", "t", "--rate", "1", "--concurrency", "2"],
            "--rate does not go with --concurrency. One kind of load was expected.",
        ),
        (["--trace", "t", "--concurrency", "0"], "rates and concurrencies are more than 0."),
        (["--trace", "t", "--offline"], "--mode agentic asks a server, and --offline has none."),
        (["--trace", "t", "--scenario", "batch"], "--scenario does not go with --mode"),
    ],
)
def test_mode_agentic_refuses_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["bench", "model", "--mode", "agentic", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--history", "trace"), ("--hash-block-tokens", "16")])
def test_options_of_traces_need_the_mode(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["bench", "model", *option]) == 2
    message = f"{option[0]} belongs to --mode agentic. A trace of sessions."
    assert message in capsys.readouterr().err


def test_bad_line_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, session("a"), {"inputlength": 5})
    assert main.run(["bench", "model", "--mode", "agentic", "--trace", file]) == 3
    assert capsys.readouterr().err == (
        f"llmkit bench: error: trace {file}, line 2: the line has an unknown field, 'inputlength'."
        " The nearest is input_length.\n"
    )


def test_agentic_scenarios_refuse_burstiness_without_end() -> None:
    with pytest.raises(UsageError, match="burstiness is more than 0"):
        agentic_scenarios(LoadOptions("agentic", trace="t", burstiness=float("inf")))
