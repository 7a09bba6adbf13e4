"""`run_server`: the API process from its first line to its exit code."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmkit.checkpoint.errors import InputError, ShortageError, UsageError
from llmkit.runtime.channel import end, spawn
from llmkit.runtime.server.hosts import is_loopback
from llmkit.runtime.server.messages import Start
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.shares import shares

__all__ = ["ServeOptions", "run_server"]

API_KEY_VARIABLE = "LLMKIT_API_KEY"
_ENGINE = "llmkit.runtime.server.engine_process"
_BACKLOG = 2048


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"llmkit serve: {text}\n")
    sys.stderr.flush()


def run_server(
    options: ServeOptions,
    message: Callable[[str], None] = _to_stderr,
    ready: Callable[[Mapping[str, Any]], None] = lambda facts: None,
    began: float | None = None,
) -> int:
    """Serve until a signal; return the exit code: 0 after a graceful stop, 130 or 143 after a forced one.

    Raises UsageError, InputError or ShortageError when the server cannot start, and LlmkitError (exit code 70) when
    the engine process fails later. The port is taken first and the engine processes started next, so that both a
    taken port and a ready server are known as early as can be. `message` takes lines for the user; `ready` is told
    the server's figures (url, model, ready_s, ...) when requests are taken. began: the perf_counter() that seconds
    are counted from, now by default.
    """
    began = time.perf_counter() if began is None else began
    keys = api_keys(options)
    _check_exposure(options, keys)
    with bind(options.host, options.port) as listener:
        engines: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        try:
            start = Start(options.model, options.engine, options.debug)
            engines.extend(spawn(_ENGINE, start, share) for share in shares(options.engine.dp, options.engine.device))
            # Imported now: the engine processes load the model meanwhile.
            import uvloop

            from llmkit.runtime.server.lifecycle import serve

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(serve(options, keys, listener, engines, began, message, ready))
        finally:
            for _, ours in engines:
                ours.close()
            for process, _ in engines:
                end(process)


def api_keys(options: ServeOptions) -> tuple[str, ...]:
    """The keys from the file, else the one of LLMKIT_API_KEY, else none."""
    if options.api_key_file is None:
        key = os.environ.get(API_KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    path = Path(options.api_key_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"the API key file cannot be read ({path}: {error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"the API key file is not UTF-8 ({path})") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise InputError(f"the API key file has no keys ({path})", "One key a line is expected")
    return keys


def _check_exposure(options: ServeOptions, keys: tuple[str, ...]) -> None:
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
