"""What lies between the products: norms (arXiv 1910.07467), the residual stream, gated activations, rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import gelu, silu
from torch.nn.functional import rms_norm as torch_rms_norm

from llmkit.kernels import native
from llmkit.kernels.jit import jit, runs_triton, tl
from llmkit.kernels.quantized_linear import codes_of, own_scale
from llmkit.kernels.rounding import FP8, FP8_MAX, INT8_MAX

if TYPE_CHECKING:
    from llmkit.kernels.attention import KvCache, Pair

MOST_HIDDEN = 1 << 15  # elements of a row that a program holds


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate (RoPE, arXiv 2104.09864) the first 2R dimensions of each head where they are, in float32; the others stay.

    x: [T, N, D]; cos, sin: float32 [T, 1, 2R], the second half of cos as the first, and of sin its negative first.
    """
    size = cos.shape[-1]
    compact = x.stride()[1:] == (x.shape[2], 1)
    if compact and native.runs(x):
        native.rotate(x, cos, sin)
        return
    x = x[..., :size]
    wide = x.float()  # x itself when that is its dtype
    other = wide.roll(size // 2, -1)
    wide.mul_(cos).addcmul_(other, sin)
    if wide is not x:
        x.copy_(wide)


def gated(gate_up: torch.Tensor, activation: Literal["silu", "gelu_tanh"]) -> torch.Tensor:
    """act(gate) * up. gate_up: [T, 2 * size], gate first. Returns [T, size]."""
    if native.runs(gate_up) and gate_up.is_contiguous() and gate_up.shape[1] % 16 == 0:
        return native.gate(gate_up, activation == "gelu_tanh")
    if runs_triton(gate_up) and gate_up.is_contiguous():
        return gated_triton(gate_up, activation == "gelu_tanh")
    gate, up = gate_up.chunk(2, dim=-1)
    return (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")).mul_(up)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in float32.

    x: [..., size]; weight: [size], any offset (Gemma's 1 + w) already added. Returns x's shape and dtype.
    """
    if native.runs(x) and x.is_contiguous() and weight.dtype == x.dtype:
        return native.rms_norm(x, weight, eps)
    return torch_rms_norm(x, weight.shape, weight, eps)


def add(hidden: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    """hidden + scale * update, both [T, H]."""
    if native.runs(hidden) and hidden.is_contiguous() and update.is_contiguous() and update.dtype == hidden.dtype:
        return native.add(hidden, update, scale)
    return torch.add(hidden, update, alpha=scale)


def add_norm(
    hidden: torch.Tensor, update: torch.Tensor | None, scale: float, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum that `add` gives and its `rms_norm`. Without an update the sum is hidden, and without a weight both are
    the sum."""
    fits = runs_triton(hidden) and hidden.is_contiguous() and hidden.shape[1] <= MOST_HIDDEN
    if fits and update is not None and weight is not None:
        return add_norm_triton(hidden, update.contiguous(), scale, weight, eps)
    if update is not None:
        hidden = add(hidden, update, scale)
    return hidden, hidden if weight is None else rms_norm(hidden, weight, eps)


def place(
    qkv: torch.Tensor, heads: int, norms: Pair | None, eps: float, rotation: Pair | None, cache: KvCache,
    slots: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """See `attention.place`. qkv: its last two dimensions are contiguous, the last has 256 elements at most."""
    tokens, count, dim = qkv.shape
    q, padded = qkv.new_empty(tokens, heads, dim), max(16, 1 << (dim - 1).bit_length())
    (q_norm, k_norm), (cos, sin) = norms or (None, None), rotation or (None, None)
    most = {torch.int8: INT8_MAX, FP8: FP8_MAX}.get(cache.kv.dtype, 0.0)
    scales, tile = cache.stored if cache.scales is None else cache.scales, 1024 // padded
    with torch.cuda.device_of(qkv):
        _place[tokens, -(-count // tile)](
            qkv, q, cache.kv, slots, q_norm, k_norm, cos, sin, scales, qkv.stride(0), cache.kv.stride(0), eps,
            heads, count, dim, padded, tile, 0 if cos is None else cos.shape[-1], most, int(cache.scales is not None),
        )  # fmt: skip
    return q


def add_norm_triton(
    hidden: torch.Tensor, update: torch.Tensor, scale: float, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_norm` as one kernel. hidden, update: contiguous, MOST_HIDDEN wide at most."""
    (rows, size), total, normed = hidden.shape, torch.empty_like(hidden), torch.empty_like(hidden)
    tile = max(128, 1 << (size - 1).bit_length())
    with torch.cuda.device_of(hidden):
        _add_norm[(rows,)](
            hidden, update, weight, total, normed, scale, eps, size, TILE=tile, num_warps=max(1, min(16, tile // 512))
        )
    return total, normed


def gated_triton(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """`gated` as one kernel. gate_up: contiguous [T, 2 * size]."""
    rows, both = gate_up.shape
    y = gate_up.new_empty(rows, both // 2)
    with torch.cuda.device_of(gate_up):
        _gate[rows, -(-both // 2048)](gate_up, y, both // 2, GELU=gelu, TILE=1024)
    return y


@jit
def _place(
    qkv: tl.tensor, q: tl.tensor, kv: tl.tensor, slots: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor,
    cos: tl.tensor, sin: tl.tensor, scales: tl.tensor, stride: tl.tensor, head_size: tl.tensor, eps: tl.tensor,
    HEADS: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    TURNED: tl.constexpr, MOST: tl.constexpr, OWN_SCALES: tl.constexpr,
) -> None:  # fmt: skip
    """TILE of a token's COUNT heads, the first HEADS of them queries'. Each step rounds to the dtype, as in torch."""
    token, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, PADDED)
    dtype: tl.constexpr = qkv.dtype.element_ty
    inside, row = (head < COUNT)[:, None] & (d < DIM)[None, :], qkv + token * stride + head[:, None] * DIM
    x = _head(row, d, inside, head, q_norm, k_norm, eps, HEADS, COUNT, DIM)
    if cos is not None:
        near = d < TURNED
        partner = tl.where(near, tl.where(d < TURNED // 2, d + TURNED // 2, d - TURNED // 2), d)
        other = _head(row, partner, inside, head, q_norm, k_norm, eps, HEADS, COUNT, DIM)
        c = tl.load(cos + token * TURNED + d, mask=near, other=1.0)[None, :]
        s = tl.load(sin + token * TURNED + d, mask=near, other=0.0)[None, :]
        x = tl.where(head[:, None] < (HEADS + COUNT) // 2, (x * c + other * s).to(dtype).to(tl.float32), x)
    at = q + (token * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(at, x.to(dtype), mask=inside & (head < HEADS)[:, None])
    own, slot, line = (head >= HEADS) & (head < COUNT), tl.load(slots + token), (head - HEADS).to(tl.int64)
    if OWN_SCALES:
        scale = own_scale(x, MOST)
        tl.store(scales + line * (head_size // DIM) + slot, scale, mask=own)
    elif MOST > 0:
        scale = tl.load(scales + line, mask=own, other=1.0)
    if MOST > 0:
        x = codes_of(x, scale[:, None], MOST)
    at = kv + line[:, None] * head_size + slot * DIM + d[None, :]
    tl.store(at, x.to(kv.dtype.element_ty), mask=inside & own[:, None])


@jit
def _head(
    row: tl.tensor, at: tl.tensor, inside: tl.tensor, head: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor,
    eps: tl.tensor, HEADS: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The dimensions `at`, all of them in some order, of some heads; of queries and keys normalised."""
    x = tl.load(row + at[None, :], mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if q_norm is not None:
        q = tl.load(q_norm + at, mask=at < DIM, other=0.0).to(tl.float32)[None, :]
        k = tl.load(k_norm + at, mask=at < DIM, other=0.0).to(tl.float32)[None, :]
        normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)[:, None] * tl.where(head[:, None] < HEADS, q, k)
        wide = tl.where(head[:, None] < (HEADS + COUNT) // 2, normed.to(x.dtype).to(tl.float32), wide)
    return wide


@jit
def _add_norm(
    hidden: tl.tensor, update: tl.tensor, weight: tl.tensor, total: tl.tensor, normed: tl.tensor, scale: tl.tensor,
    eps: tl.tensor, size: tl.tensor, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One row. What is normalised is the sum as it is rounded to the dtype."""
    d = tl.arange(0, TILE)
    at, inside = tl.program_id(0).to(tl.int64) * size + d, d < size
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    x = (x + scale * tl.load(update + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
    tl.store(total + at, x, mask=inside)
    wide = x.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    wide *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, wide.to(normed.dtype.element_ty), mask=inside)


@jit
def _gate(x: tl.tensor, y: tl.tensor, size: tl.tensor, GELU: tl.constexpr, TILE: tl.constexpr) -> None:
    """TILE outputs of a row: g up times the logistic of g, or of 2 u with gelu's tanh(u)."""
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    g = tl.load(x + row * 2 * size + d, mask=d < size, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + d, mask=d < size, other=0.0).to(tl.float32)
    inner = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    tl.store(y + row * size + d, (g * up / (1 + tl.exp(-inner))).to(y.dtype.element_ty), mask=d < size)
