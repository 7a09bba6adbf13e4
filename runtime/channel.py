"""Messages between two processes of ours over a private socket pair.

A frame is a length (4 bytes, little endian) and one msgpack message whose tag names its type. Nothing is ever
pickled: the worst a confused peer can send is a decoding error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import msgspec

from llmkit.checkpoint.errors import (
    InputError,
    LlmkitError,
    OutputError,
    ShortageError,
    UsageError,
    is_out_of_memory,
)

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_PR_SET_PDEATHSIG = 1
_SOCKET_BUFFER_BYTES = 1 << 20
API_KEY_VARIABLE = "LLMKIT_API_KEY"  # a secret: no process of ours inherits it
_encoder = msgspec.msgpack.Encoder()
_KINDS: dict[int, type[LlmkitError]] = {
    kind.exit_code: kind for kind in (UsageError, InputError, ShortageError, OutputError)
}
In = TypeVar("In")


class Failed(msgspec.Struct, tag=True):
    """A process gives up: a LlmkitError's parts, or a bug with exit code 70."""

    exit_code: int
    what: str
    expected: str = ""
    todo: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """What is told of an exception."""
        if isinstance(error, LlmkitError):
            return cls(error.exit_code, error.what, error.expected, error.todo)
        text = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            todo = "Lower --max-num-seqs, --max-num-batched-tokens or --max-model-len"
            return cls(ShortageError.exit_code, f"out of memory ({text.splitlines()[0]})", todo=todo)
        return cls(LlmkitError.exit_code, f"the engine failed: {text}")

    def error(self, who: str = "") -> LlmkitError:
        """The LlmkitError that it tells of, of the class that its exit code stands for. who: what to put before it."""
        return _KINDS.get(self.exit_code, LlmkitError)(who + self.what, self.expected, self.todo)


def frame(message: msgspec.Struct) -> bytes:
    """The bytes that carry `message`."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take `data` and yield every body that is complete by now."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start + _LENGTH.size : end])
                start = end
                yield body
        finally:
            del self._buffer[:start]


class Channel(Generic[In]):
    """One end of the socket pair, with whole messages in and out. `decoder` knows those that come."""

    def __init__(self, end: socket.socket, decoder: msgspec.msgpack.Decoder[In]) -> None:
        self.socket = end
        self._frames, self._decoder = FrameReader(), decoder

    def receive(self, wait: bool) -> list[In]:
        """The messages that have arrived; with `wait` at least one. Raises EOFError when the peer is gone."""
        messages: list[In] = []
        while True:
            block = wait and not messages
            try:
                data = self.socket.recv(_READ_BYTES, 0 if block else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            if not data:
                raise EOFError
            messages += [self._decoder.decode(body) for body in self._frames.feed(data)]

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; blocks while the peer is behind. Raises BrokenPipeError when it is gone."""
        self.socket.sendall(frame(message))


def spawn(
    module: str, message: msgspec.Struct, variables: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `python -m module` on its first message; return it and our end of the socket pair.

    variables: of its environment, over ours without the API key. The process calls `parent_socket`, which may end it
    with the thread that has started it.
    """
    ours, theirs = socket.socketpair()
    for one in (ours, theirs):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell, no user text among the arguments
            [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE} | dict(variables),
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
    ours.sendall(frame(message))
    return process, ours


def parent_socket(with_thread: bool = True) -> socket.socket:
    """Our end of the socket pair, in a process that was spawned: SIGINT and SIGTERM are left to the parent.

    When the other end closes, this process ends at once, even in the middle of a load or a step. with_thread: also
    when the thread that has started it ends, even while this process is stopped, or stuck in a library.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if with_thread:
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    fd: int = parser.parse_args().fd

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, 0)  # hang-up and errors are always reported, data is not
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return socket.socket(fileno=fd)


def end(process: subprocess.Popen[bytes], wait_s: float = 5.0) -> None:
    """Wait for a process whose socket is closed, and kill it when it does not end by itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(wait_s)
        return
    process.kill()
    process.wait()


def exit_text(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, for a message: `exit code 70`, or `signal SIGKILL: often too little memory`."""
    code = process.returncode
    if code is None:
        return "still running"
    if code >= 0:
        return f"exit code {code}"
    hint = ": often too little memory" if code == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"
