"""The engine process: loads the model, then runs engine steps for the requests it is sent.

Started by the API process only, as `python -m llmkit.runtime.server.engines.engine_process --fd N`.
It repeats: read the waiting messages, run one engine step, send the outputs. It blocks on the
socket when there is nothing to do, and exits when the socket closes. The parent handles SIGINT and
SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llmkit.common.errors import LlmkitError, is_out_of_memory
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.process_channel import Channel, Failed, parent_socket
from llmkit.runtime.server.engines.engine_messages import (
    AbortRequest,
    AddRequest,
    Done,
    EngineOutputs,
    EngineReady,
    LoadAdapter,
    LoadModel,
    Refused,
    Sleep,
    StatsUpdate,
    ToEngine,
    UnloadAdapter,
    WakeUp,
    to_engine_decoder,
)
from llmkit.runtime.server.engines.pending_grammars import PendingGrammars
from llmkit.runtime.server.process_age import process_age

if TYPE_CHECKING:
    from llmkit.runtime.engine.engine import Engine

EngineChannel = Channel[ToEngine]

_DEATH_NOTICE_S = 1.0  # the running step may fail within this time, with a better reason


def serve(engine: Engine, early_messages: list[ToEngine], channel: EngineChannel) -> None:
    """Run requests until the parent is gone (EOFError, OSError).

    `early_messages` arrived while the model was loaded.
    """
    server = _EngineServer(engine, channel)
    server.handle(early_messages)
    while True:
        server.run_once()


class _EngineServer:
    """Connects an engine to the channel: messages in, outputs out."""

    def __init__(self, engine: Engine, channel: EngineChannel) -> None:
        self._engine = engine
        self._channel = channel
        self._queue_times = QueueTimes()
        self._pending_grammars = PendingGrammars(self._compile_grammar)

    def run_once(self) -> None:
        """Handle the waiting messages, then run one engine step if there is work."""
        idle = not self._engine.has_work
        messages = self._channel.receive(wait=idle and not self._pending_grammars)
        self.handle(messages)
        compiled = self._pending_grammars.pop_ready(block=idle and not self._engine.has_work)
        for request in compiled:
            self._add(request)
        if self._engine.has_work:
            self._step()
        elif messages or compiled:
            self._channel.send(StatsUpdate(self._engine.stats()))

    def handle(self, messages: list[ToEngine]) -> None:
        """Apply `messages` in order."""
        for message in messages:
            match message:
                case AddRequest(request):
                    # Without work there is no stream that a compilation could delay.
                    if request.grammar is not None and self._engine.has_work:
                        self._pending_grammars.add(request)
                    else:
                        self._add(request)
                case AbortRequest(request_id):
                    self._engine.cancel(request_id)
                    self._queue_times.remove(request_id)
                    self._pending_grammars.remove(request_id)
                case LoadAdapter() | UnloadAdapter():
                    self._change_adapter(message)
                case Sleep(id):
                    self._sleep(id)
                case WakeUp(id):
                    self._wake_up(id)

    def _step(self) -> None:
        started_at = time.perf_counter()
        outputs = self._engine.step()
        self._queue_times.step_started(
            started_at,
            (sequence.request.request_id for sequence in self._engine.scheduler.running),
            (output.request_id for output in outputs),
        )
        queue_times_s = self._queue_times.pop(output.request_id for output in outputs)
        self._channel.send(EngineOutputs(outputs, self._engine.stats(), queue_times_s))

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except RequestError as error:
            self._channel.send(Refused(request.request_id, error.code, error.message, error.param))
            return
        self._queue_times.added(request.request_id)

    def _change_adapter(self, message: LoadAdapter | UnloadAdapter) -> None:
        try:
            if isinstance(message, LoadAdapter):
                self._engine.add_adapter(message.name, message.path)
            else:
                self._engine.remove_adapter(message.name)
        except RequestError as error:
            self._channel.send(Refused(message.id, error.code, error.message, "lora_name"))
        except LlmkitError as error:
            self._channel.send(Refused(message.id, "invalid_adapter", str(error), "lora_path"))
        else:
            self._channel.send(Done(message.id))

    def _sleep(self, message_id: str) -> None:
        while self._engine.has_work:  # steps in flight of cancelled requests
            self._step()
        try:
            self._engine.sleep()
        except RequestError as error:
            self._channel.send(Refused(message_id, error.code, error.message, error.param))
            return
        gc.unfreeze()  # recorded steps are in cycles
        gc.collect()
        _return_memory()
        self._channel.send(Done(message_id))

    def _wake_up(self, message_id: str) -> None:
        try:
            self._engine.wake_up()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = "there is not enough memory for the weights and the KV cache"
            self._channel.send(Refused(message_id, "out_of_memory", message))
            return
        gc.freeze()
        self._channel.send(Done(message_id))

    def _compile_grammar(self, grammar: str) -> object:
        """Compile `grammar` in the calling thread; the engine then finds it in its cache."""
        compile_grammar = self._engine.compile_grammar
        if compile_grammar is None:
            return None
        return compile_grammar(grammar)


class QueueTimes:
    """How long each request waited for its first step. Each time is returned once."""

    def __init__(self) -> None:
        self._added_at: dict[str, float] = {}  # perf_counter, of requests that still wait
        self._waited_s: dict[str, float] = {}  # of requests whose time was not returned yet

    def added(self, request_id: str) -> None:
        """A request starts to wait."""
        self._added_at[request_id] = time.perf_counter()

    def step_started(
        self, started_at: float, running: Iterable[str], with_output: Iterable[str]
    ) -> None:
        """A step started at `started_at` (perf_counter).

        `running` are the ids of the requests that run after it. `with_output` are those with an
        output, which may have finished.
        """
        if not self._added_at:
            return
        for request_id in (*running, *with_output):
            added_at = self._added_at.pop(request_id, None)
            if added_at is not None:
                self._waited_s[request_id] = max(0.0, started_at - added_at)

    def pop(self, request_ids: Iterable[str]) -> dict[str, float]:
        """Remove and return the known waiting times of `request_ids`, in seconds."""
        waited_s: dict[str, float] = {}
        if self._waited_s:
            for request_id in request_ids:
                if request_id in self._waited_s:
                    waited_s[request_id] = self._waited_s.pop(request_id)
        return waited_s

    def remove(self, request_id: str) -> None:
        """Drop an aborted request."""
        self._added_at.pop(request_id, None)
        self._waited_s.pop(request_id, None)


def _return_memory() -> None:
    """Return to the system the memory that the C library keeps."""
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _load(message: LoadModel, channel: EngineChannel) -> tuple[Engine, EngineReady]:
    # These modules import torch: loading them is the first stage of the start-up.
    from llmkit.checkpoint.open_checkpoint import open_checkpoint
    from llmkit.runtime.engine_loader import load_engine
    from llmkit.runtime.model_card import model_card
    from llmkit.runtime.part_loader import StartupReport

    report = StartupReport()
    import_s = process_age()
    report.seconds["python and imports"] = import_s
    with report.stage("checkpoint check"):
        checkpoint = open_checkpoint(message.model, warn_of_edits=False)
        card = model_card(checkpoint)
    engine = load_engine(checkpoint, message.engine, report, message.prefix_store)
    gc.freeze()  # loaded objects stay alive: the garbage collector need not visit them again
    _return_memory()  # that reading and casting has freed
    assert report.plan is not None
    engine.on_death(lambda error: _give_up(error, channel))
    config = engine.config
    return engine, EngineReady(
        max_model_len=config.max_model_len,
        vocab_size=engine.model.spec.full_model.vocab_size,
        dtype=config.dtype_name,
        device=str(config.device),
        kv_cache_tokens=config.num_blocks * config.block_size,
        load_s=process_age() - import_s,
        seconds=report.seconds,
        plan=report.plan.as_dict(),
        adapters=engine.adapters,
        fast_paths=report.fast_paths,
        card=card,
    )


def _give_up(error: LlmkitError, channel: EngineChannel) -> None:
    """Report `error` and exit, after a delay in which the running step may fail by itself."""
    time.sleep(_DEATH_NOTICE_S)
    with contextlib.suppress(OSError):
        channel.send(Failed.of(error))
    os._exit(error.exit_code)


def main() -> int:
    """Run the process; return its exit code.

    The parent learns of a failure from the Failed message; the exit code repeats it.
    """
    channel = EngineChannel(parent_socket(), to_engine_decoder)
    show_traceback = True
    try:
        load_model, *early_messages = channel.receive(wait=True)
        assert isinstance(load_model, LoadModel)
        # An error while loading is usually the user's: a traceback would only hide it.
        show_traceback = load_model.debug
        engine, ready = _load(load_model, channel)
        channel.send(ready)
        show_traceback = True
        serve(engine, early_messages, channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        failed = Failed.of(error)
        # The parent may have closed the socket because another replica failed.
        with contextlib.suppress(OSError):
            channel.send(failed)
        return failed.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
