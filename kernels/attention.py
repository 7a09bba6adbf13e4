"""Attention over a paged KV cache, for batches that mix prefill chunks and decode tokens.

Legend: S sequences, T tokens of this step over all of them, N query heads, K key-value heads, G = N / K,
D head_dim, L tokens of context. A cache is [blocks, block_size, K, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class AttentionBatch:
    """Which tokens of a step belong to which sequence, and where their keys and values lie.

    The lists are the truth, set once by whoever builds the batch; the tensors are their device form.
    """

    query_lens: list[int]  # new tokens of each sequence, in the order of the step's tokens
    context_lens: list[int]  # tokens in the cache after this step, the new ones included
    block_tables: torch.Tensor  # int32 [S, most blocks of a sequence], padded with its last block
    slots: torch.Tensor  # int64 [T]: block * block_size + offset of each new token
    block_size: int
    masks: dict[object, torch.Tensor] = field(default_factory=dict)  # made on first use, shared by the layers

    @classmethod
    def build(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """From plain lists; `block_tables[s]` covers at least `context_lens[s]` tokens."""
        widest = max(-(-context // block_size) for context in context_lens)
        # Padded with a sequence's own last block: what is masked there can then never be another sequence's NaN.
        rows = [[*table[:widest], *[table[-1]] * (widest - len(table))] for table in block_tables]
        tables = torch.tensor(rows, dtype=torch.int32)
        where = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
        position = torch.cat([torch.arange(c - q, c) for q, c in zip(query_lens, context_lens, strict=True)])
        slots = tables[where, position // block_size].long() * block_size + position % block_size
        if torch.device(device).type != "cpu":
            tables, slots = (t.pin_memory().to(device, non_blocking=True) for t in (tables, slots))
        return cls(list(query_lens), list(context_lens), tables, slots, block_size)

    @classmethod
    def for_sequences(
        cls, lengths: list[int], block_size: int = 16, device: torch.device | str = "cpu"
    ) -> AttentionBatch:
        """Complete sequences, one after the other, in blocks 0, 1, 2, ...: calibration and evaluation."""
        tables, first = [], 0
        for length in lengths:
            blocks = -(-length // block_size)
            tables.append(range(first, first + blocks))
            first += blocks
        return cls.build(lengths, lengths, tables, block_size, device)

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each sequence among the step's tokens, and the number of rows at the end."""
        return [0, *accumulate(self.query_lens)]

    @cached_property
    def decoding(self) -> list[int]:
        """The sequences with one new token."""
        return [s for s, n in enumerate(self.query_lens) if n == 1]

    @cached_property
    def decode_rows(self) -> torch.Tensor | slice:
        """Their rows among the step's tokens; everything when there are no others."""
        if len(self.decoding) == len(self.query_lens):
            return slice(None)
        return torch.tensor([self.starts[s] for s in self.decoding], device=self.slots.device)

    @cached_property
    def decode_tables(self) -> torch.Tensor:
        """Their block tables, int64 [S, blocks of the longest]."""
        longest = max(self.context_lens[s] for s in self.decoding)
        return self.block_tables[self.decoding, : -(-longest // self.block_size)].long()

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """Which positions of `decode_tables` each decoding sequence sees: bool [S, 1, 1, L]."""
        key = ("decode", window)
        if key not in self.masks:
            tables = self.decode_tables
            position = torch.arange(tables.shape[1] * self.block_size, device=tables.device)
            context = torch.tensor([self.context_lens[s] for s in self.decoding], device=tables.device)[:, None]
            seen = position < context
            if window is not None:
                seen &= position >= context - window
            self.masks[key] = seen[:, None, None, :]
        return self.masks[key]

    def prefill_mask(self, s: int, window: int | None) -> torch.Tensor:
        """Which of its L cached tokens each of the n new tokens of sequence `s` sees: bool [n, L]."""
        key = (s, window)
        if key not in self.masks:
            new, context = self.query_lens[s], self.context_lens[s]
            row = torch.arange(context - new, context, device=self.slots.device)[:, None]
            column = torch.arange(context, device=self.slots.device)
            seen = column <= row
            if window is not None:
                seen &= column > row - window
            self.masks[key] = seen
        return self.masks[key]

    @property
    def blocks(self) -> int:
        """How many blocks a cache must have for `for_sequences`."""
        return sum(-(-context // self.block_size) for context in self.context_lens)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the step's keys and values [T, K, D] into the cache at `slots` [T]."""
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v.to(v_cache.dtype))


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(softcap(scale q k')) v for every token, causal, within `window` tokens when given.

    q: [T, N, D]. The step's own keys and values are already in the cache. Returns [T, N, D].
    """
    out = torch.empty_like(q)
    if batch.decoding:
        rows = batch.decode_rows
        out[rows] = _decode(q[rows], k_cache, v_cache, batch, scale, window, softcap)
    for s, n in enumerate(batch.query_lens):
        if n > 1:
            rows = slice(batch.starts[s], batch.starts[s + 1])
            out[rows] = _prefill(q[rows], k_cache, v_cache, batch, s, scale, window, softcap)
    return out


def _decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch,
    scale: float, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """One new token for each of several sequences, whose contexts are padded to the longest. q: [S, N, D]."""
    count, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    k, v = (
        c[batch.decode_tables].view(count, -1, kv_heads, dim).transpose(1, 2).to(q.dtype) for c in (k_cache, v_cache)
    )
    grouped = q.reshape(count, kv_heads, heads // kv_heads, dim)  # a group's heads are rows of one small product
    return _attend(grouped, k, v, batch.decode_mask(window), scale, softcap).reshape(count, heads, dim)


def _prefill(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch,
    s: int, scale: float, window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """A chunk of one sequence's prompt. q: [n, N, D]."""
    new, heads, dim = q.shape
    context, kv_heads = batch.context_lens[s], k_cache.shape[2]
    table = batch.block_tables[s, : -(-context // batch.block_size)].long()
    k, v = (c[table].view(-1, kv_heads, dim)[:context].to(q.dtype) for c in (k_cache, v_cache))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1)[None] for t in (k, v))
    query = q.transpose(0, 1)[None]
    if new == context and softcap is None and (window is None or context <= window):
        out = scaled_dot_product_attention(query, k, v, is_causal=True, scale=scale)
    else:
        out = _attend(query, k, v, batch.prefill_mask(s, window), scale, softcap)
    return out[0].transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """q: [B, H, n, D]; k, v: [B, H, L, D]; seen: bool, broadcast to [B, H, n, L]. Returns [B, H, n, D]."""
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    scores = scores.float().masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ v
