"""`run_batch`: send a file of requests to a server, several at a time.

The server is started for the batch or runs already. Results are written in the order of the
requests to `<OUT>.partial`, which becomes OUT at the end. A stopped run continues after the last
whole line there; `<OUT>.partial.json` says which run wrote it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import aiohttp

from llmkit.checkpoint.output_directory import output_lock
from llmkit.common.errors import InputError, ShortageError
from llmkit.common.progress import Progress
from llmkit.runtime.batch_lines import Line, Tally, error_result, read_lines, response_result
from llmkit.runtime.batch_output import BatchOutput, creation_time, resume
from llmkit.runtime.server.async_waits import StopSignals, run_in_thread, wait_first
from llmkit.runtime.server.schemas.ignored_fields import HEADER as IGNORED_FIELDS_HEADER
from llmkit.runtime.server_client import Server, open_session
from llmkit.runtime.server_process import ServerProcess

STREAM = "-"  # stdin or stdout
_MAX_BUFFERED = 4  # results that may wait for an earlier one, as a multiple of the concurrency
_MAX_TRIES = 6  # for a request that does not reach the server or finds it not ready
_MIN_RETRY_S = 1.0  # before the second try; doubled for each further one
_MAX_RETRY_S = 60.0


@dataclass(frozen=True)
class Batch:
    """A file of requests and how to run it."""

    source: str  # a path, or STREAM
    out: str  # a path, or STREAM
    model: str  # for requests that name none
    concurrency: int  # requests at the server at once
    # What a run must have in common with the stopped run that it continues.
    identity: dict[str, Any] = field(default_factory=dict)


def run_batch(
    batch: Batch, start_server: Callable[[], Server], progress: Progress
) -> tuple[Tally, int]:
    """Send every request and write every result.

    Returns the counts, and the signal that stopped the run, or 0. `start_server` is called only
    after the input and the output have been checked. A request that fails has an error as its
    result. Raises InputError for an input that cannot be read or has no requests, OutputError when
    the output exists, ShortageError when it cannot be written or the server cannot be reached, and
    the LlmkitError with which the server process ended.
    """
    with contextlib.ExitStack() as stack:
        if batch.source == STREAM:
            file = sys.stdin.buffer
            size = 0
        else:
            try:
                file = stack.enter_context(Path(batch.source).open("rb"))
            except OSError as error:
                raise InputError(f"{batch.source} cannot be read ({error.strerror})") from None
            size = os.fstat(file.fileno()).st_size
        tally = Tally()
        lines = read_lines(file, batch.model)
        if batch.out == STREAM:
            output = BatchOutput(sys.stdout.buffer, None)
            created = creation_time()
        else:
            out = Path(batch.out).absolute()
            stack.enter_context(output_lock(out))
            identity = batch.identity | {"source": batch.source}
            output, created = resume(out, identity, lines, tally, stack)
        stack.callback(output.discard_if_empty)
        first_line = next(lines, None)
        if first_line is None and not tally.requests:
            raise InputError(
                f"{batch.source} has no requests", "One JSON object a line was expected"
            )
        stop_signal = 0
        if first_line is not None:
            progress.start("batch", size, "bytes")
            run = _Run(batch, created, tally, output, progress)
            server = start_server()
            try:
                stop_signal = asyncio.run(run.run(server, chain([first_line], lines)))
            finally:
                if server.process is not None:
                    server.process.stop()
                progress.finish()
        if not stop_signal:
            output.finish()
    return tally, stop_signal


class _Run:
    """The requests at the server, and the results that wait for earlier ones."""

    def __init__(
        self, batch: Batch, created: int, tally: Tally, output: BatchOutput, progress: Progress
    ) -> None:
        self._batch = batch
        self._created = created  # Unix seconds, for all results
        self._tally = tally
        self._output = output
        self._progress = progress
        self._pending: deque[tuple[Line, asyncio.Future[bytes]]] = deque()  # not written yet
        self._num_in_flight = 0
        self._changed = asyncio.Event()  # a request has finished, or a signal has come
        self._bytes_done = 0  # of the input
        self._server_process: ServerProcess | None = None
        self._limit = _ConcurrencyLimit(batch.concurrency)

    async def run(self, server: Server, lines: Iterator[Line]) -> int:
        """Run all requests; return the signal that stopped the run, or 0."""
        process = server.process
        self._server_process = process
        with StopSignals() as stop:
            stop.first.add_done_callback(lambda _: self._changed.set())
            if process is not None:
                ready = asyncio.wrap_future(process.ready)
                await wait_first(ready, stop.first)
                if stop.first.done():
                    return stop.first.result()
                ready.result()
            async with open_session(server) as session:
                url = server.base_url
                try:
                    await self._run_lines(session, url, lines, stop.first)
                except ShortageError:
                    if process is not None and process.ended.done():
                        raise process.ended.result() from None
                    raise
                finally:
                    for _, result in self._pending:
                        result.cancel()
            return stop.first.result() if stop.first.done() else 0

    async def _run_lines(
        self,
        session: aiohttp.ClientSession,
        url: str,
        lines: Iterator[Line],
        stop: asyncio.Future[int],
    ) -> None:
        concurrency = self._batch.concurrency
        max_pending = concurrency * _MAX_BUFFERED
        has_more = True
        while not stop.done():
            while (
                has_more and self._num_in_flight < concurrency and len(self._pending) < max_pending
            ):
                line = await self._next_line(lines, stop)
                if line is None:
                    has_more = False
                else:
                    self._start(session, url, line)
            self._write_finished(stop)
            if not has_more and not self._pending:
                return
            self._changed.clear()
            if not (self._pending and self._pending[0][1].done()):
                await self._changed.wait()
            for _, result in self._pending:
                if result.done() and result.exception() is not None:
                    result.result()  # raises: earlier requests cannot reach the server either

    async def _next_line(self, lines: Iterator[Line], stop: asyncio.Future[int]) -> Line | None:
        if self._batch.source != STREAM:
            return next(lines, None)
        # The next line of stdin may take long to arrive. Results are written meanwhile.
        reading = run_in_thread(lambda: next(lines, None))
        while not reading.done() and not stop.done():
            changed = asyncio.ensure_future(self._changed.wait())
            await wait_first(reading, changed)
            changed.cancel()
            self._changed.clear()
            self._write_finished(stop)
        return reading.result() if reading.done() else None

    def _start(self, session: aiohttp.ClientSession, url: str, line: Line) -> None:
        result: asyncio.Future[bytes]
        if line.error is not None:
            result = asyncio.get_running_loop().create_future()
            result.set_result(error_result(line, line.error))
        else:
            self._num_in_flight += 1
            result = asyncio.ensure_future(self._send(session, url, line))
            result.add_done_callback(self._request_done)
        self._pending.append((line, result))

    def _request_done(self, _: asyncio.Future[bytes]) -> None:
        self._num_in_flight -= 1
        self._changed.set()

    def _write_finished(self, stop: asyncio.Future[int]) -> None:
        """Write the finished results at the head of the queue."""
        while self._pending and self._pending[0][1].done() and not stop.done():
            line, finished = self._pending.popleft()
            result = finished.result()
            self._output.write(result)
            self._tally.add(result)
            note = f"{self._tally.requests} requests"
            if self._tally.failed:
                note += f", {self._tally.failed} failed"
            self._progress.advance(line.end - self._bytes_done, note)
            self._bytes_done = line.end

    async def _send(self, session: aiohttp.ClientSession, url: str, line: Line) -> bytes:
        """The result of a line. Raises ShortageError when the server cannot be reached."""
        retry_s = _MIN_RETRY_S
        num_tries = 0
        while True:
            await self._limit.acquire()
            status = 0  # the server was not reached
            try:
                async with session.post(
                    url + line.url, data=line.body, allow_redirects=False
                ) as response:
                    content = await response.read()
                    status = response.status
            except (aiohttp.ClientError, OSError) as error:
                status = 0
                reason = f"{type(error).__name__}: {error}"[:300]
            finally:
                self._limit.release(queue_was_full=status == 429)
            if status == 401:
                raise InputError("the server wants another API key", todo="Set LLMKIT_API_KEY")
            if status not in (0, 429, 503):
                ignored_fields = response.headers.get(IGNORED_FIELDS_HEADER, "")
                return response_result(line, status, content, self._created, ignored_fields)
            if status == 429:  # the server's queue was full: try again without a limit
                retry_after = response.headers.get("retry-after", "")
                wait_s = _MIN_RETRY_S
                if retry_after.isdecimal():
                    wait_s = min(int(retry_after), _MAX_RETRY_S)
                await asyncio.sleep(wait_s)
                continue
            num_tries += 1
            if num_tries == _MAX_TRIES and status:
                return response_result(line, status, content, self._created)
            process = self._server_process
            server_ended = status == 0 and process is not None and process.ended.done()
            if num_tries == _MAX_TRIES or server_ended:
                raise ShortageError(
                    f"{url} cannot be reached any more ({reason})",
                    todo="Run the command again later",
                )
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _MAX_RETRY_S)


class _ConcurrencyLimit:
    """How many requests may be at the server at once.

    When the server's queue was full, the limit falls to the number of requests that are still
    there. Otherwise each answer raises it by 1 / limit, that is by one after `limit` answers.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._limit = float(maximum)
        self._num_inside = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        while self._num_inside >= self._limit:
            self._waiters.append(asyncio.get_running_loop().create_future())
            await self._waiters[-1]
        self._num_inside += 1

    def release(self, queue_was_full: bool) -> None:
        self._num_inside -= 1
        if queue_was_full:
            self._limit = max(1.0, min(self._limit, self._num_inside))
        else:
            self._limit += 1 / self._limit
        self._limit = min(self._limit, self._maximum)
        num_free = int(self._limit) - self._num_inside
        for _ in range(min(len(self._waiters), num_free)):
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
