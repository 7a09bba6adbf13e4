"""Products of float32 matrices that are not packed: the weights of models that are calibrated.

torch multiplies with MKL, which uses AVX-512 on Intel's processors only. On others with AVX-512 the
compiled kernels are twice as fast, packing included, from a few dozen rows on.

Legend: R rows, T tokens, C columns, K inputs.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import PANEL_WIDTH, PackedWeight

MIN_ROWS = 64  # with fewer, packing the weight takes too long
CPU_INFO = Path("/proc/cpuinfo")
# Columns of a Gram matrix's blocks: those below the diagonal are copied.
GRAM_BLOCK = 24 * PANEL_WIDTH


@cache
def outruns_torch() -> bool:
    """Whether the compiled kernels multiply float32 faster than torch does on this processor."""
    if "avx512" not in (cpu_kernels.level() or ""):
        return False
    with suppress(OSError):
        return "GenuineIntel" not in CPU_INFO.read_text()
    return False


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W' + b. x: [..., K]; weight: [C, K]; bias: [C]. Returns [..., C] of x's dtype."""
    if not _is_worthwhile(x, weight):
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = _product(rows, PackedWeight.pack(weight))
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))


def add_inner_product(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float
) -> None:
    """total = beta * total + alpha * A'B. total: float32 [C, D]; a: [T, C]; b: [T, D]."""
    if _is_worthwhile(a, b):
        total.mul_(beta).add_(_product(a.T.contiguous(), _columns_of(b)), alpha=alpha)
    else:
        total.addmm_(a.T, b, beta=beta, alpha=alpha)


def add_gram_matrix(total: torch.Tensor, a: torch.Tensor, beta: float, alpha: float) -> None:
    """total = beta * total + alpha * A'A, which is symmetric. total: float32 [C, C]; a: [T, C]."""
    columns = len(total)
    block = GRAM_BLOCK if total.device.type == "cpu" else columns
    packed = _columns_of(a) if _is_worthwhile(a, a) else None
    for start in range(0, columns, block):
        part = slice(start, start + block)
        upper = total[part, start:]
        if packed is None:
            upper.addmm_(a[:, part].T, a[:, start:], beta=beta, alpha=alpha)
        else:
            panels = PackedWeight(packed.q[start // PANEL_WIDTH :], (columns - start, len(a)))
            upper.mul_(beta).add_(_product(a[:, part].T.contiguous(), panels), alpha=alpha)
        total[start + block :, part] = total[part, start + block :].T


def _is_worthwhile(x: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        cpu_kernels.supports(x)
        and not torch.is_autocast_enabled("cpu")
        and cpu_kernels.supports(other)
        and outruns_torch()
        and x.numel() >= MIN_ROWS * x.shape[-1] > 0
        and len(other) > 0
    )


def _product(rows: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """[R, K] times a weight [C, K]: [R, C]."""
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = torch.empty(len(rows), weight.shape[0])
    cpu_kernels.linear(rows, weight, None, y, 0)
    return y


def _columns_of(values: torch.Tensor) -> PackedWeight:
    """The transpose [C, T] of values [T, C] as a packed weight."""
    num_rows, columns = values.shape
    padded = functional.pad(values, (0, -columns % PANEL_WIDTH))
    panels = padded.view(num_rows, -1, PANEL_WIDTH, 1).permute(1, 0, 3, 2)
    return PackedWeight(panels.contiguous(), (columns, num_rows))
