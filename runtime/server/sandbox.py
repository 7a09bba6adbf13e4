"""The API process's side of a sandbox process: it sends one job at a time and kills at a limit."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess

import msgspec

from llmkit.runtime.process_channel import FrameReader, end_process, frame, spawn
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.sandbox_process import (
    CheckTemplate,
    CompileGrammar,
    JobFailed,
    RenderTemplate,
    SandboxSetup,
    reply_decoder,
)

# Processor time of a job, not wall-clock time: no job fails because the machine is busy.
TEMPLATE_CPU_S = 2.0
GRAMMAR_CPU_S = 1.0
MEMORY_BYTES = 512 * 2**20
MAX_PROMPT_CHARS = 32 * 2**20
WALL_S = 30.0  # wall-clock limit of a job, and of the wait before it
_MODULE = "llmkit.runtime.server.sandbox_process"
_READ_BYTES = 1 << 18


class SandboxError(ValueError):
    """A job cannot be done, or exceeds a limit."""


class Sandbox:
    """One sandbox process.

    `start` or the first job starts it. A job that exceeds a limit ends it; then a new one is
    started.
    """

    def __init__(self, model: str = "", vocab_size: int = 0) -> None:
        """Compile grammars for `model`; without a model, render templates.

        vocab_size: the rows of the model's output projection.
        """
        cpu_s = GRAMMAR_CPU_S if model else TEMPLATE_CPU_S
        self._setup = SandboxSetup(cpu_s, MEMORY_BYTES, MAX_PROMPT_CHARS, model, vocab_size)
        self._job_lock = asyncio.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def use_model(self, model: str) -> None:
        """Compile grammars for `model` from the next start on; its tokenizer is the same."""
        self._setup = msgspec.structs.replace(self._setup, model=model)

    def start(self) -> None:
        """Start the process. It ends with the thread that calls this."""
        self.process, self._socket = spawn(_MODULE, self._setup, {})
        self._socket.setblocking(False)

    async def run(self, job: RenderTemplate | CheckTemplate | CompileGrammar) -> str:
        """Run `job` and return its text.

        Raises SandboxError, and ApiError 429 when earlier jobs take too long.
        """
        try:
            message = frame(job)
        except (OverflowError, UnicodeEncodeError):
            raise SandboxError("it contains a number of over 64 bits or a lone surrogate") from None
        try:
            async with asyncio.timeout(WALL_S):
                await self._job_lock.acquire()
        except TimeoutError:
            text = "Too many templates and grammars are queued. Try again later."
            raise ApiError(429, text, code="queue_full", headers={"retry-after": "1"}) from None
        try:
            if self.process is None:
                self.start()
            async with asyncio.timeout(WALL_S):
                return await self._exchange(message)
        except asyncio.CancelledError:  # nothing would read the reply
            self.close()
            raise
        except (EOFError, OSError) as error:
            timed_out = isinstance(error, TimeoutError)
            exit_code = await asyncio.to_thread(self.close, 0.0 if timed_out else 1.0)
            if exit_code == 1:  # an unexpected exception, whose traceback is on stderr
                raise RuntimeError("the sandbox process failed; see above") from None
            self.start()
            if timed_out or exit_code == -signal.SIGPROF:
                raise SandboxError("it takes too long") from None
            raise SandboxError("it takes too much memory") from None
        finally:
            self._job_lock.release()

    async def _exchange(self, message: bytes) -> str:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        frames = FrameReader()
        await loop.sock_sendall(self._socket, message)
        while True:
            data = await loop.sock_recv(self._socket, _READ_BYTES)
            if not data:
                raise EOFError
            for body in frames.feed(data):
                reply = reply_decoder.decode(body)
                if isinstance(reply, JobFailed):
                    raise SandboxError(reply.message)
                text: str = reply.text
                return text

    def close(self, wait_s: float = 0.0) -> int | None:
        """End the process, if it runs; return its exit code."""
        if self.process is None:
            return None
        assert self._socket is not None
        self._socket.close()
        process = self.process
        self.process = None
        self._socket = None
        end_process(process, wait_s)
        return process.returncode
