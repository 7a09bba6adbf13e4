"""A sandbox process as the API process sees it: asked one job at a time, killed when one takes too much."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess

from llmkit.runtime.channel import FrameReader, end, frame, spawn
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.sandbox_process import Compile, Declined, Render, Setup, from_sandbox_decoder

TEMPLATE_S, GRAMMAR_S = 2.0, 1.0  # of processor time for a job: a busy machine makes none fail
MEMORY_BYTES = 512 * 2**20
PROMPT_CHARS = 32 * 2**20
WALL_S = 30.0  # for a job, and for its turn to come
_MODULE = "llmkit.runtime.server.sandbox_process"
_READ_BYTES = 1 << 18


class SandboxError(ValueError):
    """A job cannot be done, or would take too much."""


class Sandbox:
    """One process, started by `start` or with the first job, and again after one that took too much."""

    def __init__(self, model: str = "", vocab: int = 0) -> None:
        """For the grammars of `model` with so many rows of its output projection; without them for templates."""
        self._setup = Setup(GRAMMAR_S if model else TEMPLATE_S, MEMORY_BYTES, PROMPT_CHARS, model, vocab)
        self._turn = asyncio.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the process, which is then ready after a moment. On the thread that stays: it ends with that."""
        self.process, self._socket = spawn(_MODULE, self._setup, {})
        self._socket.setblocking(False)

    async def ask(self, job: Render | Compile) -> str:
        """What comes of `job`. Raises SandboxError, and ApiError 429 when others' jobs take too long."""
        try:
            message = frame(job)
        except (OverflowError, UnicodeEncodeError):
            raise SandboxError("it holds a number of over 64 bits or half a character") from None
        try:
            async with asyncio.timeout(WALL_S):
                await self._turn.acquire()
        except TimeoutError:
            text = "Too many templates and grammars wait to be looked at. Try again later."
            raise ApiError(429, text, code="queue_full", headers={"retry-after": "1"}) from None
        try:
            if self.process is None:
                self.start()
            async with asyncio.timeout(WALL_S):
                return await self._exchange(message)
        except asyncio.CancelledError:  # nobody would read the reply
            self.close()
            raise
        except (EOFError, OSError) as error:
            code = await asyncio.to_thread(self.close, 0.0 if isinstance(error, TimeoutError) else 1.0)
            if code == 1:  # it has raised something that it should not
                raise RuntimeError("the sandbox process failed; see above") from None
            self.start()
            slow = isinstance(error, TimeoutError) or code == -signal.SIGPROF
            raise SandboxError("it takes too long" if slow else "it takes too much memory") from None
        finally:
            self._turn.release()

    async def _exchange(self, message: bytes) -> str:
        assert self._socket is not None
        loop, frames = asyncio.get_running_loop(), FrameReader()
        await loop.sock_sendall(self._socket, message)
        while data := await loop.sock_recv(self._socket, _READ_BYTES):
            for body in frames.feed(data):
                reply = from_sandbox_decoder.decode(body)
                if isinstance(reply, Declined):
                    raise SandboxError(reply.why)
                text: str = reply.text
                return text
        raise EOFError

    def close(self, wait_s: float = 0.0) -> int | None:
        """End the process, if there is one; its exit code."""
        if self.process is None:
            return None
        assert self._socket is not None
        self._socket.close()
        process, self.process, self._socket = self.process, None, None
        end(process, wait_s)
        return process.returncode
