"""The load client against a small server on loopback that streams what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web
from tiny import tiny_checkpoint

from llmkit.bench.bench import BenchOptions, bench
from llmkit.bench.load import Server, Trace, base_url, find_server, read_trace, run_load
from llmkit.bench.metrics import Run, require_complete
from llmkit.bench.targets import UrlTarget
from llmkit.bench.workload import WorkloadRequest
from llmkit.checkpoint.errors import InputError, ShortageError, UsageError
from llmkit.checkpoint.progress import SilentProgress

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeServer:
    """Answers `/v1/models` and hands completions to `handler`; remembers requests and how many ran at once."""

    def __init__(self) -> None:
        self.handler: Handler = stream
        self.models: web.Response | None = None
        self.bodies: list[dict[str, object]] = []
        self.keys: list[str | None] = []
        self.running = self.most = 0
        self.url = ""

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.handler(request)
        finally:
            self.running -= 1

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        entry = {"id": "tiny", "object": "model", "max_model_len": 256, "root": "models/tiny"}
        return self.models or web.json_response({"object": "list", "data": [entry, {"id": "adapter"}]})


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake, loop, ready = FakeServer(), asyncio.new_event_loop(), threading.Event()

    async def start() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", fake.completions)
        app.router.add_get("/v1/models", fake.list_models)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = "http://{}:{}".format(*runner.addresses[0][:2])
        ready.set()

    def run() -> None:
        loop.create_task(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


async def begin(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


async def stream(request: web.Request) -> web.StreamResponse:
    """As many tokens as asked for, 10 ms apart."""
    body, response = await request.json(), await begin(request)
    for index in range(body["max_tokens"]):
        last = index == body["max_tokens"] - 1
        await response.write(token(" é", "length" if last else None))
        await asyncio.sleep(0.01)
    usage = {
        "prompt_tokens": len(body["prompt"]),
        "completion_tokens": body["max_tokens"],
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    await response.write(event(choices=[], usage=usage) + b"data: [DONE]\n\n")
    return response


def requests(count: int, max_tokens: int = 4) -> list[WorkloadRequest]:
    return [WorkloadRequest(f"r{index}", (index, 7, 9), max_tokens) for index in range(count)]


def test_what_is_sent_and_what_is_measured(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "secret")
    run = run_load(Server(server.url, "tiny"), requests(5), clients=2)
    wall_s, timelines = run.wall_s, run.timelines
    assert run.client_s is not None and 0 < run.client_s < wall_s
    assert server.most == 2
    assert server.keys == ["Bearer secret"] * 5
    assert sorted(body["prompt"][0] for body in server.bodies) == [0, 1, 2, 3, 4]
    assert server.bodies[0] == {
        "model": "tiny", "prompt": server.bodies[0]["prompt"], "max_tokens": 4, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    require_complete(timelines, "tiny", "x")
    for index, timeline in enumerate(timelines):
        assert timeline.id == f"r{index}", "in the order given, whoever ended first"
        assert (timeline.output_tokens, timeline.prompt_tokens, timeline.cached_tokens) == (4, 3, 2)
        assert len(timeline.arrivals_s) == 4
        assert timeline.e2e_s >= 0.03
        assert timeline.sent_s < timeline.arrivals_s[0]
    assert wall_s >= 3 * 0.03


def test_no_key_is_sent_when_there_is_none(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMKIT_API_KEY", raising=False)
    run_load(Server(server.url, "tiny"), requests(1), clients=1)
    assert server.keys == [None]


def test_no_more_clients_than_there_are_requests(server: FakeServer) -> None:
    timelines = run_load(Server(server.url, "tiny"), requests(3), clients=16).timelines
    assert [timeline.error for timeline in timelines] == [None] * 3
    assert server.most == 3


def test_an_open_loop_waits_for_no_answer_and_for_each_time(server: FakeServer) -> None:
    timed = [replace(request, at_s=0.02 * index) for index, request in enumerate(requests(4, max_tokens=10))]
    run = run_load(Server(server.url, "tiny"), timed, clients=4)
    sent = [timeline.sent_s - run.timelines[0].sent_s for timeline in run.timelines]
    assert server.most > 1, "the second was sent before the first was answered"
    assert all(later - earlier > 0 for earlier, later in pairwise(sent))
    assert sent[3] >= 0.06 - run.timelines[0].late_s - 1e-3
    assert all(timeline.late_s >= 0 for timeline in run.timelines)


def test_a_conversation_waits_for_its_answers(server: FakeServer) -> None:
    first, second, third, fourth = requests(4)
    run = run_load(Server(server.url, "tiny"), [first, replace(second, follows=True), third, fourth], clients=3)
    assert server.most == 3
    one, two, three, _ = run.timelines
    assert two.sent_s >= one.arrivals_s[-1] > three.sent_s


async def refuse(request: web.Request) -> web.StreamResponse:
    error = {"message": "too long:\n\x1b[31m4 > 3", "type": "invalid_request_error", "param": None, "code": None}
    return web.json_response({"error": error}, status=400)


async def redirect(request: web.Request) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect("http://127.0.0.1:9/elsewhere")


async def break_off(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(token("a") + event(error={"message": "the engine died"}))
    return response


async def hang_up(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(token("a"))
    assert request.transport
    request.transport.abort()
    return response


async def forget_done(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(token("a") * 4)
    return response


async def stop_early(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(token("a") + token("b", "stop") + b"data: [DONE]\n\n")
    return response


async def talk_nonsense(request: web.Request) -> web.StreamResponse:
    response = await begin(request)
    await response.write(b"data: [1]\n\n")
    return response


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (refuse, r"HTTP 400: too long:  \[31m4 > 3"),
        (redirect, "HTTP 307"),
        (break_off, "the stream broke off: the engine died"),
        (hang_up, "ClientPayloadError"),
        (forget_done, r"the stream ended without \[DONE\]"),
        (stop_early, "2 tokens came, 4 were asked for with ignore_eos"),
        (talk_nonsense, r"an event is not a completion: \[1\]"),
    ],
)
def test_failures_are_told_and_leave_no_figures(server: FakeServer, handler: Handler, told: str) -> None:
    server.handler = handler
    timelines = run_load(Server(server.url, "tiny"), requests(2), clients=2).timelines
    with pytest.raises(InputError, match=rf"2 of 2 requests of scenario x failed at tiny .*{told}"):
        require_complete(timelines, "tiny", "x")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_unreachable_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ShortageError, match=rf"{url} cannot be reached: Connection refused .errno 111, ECONNREFUSED."):
        find_server(url)
    timelines = run_load(Server(url, "tiny"), requests(1), clients=1).timelines
    assert "ClientConnectorError" in str(timelines[0].error)


def test_the_models_of_a_server(server: FakeServer) -> None:
    assert find_server(f"{server.url}/v1/") == Server(server.url, "tiny", "models/tiny", 256)
    assert find_server(server.url, "adapter") == Server(server.url, "adapter", None, None)
    with pytest.raises(InputError, match=r"does not serve other. It serves tiny, adapter"):
        find_server(server.url, "other")


def test_what_is_no_server_of_models(server: FakeServer) -> None:
    for answer, told in (
        (web.Response(status=404), "answered HTTP 404 and no list of models"),
        (web.Response(text="<html>"), "answered HTTP 200 and no list of models"),
        (web.json_response({"data": []}), "no list of models"),
        (web.Response(status=401), "wants an API key. Set LLMKIT_API_KEY"),
    ):
        server.models = answer
        with pytest.raises(InputError, match=told):
            find_server(server.url)
    with pytest.raises(InputError, match="is no address"):
        find_server("http://")


def test_addresses() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert base_url(url) == "http://h:1"
    assert base_url("https://h/prefix/v1") == "https://h/prefix"


def read(*reads: bytes, max_tokens: int = 2) -> tuple[tuple[float, ...], int, str | None]:
    trace = Trace(0.0, 200, [(float(index), data) for index, data in enumerate(reads, 1)])
    timeline = read_trace(trace, WorkloadRequest("r", (1, 2), max_tokens))
    return timeline.arrivals_s, timeline.output_tokens, timeline.error


DONE = b"data: [DONE]\n\n"


def test_a_token_arrives_with_the_read_that_completes_it() -> None:
    first = token("日")
    data = first + token("本", "length")
    middle = first.index("日".encode()) + 1
    assert read(data[:middle], data[middle : len(first) + 9], data[len(first) + 9 :], DONE) == ((2.0, 3.0), 2, None)


def test_the_message_that_only_ends_an_answer_is_no_token() -> None:
    assert read(token("a"), token("b"), token("", "length"), DONE) == ((1.0, 2.0), 2, None)


def test_tokens_without_text_count() -> None:
    assert read(token(""), token("ab", "length"), DONE) == ((1.0, 2.0), 2, None)
    usage = event(choices=[], usage={"completion_tokens": 2})
    assert read(token("a"), token("", "length"), usage, DONE) == ((1.0, 2.0), 2, None)


def test_the_server_counts_where_a_message_brings_several_tokens() -> None:
    usage = event(choices=[], usage={"completion_tokens": 5})
    assert read(token("a b"), token("c d e", "length"), usage, DONE, max_tokens=5) == ((1.0, 2.0), 5, None)
    ids = event(choices=[{"text": "a", "token_ids": [1, 2, 3], "finish_reason": "length"}])
    assert read(ids, DONE, max_tokens=3) == ((1.0,), 3, None)


class TestBench:
    """`bench` itself against servers that were there before."""

    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Path:
        return tiny_checkpoint(tmp_path / "tiny")

    def test_a_url(self, server: FakeServer, tokenizer: Path) -> None:
        gates = ("output_tps>0.1*baseline",)
        options = BenchOptions(limit=2, tokenizer=str(tokenizer), gates=gates, baseline=server.url)
        report = bench([f"{server.url}/v1"], options, SilentProgress())
        assert [target.kind for target in report.targets] == ["url", "url"]
        assert [target.name for target in report.targets] == [server.url, f"{server.url}/v1"], "the short names clash"
        assert report.workload["tokenizer"] == str(tokenizer)
        assert report.gates[0].passed
        streamed = [body for body in server.bodies if body.get("stream")]
        assert len(streamed) == 2 * (4 + 2), "warm-up and two requests for each"
        assert "perplexity" not in report.targets[0].metrics, "this server tells nothing of prompts"
        assert report.targets[0].absent["perplexity"] == "the server tells nothing of a prompt's tokens"
        bench([server.url], BenchOptions(limit=2, tokenizer=str(tokenizer), warmup=False), SilentProgress())
        assert sum(bool(body.get("stream")) for body in server.bodies) == 12 + 2

    def test_failures_leave_no_report(self, server: FakeServer, tokenizer: Path) -> None:
        server.handler = refuse
        with pytest.raises(InputError, match=r"2 of 2 requests of scenario quick failed at 127.*HTTP 400"):
            bench([server.url], BenchOptions(limit=2, tokenizer=str(tokenizer), warmup=False), SilentProgress())

    def test_whose_tokenizer(self, server: FakeServer, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match=r"which tokenizer .* \(its model is tiny\). Name its checkpoint"):
            bench([server.url], BenchOptions(limit=1), SilentProgress())
        monkeypatch.chdir(tokenizer.parent)
        report = bench([server.url], BenchOptions(limit=1), SilentProgress())
        assert report.workload["tokenizer"] == "tiny", "a folder here that the server names"

    def test_quality_of_a_server_that_tells_no_context(self, server: FakeServer, tokenizer: Path) -> None:
        async def echo(request: web.Request) -> web.StreamResponse:
            prompt = (await request.json())["prompt"]
            told = {"token_logprobs": [None, *[-1.0] * len(prompt)]}
            return web.json_response({"choices": [{"text": "", "logprobs": told}]})

        server.handler, server.models = echo, web.json_response({"data": [{"id": "tiny"}]})
        options = BenchOptions(speed=False, windows=1, window_tokens=48, tokenizer=str(tokenizer))
        (target,) = bench([server.url], options, SilentProgress()).targets
        assert target.metrics == {"perplexity": pytest.approx(math.e)}

    def test_a_server_that_is_not_scored_shortens_no_windows(self, server: FakeServer, tokenizer: Path) -> None:
        server.models = web.json_response({"data": [{"id": "tiny", "max_model_len": 24}]})
        options = BenchOptions(speed=False, windows=1, window_tokens=48, device="cpu")
        report = bench([str(tokenizer), server.url], options, SilentProgress())
        assert report.evaluation["window_tokens"] == 48
        assert [bool(target.metrics.get("perplexity")) for target in report.targets] == [True, False]

    def test_targets_take_turns(self, server: FakeServer, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[tuple[str, str]] = []
        run = UrlTarget.run

        def watched(target: UrlTarget, requests: Sequence[WorkloadRequest], clients: int) -> Run:
            order.append((target.name[-2:], requests[0].id))
            return run(target, requests, clients)

        monkeypatch.setattr(UrlTarget, "run", watched)
        options = BenchOptions(limit=1, rounds=2, tokenizer=str(tokenizer), warmup=False, device="cpu")
        report = bench([f"{server.url}/v1", f"{server.url}/"], options, SilentProgress())
        first, second = (target.name[-2:] for target in report.targets)
        assert order == [(first, "quick-0-0"), (second, "quick-0-0"), (second, "quick-1-0"), (first, "quick-1-0")]
        assert report.baseline == f"{server.url}/v1"
