"""The engine process: `python -m llmkit.runtime.server.engine_process --fd N`, started by the API process only.

It loads the model, then repeats: read the messages that wait, run one engine step, send what came of it. It blocks
on the socket when there is nothing to do, and ends with the socket. SIGINT and SIGTERM are left to the parent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from llmkit.checkpoint.errors import LlmkitError, ShortageError, is_out_of_memory
from llmkit.runtime.server.age import process_age
from llmkit.runtime.server.messages import (
    Add,
    Cancel,
    Failed,
    FrameReader,
    FromEngine,
    Output,
    Outputs,
    Ready,
    Refused,
    Start,
    Stats,
    ToEngine,
    frame,
    to_engine_decoder,
)

if TYPE_CHECKING:
    from llmkit.runtime.engine.engine import Engine

_READ_BYTES = 1 << 18


class Channel:
    """Our end of the socket pair, with whole messages in and out."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._frames = FrameReader()

    def receive(self, wait: bool) -> list[ToEngine]:
        """The messages that have arrived; with `wait` at least one. Raises EOFError when the parent is gone."""
        messages: list[ToEngine] = []
        while True:
            block = wait and not messages
            try:
                data = self._socket.recv(_READ_BYTES, 0 if block else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            if not data:
                raise EOFError
            messages += [to_engine_decoder.decode(body) for body in self._frames.feed(data)]

    def send(self, message: FromEngine) -> None:
        """Send one message; blocks while the parent is behind. Raises BrokenPipeError when it is gone."""
        self._socket.sendall(frame(message))


def serve(engine: Engine, early: list[ToEngine], channel: Channel) -> None:
    """Run requests until the parent is gone (EOFError, OSError). `early`: messages that came while loading."""
    _obey(engine, early, channel)
    while True:
        messages = channel.receive(wait=not engine.has_work)
        _obey(engine, messages, channel)
        if engine.has_work:
            outputs = [
                Output(o.request_id, o.token_ids, o.finish_reason, o.error, o.prompt_tokens, o.cached_tokens)
                for o in engine.step()
            ]
            channel.send(Outputs(outputs, _stats(engine)))
        elif messages:
            channel.send(_stats(engine))


def _load(message: Start) -> tuple[Engine, Ready]:
    from llmkit.runtime.load import StartUp, load_engine

    start = StartUp()
    start.seconds["python and imports"] = imported = process_age()
    engine = load_engine(
        message.model,
        message.engine,
        start,
    )
    gc.freeze()  # what is there now stays: no collection need look at it again
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # what reading and casting have left behind
    assert start.plan is not None
    config = engine.config
    return engine, Ready(
        max_model_len=config.max_model_len,
        vocab_size=engine.model.spec.vocab,
        dtype=str(config.dtype).removeprefix("torch."),
        device=str(config.device),
        kv_cache_tokens=config.num_blocks * config.block_size,
        load_s=process_age() - imported,
        seconds=start.seconds,
        plan=start.plan.as_dict(),
        adapters=engine.adapters,
        paths=start.paths,
    )


def _obey(engine: Engine, messages: list[ToEngine], channel: Channel) -> None:
    from llmkit.runtime.engine.types import Request, RequestError, SamplingParams

    for message in messages:
        match message:
            case Add():
                sampling = SamplingParams(
                    temperature=message.temperature,
                    top_k=message.top_k,
                    top_p=message.top_p,
                    min_p=message.min_p,
                    seed=message.seed,
                    max_tokens=message.max_tokens,
                    ignore_eos=message.ignore_eos,
                    stop_token_ids=message.stop_token_ids,
                )
                try:
                    engine.add(
                        Request(message.id, message.prompt, sampling, message.priority, message.salt, message.adapter)
                    )
                except RequestError as error:
                    channel.send(Refused(message.id, error.code, error.message, error.param))
            case Cancel():
                engine.cancel(message.id)


def _stats(engine: Engine) -> Stats:
    return Stats(**vars(engine.stats()))


def _exit_with_parent(fd: int) -> None:
    """End this process at once when the other end of `fd` closes, even in the middle of a load or a step."""

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, 0)  # hang-up and errors are always reported, data is not
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _failed(error: Exception) -> Failed:
    if isinstance(error, LlmkitError):
        return Failed(error.exit_code, error.what, error.expected, error.todo)
    text = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        todo = "Lower --max-num-seqs, --max-num-batched-tokens or --max-model-len"
        return Failed(ShortageError.exit_code, f"out of memory ({text.splitlines()[0]})", todo=todo)
    return Failed(LlmkitError.exit_code, f"the engine failed: {text}")


def main() -> int:
    """Run the process. The parent learns of a failure from the Failed message; the exit code says it again."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    fd: int = parser.parse_args().fd
    _exit_with_parent(fd)
    channel = Channel(fd)
    tracebacks = True
    try:
        start, *early = channel.receive(wait=True)
        assert isinstance(start, Start)
        tracebacks = start.debug  # what goes wrong while loading is usually the user's to mend
        engine, ready = _load(start)
        channel.send(ready)
        tracebacks = True
        serve(engine, early, channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        if tracebacks:
            traceback.print_exc()
        failed = _failed(error)
        channel.send(failed)
        return failed.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
