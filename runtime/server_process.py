"""`llmkit serve` as a child process, for a command that needs its own server.

The process gets its options over a private socket pair. It listens on a Unix socket in a private
folder, or on the host and port of its options. It ends with its engines when its parent ends.
`ready` and `ended` are concurrent futures: `process.ready.result()` waits for one, and so does
`await asyncio.wrap_future(process.ready)`. `stop` blocks its thread, so an event loop must not call
it directly.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil

from llmkit.common.errors import LlmkitError
from llmkit.runtime.process_channel import (
    API_KEY_VARIABLE,
    ROUTER_KEY_VARIABLE,
    Channel,
    Failed,
    end_process,
    exit_text,
    spawn,
)
from llmkit.runtime.server.serve_options import ServeOptions

_PROCESS = "llmkit.runtime.server.serve_process"
_SOCKET = "http"
_ENGINES_END_S = 5.0  # for engine processes to notice that their server has ended


class StartServer(msgspec.Struct, tag=True):
    """The first message to the process."""

    options: dict[str, Any]  # of ServeOptions
    socket_path: str | None  # the path to listen on; None: the options' host and port


class UserMessage(msgspec.Struct, tag=True):
    """A line for the user."""

    text: str


class ServerReady(msgspec.Struct, tag=True):
    """The server accepts requests from now on; see `run_server`."""

    facts: dict[str, Any]


from_server_decoder = msgspec.msgpack.Decoder(UserMessage | ServerReady | Failed)


class ServerProcess:
    """A server process. It starts with this object.

    key: the only API key that it accepts; None: the keys in the options. message: receives its
    lines for the user, on another thread. tcp: listen on the host and port of the options instead
    of a Unix socket. router_key: a key that it accepts beside the others; None: no other.
    environment: more variables of the process.
    """

    def __init__(
        self,
        options: ServeOptions,
        key: str | None = None,
        message: Callable[[str], None] = lambda text: None,
        tcp: bool = False,
        router_key: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.key = key
        # What `run_server` reports, or the LlmkitError with which the start failed.
        self.ready: Future[Mapping[str, Any]] = Future()
        # Why the server ended, also when `stop` ended it.
        self.ended: Future[LlmkitError] = Future()
        for future in (self.ready, self.ended):
            future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        self._message = message
        self._folder: Path | None = None
        self.socket_path: str | None = None  # the path of the Unix socket
        if not tcp:
            self._folder = Path(tempfile.mkdtemp(prefix="llmkit-"))  # readable by this user only
            self.socket_path = str(self._folder / _SOCKET)

        # What forwards requests to it ends TLS, and another server may have the gRPC port.
        options = replace(
            options,
            grpc_port=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            ssl_ca_certs=None,
        )
        if key is not None:
            options = replace(options, api_key_file=None)
        start = StartServer(options.to_dict(), self.socket_path)
        # The environment of a process can be read by this user only.
        api_key = key or os.environ.get(API_KEY_VARIABLE)
        keys = {API_KEY_VARIABLE: api_key, ROUTER_KEY_VARIABLE: router_key}
        variables = {variable: value for variable, value in keys.items() if value}
        variables |= environment or {}
        self._process, self._socket = spawn(_PROCESS, start, variables)
        threading.Thread(target=self._listen, name="server-process", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process id of the API process."""
        return self._process.pid

    @property
    def url(self) -> str:
        """The address without a path, known once the server is ready.

        With a Unix socket, clients connect to `unix` and use this address in their requests.
        """
        return "http://localhost" if self.socket_path else str(self.ready.result()["url"])

    def stop(self, grace_s: float = 0.0) -> None:
        """End the server and its engines, and wait until all have ended.

        Running requests get `grace_s` seconds.
        """
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.pid).children(recursive=True)
        if grace_s > 0 and self.ready.done() and not self.ended.done():
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                self.ended.result(grace_s)
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.ended.result()
        _, left = psutil.wait_procs(family, _ENGINES_END_S)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self) -> None:
        """Receive its messages until it ends."""
        channel = Channel(self._socket, from_server_decoder)
        failed = None
        with contextlib.suppress(EOFError, OSError):
            while True:
                for message in channel.receive(wait=True):
                    match message:
                        case UserMessage(text):
                            self._message(text)
                        case ServerReady(facts):
                            self.ready.set_result(facts)
                        case Failed():
                            failed = message
        end_process(self._process)
        self._socket.close()
        error = LlmkitError(f"the server process ended ({exit_text(self._process)})")
        if failed is not None:
            error = failed.error()
        if not self.ready.done():
            self.ready.set_exception(error)
        self.ended.set_result(error)
