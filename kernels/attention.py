"""Attention over a paged KV cache, for batches that mix prefill chunks and decode tokens.

Legend: S sequences, T tokens of this step over all of them, N query heads, K key-value heads, D head_dim, L tokens of
context. Which blocks a query sees is found once per step and window, in `paging`; here are the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from llmkit.kernels import native
from llmkit.kernels.paging import AttentionBatch, Group, Part
from llmkit.kernels.rounding import FP8, tensor_codes, token_codes

__all__ = ["CODES", "AttentionBatch", "KvCache", "paged_attention"]

CODES = {"int8": torch.int8, "fp8": FP8}
PART_BYTES = {
    "cpu": 4 << 20,
    "cuda": 256 << 20,
}  # keys and values that are gathered at a time; on a CPU, into its cache


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


def paged_attention(
    q: torch.Tensor, cache: KvCache, group: Group, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """softmax(softcap(scale q k')) v for every token, causal, within the group's window.

    q: [T, N, D]. The step's own keys and values are already in the cache. Returns [T, N, D].
    """
    if native.attends(q, cache) and q.stride()[1:] == (q.shape[2], 1):
        return native.attention(q, cache, group, scale, softcap)
    heads, _, block_size, dim = cache.kv.shape
    most_blocks = PART_BYTES[q.device.type] // (heads * block_size * dim * q.element_size())
    plan = group.plan(most_blocks, q.dtype, fused=softcap is None)
    if plan.order is not None:
        q = q.index_select(0, plan.order)
    answers = [_attend(q[part.rows], cache.gather(part.blocks, q.dtype), part, scale, softcap) for part in plan.parts]
    out = answers[0] if len(answers) == 1 else torch.cat(answers)
    return out if plan.back is None else out.index_select(0, plan.back)


def _attend(q: torch.Tensor, kv: torch.Tensor, part: Part, scale: float, softcap: float | None) -> torch.Tensor:
    """q: [S * n, N, D]; kv: [2K, S * L, D], of which each query sees what `part` says. Returns [S * n, N, D]."""
    tokens, heads, dim = q.shape
    kv = kv.view(2, -1, part.count, kv.shape[1] // part.count, dim)[..., part.span, :].transpose(1, 2)
    k, v = kv.unbind(0)
    if softcap is not None:
        return _attend_capped(q, k, v, part, scale, softcap)
    if part.new == 1:  # the heads that share a key-value head are the rows of one small product
        grouped = q.view(tokens, k.shape[1], -1, dim)
        return scaled_dot_product_attention(grouped, k, v, attn_mask=part.mask, scale=scale).reshape(q.shape)
    query = q.view(part.count, part.new, heads, dim).transpose(1, 2)
    out = scaled_dot_product_attention(
        query, k, v, attn_mask=part.mask, is_causal=part.causal, scale=scale, enable_gqa=heads != k.shape[1]
    )
    return out.transpose(1, 2).reshape(q.shape)


def _attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Part, scale: float, softcap: float
) -> torch.Tensor:
    """`_attend` with softcap(x) = cap tanh(x / cap) over the scores. k, v: [S, K, L, D]."""
    count, new, kv_heads = part.count, part.new, k.shape[1]
    rows = q.view(count, new, kv_heads, -1, q.shape[-1]).permute(0, 2, 3, 1, 4)  # [S, K, N / K, n, D]
    scores = (rows.flatten(2, 3) @ k.transpose(-1, -2)).mul_(scale / softcap).tanh().mul(softcap).float()
    if part.mask is not None:
        scores.view(*rows.shape[:-1], -1).add_(part.mask[:, :, None])
    out = scores.softmax(-1).to(q.dtype) @ v
    return out.view(rows.shape).permute(0, 3, 1, 2, 4).reshape(q.shape)
