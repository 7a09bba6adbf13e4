"""How a server starts, stops and fails."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.server_process import LlmkitServer, held, serving, wait_for
from support.tiny_models import tiny_checkpoint, write_tokenizer

from llmkit.cli import main

MODEL: dict[str, Any] = {"max_position_embeddings": 32_768}
LONG: dict[str, Any] = {  # it takes half a minute
    "model": "model",
    "prompt": "hello",
    "max_tokens": 32_000,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


@pytest.fixture
def fresh_server(model: Path, tmp_path: Path) -> Iterator[LlmkitServer]:
    with serving(tmp_path / "log", model, kv_cache_memory=64 * 2**20) as running:
        yield running


def last_line(server: LlmkitServer) -> str:
    return server.log.read_text().splitlines()[-1]


def test_graceful_stop_finishes_running_requests_and_refuses_new_ones(
    fresh_server: LlmkitServer,
) -> None:
    engine = fresh_server.engine()
    body = LONG | {"max_tokens": 100}
    with (
        fresh_server.client() as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        with held(engine), fresh_server.client() as other:
            fresh_server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: other.get("/health").status_code == 503)
            assert other.get("/health").json()["error"]["code"] == "draining"
            assert other.get("/ready").status_code == 503
            refused = other.post("/v1/completions", json=body)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        received = [line for line in lines if line]
    assert received[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in received[-2]
    assert fresh_server.process.wait(60) == 0
    assert not engine.is_running()
    assert fresh_server.log.read_text().splitlines()[1:] == [
        "llmkit serve: stopping: 1 request left, Ctrl-C again to cut it"
    ]


def test_first_signal_tells_how_many_requests_are_left(fresh_server: LlmkitServer) -> None:
    with fresh_server.client() as client, contextlib.ExitStack() as streams:
        answers = [
            streams.enter_context(client.stream("POST", "/v1/completions", json=LONG))
            for _ in range(3)
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        fresh_server.process.send_signal(signal.SIGINT)
        told = "llmkit serve: stopping: 3 requests left, Ctrl-C again to cut them"
        wait_for(lambda: last_line(fresh_server) == told)
        assert fresh_server.stop(signal.SIGINT) == 130
        assert fresh_server.log.read_text().count("stopping") == 1


# As the test before with SIGINT.
@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_second_signal_stops_at_once_with_an_error_event(
    fresh_server: LlmkitServer, number: int, code: int
) -> None:
    engine = fresh_server.engine()
    with (
        fresh_server.client() as client,
        client.stream("POST", "/v1/completions", json=LONG) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        fresh_server.process.send_signal(number)
        with fresh_server.client() as other:
            wait_for(lambda: other.get("/health").status_code == 503)
        fresh_server.process.send_signal(number)
        received = [line for line in lines if line]
    assert received[-1].startswith('data: {"error":')
    assert fresh_server.process.wait(60) == code
    assert not engine.is_running()


def test_drain_timeout_ends_requests_with_an_error_event(model: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", model, drain_timeout=0.2, kv_cache_memory=64 * 2**20) as server:
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=LONG) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            received = [line for line in lines if line]
        assert '"code":"shutting_down"' in received[-1]
        assert server.process.wait(60) == 0


def test_engine_death_fails_streams_then_health_then_the_server(fresh_server: LlmkitServer) -> None:
    with (
        fresh_server.client() as client,
        client.stream("POST", "/v1/completions", json=LONG) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        fresh_server.engine().kill()
        received = [line for line in lines if line]
        assert '"code":"engine_dead"' in received[-1]
        assert "data: [DONE]" not in received
        with fresh_server.client() as other:
            assert other.get("/health").status_code == 503
            refused = other.post("/v1/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert fresh_server.process.wait(60) == 70
    assert last_line(fresh_server).startswith(
        "llmkit serve: error: the engine process ended (signal SIGKILL"
    )


def test_engine_ends_with_a_killed_server(fresh_server: LlmkitServer) -> None:
    engine = fresh_server.engine()
    fresh_server.process.kill()
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_engine_ignores_signals_and_the_server_stops_at_one_without_requests(
    fresh_server: LlmkitServer,
) -> None:
    engine = fresh_server.engine()
    engine.send_signal(signal.SIGTERM)
    engine.send_signal(signal.SIGINT)
    with fresh_server.client() as client:
        answer = client.post("/v1/completions", json=LONG | {"max_tokens": 50, "stream": False})
    assert answer.status_code == 200
    assert fresh_server.stop(signal.SIGINT) == 0
    assert last_line(fresh_server) == "llmkit serve: stopping: no requests left"


def test_signal_while_loading_stops_the_server_and_its_engine(model: Path, tmp_path: Path) -> None:
    fresh_server = LlmkitServer(tmp_path / "log", model)
    wait_for(lambda: bool(psutil.Process(fresh_server.process.pid).children()))
    engine = fresh_server.engine()
    listening = psutil.Process(fresh_server.process.pid)
    (port,) = {
        connection.laddr.port
        for connection in listening.net_connections()
        if connection.status == "LISTEN"
    }

    def health() -> int:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code
        except httpx.TransportError:
            return 0

    wait_for(lambda: health() == 503 or " is ready at " in fresh_server.log.read_text())
    assert fresh_server.stop() in (143, 0)  # 0 when it got ready before the signal
    assert not engine.is_running()


def fails_to_start(log: Path, model: Path) -> tuple[int, str]:
    server = LlmkitServer(log, model)
    code = server.process.wait(120)
    (line,) = server.log.read_text().splitlines()
    return code, line


def test_bad_checkpoint_is_one_line_and_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, line = fails_to_start(tmp_path / "log", tmp_path / "empty")
    assert code == 3
    assert line.startswith("llmkit serve: error: ")
    assert "config.json" in line


@pytest.mark.slow  # as a bad checkpoint
def test_context_over_the_models_limit_is_exit_code_3(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--port", "0", "--device", "cpu", "--max-model-len", "50000"]
    assert main.run(["serve", str(model), *words]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "50000" in line
    assert "32768" in line


@pytest.mark.slow  # as a bad checkpoint
def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    write_tokenizer(model, vocab=600)
    code, line = fails_to_start(tmp_path / "log", model)
    assert code == 3
    assert "600" in line
    assert "512" in line


def test_model_without_a_chat_template_refuses_chats(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    write_tokenizer(model, chat_template=None)
    with serving(tmp_path / "log", model) as server, server.client() as client:
        messages = [{"role": "user", "content": "x"}]
        answer = client.post("/v1/chat/completions", json={"model": "model", "messages": messages})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
        assert (
            client.post("/v1/completions", json={"model": "model", "prompt": "x"}).status_code
            == 200
        )
