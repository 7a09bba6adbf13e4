"""Attention over a paged KV cache, for batches that mix prefill chunks and decode tokens.

Legend: S sequences, T tokens of this step over all of them, N query heads, K key-value heads, D head_dim, L tokens of
context. Which blocks a query sees is found once per step and window, in `paging`; here are the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from llmkit.kernels import elementwise, flash, native, paged
from llmkit.kernels.elementwise import rms_norm, rotate_
from llmkit.kernels.paging import AttentionBatch, Group
from llmkit.kernels.rounding import FP8, tensor_codes, token_codes

__all__ = ["CODES", "AttentionBatch", "KvCache", "paged_attention", "place"]

Pair = tuple[torch.Tensor, torch.Tensor]
Round = Callable[[torch.Tensor], torch.Tensor]

CODES = {"int8": torch.int8, "fp8": FP8}


@dataclass(frozen=True)
class KvCache:
    """The keys and values of a layer, or 8-bit codes of them.

    kv: [2K, blocks, block_size, D], the K heads' keys first: a head's tokens lie side by side, as products want them.
    Codes are multiplied by `stored`, float32 [2K, 1, 1], or by `scales`, float32 [2K, blocks, block_size, 1], which
    every token and head gets as it comes.
    """

    kv: torch.Tensor
    scales: torch.Tensor | None = None
    stored: torch.Tensor | None = None

    @property
    def coded(self) -> bool:
        """Whether it holds codes."""
        return self.kv.dtype in CODES.values()

    def store(self, kv: torch.Tensor, slots: torch.Tensor) -> None:
        """Write new keys and values [T, 2K, D] at `slots` [T], block * block_size + offset."""
        if native.runs(kv) and not self.coded and kv.stride()[1:] == (kv.shape[2], 1):
            native.store(kv, slots, self.kv)
            return
        kv = kv.transpose(0, 1)
        if self.coded:
            kind = "int" if self.kv.dtype == torch.int8 else "float"
            if self.scales is None:
                assert self.stored is not None
                codes = tensor_codes(kv.float(), self.stored, kind)
            else:
                codes, scale = token_codes(kv, kind)
                self.scales.flatten(1, 2).index_copy_(1, slots, scale)
            kv = codes.to(self.kv.dtype)
        _bytes(self.kv).flatten(1, 2).index_copy_(1, slots, _bytes(kv))

    def gather(self, blocks: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """The values of n whole blocks: [2K, n * block_size, D], to be read only."""
        found = _select(_bytes(self.kv), blocks)
        if not self.coded:
            return found
        scale = self.stored if self.scales is None else _select(self.scales, blocks)
        assert scale is not None
        return found.view(self.kv.dtype).float().mul_(scale).to(dtype)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that may hold what is not finite: attention multiplies by 0 what it does not see."""
        for part in (self.kv, self.scales):
            if part is not None:
                _bytes(part)[:, blocks] = 0


def _select(pages: torch.Tensor, blocks: torch.Tensor | slice) -> torch.Tensor:
    """[2K, blocks, block_size, x] -> [2K, n * block_size, x], without a copy where the blocks lie side by side."""
    return (pages[:, blocks] if isinstance(blocks, slice) else pages.index_select(1, blocks)).flatten(1, 2)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    """FP8 numbers as bytes, which can be indexed everywhere; others as they are."""
    return codes.view(torch.uint8) if codes.dtype == FP8 else codes


def place(
    qkv: torch.Tensor, heads: int, norms: Pair | None, eps: float, rotation: Pair | None, cache: KvCache,
    slots: torch.Tensor, rounding: tuple[Round, Round] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Queries [T, N, D] as attention takes them; keys and values go into the cache at `slots` [T].

    qkv: [T, N + 2K, D], overwritten or not. norms: what each head of the queries and of the keys is normalised with,
    [D] each; rotation: cosines and sines for `rotate_`; rounding: of keys and values before they are stored.
    """
    if rounding is None and paged.attends(qkv, cache):
        return elementwise.place(qkv, heads, norms, eps, rotation, cache, slots)
    turned = (heads + qkv.shape[1]) // 2
    if norms is not None:
        q, k, v = qkv.tensor_split((heads, turned), dim=1)
        qkv = torch.cat((rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps), v), dim=1)
    if rotation is not None:
        rotate_(qkv[:, :turned], *rotation)
    kv = qkv[:, heads:]
    if rounding is not None:
        kv = torch.cat([how(part) for how, part in zip(rounding, kv.chunk(2, dim=1), strict=True)], dim=1)
    cache.store(kv, slots)
    return qkv[:, :heads]


def paged_attention(
    q: torch.Tensor, cache: KvCache, group: Group, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """softmax(softcap(scale q k')) v for every token, causal, within the group's window.

    q: [T, N, D]. The step's own keys and values are already in the cache. Returns [T, N, D].
    """
    if native.attends(q, cache) and q.stride()[1:] == (q.shape[2], 1):
        return native.attention(q, cache, group, scale, softcap)
    if flash.attends(q, cache):
        return flash.attention(q, cache, group, scale, softcap)
    if paged.attends(q, cache):
        return paged.attention(q, cache, group, scale, softcap)
    return paged_attention_reference(q, cache, group, scale, softcap)


def paged_attention_reference(
    q: torch.Tensor, cache: KvCache, group: Group, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """`paged_attention` in plain torch, one sequence after the other."""
    answers, at = [], 0
    for new, blocks, tokens, seen in group.sequences:
        kv = cache.gather(blocks, q.dtype)[:, tokens]
        k, v = kv.view(2, -1, 1, *kv.shape[1:]).unbind(0)  # [K, 1, L, D]
        rows = q[at : at + new].unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # [K, N / K, n, D]
        answers.append(_attend(rows, k, v, seen, scale, softcap).permute(2, 0, 1, 3).flatten(1, 2))
        at += new
    return torch.cat(answers)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """seen: bool [n, L], None where every query sees everything."""
    if softcap is None:
        k, v = (t.expand(*q.shape[:2], -1, -1) for t in (k, v))
        return scaled_dot_product_attention(q, k, v, seen, scale=scale)
    scores = ((q @ k.mT) * (scale / softcap)).tanh().mul(softcap).float()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ v
