"""Failures: deadlines, full queues, disconnected clients, and engines that hang or die."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.server_process import LlmkitServer, held, serving, wait_for

CONTEXT = 4096
NOT_A_NUMBER = 500  # a token whose embedding is none
QUEUED_TOKENS = 3000
HANG_S = 8.0  # a step that compiles may take five times as long
LONG: dict[str, Any] = {
    "model": "model",
    "prompt": "hello",
    "max_tokens": 4000,
    "ignore_eos": True,
    "temperature": 0,
}
STREAM = LONG | {"stream": True}
CHAT: dict[str, Any] = {
    "model": "model",
    "stream": True,
    "temperature": 0,
    "messages": [{"role": "user", "content": "hello"}],
}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": STREAM,
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT | {"max_tokens": 4000},
    "/v1/responses": {"model": "model", "stream": True, "temperature": 0, "input": "hello"},
}


MODEL: dict[str, Any] = {"max_position_embeddings": CONTEXT}
SERVER: dict[str, Any] = {
    "kv_cache_memory": 64 * 2**20,
    "max_num_seqs": 5,
    "max_waiting_tokens": QUEUED_TOKENS,
    "write_timeout": 1.0,
}


def edit_model(path: Path) -> None:
    """Make greedy answers long, and let the token NOT_A_NUMBER lead to logits of NaN."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][NOT_A_NUMBER] = float("nan")
    # Neither the end-of-sequence token nor NOT_A_NUMBER is ever the most likely one.
    tensors["lm_head.weight"][2] = torch.zeros(64)
    tensors["lm_head.weight"][NOT_A_NUMBER] = torch.zeros(64)
    save_file(tensors, file, {"format": "pt"})


def running_and_waiting(server: LlmkitServer) -> tuple[float, float]:
    return server.metric("num_requests_running"), server.metric("num_requests_waiting")


def free(server: LlmkitServer) -> None:
    wait_for(lambda: running_and_waiting(server) == (0, 0))
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0)


class Stream:
    """An answer that is under way: its first event has come."""

    def __init__(
        self,
        server: LlmkitServer,
        stack: ExitStack,
        body: dict[str, Any],
        path: str = "/v1/completions",
    ):
        client = stack.enter_context(server.client())
        self.answer = stack.enter_context(client.stream("POST", path, json=body))
        self._lines = self.answer.iter_lines()
        assert next(self._lines)

    def rest(self) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in self._lines if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def connected(server: LlmkitServer, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request and reads nothing; its answer ends with it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        "host: localhost",
        "connection: close",
        "content-type: application/json",
    ]
    connection.sendall(
        "\r\n".join([*head, f"content-length: {len(content)}", "", ""]).encode() + content
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_deadline_without_an_answer_is_a_504(server: LlmkitServer, stream: bool) -> None:
    with held(server.engine()), server.client() as client:
        for path, body in ENDPOINTS.items():
            answer = client.post(path, json=body | {"stream": stream, "timeout": 0.1})
            assert answer.status_code == 504
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("timeout_error", "timeout")
            assert answer.headers["x-should-retry"] == "false"
    free(server)


def test_deadline_ends_a_stream_with_an_error_event(
    server: LlmkitServer,
) -> None:
    for timeout in (2, 10, 60):  # the shortest in which this machine begins four streams
        with ExitStack() as stack:
            running = Stream(server, stack, STREAM)
            streams = [
                Stream(server, stack, body | {"timeout": timeout}, path)
                for path, body in ENDPOINTS.items()
            ]
            if any(stream.answer.status_code == 504 for stream in streams):
                continue
            with held(server.engine()):
                for stream in streams:
                    assert '"timeout"' in json.dumps(stream.rest()[-1])
            assert running.rest()[-1] == "[DONE]", "others go on"
            break
    else:
        pytest.fail("no stream began")
    free(server)


@pytest.mark.parametrize("timeout", [0, -1, "1", True, 1e9])
def test_deadline_is_a_number_of_seconds_up_to_a_day(server: LlmkitServer, timeout: Any) -> None:
    with server.client() as client:
        for path, body in ENDPOINTS.items():
            answer = client.post(path, json=body | {"timeout": timeout})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout")


def test_disconnected_clients_free_their_blocks_within_two_steps(
    server: LlmkitServer,
) -> None:
    def cancelled() -> float:
        with server.client() as client:
            lines = client.get("/metrics").text.splitlines()
        name = 'llmkit:request_success_total{finished_reason="cancelled"} '
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = cancelled()
    connections = [
        connected(server, STREAM | {"max_tokens": 1}),
        *(connected(server, STREAM) for _ in range(7)),
    ]
    wait_for(lambda: running_and_waiting(server) == (5, 2))
    with held(server.engine()):
        for connection in connections:
            connection.close()
        wait_for(lambda: cancelled() == before + 7)
        steps = server.metric("iteration_tokens_total_count")
    free(server)
    assert server.metric("iteration_tokens_total_count") <= steps + 2


def test_client_that_never_reads_is_cut_off_alone(server: LlmkitServer) -> None:
    greedy = STREAM | {
        "n": 4,
        "logprobs": 20,
    }  # about 20 MB, more than what lies between two sockets
    with connected(server, greedy) as connection:
        wait_for(lambda: server.metric("num_requests_running") == 4)
        with server.client() as client:
            client.post("/v1/completions", json=LONG | {"max_tokens": 20}).raise_for_status()
        free(server)
        received = b""
        # The connection was aborted, or its answer ends with an error event.
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(1 << 20):
                received += chunk
    assert b'"finish_reason":"length"' not in received


def test_queue_of_too_many_prompt_tokens_is_a_429(server: LlmkitServer) -> None:
    params = LONG | {"prompt": [5] * 2000, "max_tokens": 1, "timeout": 0.5}
    with ExitStack() as stack, server.client() as client:
        # This request has its first token, so its prompt no longer counts as queued.
        Stream(server, stack, STREAM | {"prompt": [5] * 2000, "max_tokens": 2000})
        with held(server.engine()):
            waiting = stack.enter_context(connected(server, params | {"timeout": 60}))
            answers: list[httpx.Response] = []

            def refused() -> bool:
                answers.append(client.post("/v1/completions", json=params))
                return answers[-1].status_code == 429

            wait_for(refused)
            assert {answer.status_code for answer in answers[:-1]} <= {504}
            assert answers[-1].json()["error"]["code"] == "queue_full"
            assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
            small = client.post("/v1/completions", json=params | {"prompt": [5] * 900})
            assert small.status_code == 504, "it was taken, and waited"
        assert waiting.recv(100).startswith(b"HTTP/1.1 200")
        assert client.post("/v1/completions", json=params | {"timeout": 60}).status_code == 200
    free(server)


def test_logits_of_nan_fail_one_request_alone(server: LlmkitServer) -> None:
    with ExitStack() as stack, server.client() as client:
        alone = client.post("/v1/completions", json=LONG | {"max_tokens": 500}).json()["choices"][
            0
        ]["text"]
        other = Stream(server, stack, STREAM | {"max_tokens": 500})
        failed = client.post("/v1/completions", json=LONG | {"prompt": [5, NOT_A_NUMBER, 7]})
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "generation_failed")
        streamed = client.post("/v1/completions", json=STREAM | {"prompt": [NOT_A_NUMBER]})
        assert (streamed.status_code, streamed.json()["error"]["code"]) == (
            500,
            "generation_failed",
        )
        *rest, done = other.rest()
        assert done == "[DONE]"
        assert alone.endswith("".join(chunk["choices"][0]["text"] for chunk in rest))
        again = client.post("/v1/completions", json=LONG | {"max_tokens": 500}).json()["choices"][
            0
        ]["text"]
        assert again == alone
    free(server)


def error_codes(streams: list[Stream]) -> list[str]:
    return [stream.rest()[-1]["error"]["code"] for stream in streams]


def health(server: LlmkitServer) -> str:
    """The state of the server: "ok" or an error code.

    It may change between two requests: `/ready` is compared with the answers before and after.
    """
    with server.client() as client:
        before, ready, after = (client.get(path) for path in ("/health", "/ready", "/health"))
    assert ready.status_code in (before.status_code, after.status_code)
    return "ok" if after.status_code == 200 else str(after.json()["error"]["code"])


def test_engine_that_dies_or_hangs_is_restarted_up_to_the_limit(
    model: Path, tmp_path: Path
) -> None:
    options = {
        "restart": 1,
        "engine_timeout": HANG_S,
        "stream_keep_alive": 60.0,  # a stream that waits gets no head before the engine has hung
        "max_num_seqs": 1,
        "kv_cache_memory": 64 * 2**20,
    }
    with serving(tmp_path / "log", model, **options) as server:
        for end in (signal.SIGSTOP, signal.SIGKILL):
            engine = server.engine()
            with ExitStack() as stack:
                streams = [Stream(server, stack, STREAM)]
                waiting = stack.enter_context(connected(server, STREAM))
                wait_for(lambda: running_and_waiting(server) == (1, 1))
                made = server.metric("generation_tokens_total")
                engine.send_signal(end)
                assert error_codes(streams) == ["engine_dead"]
                assert waiting.recv(12) == b"HTTP/1.1 503"
                if end is signal.SIGKILL:
                    break
                assert health(server) == "restarting"
                with server.client() as client:
                    refused = client.post("/v1/completions", json=LONG)
                    assert (refused.status_code, refused.json()["error"]["code"]) == (
                        503,
                        "restarting",
                    )
                    wait_for(lambda: health(server) == "ok")
                    client.post("/v1/completions", json=LONG | {"max_tokens": 9}).raise_for_status()
            assert server.metric("generation_tokens_total") >= made + 9, "counters go on"
            assert not engine.is_running()
        assert health(server) == "engine_dead"
        assert server.process.wait(60) == 70
    lines = server.log.read_text().splitlines()
    assert lines[-3].startswith(
        "llmkit serve: the engine process hung: it had requests and said nothing for 8 s."
    )
    assert lines[-3].endswith("Restarting it (1 of 1 times in an hour)")
    assert lines[-2].startswith("llmkit serve: the engine process is back after")
    assert lines[-1].startswith("llmkit serve: error: the engine process ended (signal SIGKILL")


@pytest.mark.slow  # as the test before, with a replica that serves on
def test_replica_is_restarted_while_the_other_serves(model: Path, tmp_path: Path) -> None:
    options = {"dp": 2, "restart": 1, "max_num_seqs": 1, "kv_cache_memory": 64 * 2**20}
    with serving(tmp_path / "log", model, **options) as server, ExitStack() as stack:
        engines = server.engines()
        streams = [Stream(server, stack, STREAM | {"prompt": [token] * 20}) for token in (5, 6)]
        engines[0].kill()
        ends = [stream.rest()[-1] for stream in streams]
        assert sorted(end == "[DONE]" for end in ends) == [False, True]
        assert health(server) == "ok"
        with server.client() as client:
            wait_for(lambda: "replica 0: the engine process is back" in server.log.read_text())
            for token in (5, 6, 7, 8):
                client.post(
                    "/v1/completions", json=LONG | {"prompt": [token] * 20, "max_tokens": 9}
                ).raise_for_status()
        assert len(server.engines()) == 2
        assert server.stop() == 0
    assert not any(engine.is_running() for engine in engines)


@pytest.mark.parametrize(
    "end", [pytest.param("a rank that hangs", marks=pytest.mark.slow), "a server that is killed"]
)
def test_rank_processes_leave_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    options = {"tp": 2, "engine_timeout": HANG_S, "kv_cache_memory": 64 * 2**20}
    with serving(tmp_path / "log", model, **options) as server, ExitStack() as stack:
        stream = Stream(server, stack, STREAM)
        lead = server.engine()
        processes = [lead, *lead.children()]
        assert len(processes) == 2
        files = [file.path for one in processes for file in (*one.memory_maps(), *one.open_files())]
        assert not [path for path in files if path.startswith("/dev/shm")]
        processes[1].suspend()
        if end == "a rank that hangs":
            assert error_codes([stream]) == ["engine_dead"]
            assert health(server) == "engine_dead"
            assert server.process.wait(60) == 70
        else:
            server.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    assert list((tmp_path / "tmp").iterdir()) == []
