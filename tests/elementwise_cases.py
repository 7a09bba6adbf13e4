"""Cases for the kernels between the products, shared by the tests under the interpreter and on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmkit.kernels import elementwise
from llmkit.kernels.attention import CODES, KvCache, place

TOKENS, BLOCKS, BLOCK = 7, 3, 16
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Placed:
    """What lies around queries, keys and values."""

    heads: int
    kv_heads: int
    dim: int
    turned: int = 0  # dimensions that are rotated
    normed: bool = False
    codes: str | None = None
    own_scales: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def label(self) -> str:
        """The name of the test."""
        scales = f" {self.codes} {'own' if self.own_scales else 'stored'}" if self.codes else ""
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.heads}+{self.kv_heads}x{self.dim}, {self.turned} turned{', normed' * self.normed}{scales}, {kind}"
        )


def placed_cases() -> list[Placed]:
    """Every kind of head, norm, rotation and cache."""
    plain = [
        Placed(6, 2, 64, 64), Placed(4, 1, 80, 80, normed=True), Placed(8, 8, 128, 32, normed=True),
        Placed(3, 1, 256, 256), Placed(2, 1, 16, 4, normed=True), Placed(5, 5, 64), Placed(3, 3, 96, normed=True),
    ]  # fmt: skip
    coded = [
        Placed(4, 2, 64, 64, normed, kind, own)
        for normed, kind, own in (
            (True, "int8", True),
            (False, "int8", False),
            (True, "fp8", True),
            (False, "fp8", False),
        )
    ]
    return [replace(one, dtype=dtype) for one in (*plain, *coded) for dtype in (torch.float32, torch.float16)]


Arguments = tuple[
    torch.Tensor, int, tuple[torch.Tensor, torch.Tensor] | None, tuple[torch.Tensor, torch.Tensor] | None,
    torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor,
]  # fmt: skip


def placed_arguments(case: Placed, seed: int = 0) -> Arguments:
    """Heads of a wider row; a row of zeros, one of large values; a cache and scales of nothing finite."""
    draw = torch.Generator().manual_seed(seed + case.dim)
    count = case.heads + 2 * case.kv_heads
    wide = torch.randn(TOKENS, count + 2, case.dim, generator=draw)
    wide[2], wide[3] = 0, wide[3] * 50
    weights = torch.rand(2, case.dim, generator=draw).add(0.5).to(case.dtype)
    angles = torch.rand(TOKENS, 1, case.turned // 2, generator=draw) * 6
    rotation = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    pages = (2 * case.kv_heads, BLOCKS, BLOCK)
    kind = CODES[case.codes] if case.codes else case.dtype
    kv = torch.full((*pages, case.dim), 0x7F, dtype=torch.uint8).view(kind) if case.codes else torch.full(
        (*pages, case.dim), float("nan"), dtype=kind)  # fmt: skip
    stored = torch.rand(2 * case.kv_heads, 1, 1, generator=draw).add(0.2).mul(0.05) if case.codes else None
    scales = torch.full((*pages, 1), float("nan")) if case.own_scales else None
    return (
        wide.to(case.dtype)[:, :count], case.heads, (weights[0], weights[1]) if case.normed else None,
        rotation if case.turned else None, kv, scales, None if case.own_scales else stored,
        torch.randperm(BLOCKS * BLOCK, generator=draw)[:TOKENS],
    )  # fmt: skip


Placement = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def by_kernel(
    qkv: torch.Tensor, heads: int, norms: tuple[torch.Tensor, torch.Tensor] | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, kv: torch.Tensor, scales: torch.Tensor | None,
    stored: torch.Tensor | None, slots: torch.Tensor,
) -> Placement:  # fmt: skip
    """Queries, cache and scales."""
    q = elementwise.place(qkv, heads, norms, 1e-5, rotation, KvCache(kv, scales, stored), slots)
    return q, kv, scales


def by_reference(arguments: Arguments) -> Placement:
    """The same from torch's own form."""
    qkv, heads, norms, rotation, kv, scales, stored, slots = arguments
    kv, scales = kv.clone(), None if scales is None else scales.clone()
    with torch.enable_grad():
        q = place(qkv.clone(), heads, norms, 1e-5, rotation, KvCache(kv, scales, stored), slots)
    return q, kv, scales


def assert_placed(got: Placement, expected: Placement, arguments: Arguments, case: Placed) -> None:
    """Up to rounding: a code may be its neighbour, and what is at no slot is as it was."""
    limit, slots = TOLERANCES[case.dtype], arguments[-1]
    assert got[0].shape == (TOKENS, case.heads, case.dim)
    torch.testing.assert_close(got[0].cpu(), expected[0], atol=limit, rtol=limit)
    pages, wanted, before = (part.cpu().view(torch.uint8 if case.codes else case.dtype).flatten(1, 2)
                             for part in (got[1], expected[1], arguments[4]))  # fmt: skip
    elsewhere = torch.ones(pages.shape[1], dtype=torch.bool).index_fill(0, slots, False)
    if case.codes is None:
        torch.testing.assert_close(pages[:, slots], wanted[:, slots], atol=limit, rtol=limit)
        assert pages[:, elsewhere].isnan().all()
        return
    assert torch.equal(pages[:, elsewhere], before[:, elsewhere])
    ours, theirs = (part[:, slots].view(CODES[case.codes]).float() for part in (pages, wanted))
    off = ours != theirs
    assert off.float().mean() < 0.01
    torch.testing.assert_close(ours, theirs, atol=1, rtol=0.13 if case.codes == "fp8" else 0)
    if got[2] is not None and expected[2] is not None:
        torch.testing.assert_close(got[2].cpu(), expected[2], atol=0, rtol=limit, equal_nan=True)


SUMS = [
    (rows, size, dtype) for rows, size in ((1, 576), (5, 100), (3, 4096)) for dtype in (torch.float32, torch.float16)
]
Sum = tuple[torch.Tensor, torch.Tensor, float, torch.Tensor, float]


def sum_arguments(rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Sum:
    """Of `add_norm`; a row of zeros and one of large values."""
    draw = torch.Generator().manual_seed(seed + size)
    hidden, update = torch.randn(2, rows, size, generator=draw).to(dtype)
    hidden[-1], update[-1] = 0, 0
    hidden[0] *= 30
    return hidden, update, 0.4 if rows == 5 else 1.0, torch.rand(size, generator=draw).to(dtype), 1e-5
