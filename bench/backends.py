"""Backends that answer requests: a running server, and a checkpoint behind its own `llmkit serve`.

The third backend, the engine inside this process, is in `offline_backend`.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from llmkit.bench.agentic.play_sessions import AgentLoad
from llmkit.bench.agentic.run_sessions import run_sessions
from llmkit.bench.bench_metrics import RunResult
from llmkit.bench.host_memory import memory_bytes, process_tree
from llmkit.bench.load_client import Server, query_server, run_load
from llmkit.bench.workload import WorkloadRequest
from llmkit.common.errors import (
    GateError,
    InputError,
    LlmkitError,
    OutputError,
    ShortageError,
    UsageError,
)
from llmkit.runtime.process_channel import API_KEY_VARIABLE

READY_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 0.02
_MEMORY_INTERVAL_S = 0.5  # between two samples of the server's memory while it starts
_LOOPBACK = "127.0.0.1"
_EXIT_ERRORS: dict[int, type[LlmkitError]] = {
    error.exit_code: error
    for error in (GateError, UsageError, InputError, ShortageError, OutputError)
}


class Backend(Protocol):
    """Answers the requests of runs.

    Call `start`, then `run` any number of times, then `stop`. Call `stop` after a failed start too.
    """

    name: str

    @property
    def context_tokens(self) -> int | None:
        """The limit of prompt and output tokens together; None: not known."""

    def start(self) -> dict[str, float]:
        """Make the backend ready. Returns the TARGET_METRICS that the start measures."""
        return {}

    def run(self, requests: Sequence[WorkloadRequest], max_concurrency: int) -> RunResult:
        """Answer the requests, with at most `max_concurrency` conversations in flight."""

    def stop(self) -> dict[str, float]:
        """Release all resources. Returns the TARGET_METRICS that are known at the end."""
        return {}


class UrlBackend(Backend):
    """A server that is already running. `query_server` has reached it."""

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self.server = server

    @property
    def context_tokens(self) -> int | None:
        """The context length in the server's model list; None: not listed."""
        return self.server.context_tokens

    def run(self, requests: Sequence[WorkloadRequest], max_concurrency: int) -> RunResult:
        """See `Backend.run`."""
        return run_load(self.server, requests, max_concurrency)

    def run_sessions(self, load: AgentLoad) -> RunResult:
        """Play the sessions of a trace."""
        return run_sessions(self.server, load)


class ServedBackend:
    """A checkpoint behind its own `llmkit serve`, on a free loopback port."""

    def __init__(
        self, name: str, reference: str, context_tokens: int, options: Sequence[str] = ()
    ) -> None:
        """options: more arguments for `llmkit serve`."""
        self.name = name
        self.reference = reference
        self.options = list(options)
        self.model_context_tokens = context_tokens
        self.server: Server | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.peak_bytes = 0
        self.stderr_file = tempfile.TemporaryFile()  # noqa: SIM115
        self._stdout_file = tempfile.TemporaryFile()  # noqa: SIM115

    @property
    def context_tokens(self) -> int | None:
        """The server's context length; before the start, the model's."""
        served = self.server.context_tokens if self.server else None
        return served or self.model_context_tokens

    def command(self, port: int) -> list[str]:
        """The command line that serves the checkpoint on this port."""
        python = [sys.executable, "-m", "llmkit.cli.main"]
        address = ["--host", _LOOPBACK, "--port", str(port)]
        return [*python, "serve", self.reference, *address, "--json", *self.options]

    def environment(self) -> dict[str, str]:
        """The server's environment.

        The API key belongs to other servers. A configuration file, TLS or gRPC would change what is
        measured.
        """
        removed = (API_KEY_VARIABLE, "LLMKIT_CONFIG", "LLMKIT_SSL_", "LLMKIT_GRPC_PORT")
        return {name: value for name, value in os.environ.items() if not name.startswith(removed)}

    def start(self) -> dict[str, float]:
        """Start the server and wait until it is healthy. Returns ready_s.

        Raises the error that the server ended with, or ShortageError after READY_TIMEOUT_S.
        """
        port = _free_port()
        start_s = time.perf_counter()
        self.process = subprocess.Popen(  # noqa: S603
            self.command(port),
            stdin=subprocess.DEVNULL,
            stdout=self._stdout_file,
            stderr=self.stderr_file,
            env=self.environment(),
            start_new_session=True,  # Ctrl-C stops only this process, which then stops the server
        )
        last_sample_s = 0.0
        while not _is_healthy(port):
            elapsed_s = time.perf_counter() - start_s
            if self.process.poll() is not None:
                raise self._exit_error()
            if elapsed_s > READY_TIMEOUT_S:
                raise ShortageError(
                    f"the server of {self.name} was not ready after {READY_TIMEOUT_S:g} s"
                )
            if elapsed_s - last_sample_s >= _MEMORY_INTERVAL_S:
                self._sample_memory()
                last_sample_s = elapsed_s
            time.sleep(_POLL_INTERVAL_S)
        ready_s = time.perf_counter() - start_s
        self._sample_memory()
        self.server = query_server(f"http://{_LOOPBACK}:{port}")
        return {"ready_s": ready_s}

    def run(self, requests: Sequence[WorkloadRequest], max_concurrency: int) -> RunResult:
        """See `Backend.run`. Raises the server's own error when it ended during the run."""
        assert self.server
        result = run_load(self.server, requests, max_concurrency)
        self._check_after_run()
        return result

    def run_sessions(self, load: AgentLoad) -> RunResult:
        """Play the sessions of a trace. Raises as `run` does."""
        assert self.server
        result = run_sessions(self.server, load)
        self._check_after_run()
        return result

    def stop(self) -> dict[str, float]:
        """Stop the server; kill it after STOP_TIMEOUT_S. Returns peak_memory_bytes."""
        if self.process is not None:
            processes = process_tree(self.process.pid)
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for process in processes:
                # psutil also reports a missing process when the process id was reused.
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process = None
        self.stderr_file.close()
        self._stdout_file.close()
        return {"peak_memory_bytes": self.peak_bytes} if self.peak_bytes else {}

    def startup_stages(self) -> dict[str, float]:
        """Seconds of each stage of the engine's start, in order, from the server's JSON output."""
        self._stdout_file.seek(0)
        stages: dict[str, float] = json.loads(self._stdout_file.read())["engine_seconds"]
        return stages

    def _check_after_run(self) -> None:
        """Sample the memory. Raises the server's own error when it has ended."""
        assert self.process
        if self.process.poll() is not None:
            raise self._exit_error()
        self._sample_memory()

    def _sample_memory(self) -> None:
        """Call it only between runs: reading a process's memory map pauses the process."""
        assert self.process
        self.peak_bytes = max(self.peak_bytes, memory_bytes(self.process.pid))

    def _exit_error(self) -> LlmkitError:
        """An error with the server's exit code and the last error message of its stderr."""
        assert self.process
        code = self.process.returncode
        self.stderr_file.seek(0)
        text = self.stderr_file.read().decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        prefix = "llmkit serve: error: "
        errors = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
        reason = (errors or lines or ["no output"])[-1]
        error = _EXIT_ERRORS.get(code, LlmkitError)
        return error(f"the server of {self.name} ended with code {code}: {reason}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(_LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_url(target: str) -> bool:
    """Whether a target is a server's address: http or https. URLs of registries are checkpoints.

    Raises UsageError for an address with a password, which the report would show.
    """
    scheme, _, rest = target.partition("://")
    if scheme.lower() not in ("http", "https"):
        return False
    if "@" in rest.partition("/")[0]:
        raise UsageError(
            "an address holds a user or a password",
            todo=f"Give a key with {API_KEY_VARIABLE} instead",
        )
    return True


def short_name(target: str) -> str:
    """A column's heading: the end of a path or hub id, or the host and port of an address."""
    if is_url(target):
        return target.split("://", 1)[1].split("/", 1)[0]
    return Path(target.rstrip("/")).name or target
