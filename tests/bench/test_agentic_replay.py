"""Playing traces of sessions: histories, branches, loads, metrics, and a real server's hits."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.agent_server import FIRST_ANSWER_ID, AgentServer, Piece
from support.scripted_model import FORMATS, TEMPLATE
from support.server_process import LlmkitServer
from support.tiny_models import tiny_checkpoint, write_tokenizer

from llmkit.bench import prompt_dataset
from llmkit.bench.agentic import play_sessions
from llmkit.bench.agentic.client_work import work_metrics
from llmkit.bench.agentic.session_history import ChatHistory
from llmkit.bench.answer_stream import RequestRecord, read_answer
from llmkit.bench.bench_options import BenchOptions, LoadOptions
from llmkit.bench.bench_report import BenchReport, TargetReport
from llmkit.bench.load_client import send_request
from llmkit.bench.run_bench import _client_warnings, bench
from llmkit.cli import main
from llmkit.common.errors import GateError, InputError
from llmkit.common.progress import SilentProgress

MODEL = {"max_position_embeddings": 2048}
SERVER = {"max_model_len": 2048, "max_num_seqs": 8, "kv_cache_memory": 1 << 24}
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]


def edit_model(path: Path) -> None:
    template = TEMPLATE.replace("FORMAT", FORMATS["hermes"]).replace("{{ remark }}", "")
    write_tokenizer(path, chat_template=template)


@pytest.fixture(scope="module", autouse=True)
def short_text() -> Iterator[None]:
    """Prompts from a part of the built-in text: tokenizing all of it takes a second."""
    short = prompt_dataset.builtin_prompt_text()[:20_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_dataset, "builtin_prompt_text", lambda: short)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tokenizer") / "tiny"))


@pytest.fixture
def fake() -> Iterator[AgentServer]:
    with AgentServer().running() as server:
        yield server


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def turn(*messages: Mapping[str, Any], length: int = 2, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), "output_length": length} | fields


def write(folder: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    file = folder / "trace.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(file)


def play(
    server: AgentServer,
    tokenizer: str,
    trace: str,
    gates: tuple[str, ...] = (),
    rounds: int = 1,
    **load: Any,
) -> BenchReport:
    options = BenchOptions(
        load=LoadOptions("agentic", trace=trace, **load),
        tokenizer=tokenizer,
        quality=False,
        warmup=False,
        gates=gates,
        rounds=rounds,
    )
    return bench([server.url], options, SilentProgress())


def test_client_work_is_measured_in_every_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing that takes 20 ms more is in the figures of the client."""

    def slow_read(record: RequestRecord) -> Any:
        time.sleep(0.02)
        return read_answer(record)

    monkeypatch.setattr(play_sessions, "read_answer", slow_read)
    model = tiny_checkpoint(tmp_path / "model")
    lines = [{"session_id": "a", "turns": [turn({"role": "user", "content": "x"})] * 2}]
    with AgentServer().running() as server:
        report = play(server, str(model), write(tmp_path, lines), gates=("client_lag_mean_ms>0",))
    report.require_gates()
    (figures,) = report.targets[0].scenarios.values()
    assert figures["client_turn_ms"] >= 20
    wall_ms = 1000 * figures["wall_s"]
    assert figures["client_lag_mean_ms"] >= 2 * 20**2 / (2 * wall_ms)
    assert figures["client_turn_ms"] * 2 <= wall_ms


@pytest.mark.parametrize(
    ("stretches_s", "p99_ms"),
    [
        ([], 0.0),
        ([0.05, 0.05], 0.0),  # 1 % of the time
        ([0.2], 100.0),  # the half of it in which the rest is longer than 100 ms is 1 % of the time
        ([0.2, 0.2], 150.0),
        ([0.2, 0.01], 100.0),
        ([0.1, 0.1, 0.04], 50.0),
    ],
)
def test_client_lag_is_what_an_arrival_at_a_random_moment_waits(
    stretches_s: list[float], p99_ms: float
) -> None:
    wall_s = 10.0
    metrics = work_metrics(stretches_s, wall_s, 4)
    assert metrics["client_lag_p99_ms"] == pytest.approx(p99_ms)
    assert metrics["client_turn_ms"] == pytest.approx(250 * sum(stretches_s))
    # The same by brute force: an arrival at each tenth of a millisecond.
    waits = [b - tick / 10_000 for b in stretches_s for tick in range(round(b * 10_000))]
    assert metrics["client_lag_mean_ms"] == pytest.approx(
        1000 * sum(waits) / (wall_s * 10_000), rel=0.01
    )
    late = sum(wait > p99_ms / 1000 for wait in waits) / (wall_s * 10_000)
    assert late <= 0.0101


def test_client_work_of_more_than_5_percent_of_a_figure_is_noted() -> None:
    figures = {
        "client_turn_ms": 4.0,
        "client_lag_mean_ms": 0.6,
        "client_lag_p99_ms": 4.0,
        "e2e_mean_ms": 100.0,
        "ttft_mean_ms": 10.0,
        "ttft_p99_ms": 200.0,
        "itl_p99_ms": 20.0,
    }
    target = TargetReport("x", "http://x", "url", {}, {"c8": figures, "c1": {"itl_p99_ms": 1.0}})
    (note,) = _client_warnings(BenchReport([target]))
    assert "6% of ttft_mean_ms, 20% of itl_p99_ms in c8 at x" in note
    figures |= {"client_lag_mean_ms": 0.5, "client_lag_p99_ms": 1.0}
    assert _client_warnings(BenchReport([target])) == []


def test_baseline_can_be_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both servers get the same requests in one run."""
    words = ["bench", "--tokenizer", str(tiny_checkpoint(tmp_path / "model")), "--json"]
    words += ["--mode", "serve", "--concurrency", "1", "--requests", "2", "--no-quality"]
    words += ["--input-tokens", "4", "--output-tokens", "3", "--gate", "output_tokens>=1x"]
    with AgentServer().running() as server, AgentServer().running() as other:
        assert main.run([*words, "--url", server.url, "--baseline", other.url]) == 0
        prompts = [[body["prompt"] for body in one.bodies] for one in (server, other)]
    report = json.loads(capsys.readouterr().out)
    assert [target["reference"] for target in report["targets"]] == [other.url, server.url]
    assert report["baseline"] == report["targets"][0]["name"]
    assert [(gate["value"], gate["limit"]) for gate in report["gates"]] == [(6, 6)]
    assert prompts[0] == prompts[1]
    # An address that does not answer is an error before anything is measured.
    assert main.run([*words, "--url", other.url, "--baseline", other.url]) == 4
    assert "cannot be reached" in capsys.readouterr().err


class TestAnswer:
    """A chat's stream with known times."""

    @staticmethod
    def read(*deltas: Mapping[str, Any], usage: Mapping[str, Any] | None = None) -> Any:
        events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        texts = [json.dumps(event) for event in [*events, {"choices": [], "usage": usage or {}}]]
        reads = [
            (float(number), f"data: {text}\n\n".encode())
            for number, text in enumerate([*texts, "[DONE]"], 1)
        ]
        return read_answer(RequestRecord(0.5, 200, reads))

    @pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
    def test_first_output_comes_after_the_reasoning(self, name: str) -> None:
        answer = self.read(
            {"role": "assistant", "content": ""},
            {name: "Hm"},
            {name: "m."},
            {"content": "Yes"},
            {"content": "."},
            usage={"completion_tokens": 4, "prompt_tokens": 9},
        )
        assert answer.arrivals_s == [2.0, 3.0, 4.0, 5.0]
        assert answer.first_output_s == 4.0
        assert (answer.reasoning, answer.text) == ("Hmm.", "Yes.")
        assert (answer.output_tokens, answer.prompt_tokens) == (4, 9)
        assert answer.cached_tokens is None
        assert answer.error is None

    def test_a_tool_call_is_output(self) -> None:
        first = {"index": 0, "id": "c0", "function": {"name": "read", "arguments": ""}}
        second = {"index": 1, "id": "c1", "function": {"name": "read", "arguments": "{}"}}
        answer = self.read(
            {"reasoning": "Hm"},
            {"tool_calls": [first]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}, second]},
            usage={"prompt_tokens_details": {"cached_tokens": 3}},
        )
        assert answer.first_output_s == 2.0
        assert [call["id"] for call in answer.tool_calls] == ["c0", "c1"]
        assert answer.tool_calls[0]["function"] == {"name": "read", "arguments": '{"a": 1}'}
        assert answer.cached_tokens == 3

    def test_reasoning_alone_has_no_first_output(self) -> None:
        answer = self.read({"reasoning": "Hm"}, {"reasoning": "m"})
        assert answer.first_output_s is None
        assert answer.output_tokens == 2

    def test_wrong_event(self) -> None:
        assert "an event is not a completion" in self.read({"tool_calls": [3]}).error


class TestHistory:
    CALL: ClassVar[dict[str, Any]] = {
        "id": "c9",
        "type": "function",
        "function": {"name": "read", "arguments": "{}"},
    }
    RESULT: ClassVar[dict[str, Any]] = {"role": "tool", "tool_call_id": "t1", "content": "Found."}

    def history(self, answer: dict[str, Any], recorded: dict[str, Any] | None) -> ChatHistory:
        history = ChatHistory([user("Hello")], TOOLS)
        history.end_turn({"role": "assistant", "content": "Well."} | answer, recorded)
        return history

    def test_results_answer_the_calls_of_the_server(self) -> None:
        history = self.history({"tool_calls": [self.CALL]}, {"tool_calls": [{"id": "other"}]})
        history.add([self.RESULT, user("Go on")])
        assert history.messages == [
            user("Hello"),
            {"role": "assistant", "content": "Well.", "tool_calls": [self.CALL]},
            self.RESULT | {"tool_call_id": "c9"},
            user("Go on"),
        ]

    @pytest.mark.parametrize(
        "calls", [[], [CALL, CALL], [CALL | {"function": {"name": "read", "arguments": "{"}}]]
    )
    def test_calls_of_the_trace_replace_unfit_ones(self, calls: list[Any]) -> None:
        recorded = self.CALL | {"id": "t1"}
        history = self.history({"tool_calls": calls}, {"tool_calls": [recorded]})
        history.add([self.RESULT])
        assert history.messages[1]["content"] == "Well.", "the server's text stays"
        assert history.messages[1]["tool_calls"] == [recorded]
        assert history.messages[2] == self.RESULT

    def test_calls_are_made_for_results_without_any(self) -> None:
        history = self.history({}, None)
        history.add([self.RESULT])
        assert history.messages[1]["tool_calls"] == [self.CALL | {"id": "t1"}]

    def test_calls_without_results_are_dropped(self) -> None:
        history = self.history({"tool_calls": [self.CALL]}, None)
        history.add([user("Never mind")])
        assert history.messages[1] == {"role": "assistant", "content": "Well."}

    def test_copy_goes_its_own_way(self) -> None:
        history = self.history({}, None)
        other = history.copy()
        other.add([user("Aside")])
        history.add([user("On")])
        assert [m["content"] for m in other.messages] == ["Hello", "Well.", "Aside"]
        assert [m["content"] for m in history.messages] == ["Hello", "Well.", "On"]


class TestTokens:
    LINES: Sequence[Mapping[str, Any]] = (
        {"session_id": "a", "input_length": 20, "output_length": 3, "hash_ids": [1, 2]},
        {"session_id": "a", "input_length": 5, "output_length": 2},
        {"session_id": "b", "input_length": 18, "output_length": 4, "hash_ids": [1, 3]},
    )

    def prompts(self, fake: AgentServer) -> list[list[int]]:
        return [body["prompt"] for body in fake.bodies]

    def test_history_is_what_the_server_answered(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.cached = lambda body: 16 if len(body["prompt"]) == 28 else 0
        report = play(
            fake,
            tokenizer,
            write(tmp_path, self.LINES),
            concurrency=(1,),
            hash_block_tokens=16,
        )
        first, second, third = self.prompts(fake)
        answer = [FIRST_ANSWER_ID, FIRST_ANSWER_ID + 1, FIRST_ANSWER_ID + 2]
        assert len(first) == 20
        assert second[:23] == [*first, *answer]
        assert len(second) == 28
        assert third[:16] == first[:16], "one block id"
        assert third[16:] != first[16:18]
        body = fake.bodies[0]
        assert (body["max_tokens"], body["ignore_eos"], body["return_token_ids"]) == (3, True, True)
        metrics = report.targets[0].scenarios["c1"]
        assert metrics["prompt_tokens"] == 20 + 28 + 18
        # A block of 16 of the first prompt, found by the second and the third.
        assert metrics["ideal_cached_tokens"] == 32
        assert metrics["ideal_hit_rate"] == pytest.approx(32 / 66)
        assert metrics["prefix_hits_of_ideal"] == pytest.approx(0.5)
        assert metrics["sessions"] == 2
        assert metrics["ttfo_p50_ms"] == metrics["ttft_p50_ms"]

    def test_history_of_the_trace_has_its_length(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        trace = write(tmp_path, self.LINES)
        for _ in range(2):
            play(fake, tokenizer, trace, concurrency=(1,), hash_block_tokens=16, history="trace")
        first, second, third, *again = self.prompts(fake)
        assert second[:20] == first
        assert len(second) == 28
        assert not set(second) & {FIRST_ANSWER_ID}
        assert again == [first, second, third], "the same seed, the same prompts"

    def test_rounds_share_nothing(self, fake: AgentServer, tokenizer: str, tmp_path: Path) -> None:
        trace = write(tmp_path, self.LINES[:1])
        play(fake, tokenizer, trace, rounds=2, concurrency=(1,), hash_block_tokens=16)
        first, second = self.prompts(fake)
        assert first[:16] != second[:16]

    def test_sessions_that_are_too_long_are_left_out(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        long = {"input_length": 4096, "output_length": 1}
        trace = write(tmp_path, [*self.LINES, long])
        report = play(fake, tokenizer, trace, hash_block_tokens=16)
        assert report.targets[0].scenarios["c8"]["sessions"] == 2
        assert (
            "1 of 3 sessions are longer than a target's context and were left out" in report.notes
        )
        with pytest.raises(InputError, match=r"no session of trace .* fits the context of 127.*, "):
            play(fake, tokenizer, write(tmp_path, [long]))


class TestBranches:
    def lines(self) -> list[dict[str, Any]]:
        delegate = {"role": "tool", "tool_call_id": "d", "answer_of": "p/0"}
        return [
            {
                "session_id": "p",
                "tools": TOOLS,
                "turns": [
                    turn(user("parent first"), answer={"content": "recorded"}),
                    turn(user("parent second")),
                    turn(delegate, user("parent third")),
                ],
            },
            {
                "session_id": "p/0",
                "parent_session_id": "p",
                "parent_turn": 0,
                "join_turn": 2,
                "turns": [turn(user("child first")), turn(user("child second"), length=3)],
            },
            {
                "session_id": "p/1",
                "parent_session_id": "p",
                "parent_turn": 0,
                "context": "new",
                "turns": [turn(user("fresh"))],
            },
        ]

    @staticmethod
    def last_text(body: Mapping[str, Any]) -> str:
        return str(body["messages"][-1]["content"])

    def test_parent_waits_for_its_branches(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        slow = {"fresh", "child first", "child second"}
        fake.script = lambda body: [
            Piece({"content": f"answer{i} "}, 0.1 if self.last_text(body) in slow else 0.0)
            for i in range(body["max_tokens"])
        ]
        report = play(fake, tokenizer, write(tmp_path, self.lines()))
        sent = [self.last_text(body) for body in fake.bodies]
        ended = [self.last_text(body) for body in fake.ended]
        assert sent[0] == "parent first"
        assert set(sent[1:3]) == {"child first", "fresh"}, "both start at once"
        assert sent[-1] == "parent third"
        assert ended.index("fresh") < ended.index("parent second")
        assert sent.index("parent second") > sent.index("child first")
        assert ended.index("child second") < ended.index("parent third")
        by_text = {self.last_text(body): body for body in fake.bodies}
        inherited = [user("parent first"), {"role": "assistant", "content": "answer0 answer1 "}]
        assert by_text["child first"]["messages"] == [*inherited, user("child first")]
        assert by_text["child first"]["tools"] == TOOLS
        assert by_text["fresh"]["messages"] == [user("fresh")]
        assert "tools" not in by_text["fresh"]
        result = by_text["parent third"]["messages"][-2]
        assert result == {
            "role": "tool",
            "tool_call_id": "d",
            "content": "answer0 answer1 answer2 ",
        }
        (entry,) = report.workload["scenarios"]
        assert entry["about"] == "1 session with 2 branches, 6 requests, 1 at a time"
        assert report.targets[0].scenarios["c8"]["sessions"] == 1
        # What the branches and the next turns of one session find.
        assert report.targets[0].scenarios["c8"]["ideal_cached_tokens"] > 0

    def test_history_of_the_trace(self, fake: AgentServer, tokenizer: str, tmp_path: Path) -> None:
        lines = self.lines()
        trace = write(tmp_path, lines)
        with pytest.raises(InputError) as caught:
            play(fake, tokenizer, trace, history="trace")
        assert str(caught.value) == (
            f"trace {trace}, line 1: turn 1 of 'p' has no answer. --history trace needs the answers"
            " before each turn. Add them, or use --history server."
        )
        lines[0]["turns"][1]["answer"] = {"hash_ids": [7], "tokens": 6}
        lines[1]["turns"][0]["answer"] = {"content": "child recorded"}
        play(fake, tokenizer, write(tmp_path, lines), history="trace")
        by_text = {self.last_text(body): body for body in fake.bodies}
        texts = [m["content"] for m in by_text["child second"]["messages"]]
        assert texts == [
            "parent first",
            "recorded",
            "child first",
            "child recorded",
            "child second",
        ]
        assert "word" not in by_text["parent third"]["messages"][3]["content"]


class TestLoads:
    def sessions(self, count: int, **fields: Any) -> list[dict[str, Any]]:
        return [
            {"session_id": f"s{index}", "turns": [turn(user(f"turn{index}"))]} | fields
            for index in range(count)
        ]

    def test_closed_loop_has_so_many_sessions_in_flight(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.together = 3
        trace = write(tmp_path, self.sessions(7))
        report = play(fake, tokenizer, trace, concurrency=(3,))
        assert fake.most_in_flight == 3
        assert len(fake.bodies) == 7
        assert report.targets[0].scenarios["c3"]["requests"] == 7

    def test_sessions_start_at_the_times_of_the_trace(
        self,
        fake: AgentServer,
        tokenizer: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        due_s: list[float] = []
        sent: list[tuple[str, float]] = []

        async def sleep_until(time_s: float) -> None:
            due_s.append(time_s)
            await original_sleep(time_s)

        async def send(http: Any, url: str, data: bytes, record: RequestRecord) -> None:
            sent.append((json.loads(data)["messages"][0]["content"], time.perf_counter()))
            await send_request(http, url, data, record)

        original_sleep = play_sessions._sleep_until
        monkeypatch.setattr(play_sessions, "_sleep_until", sleep_until)
        monkeypatch.setattr(play_sessions, "send_request", send)
        lines = self.sessions(3)
        for line, time_ms in zip(lines, (1300, 1000, 1150), strict=True):
            line["timestamp"] = time_ms
        play(fake, tokenizer, write(tmp_path, lines))
        assert [text for text, _ in sent] == ["turn1", "turn2", "turn0"]
        # Each time is waited for by the session and by its first turn.
        times_s = sorted(set(due_s))
        assert [time_s - times_s[0] for time_s in times_s] == pytest.approx([0, 0.15, 0.3])
        # A timer may end a clock's tick early.
        assert all(at_s > time_s - 1e-3 for (_, at_s), time_s in zip(sent, times_s, strict=True))

    def test_open_loop_does_not_wait_for_answers(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.together = 6
        trace = write(tmp_path, self.sessions(6))
        report = play(fake, tokenizer, trace, rates=(5000.0,))
        assert fake.most_in_flight == 6
        assert report.targets[0].scenarios["rate5000"]["sessions"] == 6

    def test_think_time_passes_between_turns(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        line = {
            "session_id": "a",
            "turns": [turn(user("one")), turn(user("two"), delay=150, length=3)],
        }
        report = play(fake, tokenizer, write(tmp_path, [line]))
        one, two = report.targets[0].requests["c8"]
        assert two.sent_s - (one.sent_s + one.e2e_s) >= 0.15
        metrics = report.targets[0].scenarios["c8"]
        assert metrics["session_p50_s"] >= 0.15
        assert metrics["session_p50_s"] <= metrics["wall_s"]
        assert metrics["session_rate"] == pytest.approx(1 / metrics["wall_s"])

    def test_first_failure_ends_the_measurement(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.refuses = lambda body: body["messages"][-1]["content"] == "turn1"
        with pytest.raises(InputError) as caught:
            play(fake, tokenizer, write(tmp_path, self.sessions(5)), concurrency=(1,))
        assert "1 of 2 requests of scenario c1 failed at 127.0.0.1" in str(caught.value)
        assert "(the first, s1, turn 0: HTTP 400: no such turn)" in str(caught.value)
        assert len(fake.bodies) == 2

    def test_answer_of_another_length_is_a_failure(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.script = lambda body: [Piece({"content": "a "})]
        with pytest.raises(InputError, match="1 tokens came, 2 were asked for with ignore_eos"):
            play(fake, tokenizer, write(tmp_path, self.sessions(1)))
        lines = [{"session_id": "a", "turns": [{"messages": [user("free")]}]}]
        report = play(fake, tokenizer, write(tmp_path, lines))
        assert report.targets[0].scenarios["c8"]["output_tokens"] == 1
        assert not {"ignore_eos", "max_tokens"} & fake.bodies[-1].keys()


class TestReport:
    LINES: Sequence[Mapping[str, Any]] = (
        {"session_id": "a", "turns": [turn(user("one two three"), length=3)]},
    )

    def test_first_output_is_later_than_the_first_token(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.script = lambda body: [
            Piece({"reasoning": "Hm"}, 0.05),
            Piece({"reasoning": "m"}, 0.05),
            Piece({"content": "Yes"}, 0.05),
        ]
        gates = ("c8.ttfo_p99_ms>=150", "session_p50_s>0.14")
        report = play(fake, tokenizer, write(tmp_path, self.LINES), gates=gates)
        metrics = report.targets[0].scenarios["c8"]
        assert 50 <= metrics["ttft_p50_ms"] <= metrics["ttfo_p50_ms"]
        assert metrics["ttfo_share"] == 1.0
        assert all(gate.passed for gate in report.gates)

    def test_reasoning_alone_counts(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.script = lambda body: [Piece({"reasoning": "Hm"})] * body["max_tokens"]
        report = play(fake, tokenizer, write(tmp_path, self.LINES))
        metrics = report.targets[0].scenarios["c8"]
        assert metrics["ttfo_share"] == 0.0
        assert "ttfo_p50_ms" not in metrics

    def test_server_that_tells_neither_tokens_nor_hits(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        fake.tokenizes = False
        fake.cached = lambda body: None
        trace = write(tmp_path, self.LINES)
        report = play(fake, tokenizer, trace)
        # On a busy machine the client's own work may add a note.
        of_the_server = [note for note in report.notes if "load client's own work" not in note]
        assert of_the_server == [
            f"{fake.url} does not tell the tokens of a chat's prompt at /tokenize: its ideal prefix"
            " hits are not known",
            f"{fake.url} does not tell how many prompt tokens were cached (vLLM does with"
            " --enable-prompt-tokens-details)",
        ]
        metrics = report.targets[0].scenarios["c8"]
        assert not {"ideal_hit_rate", "prefix_hits_of_ideal"} & metrics.keys()
        report = play(fake, tokenizer, trace, gates=("ideal_hit_rate>=0",))
        with pytest.raises(GateError, match="ideal_hit_rate was not measured"):
            report.require_gates()

    def test_prompts_of_runs_are_kept_apart(
        self, fake: AgentServer, tokenizer: str, tmp_path: Path
    ) -> None:
        play(fake, tokenizer, write(tmp_path, self.LINES), rounds=2, concurrency=(1, 2))
        assert [body["cache_salt"] for body in fake.bodies] == [
            "0-c1-0",
            "0-c1-1",
            "0-c2-0",
            "0-c2-1",
        ]


def test_command_on_a_real_server(
    server: LlmkitServer,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two rounds of a generated trace: the server finds all that an infinite cache would."""
    trace = tmp_path / "trace.jsonl"
    sizes = ["--user-tokens", "5-20", "--result-tokens", "5-30", "--output-tokens", "3-9"]
    shape = ["--sessions", "4", "--turns", "2-4", "--tools", "1", "--system-tokens", "60"]
    more = ["--think-time", "0.01", "--branches", "0.5"]
    assert main.run(["bench", "trace", "-o", str(trace), *sizes, *shape, *more]) == 0
    capsys.readouterr()
    files = {name: tmp_path / f"report.{name}" for name in ("html", "csv", "json")}
    command = ["bench", "--url", server.url, "--tokenizer", str(model), "--mode", "agentic"]
    command += ["--trace", str(trace), "--concurrency", "1,4", "--repeats", "2", "--no-quality"]
    command += ["--html", str(files["html"]), "--csv", str(files["csv"])]
    command += ["--output", str(files["json"])]
    gates = ["--gate", "c1.prefix_hits_of_ideal>=1", "--gate", "ideal_hit_rate>=0.3"]
    assert main.run([*command, *gates]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "c4: 4 sessions with" in shown
    for title in (
        "time to first output token, p50",
        "session latency, p99",
        "prompt tokens that an infinite cache has",
        "prefix hits, of those possible",
    ):
        assert title in shown
        assert title in files["html"].read_text()
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    ideal = {r["scenario"]: float(r["value"]) for r in rows if r["metric"] == "ideal_hit_rate"}
    assert ideal.keys() == {"c1", "c4"}
    report = json.loads(files["json"].read_text())
    for metrics in report["targets"][0]["rounds"]["c1"]:
        assert metrics["cached_tokens"] == metrics["ideal_cached_tokens"] > 0
        assert metrics["cache_hit_rate"] == pytest.approx(metrics["ideal_hit_rate"])
    assert report["workload"]["load"]["history"] == "server"


def test_token_trace_on_a_real_server(server: LlmkitServer, model: Path, tmp_path: Path) -> None:
    lines: list[Mapping[str, Any]] = [
        {"input_length": 70, "output_length": 5, "hash_ids": [1, 2]},
        {"input_length": 100, "output_length": 5, "hash_ids": [1, 2]},
        {"session_id": "a", "input_length": 64, "output_length": 20, "hash_ids": [1]},
        {"session_id": "a", "input_length": 30, "output_length": 2, "delay": 1},
    ]
    options = BenchOptions(
        load=LoadOptions(
            "agentic", concurrency=(1,), trace=write(tmp_path, lines), hash_block_tokens=64
        ),
        tokenizer=str(model),
        quality=False,
        rounds=2,
    )
    report = bench([server.url], options, SilentProgress())
    for metrics in report.targets[0].rounds["c1"]:
        # 4 blocks of 16 by the second and, less one for the last token, by the third; then 5.
        assert metrics["ideal_cached_tokens"] == 64 + 48 + 80
        assert metrics["cached_tokens"] == metrics["ideal_cached_tokens"]
        assert metrics["prompt_tokens"] == 70 + 100 + 64 + 114
