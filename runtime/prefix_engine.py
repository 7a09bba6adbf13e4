"""An engine that also stores long shared prefixes in files and finds them again after a restart.

The engine's own thread copies pages between the KV cache and ordinary memory between two steps, at
most one page in each direction while requests run. Other threads read, hash and write the files. A
page is written when its prefix is requested for the second time. A request whose prefix is in files
waits for its pages; other requests continue meanwhile. A page that is not read within
PAGE_TIMEOUT_S is computed instead.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError
from llmkit.common.formatting import bytes_text
from llmkit.kernels.recurrent_state import RecurrentState
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.prefix_store import PAGE_TOKENS, PrefixStore, model_identity

PAGE_TIMEOUT_S = 2.0
_IDLE_WAIT_S = 0.005  # for a file, before the engine looks for new requests again
_MAX_READS = 2  # pages that are being read
_MAX_WRITES = 4  # pages that are being copied or written
_MAX_REQUESTED_KEYS = 1 << 16  # remembered pages that were requested once


@dataclass(eq=False)
class Page:
    """A page of a request's prompt."""

    block_hashes: list[bytes]
    key: str  # in the store
    used_ns: int  # when it was requested; later pages of a prompt count as older
    read: Future[torch.Tensor | None] | None = None  # its bytes, set when reading begins
    read_since: float = 0.0  # monotonic seconds, set when reading begins


@dataclass(frozen=True)
class CopiedPage:
    """A page on its way from the KV cache to a file."""

    page: Page
    data: torch.Tensor  # uint8 [page_bytes], on the host once `copied` is done
    copied: torch.cuda.Event | None  # None: the data is on the host already


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
        kv_caches = list(self.runner.paged_model.kv_caches)
        if self.runner.draft_model is not None:
            kv_caches += self.runner.draft_model.paged_model.kv_caches
        # Every tensor of the caches as int64 [2K, blocks, bytes of a block / 8]; K: KV heads.
        self._cache_tensors: list[torch.Tensor] = []
        for cache in kv_caches:
            if isinstance(cache, RecurrentState):
                raise InputError(
                    "--prefix-cache-dir is not possible with a model that has recurrent layers",
                    "A model with full attention in all layers was expected",
                    "Leave out --prefix-cache-dir; prefixes are cached in memory anyway",
                )
            for tensor in (cache.kv, cache.scales):
                if tensor is not None:
                    self._cache_tensors.append(tensor.flatten(2).view(torch.int64))
        self._blocks_per_page = PAGE_TOKENS // self.config.block_size
        page_bytes = 0
        for tensor in self._cache_tensors:
            page_bytes += 8 * tensor.shape[0] * self._blocks_per_page * tensor.shape[2]
        if limit_bytes < page_bytes:
            raise InputError(
                f"--prefix-cache-size ({bytes_text(limit_bytes)}) is less than {PAGE_TOKENS} "
                "tokens need",
                f"At least {page_bytes} bytes ({bytes_text(page_bytes)}) were expected",
            )
        identity = model_identity(checkpoints, self.config)
        self._store = PrefixStore(folder, limit_bytes, identity, page_bytes)
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
        missing = [page for page in pages if not self._is_in_memory(page)]
        in_store = list(takewhile(lambda page: self._store.has(page.key), missing))
        self._num_queries += PAGE_TOKENS * len(missing)
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
        self._save_pages(is_idle)
        outputs = super().step()
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

    def _is_in_memory(self, page: Page) -> bool:
        pool = self.scheduler.pools[0]
        return all(
            pool.get_cached_block(block_hash) is not None for block_hash in page.block_hashes
        )

    # From files to the KV cache

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
                    page.read = self._read_threads.submit(self._store.read, page.key, page.used_ns)
                    page.read_since = time.monotonic()
                    self._reading[page.key] = page

    def _release(self, sequence: Sequence) -> None:
        """Put a sequence back into the scheduler's queue."""
        del self._waiting_for_pages[sequence]
        self.scheduler.release(sequence)

    @torch.inference_mode()
    def _restore(self, page: Page, read: Future[torch.Tensor | None]) -> bool:
        """Put a page into the prefix cache.

        Returns False when its data could not be read or when there are too few blocks.
        """
        pool = self.scheduler.pools[0]
        data = None if read.exception() else read.result()
        if data is None or len(page.block_hashes) > pool.num_available_blocks:
            return False
        blocks = pool.allocate(len(page.block_hashes))
        index = torch.tensor(blocks).to(self.config.device)
        data = data.view(torch.int64).to(self.config.device)
        for tensor, piece in self._split(data):
            tensor.index_copy_(1, index, piece)
        for block, block_hash in zip(blocks, page.block_hashes, strict=True):
            pool.cache_block(block, block_hash)
        pool.free(blocks)
        self._num_hits += PAGE_TOKENS
        return True

    # From the KV cache to files

    def _note_prompt(self, sequence: Sequence) -> None:
        """Note the pages of a computed prompt, and copy those that were requested before."""
        for page in self._pages(sequence, sequence.num_prompt_tokens):
            if self._store.has(page.key):
                continue
            if self._requested_keys.pop(page.key, False):
                self._to_copy.append(page)
            else:
                self._requested_keys[page.key] = True
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
        if self._to_copy and len(self._writing) + len(self._copied) < _MAX_WRITES:
            page = self._to_copy.popleft()
            if self._is_in_memory(page):
                self._copied.append(self._copy(page))

    @torch.inference_mode()
    def _copy(self, page: Page) -> CopiedPage:
        """Start copying a page to the host; on a GPU the copy runs after the steps in flight."""
        pool = self.scheduler.pools[0]
        blocks = [pool.get_cached_block(block_hash) for block_hash in page.block_hashes]
        device = self.config.device
        index = torch.tensor([block for block in blocks if block is not None]).to(device)
        data = torch.empty(self._store.page_bytes // 8, dtype=torch.int64, device=device)
        for tensor, piece in self._split(data):
            torch.index_select(tensor, 1, index, out=piece)
        if device.type == "cpu":
            return CopiedPage(page, data.view(torch.uint8), None)
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
        host.copy_(data, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return CopiedPage(page, host.view(torch.uint8), copied)

    def _split(self, data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each cache tensor, and its part of a page's data.

        The parts are int64 [2K, blocks of a page, bytes of a block / 8].
        """
        start = 0
        for tensor in self._cache_tensors:
            shape = (tensor.shape[0], self._blocks_per_page, tensor.shape[2])
            stop = start + shape[0] * shape[1] * shape[2]
            yield tensor, data[start:stop].view(shape)
            start = stop


def _lower_thread_priority() -> None:
    """Let this thread run only when no other thread wants to."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
