"""`run_batch`: a file of requests through a server of ours, or anyone's, with so many under way at a time.

Results are written in the order of the requests to `<OUT>.partial`, which becomes OUT at the end. A run that was
stopped goes on after the last whole line there: `<OUT>.partial.json` says whose it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.checkpoint.output import locked
from llmkit.checkpoint.progress import Progress
from llmkit.runtime.batch_lines import Line, Tally, answered, failed, read_lines
from llmkit.runtime.batch_output import Output, now, resume
from llmkit.runtime.child import Child
from llmkit.runtime.server.waiting import StopSignals, first, in_thread

STREAM = "-"  # stdin or stdout
_WINDOW = 4  # results that may wait for an earlier one, as a multiple of the requests under way
_TRIES = 6  # of a request that does not reach the server, or finds it not ready
_WAIT_S = (1.0, 60.0)  # before the next try: at first, doubled each time, and at most
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Server:
    """Whom the requests are sent to. `child`: a server of ours, still loading, in place of `url`."""

    url: str = ""
    key: str = ""
    child: Child | None = None


@dataclass(frozen=True)
class Batch:
    """What is to be done. identity: what a run must share with the one that it continues."""

    source: str  # a path, or STREAM
    out: str
    model: str  # for requests that name none
    concurrency: int
    identity: dict[str, Any] = field(default_factory=dict)


def run_batch(batch: Batch, serve: Callable[[], Server], progress: Progress) -> tuple[Tally, int]:
    """Answer every line; what came of it and the signal that stopped it, 0 for none.

    serve: starts the server, once nothing else is wrong. Errors of lines are results. Raises InputError for an input
    that cannot be read or has no requests, OutputError when the output is in the way, ShortageError when it cannot be
    written or the server cannot be reached, and the LlmkitError with which a server of ours ended.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = sys.stdin.buffer if batch.source == STREAM else stack.enter_context(Path(batch.source).open("rb"))
        except OSError as error:
            raise InputError(f"{batch.source} cannot be read ({error.strerror})") from None
        size = 0 if batch.source == STREAM else os.fstat(file.fileno()).st_size
        tally, lines = Tally(), read_lines(file, batch.model)
        if batch.out == STREAM:
            output = Output(sys.stdout.buffer, None)
            created = now()
        else:
            out = Path(batch.out).absolute()
            stack.enter_context(locked(out))
            output, created = resume(out, batch.identity | {"source": batch.source}, lines, tally, stack)
        stack.callback(output.discard_if_empty)
        line = next(lines, None)
        if line is None and not tally.requests:
            raise InputError(f"{batch.source} has no requests", "One JSON object a line was expected")
        stopped = 0
        if line is not None:
            progress.start("batch", size, "bytes")
            run = _Run(batch, created, tally, output, progress)
            server = serve()
            try:
                stopped = asyncio.run(run.run(server, _chained(line, lines)))
            finally:
                if server.child is not None:
                    server.child.stop()
                progress.finish()
        if not stopped:
            output.finish()
    return tally, stopped


def _chained(line: Line, lines: Iterator[Line]) -> Iterator[Line]:
    yield line
    yield from lines


class _Run:
    """The requests under way and the results that wait for earlier ones."""

    def __init__(self, batch: Batch, created: int, tally: Tally, output: Output, progress: Progress) -> None:
        self._batch, self._created, self._tally = batch, created, tally
        self._output, self._progress = output, progress
        self._pending: deque[tuple[Line, asyncio.Future[bytes]]] = deque()
        self._flying = 0
        self._news = asyncio.Event()
        self._end = 0  # of the input, as far as it is done
        self._child: Child | None = None
        self._gate = _Gate(batch.concurrency)

    async def run(self, server: Server, lines: Iterator[Line]) -> int:
        self._child = server.child
        with StopSignals() as stop:
            stop.first.add_done_callback(lambda _: self._news.set())
            if server.child is not None:
                ready = asyncio.wrap_future(server.child.ready)
                await first(ready, stop.first)
                if stop.first.done():
                    return stop.first.result()
                ready.result()
            async with _session(server) as session:
                url = server.child.url if server.child else server.url
                try:
                    await self._all(session, url, lines, stop.first)
                except ShortageError:
                    if server.child is not None and server.child.gone.done():
                        raise server.child.gone.result() from None
                    raise
                finally:
                    for _, task in self._pending:
                        task.cancel()
            return stop.first.result() if stop.first.done() else 0

    async def _all(
        self, session: aiohttp.ClientSession, url: str, lines: Iterator[Line], stop: asyncio.Future[int]
    ) -> None:
        most, more = self._batch.concurrency, True
        while not stop.done():
            while more and self._flying < most and len(self._pending) < most * _WINDOW:
                line = await self._next(lines, stop)
                if line is None:
                    more = False
                else:
                    self._start(session, url, line)
            while self._pending and self._pending[0][1].done() and not stop.done():
                self._write(*self._pending.popleft())
            if not more and not self._pending:
                return
            self._news.clear()
            if not (self._pending and self._pending[0][1].done()):
                await self._news.wait()
            if dead := next((t for _, t in self._pending if t.done() and t.exception() is not None), None):
                dead.result()  # the server is gone: earlier requests would only find that out, too

    async def _next(self, lines: Iterator[Line], stop: asyncio.Future[int]) -> Line | None:
        if self._batch.source != STREAM:
            return next(lines, None)
        reading = in_thread(lambda: next(lines, None))  # whoever writes there may take its time
        while not reading.done() and not stop.done():
            changed = asyncio.ensure_future(self._news.wait())
            await first(reading, changed)
            changed.cancel()
            self._news.clear()
            while self._pending and self._pending[0][1].done() and not stop.done():
                self._write(*self._pending.popleft())
        return reading.result() if reading.done() else None

    def _start(self, session: aiohttp.ClientSession, url: str, line: Line) -> None:
        if line.error is not None:
            task: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            task.set_result(failed(line, line.error))
        else:
            self._flying += 1
            task = asyncio.ensure_future(self._ask(session, url, line))
            task.add_done_callback(self._landed)
        self._pending.append((line, task))

    def _landed(self, _task: asyncio.Future[bytes]) -> None:
        self._flying -= 1
        self._news.set()

    def _write(self, line: Line, task: asyncio.Future[bytes]) -> None:
        result = task.result()
        self._output.write(result)
        self._tally.add(result)
        note = f"{self._tally.requests} requests" + (f", {self._tally.failed} failed" if self._tally.failed else "")
        self._progress.advance(line.end - self._end, note)
        self._end = line.end

    async def _ask(self, session: aiohttp.ClientSession, url: str, line: Line) -> bytes:
        """The result of a line. Raises ShortageError when the server cannot be reached."""
        wait_s, tries = _WAIT_S[0], 0
        while True:
            await self._gate.enter()
            status = 0
            try:
                async with session.post(url + line.url, data=line.body, allow_redirects=False) as answer:
                    content, status = await answer.read(), answer.status
            except (aiohttp.ClientError, OSError) as error:
                status, reason = 0, f"{type(error).__name__}: {error}"[:300]
            finally:
                self._gate.leave(status == 429)
            if status == 401:
                raise InputError("the server wants another API key", todo="Set LLMKIT_API_KEY")
            if status not in (0, 429, 503):
                return answered(line, status, content, self._created)
            if status == 429:  # the queue will be shorter, however long that takes
                after = answer.headers.get("retry-after", "")
                await asyncio.sleep(min(int(after), _WAIT_S[1]) if after.isdecimal() else _WAIT_S[0])
                continue
            tries += 1
            if tries == _TRIES and status:
                return answered(line, status, content, self._created)
            if tries == _TRIES or (status == 0 and self._child is not None and self._child.gone.done()):
                raise ShortageError(f"{url} cannot be reached any more ({reason})", todo="Run the command again later")
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _WAIT_S[1])


class _Gate:
    """How many requests may be at the server: fewer once its queue was full, one more after a round of good answers."""

    def __init__(self, most: int) -> None:
        self._most, self._limit, self._inside = most, float(most), 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        while self._inside >= self._limit:
            self._waiters.append(asyncio.get_running_loop().create_future())
            await self._waiters[-1]
        self._inside += 1

    def leave(self, full: bool) -> None:
        """A request has been answered. full: with 429."""
        self._inside -= 1
        self._limit = max(1.0, min(self._limit, self._inside)) if full else self._limit + 1 / self._limit
        self._limit = min(self._limit, self._most)
        for _ in range(min(len(self._waiters), int(self._limit) - self._inside)):
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)


def _session(server: Server) -> aiohttp.ClientSession:
    child = server.child
    key = (child.key if child else server.key) or ""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connector: aiohttp.BaseConnector = (
        aiohttp.UnixConnector(child.unix, limit=0) if child and child.unix else aiohttp.TCPConnector(limit=0)
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    return aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout)
