"""How a server starts, stops and fails."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint, write_tokenizer

LONG: dict[str, Any] = {
    "model": "model",
    "prompt": "hello",
    "max_tokens": 4000,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", max_position_embeddings=4096)


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with serving(tmp_path / "log", model, kv_cache_memory=64 * 2**20) as running:
        yield running


def last_line(server: ServerProcess) -> str:
    return server.log.read_text().splitlines()[-1]


def test_a_graceful_stop_lets_running_requests_finish_and_refuses_new_ones(server: ServerProcess) -> None:
    engine = server.engine()
    body = LONG | {"max_tokens": 1000}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        with server.client() as other:
            wait_for(lambda: other.get("/health").status_code == 503)
            assert other.get("/health").json()["error"]["code"] == "draining"
            assert other.get("/ready").status_code == 503
            refused = other.post("/v1/completions", json=body)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        received = [line for line in lines if line]
    assert received[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in received[-2]
    assert server.process.wait(30) == 0
    assert not engine.is_running()
    assert len(server.log.read_text().splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once_with_an_error_event(server: ServerProcess, number: int, code: int) -> None:
    engine = server.engine()
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(number)
        with server.client() as other:
            wait_for(lambda: other.get("/health").status_code == 503)
        server.process.send_signal(number)
        received = [line for line in lines if line]
    assert received[-1].startswith('data: {"error":')
    assert server.process.wait(30) == code
    assert not engine.is_running()


def test_requests_that_outlast_the_drain_timeout_get_an_error_event(model: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", model, drain_timeout=0.2, kv_cache_memory=64 * 2**20) as server:
        with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            received = [line for line in lines if line]
        assert '"code":"shutting_down"' in received[-1]
        assert server.process.wait(30) == 0


def test_the_engines_death_fails_streams_then_health_then_the_server(server: ServerProcess) -> None:
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.engine().kill()
        received = [line for line in lines if line]
        assert '"code":"engine_dead"' in received[-1]
        assert "data: [DONE]" not in received
        with server.client() as other:
            assert other.get("/health").status_code == 503
            refused = other.post("/v1/completions", json=LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert server.process.wait(30) == 70
    assert last_line(server).startswith("llmkit serve: error: the engine process ended (signal SIGKILL")


def test_the_engine_does_not_outlive_a_killed_server(server: ServerProcess) -> None:
    engine = server.engine()
    server.process.kill()
    wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, timeout_s=10)


def test_the_engine_leaves_signals_to_its_parent(server: ServerProcess) -> None:
    engine = server.engine()
    engine.send_signal(signal.SIGTERM)
    engine.send_signal(signal.SIGINT)
    with server.client() as client:
        answer = client.post("/v1/completions", json=LONG | {"max_tokens": 50, "stream": False})
    assert answer.status_code == 200
    assert server.stop() == 0


def test_a_signal_while_loading_stops_the_server_and_its_engine(model: Path, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", model)
    wait_for(lambda: bool(psutil.Process(server.process.pid).children()))
    engine = server.engine()
    listening = psutil.Process(server.process.pid)
    (port,) = {connection.laddr.port for connection in listening.net_connections() if connection.status == "LISTEN"}

    def health() -> int:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code
        except httpx.TransportError:
            return 0

    wait_for(lambda: health() == 503 or " is ready at " in server.log.read_text())
    assert server.stop() in (143, 0)  # 0 when it got ready before the signal
    assert not engine.is_running()


def fails_to_start(log: Path, model: Path, **options: Any) -> tuple[int, str]:
    server = ServerProcess(log, model, **options)
    code = server.process.wait(60)
    (line,) = server.log.read_text().splitlines()
    return code, line


def test_a_bad_checkpoint_is_one_line_and_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, line = fails_to_start(tmp_path / "log", tmp_path / "empty")
    assert code == 3
    assert line.startswith("llmkit serve: error: ")
    assert "config.json" in line


def test_a_context_over_the_models_limit_comes_from_the_engine_as_exit_code_3(model: Path, tmp_path: Path) -> None:
    code, line = fails_to_start(tmp_path / "log", model, max_model_len=5000)
    assert code == 3
    assert "5000" in line
    assert "4096" in line


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    write_tokenizer(model, vocab=600)
    code, line = fails_to_start(tmp_path / "log", model)
    assert code == 3
    assert "600" in line
    assert "512" in line


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    write_tokenizer(model, chat_template=None)
    with serving(tmp_path / "log", model) as server, server.client() as client:
        messages = [{"role": "user", "content": "x"}]
        answer = client.post("/v1/chat/completions", json={"model": "model", "messages": messages})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
        assert client.post("/v1/completions", json={"model": "model", "prompt": "x"}).status_code == 200
