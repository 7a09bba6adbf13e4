"""`run_server`: the API process from its start to its exit code."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkit.common.errors import ShortageError, UsageError
from llmkit.runtime.engine.synthetic_acceptance import HEADER
from llmkit.runtime.prefix_folder import private_folder
from llmkit.runtime.process_channel import API_KEY_VARIABLE, end_process, spawn
from llmkit.runtime.server.engines.engine_messages import LoadModel
from llmkit.runtime.server.engines.resource_shares import replica_environments
from llmkit.runtime.server.http.api_keys import Client
from llmkit.runtime.server.http.hosts import is_loopback
from llmkit.runtime.server.http.key_ring import KeyRing
from llmkit.runtime.server.semantic.semantic_options import (
    check_semantic_options,
    embedder_message,
)
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.tracing import require_tracing
from llmkit.runtime.server_files import server_file

_ENGINE_MODULE = "llmkit.runtime.server.engines.engine_process"
_BACKLOG = 2048
_MAX_OPEN_FILES = 65_536  # one per client; the usual limit of a shell is 1,024


def _log_to_stderr(text: str) -> None:
    sys.stderr.write(f"llmkit serve: {text}\n")
    sys.stderr.flush()


def run_server(
    options: ServeOptions,
    log: Callable[[str], None] = _log_to_stderr,
    on_ready: Callable[[Mapping[str, Any]], None] = lambda info: None,
    start_time: float | None = None,
    listener: socket.socket | None = None,
) -> int:
    """Serve until a signal. Returns 0 after a graceful stop, 130 or 143 after a forced one.

    log: gets lines for the user. on_ready: gets the server's data (url, model, ready_s, ...) once
    it accepts requests. start_time: the time.perf_counter() from which start-up times are counted;
    now by default. listener: a socket to use in place of the options' host and port.

    Raises UsageError, InputError or ShortageError when the server cannot start, and LlmkitError
    (exit code 70) when the engine process fails later. It binds the port before it starts the
    engine processes, so that a port in use is reported before a model is loaded.
    """
    start_time = time.perf_counter() if start_time is None else start_time
    clients = KeyRing(options, log)
    check_exposure(options, clients)
    if listener is None:  # otherwise the router has warned
        log_open_doors(options, clients, log)
    check_synthetic_acceptance(options, log)
    _raise_open_files_limit()
    if options.ssl_certfile or options.ssl_keyfile or options.ssl_ca_certs:
        # Imported here, as uvloop would delay the start of the engine processes.
        from llmkit.runtime.server.http.tls import tls_context

        tls_context(options)  # reports wrong files before the model is loaded
    prefix_store = _prefix_store(options)
    check_semantic_options(options)
    if options.otlp_traces_endpoint is not None:
        require_tracing(options.otlp_traces_endpoint)
    if listener is None:
        listener = bind(options.host, options.port)
    with listener, server_file() as file:
        engines: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        environments = replica_environments(
            options.engine.dp, options.engine.device, options.engine.threads
        )

        def announce(facts: Mapping[str, Any]) -> None:
            file.write(facts)
            on_ready(facts)

        def start_engine(replica: int, model: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
            message = LoadModel(model, options.engine, options.debug, prefix_store)
            engines.append(spawn(_ENGINE_MODULE, message, environments[replica]))
            return engines[-1]

        def start_embedder() -> tuple[subprocess.Popen[bytes], socket.socket]:
            engines.append(spawn(_ENGINE_MODULE, embedder_message(options), {}))
            return engines[-1]

        try:
            replica_indexes = range(len(environments))
            first_engines = [start_engine(index, options.model) for index in replica_indexes]
            # Imported here, while the engine processes load the model.
            from llmkit.runtime.server.http.tls import new_event_loop
            from llmkit.runtime.server.lifecycle import serve

            with asyncio.Runner(loop_factory=lambda: new_event_loop(options)) as runner:
                return runner.run(
                    serve(
                        options,
                        clients,
                        listener,
                        first_engines,
                        start_embedder if options.semantic_cache_model is not None else None,
                        start_engine,
                        start_time,
                        log,
                        announce,
                    )
                )
        finally:
            for _, engine_socket in engines:
                engine_socket.close()
            for process, _ in engines:
                end_process(process)


def _raise_open_files_limit() -> None:
    """Raise the soft limit of open files to _MAX_OPEN_FILES, or to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _prefix_store(options: ServeOptions) -> tuple[str, int] | None:
    """Return the folder and the maximum bytes of the prefix cache on disk."""
    if options.prefix_cache_dir is None:
        return None
    if not options.engine.prefix_cache:
        raise UsageError(
            "--prefix-cache-dir and --no-prefix-cache exclude each other",
            todo="Leave out one of them",
        )
    return str(private_folder(str(options.prefix_cache_dir))), options.prefix_cache_size


def check_exposure(options: ServeOptions, clients: Sequence[Client]) -> None:
    """Raise UsageError when other machines could use the server without a key.

    SageMaker's endpoint authenticates its callers, and sends no key to the container.
    """
    if options.sagemaker is not None:
        if clients:
            raise UsageError(
                f"an API key and --sagemaker {options.sagemaker} exclude each other",
                "SageMaker sends no key: the endpoint itself checks who may call it",
                f"Leave out --sagemaker, or --api-key-file and {API_KEY_VARIABLE}",
            )
        return
    if not clients and not is_loopback(options.host):
        raise UsageError(
            f"other machines could use the server without a key (--host {options.host})",
            "An address other than loopback needs an API key",
            f"Give --api-key-file FILE or set {API_KEY_VARIABLE}, or serve on 127.0.0.1",
        )


def log_open_doors(
    options: ServeOptions, clients: Sequence[Client], log: Callable[[str], None]
) -> None:
    """Log a warning for each option that lets others use a server without a key."""
    if clients:
        return
    if options.sagemaker is not None and not is_loopback(options.host):
        log(
            f"warning: with --sagemaker, whoever reaches {options.host} can use the server without "
            "a key. Only SageMaker's endpoint may reach it"
        )
    for option, values in (
        ("--allowed-origins", options.allowed_origins),
        ("--allowed-hosts", options.allowed_hosts),
    ):
        if "*" in values:
            log(
                f"warning: with {option} '*' and no API key, every web page that a browser on this "
                f"machine opens can use the server. Name what you need, or give --api-key-file"
            )


def check_synthetic_acceptance(options: ServeOptions, log: Callable[[str], None]) -> None:
    """Log a warning when draft tokens are accepted by a draw: the answers are not the model's.

    Raises UsageError for what would keep such answers or hide where they come from.
    """
    rates = options.engine.acceptance_rates
    if not rates:
        return
    for option, is_used in (
        ("--response-cache", bool(options.response_cache)),
        ("--semantic-cache", bool(options.semantic_cache)),
        ("--response-store", options.response_store is not None),
        ("--grpc-port", options.grpc_port is not None),
    ):
        if is_used:
            raise UsageError(
                f"{option} with synthetic acceptance, whose answers are not the model's",
                f"They are neither stored nor sent without the header {HEADER}",
                "Leave out one of them",
            )
    shares = ", ".join(f"{rate:.0%}" for rate in rates)
    log(
        "warning: SYNTHETIC ACCEPTANCE: draft tokens are accepted by a draw"
        f" ({shares} at their places), so that the answers are NOT THE MODEL'S. This server is"
        f" for measuring speed only; each response has the header {HEADER}"
    )


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 is any free port.

    Raises ShortageError when the port is in use or not allowed, and UsageError for a wrong address.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"there is no such port ({port})", "A port is a number from 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except socket.gaierror as error:
        raise UsageError(f"the host is unknown (--host {host}: {error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ShortageError(
                f"port {port} on {host} is in use",
                todo="Choose another with --port, or stop what uses it",
            ) from None
        reason = os.strerror(error.errno or 0)
        raise ShortageError(f"port {port} on {host} cannot be used: {reason}") from None
