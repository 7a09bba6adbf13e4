"""A `llmkit serve` of ours as a child process, for whoever needs a server of a model to itself.

It gets its options over a private socket pair, listens on a Unix socket in a private folder or on a free loopback port,
and ends, with its engines, when its parent does. Nothing here blocks an event loop but `stop`; `ready` and `gone` are
concurrent futures: `child.ready.result()` waits for one, `await asyncio.wrap_future(child.ready)` does so in asyncio.
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

from llmkit.checkpoint.errors import LlmkitError
from llmkit.runtime.channel import API_KEY_VARIABLE, Channel, Failed, end, exit_text, spawn
from llmkit.runtime.server.options import ServeOptions

_PROCESS = "llmkit.runtime.server.serve_process"
_SOCKET = "http"
_FAMILY_S = 5.0  # that engine processes may take to notice that their server is gone


class Serve(msgspec.Struct, tag=True):
    """The first message to the child."""

    options: dict[str, Any]  # of ServeOptions
    unix: str | None  # the path to listen on; None: the options' host and port


class Said(msgspec.Struct, tag=True):
    """A line for the user."""

    text: str


class Up(msgspec.Struct, tag=True):
    """Requests are taken from now on; see `run_server`."""

    facts: dict[str, Any]


from_child_decoder = msgspec.msgpack.Decoder(Said | Up | Failed)


class Child:
    """A server that has been started.

    key: the only one that it takes; None: those that the options name. message: takes its lines for the user, on
    another thread. tcp: listen on a free loopback port and not on a Unix socket.
    """

    def __init__(
        self,
        options: ServeOptions,
        key: str | None = None,
        message: Callable[[str], None] = lambda text: None,
        tcp: bool = False,
    ) -> None:
        self.key = key
        self.ready: Future[Mapping[str, Any]] = Future()  # what `run_server` tells of, or the LlmkitError of the start
        self.gone: Future[LlmkitError] = Future()  # why it ended, once it has, whoever wanted that
        for future in (self.ready, self.gone):
            future.set_running_or_notify_cancel()  # nobody can cancel what is only told of
        self._message = message
        self._folder = None if tcp else Path(tempfile.mkdtemp(prefix="llmkit-"))  # for this user only
        self.unix = None if self._folder is None else str(self._folder / _SOCKET)  # where it listens
        options = replace(options, grpc_port=None)  # of which there is one
        options = replace(options, host="127.0.0.1", port=0) if tcp else options
        options = replace(options, api_key_file=None) if key is not None else options
        options = replace(options, ssl_certfile=None, ssl_keyfile=None, ssl_ca_certs=None)  # only a proxy talks to it
        serve = Serve(options.as_document(), self.unix)
        given = key or os.environ.get(API_KEY_VARIABLE)  # others of this user may read it, and nobody else
        self._process, self._socket = spawn(_PROCESS, serve, {API_KEY_VARIABLE: given} if given else {})
        threading.Thread(target=self._listen, name="child", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the server's API process."""
        return self._process.pid

    @property
    def url(self) -> str:
        """The address without a path, once ready; of a Unix socket, one for clients that are connected to `unix`."""
        return "http://localhost" if self.unix else str(self.ready.result()["url"])

    def stop(self, grace_s: float = 0.0) -> None:
        """End it and its engines: requests under way may take `grace_s` seconds. Blocks until all are gone."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.pid).children(recursive=True)
        if grace_s > 0 and self.ready.done() and not self.gone.done():
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                self.gone.result(grace_s)
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.gone.result()
        _, left = psutil.wait_procs(family, _FAMILY_S)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self) -> None:
        """Take what it says until it ends."""
        channel, failed = Channel(self._socket, from_child_decoder), None
        with contextlib.suppress(EOFError, OSError):
            while True:
                for said in channel.receive(wait=True):
                    match said:
                        case Said(text):
                            self._message(text)
                        case Up(facts):
                            self.ready.set_result(facts)
                        case Failed():
                            failed = said
        end(self._process)
        self._socket.close()
        error = failed.error() if failed else LlmkitError(f"the server process ended ({exit_text(self._process)})")
        if not self.ready.done():
            self.ready.set_exception(error)
        self.gone.set_result(error)
