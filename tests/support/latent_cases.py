"""Batches for attention to a cache of latents, for the interpreter and for a CUDA device.

In the cache that the kernel gets, what no query sees is NaN; in that of the reference it is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from llmkit.kernels import latent_attention_triton, paged_attention
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.latent_attention import latent_attention_reference
from llmkit.kernels.latent_cache import LatentCache
from support.paged_cases import BLOCK, DECODE, MIXED, RAGGED_MIXED, SCALE, poisoned_memory


@dataclass(frozen=True)
class Case:
    label: str
    query_lens: list[int]
    seq_lens: list[int]
    heads: int = 4
    rank: int = 32
    rope: int = 16
    programs: int = 1  # a group of heads': contexts are split over them
    dtype: torch.dtype = torch.float16

    @cached_property
    def inputs(self) -> LatentInputs:
        return LatentInputs(self)


class LatentInputs:
    def __init__(self, case: Case) -> None:
        draw = torch.Generator().manual_seed(0)
        sizes = [-(-length // BLOCK) for length in case.seq_lens]
        ids = torch.randperm(sum(sizes) + 4, generator=draw)
        self.case = case
        self.tables: list[list[int]] = [part.tolist() for part in ids[:-4].split(sizes)]
        dim = case.rank + case.rope
        shape = sum(case.query_lens), case.heads, dim
        self.q = torch.randn(shape, generator=draw).to(case.dtype)
        latents = torch.randn(1, len(ids), BLOCK, dim, generator=draw).to(case.dtype)
        self.clean = LatentCache(torch.zeros_like(latents))
        self.with_nan = LatentCache(torch.full_like(latents, float("nan")))
        for table, length in zip(self.tables, case.seq_lens, strict=True):
            for place in range(length):
                block, offset = table[place // BLOCK], place % BLOCK
                for cache in (self.clean, self.with_nan):
                    cache.kv[0, block, offset] = latents[0, block, offset]

    def batch(self, device: str = "cpu") -> AttentionBatch:
        case = self.case
        return AttentionBatch.build(
            case.query_lens, case.seq_lens, {None: self.tables}, BLOCK, device
        )

    def expected(self) -> torch.Tensor:
        """By torch, in float32."""
        cache = LatentCache(self.clean.kv.float())
        metadata = self.batch().metadata(None)
        return latent_attention_reference(self.q.float(), cache, metadata, SCALE, self.case.rank)

    def run_kernel(self, device: str = "cpu", replayed: bool = False) -> torch.Tensor:
        """The kernel's output. replayed: the metadata is of other sequences, then overwritten."""
        case = self.case
        metadata = self.batch(device).metadata(None)
        if replayed:
            longest = max(map(len, self.tables)) + 20
            others = [[0] * longest] * len(case.query_lens)
            lengths = [longest * BLOCK] * len(case.query_lens)
            metadata = AttentionBatch.build(
                case.query_lens, lengths, {None: others}, BLOCK, device
            ).metadata(None)
            metadata.device_tensors()
            blocks = [table + [-1] * (longest - len(table)) for table in self.tables]
            metadata.update_block_tables(
                torch.tensor(blocks, device=device), torch.tensor(case.seq_lens, device=device)
            )
        cache = replace(self.with_nan, kv=self.with_nan.kv.to(device))
        with poisoned_memory():
            return latent_attention_triton.attention(
                self.q.to(device), cache, metadata, SCALE, case.rank
            )


def cases() -> Iterator[Case]:
    yield Case("decode", *DECODE, programs=4)
    yield Case("drafts, 20 heads", [3, 1, 2], [50, 9, 33], heads=20)
    yield Case("40 heads, rank of 40", [1, 2], [40, 2], heads=40, rank=40, rope=64)
    yield Case("float32", *MIXED, dtype=torch.float32, heads=6, rank=24, rope=8)
    yield Case("ragged, mixed, splits", *RAGGED_MIXED, heads=8, programs=6)


CASES = list(cases())
REPLAYED = [case for case in CASES if max(case.query_lens) == 1]


def run_kernel_interpreted(index: int, replayed: bool) -> torch.Tensor:
    """A case's output, with contexts split as it says."""
    case = (REPLAYED if replayed else CASES)[index]
    paged_attention.num_programs = lambda *_: case.programs
    paged_attention.MIN_UNIT_TILES = 1
    return case.inputs.run_kernel(replayed=replayed)
