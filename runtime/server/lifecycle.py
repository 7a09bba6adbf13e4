"""The API process's event loop: load, serve, and the three ways to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from llmkit.checkpoint.errors import InputError
from llmkit.runtime.server.app import build_app
from llmkit.runtime.server.errors import ApiError
from llmkit.runtime.server.http_protocol import LimitedHttpProtocol
from llmkit.runtime.server.messages import Ready
from llmkit.runtime.server.metrics import Metrics
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.process import EngineClient
from llmkit.runtime.server.replicas import Replicas
from llmkit.runtime.server.state import Phase, State, TextSide

# After the engine's death, health answers 503 for so long before the process exits: probes get to see it.
_DEATH_NOTICE_S = 2.0
_LAST_BYTES_S = 2  # for error events to leave once nothing is waited for any more
_TEXT_WAIT_S = 5.0  # an interpreter should not end while a thread is in the middle of an import
_KEEP_ALIVE_S = 75  # longer than the idle time of common clients and proxies, so that they close first

Result = TypeVar("Result")
Message = Callable[[str], None]
OnReady = Callable[[Mapping[str, Any]], None]


async def serve(
    options: ServeOptions,
    keys: tuple[str, ...],
    listener: socket.socket,
    engines: Sequence[tuple[subprocess.Popen[bytes], socket.socket]],
    began: float,
    message: Message,
    ready: OnReady,
) -> int:
    """Serve on `listener` with engine processes, each behind its socket; see run_server.

    began: perf_counter at the start, for the ready line.
    """
    seconds = {"python and imports": _since(began)}
    with _StopSignals() as stop:
        names = [f"replica {index}: " if len(engines) > 1 else "" for index in range(len(engines))]
        clients = [await EngineClient.connect(*one, who) for one, who in zip(engines, names, strict=True)]
        client = Replicas(clients, options.engine.prefix_cache)
        lost = _task(client.lost())
        metrics = Metrics(lambda: client.stats, gpus=options.engine.device != "cpu")
        for one in clients:
            one.on_step = metrics.stepped
        state = State(options, client, metrics, _model_name(options))
        http = _HttpServer(state, keys)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        text = _in_thread(lambda: _load_text(options.model, seconds))
        try:
            loaded = _task(_both(client.ready(), text))
            await _first(loaded, stop.first)
            if not loaded.done():
                loaded.cancel()
                return 128 + stop.first.result()
            facts = _open_for_requests(state, *loaded.result(), message)
            facts |= {"url": _url(options.host, listener), "ready_s": _since(began), "api_seconds": seconds}
            message(
                "{model} is ready at {url} after {ready_s:.1f} s ({device}, {dtype}, context {max_model_len}, KV "
                "cache {kv_cache_tokens} tokens)".format(**facts)
            )
            ready(facts)
            await _first(lost, stop.first)
            if lost.done():
                await _announce_death(state, lost.result(), stop)
            state.phase = Phase.DRAINING
            idle = _task(state.idle())
            await _first(idle, lost, stop.second, timeout=options.drain_timeout)
            return 128 + stop.second.result() if stop.second.done() else 0
        finally:
            state.fail_all(ApiError(503, "The server is shutting down.", code="shutting_down"))
            http.should_exit = True
            await serving
            client.close()
            await _first(text, timeout=_TEXT_WAIT_S)
            if text.done():
                text.exception()  # known, or of no interest any more


def _open_for_requests(state: State, facts: Ready, text: TextSide, message: Message) -> dict[str, Any]:
    """Take requests from now on; what there is to say of the model. InputError when its parts do not fit."""
    known, rows = text.tokenizer.vocab_size, facts.vocab_size
    if known > rows:
        raise InputError(
            f"the tokenizer has {known} tokens and the model's embedding {rows}",
            "The embedding must have a row for every token",
            "Use the tokenizer that the model was trained with",
        )
    if state.options.engine.device == "auto" and facts.device == "cpu":
        message("no CUDA device: running on the CPU")
    if state.options.engine.max_model_len is None and facts.max_model_len != facts.plan["model_limit"]:
        limit = facts.plan["model_limit"]
        message(f"the context is what the KV cache holds; the model's own limit is {limit} (see --kv-cache-memory)")
    state.become_ready(facts, text)
    for ignored in text.not_applied:
        message(f"generation_config.json has {ignored}, which is not applied")
    return {
        "model": state.model_name,
        "device": facts.device,
        "dtype": facts.dtype,
        "max_model_len": facts.max_model_len,
        "kv_cache_tokens": facts.kv_cache_tokens,
        "replicas": state.options.engine.dp,
        "load_s": round(facts.load_s, 3),
        "engine_seconds": {stage: round(spent, 3) for stage, spent in facts.seconds.items()},
        "memory": facts.plan,
        "paths": facts.paths,
    }


def _load_text(model: str, seconds: dict[str, float]) -> TextSide:
    began = time.perf_counter()
    text = TextSide.load(model)
    seconds["tokenizer"] = _since(began)
    return text


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)


async def _announce_death(state: State, engine: EngineClient, stop: _StopSignals) -> None:
    """The streams have failed by now; let health tell it for a moment, then raise LlmkitError."""
    state.phase = Phase.DEAD
    death = _in_thread(engine.death)
    await _first(stop.first, timeout=_DEATH_NOTICE_S)
    raise await death


class _HttpServer(uvicorn.Server):
    """uvicorn with our limits; signals are the lifecycle's."""

    def __init__(self, state: State, keys: tuple[str, ...]) -> None:
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        super().__init__(
            uvicorn.Config(
                build_app(state, keys),
                loop="none",
                http=LimitedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _StopSignals:
    """The first and the second SIGINT or SIGTERM, as futures of the signal's number."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.first: asyncio.Future[int] = self._loop.create_future()
        self.second: asyncio.Future[int] = self._loop.create_future()

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if not self.first.done():
            self.first.set_result(number)
        elif not self.second.done():
            self.second.set_result(number)


async def _first(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait until one is done. None is cancelled."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


_task = asyncio.ensure_future


async def _both(engine: Awaitable[Ready], text: asyncio.Future[TextSide]) -> tuple[Ready, TextSide]:
    """Both results, or the first error; `text` is not cancelled with this."""
    return await asyncio.gather(engine, asyncio.shield(text))


def _in_thread(function: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run `function` in a daemon thread: unlike an executor's, it does not delay the exit of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _model_name(options: ServeOptions) -> str:
    if options.served_model_name:
        return options.served_model_name
    path = Path(options.model)
    return path.resolve().name if path.exists() else options.model


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
