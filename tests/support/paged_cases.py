"""Batches for paged attention, for the interpreter and for a CUDA device.

In the cache that the kernel gets, what no query sees is NaN; in that of the reference it is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from llmkit.kernels import paged_attention as paged
from llmkit.kernels import tuned_configs
from llmkit.kernels.attention import paged_attention
from llmkit.kernels.attention_metadata import AttentionBatch, BlockTable
from llmkit.kernels.kv_cache import QUANTIZED_KV_CACHE_DTYPES, KVCache
from llmkit.kernels.tuned_configs import Config, Shape

BLOCK = 16
SCALE = 0.2
DECODE = ([1, 1, 1, 1], [3, 150, 17, 64])  # new tokens, contexts
PREFILL = ([20, 5, 70], [20, 5, 70])
MIXED = (
    [1, 23, 1, 50, 2],
    [70, 23, 1, 90, 40],
)  # decoding, whole prompts, chunks after earlier ones, drafts
# One long context among many short ones, and lengths at the edges of blocks and tiles.
RAGGED = ([1] * 7, [130, 1, 15, 16, 17, 32, 33])
RAGGED_MIXED = ([1, 18, 1, 34, 2], [110, 18, 16, 70, 33])


@dataclass(frozen=True)
class Case:
    label: str
    query_lens: list[int]
    seq_lens: list[int]
    heads: tuple[int, int] = (4, 2)
    dim: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_cache_dtype: str | None = None
    dynamic_scales: bool = False
    programs: int = 1  # a KV head's: contexts are split over them
    tile_tokens: int | None = None  # None: the default
    capability: tuple[int, int] = (9, 0)  # the interpreter's
    dtype: torch.dtype = torch.float16

    @cached_property
    def inputs(self) -> AttentionInputs:
        return AttentionInputs(self)


class AttentionInputs:
    def __init__(self, case: Case, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        sizes = [-(-length // BLOCK) for length in case.seq_lens]
        ids = torch.randperm(sum(sizes) + 4, generator=draw)
        pages = (2 * case.heads[1], len(ids), BLOCK)
        self.case = case
        self.tables: list[list[int]] = [part.tolist() for part in ids[:-4].split(sizes)]
        self.q = torch.randn(sum(case.query_lens), case.heads[0], case.dim, generator=draw).to(
            case.dtype
        )
        kv = torch.randn(*pages, case.dim, generator=draw)
        self.sinks = torch.arange(case.heads[0]) * 1.5 - 2 if case.sinks else None
        scales = None
        stored = None
        poison = float("nan")
        bad = float("nan")
        if case.kv_cache_dtype is None:
            kv = kv.to(case.dtype)
        else:
            kv = (kv * 40).clamp(-120, 120).to(QUANTIZED_KV_CACHE_DTYPES[case.kv_cache_dtype])
            poison = float("nan") if case.kv_cache_dtype == "fp8" else 127
            scale = torch.rand(*pages, 1, generator=draw) * 0.03 + 0.01
            scales, stored = (
                (scale, None) if case.dynamic_scales else (None, scale[:, :1, :1, 0].clone())
            )
        unseen = torch.ones(pages[1] * BLOCK, dtype=torch.bool)
        for table, new, context in zip(self.tables, case.query_lens, case.seq_lens, strict=True):
            first = max(0, context - new + 1 - (case.window or context))
            for place in range(first, context):
                unseen[table[place // BLOCK] * BLOCK + place % BLOCK] = False
            table[: first // BLOCK] = [-1] * (first // BLOCK)
        self.caches = [KVCache(kv, scales, stored)]
        for value, wrong in ((0.0, 0.0), (poison, bad)):
            bytes_ = kv.float().flatten(1, 2).clone()
            bytes_[:, unseen] = value
            own = (
                None
                if scales is None
                else scales.flatten(1, 2).index_fill(1, unseen.nonzero()[:, 0], wrong)
            )
            pair = (
                bytes_.view(kv.shape).to(kv.dtype),
                None if own is None else own.view(scales.shape),
            )
            self.caches.append(KVCache(*pair, stored))
        self.clean, self.with_nan = self.caches[1:]

    def bfloat16(self) -> KVCache:
        """The clean cache, in bfloat16."""
        return KVCache(self.clean.kv.bfloat16())

    def batch(self, device: str = "cpu") -> AttentionBatch:
        return AttentionBatch.build(
            self.case.query_lens, self.case.seq_lens, {self.case.window: self.tables}, BLOCK, device
        )

    def expected(self) -> torch.Tensor:
        """In float32, by the form in torch or compiled for the CPU."""
        cache = self.clean
        if self.case.kv_cache_dtype is None:
            cache = KVCache(cache.kv.float())
        group = self.batch().metadata(self.case.window)
        return paged_attention(self.q.float(), cache, group, SCALE, self.case.softcap, self.sinks)

    def run_kernel(self, device: str = "cpu", replayed: bool = False) -> torch.Tensor:
        """The kernel's output. replayed: the metadata is of other sequences, then overwritten."""
        case = self.case
        batch = self.batch(device)
        group = batch.metadata(case.window)
        if replayed:
            longest = max(map(len, self.tables)) + 20
            others = [[0] * longest] * len(case.query_lens)
            lengths = [longest * BLOCK] * len(case.query_lens)
            group = AttentionBatch.build(
                case.query_lens, lengths, {case.window: others}, BLOCK, device
            ).metadata(case.window)
            group.device_tensors()
            blocks = [table + [-1] * (longest - len(table)) for table in self.tables]
            group.update_block_tables(
                torch.tensor(blocks, device=device), torch.tensor(case.seq_lens, device=device)
            )
        parts = (self.with_nan.kv, self.with_nan.scales, self.with_nan.static_scales)
        cache = KVCache(*(None if part is None else part.to(device) for part in parts))
        sinks = None if self.sinks is None else self.sinks.to(device)
        with poisoned_memory():
            return paged.attention(self.q.to(device), cache, group, SCALE, case.softcap, sinks)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def cases() -> Iterator[Case]:
    yield Case("decode", *DECODE)
    yield Case("prefill", *PREFILL)
    yield Case("mixed", *MIXED)
    yield Case("mixed, before Hopper", *MIXED, capability=(8, 0))
    yield Case("drafts", [3, 1, 2], [50, 9, 33])
    yield Case("one head a head", *MIXED, heads=(2, 2))
    yield Case("3 heads a head", *MIXED, heads=(3, 1))
    yield Case("8 heads a head", *MIXED, heads=(8, 1))
    yield Case("18 heads a head", *DECODE, heads=(18, 1))
    yield Case("dim 80", *MIXED, dim=80)
    yield Case("dim 128", *MIXED, dim=128, heads=(4, 1))
    yield Case("dim 256", *DECODE, dim=256, heads=(2, 1))
    yield Case("dim 512", [1, 20], [40, 20], dim=512, heads=(2, 1))
    yield Case("float32", *MIXED, dtype=torch.float32, heads=(3, 1))
    yield Case("window", *MIXED, window=20)
    yield Case("window, decode", *DECODE, window=20, programs=2)
    yield Case("window of 1", *MIXED, window=1)
    yield Case("soft cap", *MIXED, softcap=2.0)
    yield Case("soft cap, window, float32", *DECODE, softcap=2.0, window=40, dtype=torch.float32)
    yield Case("sinks, mixed", *MIXED, sinks=True)
    yield Case("sinks, window, 3 heads a head", *MIXED, heads=(3, 1), window=20, sinks=True)
    yield Case("sinks, window, splits", *DECODE, window=70, programs=4, sinks=True)
    yield Case("sinks, soft cap, float32", *DECODE, softcap=2.0, dtype=torch.float32, sinks=True)
    yield Case(
        "sinks, int8, splits",
        *DECODE,
        kv_cache_dtype="int8",
        dynamic_scales=True,
        programs=2,
        sinks=True,
    )
    for programs in (2, 4, 16):
        yield Case(f"{programs} programs", *DECODE, programs=programs)
    yield Case("splits, mixed", *MIXED, programs=2)
    yield Case("splits, float32", *DECODE, programs=4, dtype=torch.float32)
    yield Case("ragged", *RAGGED, programs=8, tile_tokens=32)
    yield Case("ragged, 1 head a head", *RAGGED, heads=(2, 2), programs=5, tile_tokens=16)
    yield Case("ragged, 5 heads a head", *RAGGED, heads=(5, 1), programs=40, tile_tokens=16)
    yield Case("ragged, 8 heads a head", *RAGGED, heads=(8, 1), dim=32, programs=8, tile_tokens=32)
    yield Case("ragged, window", *RAGGED, window=100, programs=8, tile_tokens=16)
    yield Case("ragged, sinks, cap", *RAGGED, softcap=2.0, sinks=True, programs=8, tile_tokens=32)
    yield Case("ragged, mixed", *RAGGED_MIXED, programs=8, tile_tokens=16)
    yield Case("ragged, mixed, 8 heads a head", *RAGGED_MIXED, heads=(8, 1), programs=6)
    yield Case(
        "ragged, mixed, window",
        *RAGGED_MIXED,
        heads=(4, 1),
        window=70,
        programs=8,
        tile_tokens=16,
    )
    yield Case(
        "ragged, mixed, sinks, fp8, bfloat16",
        *RAGGED_MIXED,
        dtype=torch.bfloat16,
        kv_cache_dtype="fp8",
        dynamic_scales=True,
        sinks=True,
        heads=(4, 1),
        programs=8,
        tile_tokens=32,
    )
    yield Case(
        "ragged, int8, bfloat16",
        *RAGGED,
        dtype=torch.bfloat16,
        kv_cache_dtype="int8",
        programs=6,
        tile_tokens=32,
    )
    for name in QUANTIZED_KV_CACHE_DTYPES:
        for own in (False, True):
            label = f"{name}, {'own' if own else 'stored'} scales"
            yield Case(label, *MIXED, kv_cache_dtype=name, dynamic_scales=own)
            yield Case(
                f"{label}, splits",
                *DECODE,
                kv_cache_dtype=name,
                dynamic_scales=own,
                programs=2,
                heads=(3, 1),
            )


CASES = list(cases())
REPLAYED = [case for case in CASES if max(case.query_lens) == 1 and case.programs <= 4]
IDS = [case.label for case in CASES]


def use_programs(case: Case) -> None:
    """Split contexts as the case says, even into single tiles of tokens."""

    def choose(_: Shape, default: Config) -> Config:
        return (case.tile_tokens or default[0], *default[1:])

    paged.num_programs = lambda *_: case.programs
    paged.MIN_UNIT_TILES = 1
    tuned_configs.trials["attention"] = choose


def run_kernel_interpreted(index: int, replayed: bool) -> torch.Tensor:
    case = (REPLAYED if replayed else CASES)[index]
    use_programs(case)
    torch.cuda.get_device_capability = lambda *_: case.capability
    return case.inputs.run_kernel(replayed=replayed)


def run_schedule(
    query_lens: list[int],
    seq_lens: list[int],
    window: int | None,
    queries: tuple[int, int],
    tile_tokens: int,
    programs: int,
    max_query_len: int | None = None,
) -> list[tuple[int, list[list[int]], list[list[int]], list[list[int]] | None]]:
    """For each launch: tile_queries, and the units, parts and tiles of `schedule`.

    The kernel takes turns of few tiles, so that small batches need several.
    """
    paged.SCHEDULE_STEP = 16
    lens = np.array(query_lens), np.array(seq_lens)
    table = BlockTable.build([[0] * -(-max(seq_lens) // BLOCK) for _ in seq_lens])
    batch = AttentionBatch(*lens, {window: table}, BLOCK, torch.device("cpu"), max_query_len)
    metadata = batch.metadata(window)
    found = []
    for tiles in metadata.query_tiles(*queries):
        units, parts = paged.schedule(metadata, tiles, window or 1 << 30, tile_tokens, programs)
        rows = None if tiles.tiles is None else tiles.tiles.tolist()
        found.append((tiles.tile_queries, units.tolist(), parts.tolist(), rows))
    return found


def assert_close(answer: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.cpu().float(), expected, atol=tolerance, rtol=tolerance)
