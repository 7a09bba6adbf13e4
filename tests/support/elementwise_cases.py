"""Cases for the elementwise kernels, for the interpreter and for a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmkit.kernels import elementwise
from llmkit.kernels.attention import rope_and_cache
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES, KVCache
from llmkit.kernels.rope_and_cache_triton import rope_and_cache_triton

TOKENS = 7
BLOCKS = 3
BLOCK = 16
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class RopeCacheCase:
    """The heads, norms, rotation and cache of a `rope_and_cache` call."""

    heads: int
    kv_heads: int
    dim: int
    rotary_dim: int = 0
    normed: bool = False
    kv_cache_dtype: str | None = None
    dynamic_scales: bool = False
    dtype: torch.dtype = torch.float32
    interleaved: bool = False
    norm_after_rope: bool = False
    norm_subtracts_mean: bool = False
    per_head_norm: bool = False
    query_scale: bool = False

    @property
    def label(self) -> str:
        """The name of the test."""
        kind_of_scales = "dynamic" if self.dynamic_scales else "static"
        cache = f" {self.kv_cache_dtype} {kind_of_scales}" if self.kv_cache_dtype else ""
        kind = str(self.dtype).removeprefix("torch.")
        heads = f"{self.heads}+{self.kv_heads}x{self.dim}, rotary {self.rotary_dim}"
        flags = (
            "interleaved",
            "norm_after_rope",
            "norm_subtracts_mean",
            "per_head_norm",
            "query_scale",
        )
        chosen = "".join(f", {flag}" for flag in flags if getattr(self, flag))
        return f"{heads}{', normed' * self.normed}{chosen}{cache}, {kind}"


def rope_cache_cases() -> list[RopeCacheCase]:
    """Every kind of head, norm, rotation and cache."""
    plain = [
        RopeCacheCase(6, 2, 64, 64),
        RopeCacheCase(4, 1, 80, 80, normed=True),
        RopeCacheCase(8, 8, 128, 32, normed=True),
        RopeCacheCase(3, 1, 256, 256),
        RopeCacheCase(2, 1, 16, 4, normed=True),
        RopeCacheCase(5, 5, 64),
        RopeCacheCase(3, 3, 96, normed=True),
    ]
    coded = [
        RopeCacheCase(4, 2, 64, 64, normed, kind, own)
        for normed, kind, own in (
            (True, "int8", True),
            (False, "int8", False),
            (True, "fp8", True),
            (False, "fp8", False),
        )
    ]
    flags = [
        RopeCacheCase(6, 2, 64, 64, interleaved=True),
        RopeCacheCase(3, 1, 80, 20, normed=True, interleaved=True),
        RopeCacheCase(4, 2, 128, 128, normed=True, norm_after_rope=True),
        RopeCacheCase(
            5,
            1,
            96,
            48,
            True,
            "int8",
            True,
            norm_after_rope=True,
            interleaved=True,
            query_scale=True,
        ),
        RopeCacheCase(4, 4, 64, 64, normed=True, norm_subtracts_mean=True, per_head_norm=True),
        RopeCacheCase(
            6, 3, 80, 80, True, interleaved=True, norm_subtracts_mean=True, per_head_norm=True
        ),
        RopeCacheCase(3, 3, 80, 16, True, norm_after_rope=True, norm_subtracts_mean=True),
        RopeCacheCase(8, 2, 32, 32, True, norm_after_rope=True, per_head_norm=True),
        RopeCacheCase(4, 1, 128, 128, query_scale=True),
        RopeCacheCase(2, 2, 512, 128, normed=True, query_scale=True),
        RopeCacheCase(3, 1, 64, normed=True, norm_subtracts_mean=True, query_scale=True),
    ]
    return [
        replace(one, dtype=dtype)
        for one in (*plain, *coded, *flags)
        for dtype in (torch.float32, torch.float16)
    ]


Arguments = tuple[
    torch.Tensor,
    int,
    tuple[torch.Tensor, torch.Tensor] | None,
    tuple[torch.Tensor, torch.Tensor] | None,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    dict[str, bool],
    torch.Tensor,
]


def rope_cache_arguments(case: RopeCacheCase, seed: int = 0) -> Arguments:
    """Heads that are part of a wider row; a row of zeros, one of large values; a cache of NaN."""
    draw = torch.Generator().manual_seed(seed + case.dim)
    count = case.heads + 2 * case.kv_heads
    wide = torch.randn(TOKENS, count + 2, case.dim, generator=draw)
    wide[2], wide[3] = 0, wide[3] * 50
    if case.per_head_norm:
        weights = torch.rand(case.heads + case.kv_heads, case.dim, generator=draw)
    else:
        weights = torch.rand(2, case.dim, generator=draw)
    weights = weights.add(0.5).to(case.dtype)
    norms = weights.split(case.heads) if case.per_head_norm else weights.unbind()
    angles = torch.rand(TOKENS, 1, case.rotary_dim // 2, generator=draw) * 6
    rotation = (
        torch.cat((angles.cos(), angles.cos()), -1),
        torch.cat((-angles.sin(), angles.sin()), -1),
    )
    pages = (2 * case.kv_heads, BLOCKS, BLOCK)
    kind = KV_CACHE_DTYPES[case.kv_cache_dtype] if case.kv_cache_dtype else case.dtype
    kv = (
        torch.full((*pages, case.dim), 0x7F, dtype=torch.uint8).view(kind)
        if case.kv_cache_dtype
        else torch.full((*pages, case.dim), float("nan"), dtype=kind)
    )
    stored = (
        torch.rand(2 * case.kv_heads, 1, 1, generator=draw).add(0.2).mul(0.05)
        if case.kv_cache_dtype
        else None
    )
    scales = torch.full((*pages, 1), float("nan")) if case.dynamic_scales else None
    return (
        wide.to(case.dtype)[:, :count],
        case.heads,
        (norms[0], norms[-1]) if case.normed else None,
        rotation if case.rotary_dim else None,
        kv,
        scales,
        None if case.dynamic_scales else stored,
        torch.rand(TOKENS, generator=draw).add(1) if case.query_scale else None,
        {
            "interleaved": case.interleaved,
            "norm_after_rope": case.norm_after_rope,
            "norm_subtracts_mean": case.norm_subtracts_mean,
        },
        torch.randperm(BLOCKS * BLOCK, generator=draw)[:TOKENS],
    )


Placement = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def run_kernel(
    qkv: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    kv: torch.Tensor,
    scales: torch.Tensor | None,
    stored: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    flags: dict[str, bool],
    slots: torch.Tensor,
) -> Placement:
    """Returns queries, cache and scales."""
    cache = KVCache(kv, scales, stored)
    q = rope_and_cache_triton(
        qkv, heads, norms, 1e-5, rotation, cache, slots, **flags, query_scale=query_scale
    )
    return q, kv, scales


def run_reference(arguments: Arguments, grad: bool = True) -> Placement:
    """The same with torch's operators, or, if `grad` is False, with the kernels of this device.

    Where gradients are enabled, no kernel runs.
    """
    qkv, heads, norms, rotation, kv, scales, stored, query_scale, flags, slots = arguments
    kv = kv.clone()
    scales = None if scales is None else scales.clone()
    cache = KVCache(kv, scales, stored)
    with torch.set_grad_enabled(grad):
        q = rope_and_cache(
            qkv.clone(),
            heads,
            norms,
            1e-5,
            rotation,
            cache,
            slots,
            **flags,
            query_scale=query_scale,
        )
    return q, kv, scales


def assert_same_outputs(
    got: Placement, expected: Placement, arguments: Arguments, case: RopeCacheCase
) -> None:
    """Equal up to rounding: 8-bit values may differ by one. Other slots are unchanged."""
    limit = TOLERANCES[case.dtype]
    slots = arguments[-1]
    assert got[0].shape == (TOKENS, case.heads, case.dim)
    torch.testing.assert_close(got[0].cpu(), expected[0], atol=limit, rtol=limit)
    pages, wanted, before = (
        part.cpu().view(torch.uint8 if case.kv_cache_dtype else case.dtype).flatten(1, 2)
        for part in (got[1], expected[1], arguments[4])
    )
    elsewhere = torch.ones(pages.shape[1], dtype=torch.bool).index_fill(0, slots, False)
    if case.kv_cache_dtype is None:
        torch.testing.assert_close(pages[:, slots], wanted[:, slots], atol=limit, rtol=limit)
        assert pages[:, elsewhere].isnan().all()
        return
    assert torch.equal(pages[:, elsewhere], before[:, elsewhere])
    ours, theirs = (
        part[:, slots].view(KV_CACHE_DTYPES[case.kv_cache_dtype]).float()
        for part in (pages, wanted)
    )
    off = ours != theirs
    assert off.float().mean() < 0.01
    torch.testing.assert_close(
        ours, theirs, atol=1, rtol=0.13 if case.kv_cache_dtype == "fp8" else 0
    )
    if got[2] is not None and expected[2] is not None:
        torch.testing.assert_close(got[2].cpu(), expected[2], atol=0, rtol=limit, equal_nan=True)


NORM_SHAPES = [
    (rows, size, dtype)
    for rows, size in ((1, 576), (5, 100), (3, 4096))
    for dtype in (torch.float32, torch.float16)
]
Sum = tuple[torch.Tensor, torch.Tensor, float, torch.Tensor, float]


def add_norm_arguments(rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Sum:
    """Of `add_rms_norm`; a row of zeros and one of large values."""
    draw = torch.Generator().manual_seed(seed + size)
    hidden, update = torch.randn(2, rows, size, generator=draw).to(dtype)
    hidden[-1] = 0
    update[-1] = 0
    hidden[0] *= 30
    return (
        hidden,
        update,
        0.4 if rows == 5 else 1.0,
        torch.rand(size, generator=draw).to(dtype),
        1e-5,
    )


def run_elementwise(function: str, *arguments: object) -> object:
    """A function of `llmkit.kernels.elementwise`, so that one interpreter runs them all."""
    return getattr(elementwise, function)(*arguments)
