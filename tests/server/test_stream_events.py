"""How a token gets from the engine's message to the connection: at once, or by a task."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from support.engine_requests import engine_request

from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.generation import MAX_UNREAD, Generation
from llmkit.runtime.server.http.body_writer import BodyWriter, without_body_writer
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.server_metrics import ITL_BUCKETS_S, PlainHistogram, ServerMetrics
from llmkit.runtime.server.text.output_parser import DialectParser, TextParser
from llmkit.runtime.server.text.output_parts import TextPart


class Letters:
    """A detokenizer whose tokens are letters."""

    def add(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


class Engine:
    """Takes requests and notes which are aborted."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def add(self, request: Any, receiver: Any) -> None:
        pass

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def new_generation(engine: Engine) -> Generation:
    choice = Choice(engine_request("0", [1], 9), 0, Letters())  # type: ignore[arg-type]
    metrics = ServerMetrics(EngineStats, gpus=False)
    made = Generation(engine, metrics, [choice], (), 0.0)  # type: ignore[arg-type]
    made.start()
    return made


def output(text: str, finish: Any = None) -> EngineOutput:
    return EngineOutput("0", [ord(letter) for letter in text], finish, None, 1, 0)


def test_generation_passes_outputs_on_in_the_call_that_brings_them() -> None:
    async def run() -> None:
        made = new_generation(Engine())
        texts: list[str] = []

        def take(deltas: list[Delta]) -> bool:
            texts.extend(delta.text for delta in deltas)
            return True

        task = asyncio.create_task(made.run(take))
        await asyncio.sleep(0)
        made.on_outputs([output("a")], {"0": 0.5})
        assert texts == ["a"]
        assert made.choices[0].times.queue_s == 0.5
        made.on_outputs([output("b"), output("c", "stop")], {})
        assert texts == ["a", "b", "c"]
        await task
        assert made.outcome == "finished"

    asyncio.run(run())


def test_generation_keeps_outputs_until_the_client_has_read() -> None:
    async def run() -> None:
        made = new_generation(Engine())
        read = asyncio.Event()
        calls: list[str] = []

        def take(deltas: list[Delta]) -> bool:
            calls.append("".join(delta.text for delta in deltas))
            return not deltas

        task = asyncio.create_task(made.run(take, read.wait))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for letter in "abc":
            made.on_outputs([output(letter)], {})
        await asyncio.sleep(0)
        assert calls == ["", "a"]
        made.on_outputs([output("d", "stop")], {})
        read.set()
        await task
        assert calls[:3] == ["", "a", "bcd"]

    asyncio.run(run())


def test_generation_fails_while_the_client_does_not_read() -> None:
    async def run() -> None:
        engine = Engine()
        made = new_generation(engine)
        read = asyncio.Event()
        run = made.run(lambda deltas: not deltas, read.wait)  # type: ignore[arg-type]
        task = asyncio.create_task(run)
        await asyncio.sleep(0)
        made.on_outputs([output("a")], {})
        for _ in range(MAX_UNREAD + 1):
            made.on_outputs([output("a")], {})
        assert engine.aborted == ["0"]
        read.set()
        with pytest.raises(ApiError, match="unread"):
            await task

    asyncio.run(run())


def test_generation_raises_in_its_task_what_take_raises() -> None:
    async def run() -> None:
        engine = Engine()
        made = new_generation(engine)

        def take(deltas: list[Delta]) -> bool:
            if deltas:
                raise ZeroDivisionError
            return True

        task = asyncio.create_task(made.run(take))
        await asyncio.sleep(0)
        made.on_outputs([output("a")], {})  # the engine's connection goes on
        with pytest.raises(ZeroDivisionError):
            await task
        assert engine.aborted == ["0"]

    asyncio.run(run())


def cycle(**fields: Any) -> Any:
    written: list[bytes] = []
    flow = SimpleNamespace(write_paused=False)
    transport = SimpleNamespace(write=written.append)
    values = {"response_started": True, "disconnected": False, "chunked_encoding": True}
    return SimpleNamespace(transport=transport, flow=flow, written=written, **values | fields)


def test_body_writer_writes_chunks_while_the_client_is_there() -> None:
    connection = cycle()
    writer = BodyWriter(connection)
    assert writer.write(b"data: 0123456789\n\n")
    connection.flow.write_paused = True
    assert not writer.write(b"x")
    connection.disconnected = True
    writer.write(b"y")
    assert connection.written == [b"12\r\ndata: 0123456789\n\n\r\n", b"1\r\nx\r\n"]


def test_body_writer_writes_nothing_to_a_client_that_went_before_the_headers() -> None:
    connection = cycle(response_started=False, disconnected=True)
    assert BodyWriter(connection).write(b"x")
    assert connection.written == []


def test_body_writer_writes_no_chunks_to_an_http_1_0_client() -> None:
    connection = cycle(chunked_encoding=False)
    BodyWriter(connection).write(b"x")
    assert connection.written == [b"x"]


def test_body_writer_is_found_in_the_scope_unless_it_was_removed() -> None:
    scope: dict[str, Any] = {}
    assert BodyWriter.of(scope) is None
    writer = BodyWriter(cycle())
    writer.offer(scope)
    assert BodyWriter.of(scope) is writer
    without_body_writer(scope)
    assert BodyWriter.of(scope) is None


@pytest.mark.parametrize(
    "pieces",
    [["a", " ", "b ", "\n", ""], [" ", "  "], ["", " a\u2028", "b"], ["x"], [" a b ", "c \n"]],
)
def test_text_parser_holds_white_space_back_as_a_dialect_parser_does(pieces: list[str]) -> None:
    parsers = (
        TextParser(),
        DialectParser(None, (), True, False, False, False, False, None),
    )
    plain, dialect = (
        [parser.feed(piece, final=index == len(pieces)) for index, piece in enumerate(pieces, 1)]
        for parser in parsers
    )
    assert plain == dialect
    shown = "".join(part.text for parts in plain for part in parts if isinstance(part, TextPart))
    assert shown == "".join(pieces)


def test_plain_histogram_reports_what_a_prometheus_histogram_does() -> None:
    registries = (CollectorRegistry(), CollectorRegistry())
    name, text = "llmkit:x_seconds", "Some seconds."
    plain = PlainHistogram(name, text, ITL_BUCKETS_S)
    registries[0].register(plain)
    usual = Histogram(name, text, registry=registries[1], buckets=ITL_BUCKETS_S)
    for value in (0.0, 0.001, 0.25, 0.25, 10.0, 11.0):
        plain.observe(value)
        usual.observe(value)
    plain.observe(0.5, 2)
    usual.observe(0.5)
    usual.observe(0.5)
    reports = [re.sub(r"(_created) .*", r"\1", generate_latest(r).decode()) for r in registries]
    assert reports[0] == reports[1]
