"""The compiled CPU kernels (native.c), for float32 on x86 processors with AVX2.

Each kernel has a form in torch as its reference, which runs where these do not: on GPUs, in 16 bits, on other
processors, and where llmkit was installed without a C compiler. Legend: M rows, N columns, K summed over, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

    from llmkit.kernels.attention import KvCache
    from llmkit.kernels.paging import Group

try:  # after torch, whose OpenMP it shares
    from llmkit.kernels import _native
except ImportError:
    _native = None  # type: ignore[assignment]

WIDTH = 16  # columns of a panel
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}  # uint8: 4-bit codes
MOST_HEADS, MOST_DIM, CHUNK = 48, 256, 64  # queries of a key-value head, a head's dimensions, tokens of whole blocks


def _found() -> ModuleType | None:
    return _native if _native is not None and _native.supported() else None


library = _found()


def status() -> str:
    """Whether the compiled kernels run here, and why not."""
    if library is not None:
        return "on"
    return "off, llmkit was installed without a C compiler" if _native is None else "off, a processor without AVX2"


def runs(x: torch.Tensor) -> bool:
    """Whether the compiled kernels take this tensor. They give no gradients."""
    return x.dtype is torch.float32 and library is not None and x.is_cpu and not torch.is_grad_enabled()


@dataclass(frozen=True)
class Panels:
    """A weight, WIDTH columns of the product side by side: w = scales * code - offsets, or the codes themselves.

    codes: of a kind of KINDS, as `pack` arranges them. scales, offsets: float32 [G, N rounded up to whole panels].
    """

    codes: torch.Tensor
    shape: tuple[int, int]  # [N, K]
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @classmethod
    def pack(
        cls, codes: torch.Tensor, scales: torch.Tensor | None = None, offsets: torch.Tensor | None = None
    ) -> Panels:
        """codes: [N, K], floats, int8, or uint8 up to 15, whose K and groups are even; scales, offsets: [N, G]."""
        n, k = codes.shape
        panels = -(-n // WIDTH)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, panels * WIDTH - n))
        if codes.dtype == torch.bfloat16:  # columns j and j + 8 in one word of 32 bits
            arranged = codes.view(panels, 2, WIDTH // 2, k).permute(0, 3, 2, 1)
        elif codes.dtype == torch.uint8:  # rows k and k + 1 in one byte
            pairs = codes.view(panels, WIDTH, k // 2, 2).permute(3, 0, 2, 1)
            arranged = pairs[0] | pairs[1] << 4
        else:
            arranged = codes.view(panels, WIDTH, k).transpose(1, 2)
        return cls(arranged.contiguous(), (n, k), _columns(scales, panels), _columns(offsets, panels))

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.offsets) if part is not None)

    @cached_property
    def layout(self) -> tuple[int, int, int, int, int, int, int]:
        """Kind, addresses and sizes, as `product` passes them."""
        (n, k), groups = self.shape, 1 if self.scales is None else len(self.scales)
        kind, codes = KINDS[self.codes.dtype], self.codes.data_ptr()
        return kind, codes, _address(self.scales), _address(self.offsets), n, k, k // groups


def _columns(values: torch.Tensor | None, panels: int) -> torch.Tensor | None:
    """[N, G] -> float32 [G, panels * WIDTH]"""
    if values is None:
        return None
    return torch.nn.functional.pad(values.float().T, (0, panels * WIDTH - len(values))).contiguous()


def product(x: torch.Tensor, weight: Panels, bias: torch.Tensor | None, y: torch.Tensor, column: int) -> None:
    """y[:, column : column + N] = x W' + bias. x: [M, K]; y: [M, any], contiguous; bias: whole panels."""
    assert library is not None
    (rows, width), (kind, codes, scales, offsets, n, k, group) = y.shape, weight.layout
    library.product(
        kind, x.data_ptr(), x.stride(0), codes, scales, offsets, _address(bias), y.data_ptr() + 4 * column, width, rows,
        n, k, group,
    )  # fmt: skip


def integer_product(x: torch.Tensor, weight: Panels, bias: torch.Tensor | None, y: torch.Tensor, column: int) -> None:
    """`product` with the rows of x rounded to 8 bits, for int8 codes with a scale for each column and even K."""
    assert library is not None
    (rows, width), (_, codes, scales, _, n, k, _) = y.shape, weight.layout
    library.product_integers(
        x.data_ptr(), x.stride(0), codes, scales, _address(bias), y.data_ptr() + 4 * column, width, rows, n, k
    )  # fmt: skip


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def attends(q: torch.Tensor, cache: KvCache) -> bool:
    """Whether `attention` takes these queries and this cache."""
    heads, _, size, dim = cache.kv.shape
    fits = dim % 8 == 0 and dim <= MOST_DIM and CHUNK % size == 0 and size % 4 == 0
    return runs(q) and fits and q.shape[1] <= MOST_HEADS * heads // 2 and cache.kv.dtype in (torch.float32, torch.int8)


def attention(q: torch.Tensor, cache: KvCache, group: Group, scale: float, softcap: float | None) -> torch.Tensor:
    """See `paged_attention`. q: [T, N, D], whose last two dimensions are contiguous."""
    assert library is not None
    out = torch.empty(q.shape)
    heads, _, size, dim = cache.kv.shape
    stored = cache.scales is None
    scales = cache.stored if stored else cache.scales
    sequences, queries, contexts, tables, starts = group.addresses
    library.attention(
        q.data_ptr(), out.data_ptr(), q.stride(0), cache.coded, cache.kv.data_ptr(), _address(scales), stored,
        cache.kv.stride(0), size, dim, q.shape[1], heads // 2, sequences, queries, contexts, tables, starts,
        group.window or 0, scale, softcap or 0.0,
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `norm.rms_norm`. x: contiguous."""
    assert library is not None
    y = torch.empty_like(x)
    size = x.shape[-1]
    library.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps)
    return y


def add(hidden: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    """See `residual.add`. Both contiguous."""
    assert library is not None
    y = torch.empty_like(hidden)
    library.add(hidden.data_ptr(), update.data_ptr(), y.data_ptr(), hidden.numel(), scale)
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """See `rope.rotate_`. x: [T, N, D], whose last two dimensions are contiguous."""
    assert library is not None
    tokens, heads, dim = x.shape
    library.rotate(x.data_ptr(), x.stride(0), tokens, heads, dim, cos.data_ptr(), sin.data_ptr(), cos.shape[-1] // 2)


def store(kv: torch.Tensor, slots: torch.Tensor, to: torch.Tensor) -> None:
    """Write keys and values [T, 2K, D] at `slots` of a cache [2K, blocks, block_size, D]."""
    assert library is not None
    tokens, heads, dim = kv.shape
    library.store(kv.data_ptr(), kv.stride(0), tokens, heads, dim, slots.data_ptr(), to.data_ptr(), to.stride(0))


def gate(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """See `activation.gated`. gate_up: contiguous [T, 2 * size], size a multiple of 8."""
    assert library is not None
    rows, both = gate_up.shape
    out = torch.empty(rows, both // 2)
    library.gate(gate_up.data_ptr(), out.data_ptr(), rows, both // 2, gelu)
    return out
