"""From the product that makes queries, keys and values to attention. T tokens, N query and K key-value heads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmkit.kernels import elementwise, paged
from llmkit.kernels.attention import KvCache
from llmkit.kernels.norm import rms_norm
from llmkit.kernels.rope import rotate_

Pair = tuple[torch.Tensor, torch.Tensor]
Round = Callable[[torch.Tensor], torch.Tensor]


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
    q, k, v = qkv.tensor_split((heads, (heads + qkv.shape[1]) // 2), dim=1)
    if norms is not None:
        qkv = torch.cat((rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps), v), dim=1)
    if rotation is not None:
        rotate_(qkv[:, : (heads + qkv.shape[1]) // 2], *rotation)
    kv = qkv[:, heads:]
    if rounding is not None:
        kv = torch.cat([how(part) for how, part in zip(rounding, kv.chunk(2, dim=1), strict=True)], dim=1)
    cache.store(kv, slots)
    return qkv[:, :heads]
