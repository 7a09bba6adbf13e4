"""An engine whose long shared prefixes are kept in files and found there again, after a restart too.

All copies between the KV cache and ordinary memory are made by the engine's own thread between two steps, at most a
page each way while requests run; files are read, hashed and written by other threads. A page is written when its prefix
is asked for a second time. A request whose prefix is in files waits for these only, others go on, and a page that does
not come within WAIT_S is computed as if there were none.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.text import bytes_text
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.types import EngineStats, Request, TokenOutput
from llmkit.runtime.prefix_store import PAGE_TOKENS, PrefixStore, identity_of

WAIT_S = 2.0  # for a page
_IDLE_S = 0.005  # of waiting for a file before messages are looked at again
_READS = 2  # pages on their way from files, at most
_WRITES = 4  # to files
_REMEMBERED = 1 << 16  # pages that were asked for once


@dataclass(frozen=True)
class StoreStats(EngineStats):
    """An engine's figures, and those of its files."""

    store_queries_total: int = 0  # prompt tokens looked up in files: those that memory did not have
    store_hits_total: int = 0  # of them found
    store_damaged_total: int = 0  # files


@dataclass(eq=False)
class Page:
    """A page of a request's prompt: its blocks' names and its key in the store."""

    names: list[bytes]
    key: str
    used_ns: int  # when it was asked for; a prompt's last page counts as the oldest
    ready: Future[torch.Tensor | None] | None = None  # its bytes, where they are being read
    since: float = 0.0  # monotonic; when that began


def _yield_to_others() -> None:
    """Have this thread run where no other would."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class KeepingEngine(Engine):
    """See above. `keep` is called before the first request."""

    def keep(self, folder: Path, limit_bytes: int, models: list[Checkpoint]) -> None:
        """Use a folder for what these models compute, the second of which guesses. Raises InputError when it cannot."""
        if self.config.windows != (None,):
            raise InputError(
                "--prefix-cache-dir is not possible with a model that has sliding windows",
                "A model with full attention in all layers was expected",
                "Leave out --prefix-cache-dir; prefixes are cached in memory anyway",
            )
        caches = [*self.runner.caches, *self.runner.draft_caches]
        parts = [part for cache in caches for part in (cache.kv, cache.scales) if part is not None]
        self._parts = [part.flatten(2).view(torch.int64) for part in parts]  # [2K, blocks, bytes / 8] each
        self._page_blocks = PAGE_TOKENS // self.config.block_size
        page_bytes = sum(8 * part.shape[0] * self._page_blocks * part.shape[2] for part in self._parts)
        if limit_bytes < page_bytes:
            raise InputError(
                f"--prefix-cache-size ({bytes_text(limit_bytes)}) is less than {PAGE_TOKENS} tokens need",
                f"At least {page_bytes} bytes ({bytes_text(page_bytes)}) were expected",
            )
        self._store = PrefixStore(folder, limit_bytes, identity_of(models, self.config), page_bytes)
        self._readers = ThreadPoolExecutor(_READS, "prefix-read")
        self._writer = ThreadPoolExecutor(1, "prefix-write", _yield_to_others)
        self._new: dict[str, Sequence] = {}  # requests that have no token yet, by id
        self._held: dict[Sequence, list[Page]] = {}  # those that wait for pages, and for which
        self._reading: dict[str, Page] = {}  # by key
        self._asked: OrderedDict[str, bool] = OrderedDict()  # keys of pages that were asked for once
        self._wanted: deque[Page] = deque()  # to be copied
        self._copied: deque[tuple[Page, torch.Tensor, torch.cuda.Event | None]] = deque()  # once the event is there
        self._writes: list[Future[None]] = []
        self._queries = self._hits = 0

    @property
    def has_work(self) -> bool:
        """See `Engine.has_work`; copies that are to be made are work."""
        return super().has_work or bool(self._held or self._wanted or self._copied)

    def add(self, request: Request) -> None:
        """See `Engine.add`."""
        super().add(request)
        if request.adapter is not None:  # whose key is another one after a restart
            return
        sequence = next(one for one in reversed(self.scheduler.waiting) if one.request is request)
        self._new[request.id] = sequence
        if request.sampling.prompt_logprobs is None and request.pooling != "mean":  # else all is computed anyway
            missing = [page for page in self._pages(sequence, sequence.total - 1) if not self._in_memory(page)]
            found = list(takewhile(lambda page: self._store.has(page.key), missing))
            self._queries += PAGE_TOKENS * len(missing)
            if found:
                self.scheduler.waiting.remove(sequence)
                self._held[sequence] = found

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        sequence = self._new.pop(request_id, None)
        if sequence in self._held:
            self._go_on(sequence)
        super().cancel(request_id)

    def step(self) -> list[TokenOutput]:
        """See `Engine.step`."""
        idle = not super().has_work
        self._load(idle)
        self._save(idle)
        outputs = super().step()
        for output in outputs:
            sequence = self._new.pop(output.request_id, None)
            if sequence is not None and output.error is None:
                self._ask(sequence)
        return outputs

    def stats(self) -> StoreStats:
        """See `Engine.stats`."""
        told = dict(vars(super().stats()))
        told["waiting"] += len(self._held)
        figures = {"store_queries_total": self._queries, "store_hits_total": self._hits}
        return StoreStats(**told, **figures, store_damaged_total=self._store.damaged)

    def _pages(self, sequence: Sequence, tokens: int) -> list[Page]:
        """The whole pages of its first `tokens` tokens."""
        size, now = self._page_blocks, time.time_ns()
        names = sequence.names(tokens // PAGE_TOKENS * size, self.config.block_size)
        parts = [names[start : start + size] for start in range(0, len(names), size)]
        return [Page(part, self._store.key(part[-1]), now - index) for index, part in enumerate(parts)]

    def _in_memory(self, page: Page) -> bool:
        return all(self.scheduler.pools[0].find(name) is not None for name in page.names)

    # From files

    def _load(self, idle: bool) -> None:
        """Take in what was read, let those go on that wait for nothing more, and read what comes next."""
        if idle and self._reading:
            wait([page.ready for page in self._reading.values() if page.ready], _IDLE_S, FIRST_COMPLETED)
        came: set[str] = set()
        failed: set[str] = set()
        for page in list(self._reading.values()):
            assert page.ready is not None
            late = time.monotonic() - page.since > WAIT_S
            if (page.ready.done() and (idle or not came)) or late:
                del self._reading[page.key]
                (came if not late and self._restore(page, page.ready) else failed).add(page.key)
        for sequence, pages in list(self._held.items()):
            pages[:] = takewhile(lambda page: page.key not in failed, pages)
            pages[:] = [page for page in pages if page.key not in came]
            if not pages:
                self._go_on(sequence)
        for page in [page for pages in self._held.values() for page in pages]:
            if len(self._reading) < _READS and page.key not in self._reading:
                page.ready, page.since = (
                    self._readers.submit(self._store.read, page.key, page.used_ns),
                    time.monotonic(),
                )
                self._reading[page.key] = page

    def _go_on(self, sequence: Sequence) -> None:
        """It waits for files no longer, but like others."""
        del self._held[sequence]
        insort(self.scheduler.waiting, sequence, key=lambda one: one.rank)

    @torch.inference_mode()
    def _restore(self, page: Page, ready: Future[torch.Tensor | None]) -> bool:
        """Put a page that was read where requests find it; False when it is gone, or there is no room."""
        pool, data = self.scheduler.pools[0], None if ready.exception() else ready.result()
        if data is None or len(page.names) > pool.available:
            return False
        blocks = pool.allocate(len(page.names))
        index, data = torch.tensor(blocks).to(self.config.device), data.view(torch.int64).to(self.config.device)
        for part, piece in self._pieces(data):
            part.index_copy_(1, index, piece)
        for block, name in zip(blocks, page.names, strict=True):
            pool.name(block, name)
        pool.release(blocks)
        self._hits += PAGE_TOKENS
        return True

    # To files

    def _ask(self, sequence: Sequence) -> None:
        """Its prompt is computed: note its pages, and want those in files that were asked for before."""
        for page in self._pages(sequence, len(sequence.request.prompt)):
            if self._store.has(page.key):
                continue
            if self._asked.pop(page.key, False):
                self._wanted.append(page)
            else:
                self._asked[page.key] = True
        while len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)

    def _save(self, idle: bool) -> None:
        """Hand what is copied to the thread that writes, and copy one page more when that is not behind."""
        if idle and len(self._writes) >= _WRITES:
            wait(self._writes, _IDLE_S, FIRST_COMPLETED)
        self._writes = [write for write in self._writes if not write.done()]
        while self._copied and (self._copied[0][2] is None or self._copied[0][2].query()):
            page, data, _ = self._copied.popleft()
            self._writes.append(self._writer.submit(self._store.write, page.key, data, page.used_ns))
        if self._wanted and len(self._writes) + len(self._copied) < _WRITES:
            page = self._wanted.popleft()
            if self._in_memory(page):
                self._copied.append((page, *self._copy(page)))

    @torch.inference_mode()
    def _copy(self, page: Page) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The bytes of a page, on a GPU behind the steps that are under way and there once the event is."""
        found = [self.scheduler.pools[0].find(name) for name in page.names]
        device = self.config.device
        index = torch.tensor([block for block in found if block is not None]).to(device)
        data = torch.empty(self._store.page_bytes // 8, dtype=torch.int64, device=device)
        for part, piece in self._pieces(data):
            torch.index_select(part, 1, index, out=piece)
        if device.type == "cpu":
            return data.view(torch.uint8), None
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host.view(torch.uint8), event

    def _pieces(self, data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each part of the caches, and its piece of a page's data, int64: [2K, blocks of a page, bytes / 8]."""
        start = 0
        for part in self._parts:
            shape = (part.shape[0], self._page_blocks, part.shape[2])
            count = shape[0] * shape[1] * shape[2]
            yield part, data[start : start + count].view(shape)
            start += count
