"""Messages between two llmkit processes over a private socket pair.

A frame is a length (4 bytes, little endian) and one msgpack message whose tag names its type.
Nothing is pickled, so that a wrong message is only a decoding error.
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

from llmkit.common.errors import (
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
API_KEY_VARIABLE = "LLMKIT_API_KEY"  # a secret, which child processes do not inherit
# The key of a router's own requests to the servers of its models, which only these get.
ROUTER_KEY_VARIABLE = "LLMKIT_ROUTER_KEY"
_encoder = msgspec.msgpack.Encoder()
_ERROR_CLASSES: dict[int, type[LlmkitError]] = {
    error_class.exit_code: error_class
    for error_class in (UsageError, InputError, ShortageError, OutputError)
}
In = TypeVar("In")


class Failed(msgspec.Struct, tag=True):
    """Why a process fails: the fields of its LlmkitError; a bug has exit code 70."""

    exit_code: int
    what: str
    expected: str = ""
    todo: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """The message for an exception."""
        if isinstance(error, LlmkitError):
            return cls(error.exit_code, error.what, error.expected, error.todo)
        text = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            todo = "Lower --max-num-seqs, --max-num-batched-tokens or --max-model-len"
            return cls(
                ShortageError.exit_code, f"out of memory ({text.splitlines()[0]})", todo=todo
            )
        return cls(LlmkitError.exit_code, f"the engine failed: {text}")

    def error(self, prefix: str = "") -> LlmkitError:
        """The LlmkitError in this message, of the class with its exit code.

        prefix: text to put before it.
        """
        return _ERROR_CLASSES.get(self.exit_code, LlmkitError)(
            prefix + self.what, self.expected, self.todo
        )


def frame(message: msgspec.Struct) -> bytes:
    """The frame of a message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add received bytes and yield every message body that is complete now."""
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
    """One end of the socket pair, for whole messages. `decoder` decodes the peer's messages."""

    def __init__(self, end: socket.socket, decoder: msgspec.msgpack.Decoder[In]) -> None:
        self.socket = end
        self._frames = FrameReader()
        self._decoder = decoder

    def receive(self, wait: bool) -> list[In]:
        """The messages that have arrived; with `wait` at least one.

        Raises EOFError when the peer has ended and all its messages have been returned.
        """
        messages: list[In] = []
        while True:
            block = wait and not messages
            try:
                data = self.socket.recv(_READ_BYTES, 0 if block else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            except ConnectionResetError:  # the peer has ended without reading all that was sent
                if messages:
                    return messages
                raise
            if not data:
                if messages:
                    return messages
                raise EOFError
            messages += [self._decoder.decode(body) for body in self._frames.feed(data)]

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; blocks while the buffer is full.

        Raises BrokenPipeError when the peer has ended.
        """
        self.socket.sendall(frame(message))

    def close(self) -> None:
        """Close the connection. The peer sees its end at once.

        `socket.close` alone would not end it while another thread waits for the socket in `poll`.
        """
        with contextlib.suppress(OSError):  # closed already
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def spawn(
    module: str, message: msgspec.Struct, variables: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `python -m module` and send its first message.

    Returns the process and the parent's socket. variables: added to the environment, from which
    keys are removed. The module must call `parent_socket`. After that call the process may be
    killed when the thread that called `spawn` ends.
    """
    environment = dict(os.environ)
    for secret in (API_KEY_VARIABLE, ROUTER_KEY_VARIABLE):
        environment.pop(secret, None)
    environment.update(variables)
    parent_end, child_end = socket.socketpair()
    for end in (parent_end, child_end):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    with child_end:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", module, "--fd", str(child_end.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else subprocess.DEVNULL,
            pass_fds=[child_end.fileno()],
            env=environment,
            start_new_session=True,  # only the parent handles Ctrl-C
        )
    parent_end.sendall(frame(message))
    return process, parent_end


def parent_socket(with_thread: bool = True) -> socket.socket:
    """The child's socket in a spawned process, which ignores SIGINT and SIGTERM from now on.

    When the parent closes its socket, this process ends at once, even while it loads or computes.
    with_thread: this process is also killed when the thread that started it ends, even while this
    process is suspended or stuck in a library.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if with_thread:
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
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


def end_process(process: subprocess.Popen[bytes], wait_s: float = 5.0) -> None:
    """Wait for a process whose socket is closed, and kill it after `wait_s` seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(wait_s)
        return
    process.kill()
    process.wait()


def exit_text(process: subprocess.Popen[bytes]) -> str:
    """How a process ended: `exit code 70` or `signal SIGKILL: often too little memory`."""
    code = process.returncode
    if code is None:
        return "still running"
    if code >= 0:
        return f"exit code {code}"
    hint = ": often too little memory" if code == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"
