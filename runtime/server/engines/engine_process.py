"""The engine process: `python -m llmkit.runtime.server.engines.engine_process --fd N`, started by the API process only.

It loads the model, then repeats: read the messages that wait, run one engine step, send what came of it. It blocks
on the socket when there is nothing to do, and ends with the socket. SIGINT and SIGTERM are left to the parent.
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

from llmkit.checkpoint.errors import LlmkitError
from llmkit.runtime.channel import Channel, Failed, parent_socket
from llmkit.runtime.server.age import process_age
from llmkit.runtime.server.engines.held import Held
from llmkit.runtime.server.engines.messages import (
    Add,
    Cancel,
    Done,
    LoadAdapter,
    Output,
    Outputs,
    Ready,
    Refused,
    Start,
    Stats,
    ToEngine,
    UnloadAdapter,
    to_engine_decoder,
)

if TYPE_CHECKING:
    from llmkit.runtime.engine.engine import Engine

EngineChannel = Channel[ToEngine]


def serve(engine: Engine, early: list[ToEngine], channel: EngineChannel) -> None:
    """Run requests until the parent is gone (EOFError, OSError). `early`: messages that came while loading."""
    waits, held = Waits(), Held(lambda grammar: engine.grammars and engine.grammars(grammar))
    _obey(engine, early, channel, waits, held)
    while True:
        idle = not engine.has_work
        messages = channel.receive(wait=idle and not held)
        _obey(engine, messages, channel, waits, held)
        for request in held.ready(block=idle and not engine.has_work):
            messages.append(request)
            _add(engine, request, channel, waits)
        if engine.has_work:
            began = time.perf_counter()
            told = engine.step()
            waits.stepped(began, (s.request.id for s in engine.scheduler.running), (o.request_id for o in told))
            outputs = [
                Output(
                    o.request_id,
                    o.token_ids,
                    o.finish_reason,
                    o.error,
                    o.prompt_tokens,
                    o.cached_tokens,
                    o.logprobs,
                    o.prompt_logprobs,
                    waits.take(o.request_id),
                    o.embedding,
                )
                for o in told
            ]
            channel.send(Outputs(outputs, _stats(engine)))
        elif messages:
            channel.send(_stats(engine))


class Waits:
    """How long each request waited for its first step; what is told once is forgotten."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # perf_counter, of those that wait
        self._waited: dict[str, float] = {}  # seconds, of those that have no token yet

    def added(self, request_id: str) -> None:
        """It waits from now on."""
        self._since[request_id] = time.perf_counter()

    def stepped(self, began: float, running: Iterable[str], told: Iterable[str]) -> None:
        """A step began; the requests that run behind it, and those that it told of, which may have ended."""
        if self._since:
            for request_id in (*running, *told):
                if (since := self._since.pop(request_id, None)) is not None:
                    self._waited[request_id] = max(0.0, began - since)

    def take(self, request_id: str) -> float | None:
        """The seconds that it waited; None when they were told before."""
        return self._waited.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """It is cancelled."""
        self._since.pop(request_id, None)
        self._waited.pop(request_id, None)


def _load(message: Start, channel: EngineChannel) -> tuple[Engine, Ready]:
    from llmkit.checkpoint.source import open_checkpoint
    from llmkit.runtime.card import model_card
    from llmkit.runtime.load import StartUp, load_engine

    start = StartUp()
    start.seconds["python and imports"] = imported = process_age()
    with start.stage("checkpoint check"):
        checkpoint = open_checkpoint(message.model)
        card = model_card(checkpoint)
    engine = load_engine(checkpoint, message.engine, start, message.prefixes)
    gc.freeze()  # what is there now stays: no collection need look at it again
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # what reading and casting have left behind
    assert start.plan is not None
    engine.on_death(lambda error: _give_up(error, channel))
    config = engine.config
    return engine, Ready(
        max_model_len=config.max_model_len,
        vocab_size=engine.model.spec.whole.vocab,
        dtype=str(config.dtype).removeprefix("torch."),
        device=str(config.device),
        kv_cache_tokens=config.num_blocks * config.block_size,
        load_s=process_age() - imported,
        seconds=start.seconds,
        plan=start.plan.as_dict(),
        adapters=engine.adapters,
        paths=start.paths,
        card=card,
    )


def _add(engine: Engine, message: Add, channel: EngineChannel, waits: Waits) -> None:
    from llmkit.runtime.engine.types import Request, RequestError, SamplingParams

    sampling = SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        max_tokens=message.max_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=message.stop_token_ids,
        min_tokens=message.min_tokens,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=message.logit_bias,
        logprobs=message.logprobs,
        prompt_logprobs=message.prompt_logprobs,
    )
    try:
        engine.add(
            Request(
                message.id,
                message.prompt,
                sampling,
                message.priority,
                message.salt,
                message.adapter,
                message.grammar,
                message.pooling,
            )
        )
        waits.added(message.id)
    except RequestError as error:
        channel.send(Refused(message.id, error.code, error.message, error.param))


def _obey(engine: Engine, messages: list[ToEngine], channel: EngineChannel, waits: Waits, held: Held) -> None:
    from llmkit.runtime.engine.types import RequestError

    for message in messages:
        match message:
            case Add(grammar=str()) if engine.has_work:
                held.hold(message)
            case Add():
                _add(engine, message, channel, waits)
            case Cancel():
                engine.cancel(message.id)
                waits.forget(message.id)
                held.forget(message.id)
            case LoadAdapter() | UnloadAdapter():
                try:
                    if isinstance(message, LoadAdapter):
                        engine.add_adapter(message.name, message.path)
                    else:
                        engine.remove_adapter(message.name)
                    channel.send(Done(message.id))
                except RequestError as error:
                    channel.send(Refused(message.id, error.code, error.message, "lora_name"))
                except LlmkitError as error:
                    channel.send(Refused(message.id, "invalid_adapter", str(error), "lora_path"))


def _give_up(error: LlmkitError, channel: EngineChannel) -> None:
    """Tell why and end, after a while in which the step under way may fail by itself."""
    time.sleep(1.0)
    with contextlib.suppress(OSError):
        channel.send(Failed.of(error))
    os._exit(error.exit_code)


def _stats(engine: Engine) -> Stats:
    return Stats(**vars(engine.stats()))


def main() -> int:
    """Run the process. The parent learns of a failure from the Failed message; the exit code says it again."""
    channel = EngineChannel(parent_socket(), to_engine_decoder)
    tracebacks = True
    try:
        start, *early = channel.receive(wait=True)
        assert isinstance(start, Start)
        tracebacks = start.debug  # what goes wrong while loading is usually the user's to mend
        engine, ready = _load(start, channel)
        channel.send(ready)
        tracebacks = True
        serve(engine, early, channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        if tracebacks:
            traceback.print_exc()
        failed = Failed.of(error)
        with contextlib.suppress(OSError):  # the parent has given up meanwhile, for another replica's sake
            channel.send(failed)
        return failed.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
