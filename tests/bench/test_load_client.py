"""The load client against a fake server on loopback, whose responses the tests script."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web
from support.free_ports import free_port
from support.tiny_models import tiny_checkpoint

from llmkit.bench.answer_stream import RequestRecord
from llmkit.bench.backends import UrlBackend
from llmkit.bench.bench_metrics import RunResult, require_complete
from llmkit.bench.bench_options import BenchOptions
from llmkit.bench.load_client import (
    Server,
    base_url,
    parse_record,
    query_server,
    run_load,
)
from llmkit.bench.run_bench import bench
from llmkit.bench.workload import WorkloadRequest
from llmkit.common.errors import InputError, ShortageError, UsageError
from llmkit.common.progress import SilentProgress

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeServer:
    """Answers `/v1/models`, passes completions to `handler`, and records requests."""

    def __init__(self) -> None:
        self.handler: Handler = stream
        self.together = 1  # answers wait until so many requests have been in flight at once
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
            for _ in range(1000):
                if self.most >= self.together:
                    break
                await asyncio.sleep(0.01)
            return await self.handler(request)
        finally:
            self.running -= 1

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        entry = {"id": "tiny", "object": "model", "max_model_len": 256, "root": "models/tiny"}
        return self.models or web.json_response(
            {"object": "list", "data": [entry, {"id": "adapter"}]}
        )


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    fake = FakeServer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()

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
        starting = loop.create_task(start())
        starting.add_done_callback(lambda task: task.result())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)


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
    body = await request.json()
    response = await begin(request)
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


def test_load_client_sends_and_measures_requests(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "secret")
    fake_server.together = 2
    run = run_load(Server(fake_server.url, "tiny"), requests(5), max_concurrency=2)
    wall_s = run.wall_s
    timelines = run.timelines
    assert run.client_cpu_s is not None and 0 < run.client_cpu_s < wall_s
    assert fake_server.most == 2
    assert fake_server.keys == ["Bearer secret"] * 5
    assert sorted(body["prompt"][0] for body in fake_server.bodies) == [0, 1, 2, 3, 4]
    assert fake_server.bodies[0] == {
        "model": "tiny",
        "prompt": fake_server.bodies[0]["prompt"],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    require_complete(timelines, "tiny", "x")
    for index, timeline in enumerate(timelines):
        assert timeline.id == f"r{index}", "in the order given, whoever ended first"
        assert (timeline.output_tokens, timeline.prompt_tokens, timeline.cached_tokens) == (4, 3, 2)
        assert len(timeline.arrivals_s) == 4
        assert timeline.e2e_s >= 0.03
        assert timeline.sent_s < timeline.arrivals_s[0]
    assert wall_s >= 3 * 0.03


def test_load_client_sends_no_key_without_one(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMKIT_API_KEY", raising=False)
    run_load(Server(fake_server.url, "tiny"), requests(1), max_concurrency=1)
    assert fake_server.keys == [None]


def test_load_client_has_no_more_clients_than_requests(fake_server: FakeServer) -> None:
    fake_server.together = 3
    timelines = run_load(Server(fake_server.url, "tiny"), requests(3), max_concurrency=16).timelines
    assert [timeline.error for timeline in timelines] == [None] * 3
    assert fake_server.most == 3


def test_load_client_sends_scheduled_requests_on_time(fake_server: FakeServer) -> None:
    timed = [
        replace(request, send_at_s=0.02 * index)
        for index, request in enumerate(requests(4, max_tokens=10))
    ]
    fake_server.together = 2
    run = run_load(Server(fake_server.url, "tiny"), timed, max_concurrency=4)
    sent = [timeline.sent_s - run.timelines[0].sent_s for timeline in run.timelines]
    assert fake_server.most > 1, "the second was sent before the first was answered"
    assert all(later - earlier > 0 for earlier, later in pairwise(sent))
    assert sent[3] >= 0.06 - run.timelines[0].schedule_lag_s - 1e-3
    assert all(timeline.schedule_lag_s >= 0 for timeline in run.timelines)


def test_load_client_waits_for_answers_within_a_conversation(fake_server: FakeServer) -> None:
    first, second, third, fourth = requests(4)
    fake_server.together = 3
    run = run_load(
        Server(fake_server.url, "tiny"),
        [first, replace(second, is_follow_up=True), third, fourth],
        max_concurrency=3,
    )
    assert fake_server.most == 3
    one, two, three, _ = run.timelines
    assert two.sent_s >= one.arrivals_s[-1] > three.sent_s


async def refuse(request: web.Request) -> web.StreamResponse:
    error = {
        "message": "too long:\n\x1b[31m4 > 3",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
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
    ("handler", "message"),
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
def test_load_client_reports_failures(
    fake_server: FakeServer, handler: Handler, message: str
) -> None:
    fake_server.handler = handler
    timelines = run_load(Server(fake_server.url, "tiny"), requests(2), max_concurrency=2).timelines
    with pytest.raises(
        InputError, match=rf"2 of 2 requests of scenario x failed at tiny .*{message}"
    ):
        require_complete(timelines, "tiny", "x")


def test_query_server_reports_an_unreachable_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        ShortageError,
        match=rf"{url} cannot be reached: Connection refused .errno 111, ECONNREFUSED.",
    ):
        query_server(url)
    timelines = run_load(Server(url, "tiny"), requests(1), max_concurrency=1).timelines
    assert "ClientConnectorError" in str(timelines[0].error)


def test_query_server_reads_the_model_list(fake_server: FakeServer) -> None:
    assert query_server(f"{fake_server.url}/v1/") == Server(
        fake_server.url, "tiny", "models/tiny", 256
    )
    assert query_server(fake_server.url, "adapter") == Server(
        fake_server.url, "adapter", None, None
    )
    with pytest.raises(InputError, match=r"does not serve other. It serves tiny, adapter"):
        query_server(fake_server.url, "other")


def test_query_server_refuses_other_answers(fake_server: FakeServer) -> None:
    for answer, message in (
        (web.Response(status=404), "answered HTTP 404 and no list of models"),
        (web.Response(text="<html>"), "answered HTTP 200 and no list of models"),
        (web.json_response({"data": []}), "no list of models"),
        (web.Response(status=401), "wants an API key. Set LLMKIT_API_KEY"),
    ):
        fake_server.models = answer
        with pytest.raises(InputError, match=message):
            query_server(fake_server.url)
    with pytest.raises(InputError, match="is not a URL"):
        query_server("http://")


def test_base_url() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert base_url(url) == "http://h:1"
    assert base_url("https://h/prefix/v1") == "https://h/prefix"


def read(*reads: bytes, max_tokens: int = 2) -> tuple[tuple[float, ...], int, str | None]:
    trace = RequestRecord(0.0, 200, [(float(index), data) for index, data in enumerate(reads, 1)])
    timeline = parse_record(trace, WorkloadRequest("r", (1, 2), max_tokens))
    return timeline.arrivals_s, timeline.output_tokens, timeline.error


DONE = b"data: [DONE]\n\n"


def test_parse_record_uses_the_read_that_completes_an_event() -> None:
    first = token("日")
    data = first + token("本", "length")
    middle = first.index("日".encode()) + 1
    assert read(data[:middle], data[middle : len(first) + 9], data[len(first) + 9 :], DONE) == (
        (2.0, 3.0),
        2,
        None,
    )


def test_parse_record_ignores_an_event_without_tokens() -> None:
    assert read(token("a"), token("b"), token("", "length"), DONE) == ((1.0, 2.0), 2, None)


def test_parse_record_counts_tokens_without_text() -> None:
    assert read(token(""), token("ab", "length"), DONE) == ((1.0, 2.0), 2, None)
    usage = event(choices=[], usage={"completion_tokens": 2})
    assert read(token("a"), token("", "length"), usage, DONE) == ((1.0, 2.0), 2, None)


def test_parse_record_uses_the_servers_token_count() -> None:
    usage = event(choices=[], usage={"completion_tokens": 5})
    assert read(token("a b"), token("c d e", "length"), usage, DONE, max_tokens=5) == (
        (1.0, 2.0),
        5,
        None,
    )
    ids = event(choices=[{"text": "a", "token_ids": [1, 2, 3], "finish_reason": "length"}])
    assert read(ids, DONE, max_tokens=3) == ((1.0,), 3, None)


class TestBench:
    """`bench` itself against servers that were there before."""

    @pytest.fixture
    def tokenizer(self, tmp_path: Path) -> Path:
        return tiny_checkpoint(tmp_path / "tiny")

    def test_url_target_is_measured(self, fake_server: FakeServer, tokenizer: Path) -> None:
        gates = ("output_tokens>=baseline",)
        options = BenchOptions(
            limit=2, tokenizer=str(tokenizer), gates=gates, baseline=fake_server.url
        )
        report = bench([f"{fake_server.url}/v1"], options, SilentProgress())
        assert [target.kind for target in report.targets] == ["url", "url"]
        assert [target.name for target in report.targets] == [
            fake_server.url,
            f"{fake_server.url}/v1",
        ], "the short names clash"
        assert report.workload["tokenizer"] == str(tokenizer)
        assert report.gates[0].passed
        streamed = [body for body in fake_server.bodies if body.get("stream")]
        assert len(streamed) == 2 * (4 + 2), "warm-up and two requests for each"
        assert "perplexity" not in report.targets[0].metrics, (
            "this server returns nothing about prompts"
        )
        assert (
            report.targets[0].absent["perplexity"]
            == "the server returns no log probabilities of a prompt's tokens"
        )
        bench(
            [fake_server.url],
            BenchOptions(limit=2, tokenizer=str(tokenizer), warmup=False),
            SilentProgress(),
        )
        assert sum(bool(body.get("stream")) for body in fake_server.bodies) == 12 + 2

    def test_failures_raise(self, fake_server: FakeServer, tokenizer: Path) -> None:
        fake_server.handler = refuse
        with pytest.raises(
            InputError, match=r"2 of 2 requests of scenario quick failed at 127.*HTTP 400"
        ):
            bench(
                [fake_server.url],
                BenchOptions(limit=2, tokenizer=str(tokenizer), warmup=False),
                SilentProgress(),
            )

    def test_tokenizer_is_found(
        self, fake_server: FakeServer, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(
            UsageError, match=r"which tokenizer .* \(its model is tiny\). Name its checkpoint"
        ):
            bench([fake_server.url], BenchOptions(limit=1), SilentProgress())
        monkeypatch.chdir(tokenizer.parent)
        report = bench([fake_server.url], BenchOptions(limit=1), SilentProgress())
        assert report.workload["tokenizer"] == "tiny", "a folder here that the server names"

    def test_quality_of_a_server_without_context_length(
        self, fake_server: FakeServer, tokenizer: Path
    ) -> None:
        async def echo(request: web.Request) -> web.StreamResponse:
            prompt = (await request.json())["prompt"]
            logprobs = {"token_logprobs": [None, *[-1.0] * len(prompt)]}
            return web.json_response({"choices": [{"text": "", "logprobs": logprobs}]})

        fake_server.handler = echo
        fake_server.models = web.json_response({"data": [{"id": "tiny"}]})
        options = BenchOptions(speed=False, windows=1, window_tokens=48, tokenizer=str(tokenizer))
        (target,) = bench([fake_server.url], options, SilentProgress()).targets
        assert target.metrics == {"perplexity": pytest.approx(math.e)}

    def test_windows_ignore_servers_that_are_not_scored(
        self, fake_server: FakeServer, tokenizer: Path
    ) -> None:
        fake_server.models = web.json_response({"data": [{"id": "tiny", "max_model_len": 24}]})
        options = BenchOptions(speed=False, windows=1, window_tokens=48, device="cpu")
        report = bench([str(tokenizer), fake_server.url], options, SilentProgress())
        assert report.evaluation["window_tokens"] == 48
        assert [bool(target.metrics.get("perplexity")) for target in report.targets] == [
            True,
            False,
        ]

    def test_targets_are_interleaved(
        self, fake_server: FakeServer, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[tuple[str, str]] = []
        run = UrlBackend.run

        def watched(
            target: UrlBackend, requests: Sequence[WorkloadRequest], max_concurrency: int
        ) -> RunResult:
            order.append((target.name[-2:], requests[0].id))
            return run(target, requests, max_concurrency)

        monkeypatch.setattr(UrlBackend, "run", watched)
        options = BenchOptions(
            limit=1, rounds=2, tokenizer=str(tokenizer), warmup=False, device="cpu"
        )
        report = bench([f"{fake_server.url}/v1", f"{fake_server.url}/"], options, SilentProgress())
        first, second = (target.name[-2:] for target in report.targets)
        assert order == [
            (first, "quick-0-0"),
            (second, "quick-0-0"),
            (second, "quick-1-0"),
            (first, "quick-1-0"),
        ]
        assert report.baseline == f"{fake_server.url}/v1"
