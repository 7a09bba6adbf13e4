"""An engine that also stores long shared prefixes in files and finds them again after a restart.

The engine's own thread copies pages between the KV cache and ordinary memory between two steps, at
most one page in each direction while requests run. Other threads read, hash and write the files. A
page is written when its prefix is requested for the second time. A request whose prefix is in files
waits for its pages; other requests continue meanwhile. A page that is not read within
PAGE_TIMEOUT_S is computed instead.

A prefix of a model with recurrent layers can be used only up to a position whose states were kept.
So the scheduler keeps those at the last page's end within each prompt. They are files of their own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError
from llmkit.common.formatting import bytes_text
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.prefix_pages import CopiedPage, Page, PageCopier
from llmkit.runtime.prefix_store import PAGE_TOKENS, PrefixStore, model_identity

PAGE_TIMEOUT_S = 2.0
_IDLE_WAIT_S = 0.005  # for a file, before the engine looks for new requests again
_MAX_READS = 2  # pages that are being read
_MAX_WRITES = 4  # pages that are being copied or written
_MAX_REQUESTED_KEYS = 1 << 16  # remembered pages that were requested once


class PrefixStoreEngine(Engine):
    """An engine with a prefix store; see the module. Call `open_store` before the first request."""

    def open_store(self, folder: Path, limit_bytes: int, checkpoints: list[Checkpoint]) -> None:
        """Store the prefixes of these checkpoints in a folder.

        The second checkpoint, if there is one, is the draft model. Raises InputError for a model
        with sliding windows and for a limit below one page.
        """
        if self.config.sliding_windows != (None,):
            raise InputError(
                "--prefix-cache-dir is not possible with a model that has sliding windows",
                "A model with full attention in all layers was expected",
                "Leave out --prefix-cache-dir; prefixes are cached in memory anyway",
            )
        self._blocks_per_page = PAGE_TOKENS // self.config.block_size
        self._attach_caches()
        page_bytes = self._block_copier.num_bytes + self._state_copier.num_bytes
        if limit_bytes < page_bytes:
            raise InputError(
                f"--prefix-cache-size ({bytes_text(limit_bytes)}) is less than {PAGE_TOKENS} "
                "tokens need",
                f"At least {page_bytes} bytes ({bytes_text(page_bytes)}) were expected",
            )
        identity = model_identity(checkpoints, self.config)
        self._store = PrefixStore(folder, limit_bytes, identity)
        self._read_threads = ThreadPoolExecutor(_MAX_READS, "prefix-read")
        self._write_thread = ThreadPoolExecutor(1, "prefix-write", _lower_thread_priority)

        # Reading: requests wait for pages, and pages are read in the order of the requests.
        self._waiting_for_pages: dict[Sequence, list[Page]] = {}
        self._reading: dict[str, Page] = {}  # by key
        # Writing: a prompt's pages are noted with its first token, then copied, then written.
        self._awaiting_first_token: dict[str, Sequence] = {}  # requests without a token yet, by id
        self._requested_keys: OrderedDict[str, bool] = OrderedDict()  # pages requested once
        self._to_copy: deque[Page] = deque()
        self._copied: deque[CopiedPage] = deque()
        self._writing: list[Future[None]] = []
        self._num_queries = 0
        self._num_hits = 0

    def _attach_caches(self) -> None:
        """Copy pages from and to the engine's caches as they are now."""
        device = self.config.device
        block_tensors = self.runner.block_tensors(0)
        self._block_copier = PageCopier(block_tensors, self._blocks_per_page, device)
        self._state_copier = PageCopier(self.runner.state_tensors(), 1, device)
        if self.scheduler.states is not None:
            self.scheduler.states.page_tokens = PAGE_TOKENS

    def sleep(self) -> None:
        """See `Engine.sleep`. The files of prefixes stay."""
        super().sleep()
        self._block_copier = PageCopier([], self._blocks_per_page, self.config.device)
        self._state_copier = PageCopier([], 1, self.config.device)

    def wake_up(self) -> None:
        """See `Engine.wake_up`."""
        if self.is_sleeping:
            super().wake_up()
            self._attach_caches()

    @property
    def has_work(self) -> bool:
        """See `Engine.has_work`. Pages to copy are work."""
        return super().has_work or bool(self._waiting_for_pages or self._to_copy or self._copied)

    def add(self, request: EngineRequest) -> None:
        """See `Engine.add`."""
        super().add(request)
        # The adapter's id is a part of the block hashes and may differ after a restart.
        if request.adapter is not None:
            return
        waiting = reversed(self.scheduler.waiting)
        sequence = next(sequence for sequence in waiting if sequence.request is request)
        self._awaiting_first_token[request.request_id] = sequence
        if request.sampling_params.prompt_logprobs is not None or request.pooling == "mean":
            return  # the whole prompt is computed anyway
        pages = self._pages(sequence, sequence.num_tokens - 1)
        self._num_queries += PAGE_TOKENS * sum(not self._is_in_memory(page) for page in pages)
        in_store = self._pages_to_load(sequence, pages)
        if in_store:
            self.scheduler.hold(sequence)
            self._waiting_for_pages[sequence] = in_store

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        sequence = self._awaiting_first_token.pop(request_id, None)
        if sequence is not None and sequence in self._waiting_for_pages:
            self._release(sequence)
        super().cancel(request_id)

    def step(self) -> list[EngineOutput]:
        """See `Engine.step`."""
        is_idle = not super().has_work
        self._load_pages(is_idle)
        outputs = super().step()
        # The step has named the states that the step before has written.
        self._save_pages(is_idle)
        for output in outputs:
            sequence = self._awaiting_first_token.pop(output.request_id, None)
            if sequence is not None and output.error is None:
                self._note_prompt(sequence)
        return outputs

    def stats(self) -> EngineStats:
        """See `Engine.stats`; adds the statistics of the prefix store."""
        stats = super().stats()
        return replace(
            stats,
            waiting=stats.waiting + len(self._waiting_for_pages),
            store_queries_total=self._num_queries,
            store_hits_total=self._num_hits,
            store_damaged_total=self._store.num_damaged,
        )

    def _pages(self, sequence: Sequence, num_tokens: int) -> list[Page]:
        """The full pages of a sequence's first tokens."""
        size = self._blocks_per_page
        now = time.time_ns()
        num_pages = num_tokens // PAGE_TOKENS
        hashes = sequence.block_hashes(num_pages * size, self.config.block_size)
        pages = []
        for index in range(num_pages):
            page_hashes = hashes[index * size : (index + 1) * size]
            pages.append(Page(page_hashes, self._store.key(page_hashes[-1]), now - index))
        return pages

    def _state_after(self, page: Page) -> Page:
        """The recurrent states at the end of a page."""
        last = page.block_hashes[-1]
        return Page([last], self._store.key(last, "state"), page.used_ns, is_state=True)

    def _rows(self, page: Page) -> list[int] | None:
        """The blocks in memory of a page, or the row of the states; None when one is missing."""
        rows = []
        for block_hash in page.block_hashes:
            if page.is_state:
                assert self.scheduler.states is not None
                row = self.scheduler.states.find_snapshot(block_hash)
            else:
                row = self.scheduler.pools[0].get_cached_block(block_hash)
            if row is None:
                return None
            rows.append(row)
        return rows

    def _is_in_memory(self, page: Page) -> bool:
        """Whether the scheduler finds the page, on the device or in host memory."""
        if page.is_state:
            assert self.scheduler.states is not None
            return self.scheduler.states.has_snapshot(page.block_hashes[0])
        return all(map(self.scheduler.pools[0].has_block, page.block_hashes))

    def _copier(self, page: Page) -> PageCopier:
        return self._state_copier if page.is_state else self._block_copier

    # From files to the KV cache

    def _pages_to_load(self, sequence: Sequence, pages: list[Page]) -> list[Page]:
        """The pages that memory lacks of the longest prefix that is in memory and in files.

        With recurrent layers, also the states at its end.
        """

        def is_available(page: Page) -> bool:
            return self._is_in_memory(page) or self._store.has(page.key)

        prefix = list(takewhile(is_available, pages))
        if self.scheduler.states is not None:
            while prefix and not is_available(self._state_after(prefix[-1])):
                prefix.pop()
            if len(prefix) * PAGE_TOKENS <= self.scheduler.num_reusable_tokens(sequence):
                return []
            prefix.append(self._state_after(prefix[-1]))
        return [page for page in prefix if not self._is_in_memory(page)]

    def _load_pages(self, is_idle: bool) -> None:
        """Restore a page that was read, release requests with all pages, start the next reads."""
        if is_idle and self._reading:
            reads = [page.read for page in self._reading.values() if page.read]
            wait(reads, _IDLE_WAIT_S, FIRST_COMPLETED)
        restored: set[str] = set()
        failed: set[str] = set()
        for page in list(self._reading.values()):
            assert page.read is not None
            timed_out = time.monotonic() - page.read_since > PAGE_TIMEOUT_S
            may_restore = page.read.done() and (is_idle or not restored)
            if not may_restore and not timed_out:
                continue
            del self._reading[page.key]
            if not timed_out and self._restore(page, page.read):
                restored.add(page.key)
            else:
                failed.add(page.key)
        for sequence, pages in list(self._waiting_for_pages.items()):
            # A page is of use only with all pages before it.
            usable = takewhile(lambda page: page.key not in failed, pages)
            pages[:] = [page for page in usable if page.key not in restored]
            if not pages:
                self._release(sequence)
        for pages in self._waiting_for_pages.values():
            for page in pages:
                if len(self._reading) < _MAX_READS and page.key not in self._reading:
                    page.read = self._read_threads.submit(
                        self._store.read, page.key, self._copier(page).num_bytes, page.used_ns
                    )
                    page.read_since = time.monotonic()
                    self._reading[page.key] = page

    def _release(self, sequence: Sequence) -> None:
        """Put a sequence back into the scheduler's queue."""
        del self._waiting_for_pages[sequence]
        self.scheduler.release(sequence)

    def _restore(self, page: Page, read: Future[torch.Tensor | None]) -> bool:
        """Put a page into the prefix cache.

        Returns False when its data could not be read or when there is too little memory.
        """
        data = None if read.exception() else read.result()
        if data is None:
            return False
        if page.is_state:
            return self._restore_state(page, data)
        pool = self.scheduler.pools[0]
        if len(page.block_hashes) > pool.num_available_blocks:
            return False
        blocks = pool.allocate(len(page.block_hashes))
        self.copy_host_blocks()  # saves what was in these blocks
        self._block_copier.restore(blocks, data)
        for block, block_hash in zip(blocks, page.block_hashes, strict=True):
            pool.cache_block(block, block_hash)
        pool.free(blocks)
        self._num_hits += PAGE_TOKENS
        return True

    def _restore_state(self, page: Page, data: torch.Tensor) -> bool:
        assert self.scheduler.states is not None
        cache = self.scheduler.states.cache
        row = cache.allocate()
        if row is None:
            return False
        self.copy_host_blocks()  # saves the state that was in this row
        self._state_copier.restore([row], data)
        cache.cache_row(row, page.block_hashes[0])
        cache.release(row)
        return True

    # From the KV cache to files

    def _note_prompt(self, sequence: Sequence) -> None:
        """Note the pages of a computed prompt, and copy those that were requested before."""
        for page in self._pages(sequence, sequence.num_prompt_tokens):
            if not self._store.has(page.key):
                if not self._requested_keys.pop(page.key, False):
                    self._requested_keys[page.key] = True
                    continue
                self._to_copy.append(page)
            if self.scheduler.states is not None:
                state = self._state_after(page)
                if not self._store.has(state.key):
                    self._to_copy.append(state)  # if it was kept
        while len(self._requested_keys) > _MAX_REQUESTED_KEYS:
            self._requested_keys.popitem(last=False)

    def _save_pages(self, is_idle: bool) -> None:
        """Hand copied pages to the writing thread, and copy one more if that thread keeps up."""
        if is_idle and len(self._writing) >= _MAX_WRITES:
            wait(self._writing, _IDLE_WAIT_S, FIRST_COMPLETED)
        self._writing = [write for write in self._writing if not write.done()]
        while self._copied:
            first = self._copied[0]
            if first.copied is not None and not first.copied.query():
                break
            self._copied.popleft()
            page = first.page
            write = self._write_thread.submit(self._store.write, page.key, first.data, page.used_ns)
            self._writing.append(write)
        if len(self._writing) + len(self._copied) >= _MAX_WRITES:
            return
        while self._to_copy:
            page = self._to_copy.popleft()
            rows = self._rows(page)
            if rows is not None:
                self._copied.append(self._copier(page).copy(page, rows))
                break


def _lower_thread_priority() -> None:
    """Let this thread run only when no other thread wants to."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
