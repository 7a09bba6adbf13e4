"""What lies between the products on a GPU, one Triton kernel each: rotation of queries and keys, gated activation."""

from __future__ import annotations

import torch

from llmkit.kernels.jit import jit, tl


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """See `rope.rotate_`. x: [T, N, D], whose last two dimensions are contiguous."""
    (tokens, heads, dim), half = x.shape, cos.shape[-1] // 2
    with torch.cuda.device_of(x):
        _rotate[(tokens,)](
            x, cos, sin, x.stride(0), heads, DIM=dim, HALF=half, PADDED=1 << (half - 1).bit_length(),
            HEADS=1 << (heads - 1).bit_length(),
        )  # fmt: skip


def gate(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """See `activation.gated`. gate_up: contiguous [T, 2 * size]."""
    rows, both = gate_up.shape
    y = gate_up.new_empty(rows, both // 2)
    with torch.cuda.device_of(gate_up):
        _gate[rows, -(-both // 2048)](gate_up, y, both // 2, GELU=gelu, TILE=1024)
    return y


@jit
def _rotate(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, stride: tl.tensor, heads: tl.tensor, DIM: tl.constexpr,
    HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
) -> None:  # fmt: skip
    """All heads of a token, in place."""
    token, head, d = tl.program_id(0), tl.arange(0, HEADS)[:, None], tl.arange(0, PADDED)
    inside = (head < heads) & (d < HALF)[None, :]
    at = x + token.to(tl.int64) * stride + head * DIM + d[None, :]
    left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * 2 * HALF + d, mask=d < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * 2 * HALF + HALF + d, mask=d < HALF, other=0.0)[None, :]
    tl.store(at, (left * c - right * s).to(x.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (right * c + left * s).to(x.dtype.element_ty), mask=inside)


@jit
def _gate(x: tl.tensor, y: tl.tensor, size: tl.tensor, GELU: tl.constexpr, TILE: tl.constexpr) -> None:
    """TILE outputs of a row: g up times the logistic of g, or of 2 u with gelu's tanh(u)."""
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    g = tl.load(x + row * 2 * size + d, mask=d < size, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + d, mask=d < size, other=0.0).to(tl.float32)
    inner = 1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g
    tl.store(y + row * size + d, (g * up / (1 + tl.exp(-inner))).to(y.dtype.element_ty), mask=d < size)
