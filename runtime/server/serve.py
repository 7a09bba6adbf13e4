"""`run_server`: the API process from its first line to its exit code."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmkit.checkpoint.errors import ShortageError, UsageError
from llmkit.runtime.channel import API_KEY_VARIABLE, end, spawn
from llmkit.runtime.prefix_files import private_folder
from llmkit.runtime.server.engines.messages import Start
from llmkit.runtime.server.engines.shares import shares
from llmkit.runtime.server.http.hosts import is_loopback
from llmkit.runtime.server.http.keys import Client, api_keys
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.tracing import require_tracing

__all__ = ["ServeOptions", "run_server"]

_ENGINE = "llmkit.runtime.server.engines.engine_process"
_BACKLOG = 2048
_OPEN_FILES = 65_536  # each client is one; a shell's usual limit is 1,024


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"llmkit serve: {text}\n")
    sys.stderr.flush()


def run_server(
    options: ServeOptions,
    message: Callable[[str], None] = _to_stderr,
    ready: Callable[[Mapping[str, Any]], None] = lambda facts: None,
    began: float | None = None,
    listener: socket.socket | None = None,
) -> int:
    """Serve until a signal; return the exit code: 0 after a graceful stop, 130 or 143 after a forced one.

    Raises UsageError, InputError or ShortageError when the server cannot start, and LlmkitError (exit code 70) when
    the engine process fails later. The port is taken first and the engine processes started next, so that both a
    taken port and a ready server are known as early as can be. `message` takes lines for the user; `ready` is told
    the server's figures (url, model, ready_s, ...) when requests are taken. began: the perf_counter() that seconds
    are counted from, now by default. listener: listens in place of the options' host and port.
    """
    began = time.perf_counter() if began is None else began
    keys = api_keys(options)
    check_exposure(options, keys)
    _allow_open_files()
    if options.ssl_certfile or options.ssl_keyfile or options.ssl_ca_certs:
        from llmkit.runtime.server.http.tls import tls_context

        tls_context(options)  # what is wrong with the files is known before the model is loaded
    prefixes = _prefixes(options)
    if options.otlp_traces_endpoint is not None:
        require_tracing(options.otlp_traces_endpoint)
    with listener or bind(options.host, options.port) as listener:
        engines: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        given = shares(options.engine.dp, options.engine.device)

        def start(place: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
            said = Start(options.model, options.engine, options.debug, prefixes)
            engines.append(spawn(_ENGINE, said, given[place]))
            return engines[-1]

        try:
            first = [start(place) for place in range(len(given))]
            # Imported now: the engine processes load the model meanwhile.
            from llmkit.runtime.server.http.tls import event_loop
            from llmkit.runtime.server.lifecycle import serve

            with asyncio.Runner(loop_factory=lambda: event_loop(options)) as runner:
                return runner.run(serve(options, keys, listener, first, start, began, message, ready))
        finally:
            for _, ours in engines:
                ours.close()
            for process, _ in engines:
                end(process)


def _allow_open_files() -> None:
    """Raise the soft limit of open files as far as the hard one lets it, to _OPEN_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _prefixes(options: ServeOptions) -> tuple[str, int] | None:
    if options.prefix_cache_dir is None:
        return None
    if not options.engine.prefix_cache:
        raise UsageError("--prefix-cache-dir and --no-prefix-cache exclude each other", todo="Leave out one of them")
    return str(private_folder(str(options.prefix_cache_dir))), options.prefix_cache_size


def check_exposure(options: ServeOptions, keys: tuple[Client, ...]) -> None:
    """UsageError when other machines could use the server without a key."""
    if not keys and not is_loopback(options.host):
        raise UsageError(
            f"other machines could use the server without a key (--host {options.host})",
            "An address other than loopback needs an API key",
            f"Give --api-key-file FILE or set {API_KEY_VARIABLE}, or serve on 127.0.0.1",
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. ShortageError when the port is taken or not allowed, UsageError for a bad address."""
    if not 0 <= port <= 65535:
        raise UsageError(f"there is no such port ({port})", "A port is a number from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except socket.gaierror as error:
        raise UsageError(f"the host is unknown (--host {host}: {error.strerror})") from None
    except OSError as error:
        todo = "Choose another with --port, or stop what uses it" if error.errno == errno.EADDRINUSE else ""
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {os.strerror(error.errno or 0)}"
        raise ShortageError(f"port {port} on {host} {reason}", todo=todo) from None
