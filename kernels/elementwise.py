"""The operations between the linear layers: norms, residual additions, activations, RoPE.

Legend: T tokens, H hidden, N query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import gelu, silu, softplus
from torch.nn.functional import layer_norm as torch_layer_norm
from torch.nn.functional import rms_norm as torch_rms_norm

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.input_quant import (
    InputQuant,
    LinearInput,
    QuantizedInput,
    largest_bits,
    quantize,
    scale_of_largest,
    store_quantized,
)
from llmkit.kernels.triton_support import jit, runs_triton, tl

MAX_HIDDEN = 1 << 15  # elements of a row that one Triton program holds
MAX_ACTIVATED = 1 << 13  # of the outputs of a gated activation


# "gelu" is the exact one, by the error function; "relu2" is max(x, 0) squared.
Activation = Literal["silu", "gelu_tanh", "gelu", "relu2"]


def apply_rotary_emb_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> None:
    """Rotate (RoPE, arXiv 2104.09864) the first R dimensions of each head in place, in float32.

    x: [T, N, D]; the dimensions after R are unchanged. cos, sin: float32 [T, 1, R]. The second half
    of cos equals the first half, and the first half of sin is the negative of the second half.
    Pair i is made of the dimensions i and i + R / 2, or 2 i and 2 i + 1 if `interleaved`.
    """
    rotary_dim = cos.shape[-1]
    if x.stride(2) == 1 and cpu_kernels.supports(x):
        cpu_kernels.apply_rotary_emb_(x, cos, sin, interleaved)
        return
    x = x[..., :rotary_dim]
    rotated = x.float()  # x itself when it is float32
    if interleaved:
        partner = rotated.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        cos = _interleave_halves(cos)
        sin = _interleave_halves(sin)
    else:
        partner = rotated.roll(rotary_dim // 2, -1)
    rotated.mul_(cos).addcmul_(partner, sin)
    if rotated is not x:
        x.copy_(rotated)


def _interleave_halves(values: torch.Tensor) -> torch.Tensor:
    """[..., R] -> [..., R]: element i of the two halves become elements 2 i and 2 i + 1."""
    first, second = values.chunk(2, -1)
    return torch.stack((first, second), -1).flatten(-2)


def act_and_mul(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up. gate_up: [T, 2 * size], first gate, then up. Returns [T, size]."""
    if cpu_kernels.supports(gate_up) and gate_up.is_contiguous() and gate_up.shape[1] % 16 == 0:
        return cpu_kernels.act_and_mul(gate_up, activation)
    if runs_triton(gate_up) and gate_up.is_contiguous():
        return act_and_mul_triton(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    return _activate(gate, activation).mul_(up)


def swiglu_clamped(gate_up: torch.Tensor, limit: float, alpha: float = 1.702) -> torch.Tensor:
    """gate sigmoid(alpha gate) (up + 1), with gate <= limit and -limit <= up <= limit (gpt-oss).

    gate_up: [T, 2 * size], first gate, then up. Returns [T, size].
    """
    if cpu_kernels.supports(gate_up) and gate_up.is_contiguous() and gate_up.shape[1] % 16 == 0:
        return cpu_kernels.swiglu_clamped(gate_up, limit, alpha)
    if runs_triton(gate_up) and gate_up.is_contiguous():
        return swiglu_clamped_triton(gate_up, limit, alpha)
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * (gate * alpha).sigmoid())


def act(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(x), of x's shape and dtype, for an MLP without a gate."""
    if cpu_kernels.supports(x) and x.is_contiguous():
        return cpu_kernels.act(x, activation)
    if runs_triton(x) and x.is_contiguous():
        return act_triton(x, activation)
    return _activate(x, activation)


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return silu(x)
    if activation == "relu2":
        return x.relu().square()
    return gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def xielu(
    x: torch.Tensor,
    alpha_p: torch.Tensor,
    alpha_n: torch.Tensor,
    beta: torch.Tensor,
    eps: torch.Tensor,
) -> torch.Tensor:
    """xIELU (arXiv 2411.13010), in float32, of x's shape and dtype.

    With ap = softplus(alpha_p) and an = beta + softplus(alpha_n):
    ap x^2 + beta x for x > 0, otherwise an (expm1(min(x, eps)) - x) + beta x.
    alpha_p, alpha_n, beta, eps: one element each, as a checkpoint stores them.
    """
    parameters = (alpha_p, alpha_n, beta, eps)
    if (
        cpu_kernels.supports(x)
        and x.is_contiguous()
        and all(parameter.dtype == torch.float32 for parameter in parameters)
    ):
        return cpu_kernels.xielu(x, *parameters)
    if runs_triton(x) and x.is_contiguous():
        return xielu_triton(x, *parameters)
    wide = x.float()
    alpha_p = softplus(alpha_p.float())
    alpha_n = beta.float() + softplus(alpha_n.float())
    positive = alpha_p * wide.square()
    negative = alpha_n * (wide.minimum(eps.float()).expm1() - wide)
    return (positive.where(wide > 0, negative) + beta.float() * wide).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in float32 (arXiv 1910.07467).

    x: [..., size]; weight: [size], to which any offset (Gemma's 1 + w) is already added. Returns
    x's shape and dtype.
    """
    if cpu_kernels.supports(x) and x.is_contiguous() and weight.dtype == x.dtype:
        return cpu_kernels.rms_norm(x, weight, eps)
    if weight.dtype != x.dtype:
        return torch_rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return torch_rms_norm(x, weight.shape, weight, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean) / std * weight + bias over the last dimension, in float32 (arXiv 1607.06450).

    x: [..., size]; weight, bias: [size]; None: no bias. Returns x's shape and dtype.
    """
    if cpu_kernels.supports(x) and x.is_contiguous() and weight.dtype == x.dtype:
        return cpu_kernels.layer_norm(x, weight, bias, eps)
    return torch_layer_norm(x, weight.shape, weight, bias, eps)


def add_residual(residual: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    """residual + scale * update, both [T, H]."""
    if (
        cpu_kernels.supports(residual)
        and residual.is_contiguous()
        and update.is_contiguous()
        and update.dtype == residual.dtype
    ):
        return cpu_kernels.add_residual(residual, update, scale)
    return torch.add(residual, update, alpha=scale)


def _has_triton_kernel(residual: torch.Tensor) -> bool:
    """Whether a Triton kernel computes `add_rms_norm` and `add_layer_norm`."""
    return runs_triton(residual) and residual.is_contiguous() and residual.shape[1] <= MAX_HIDDEN


def _has_cpu_kernel(residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a compiled kernel computes `add_rms_norm` and `add_layer_norm`."""
    return (
        cpu_kernels.supports(residual)
        and residual.is_contiguous()
        and update.is_contiguous()
        and weight.dtype == update.dtype == residual.dtype
    )


def add_rms_norm(
    residual: torch.Tensor,
    update: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_residual` and the `rms_norm` of the sum, in one kernel.

    Returns the sum and the normalized sum. If `update` is None, the sum is `residual`. If `weight`
    is None, nothing is normalized, and the sum is returned twice.
    """
    return _add_norm(residual, update, scale, weight, None, eps, subtract_mean=False)


def add_layer_norm(
    residual: torch.Tensor,
    update: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` with `layer_norm`."""
    return _add_norm(residual, update, scale, weight, bias, eps, subtract_mean=True)


def _add_norm(
    residual: torch.Tensor,
    update: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    subtract_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if update is not None and weight is not None:
        if _has_triton_kernel(residual):
            return _add_norm_triton(
                residual,
                update.contiguous(),
                scale,
                weight,
                bias,
                eps,
                subtract_mean=subtract_mean,
            )
        if _has_cpu_kernel(residual, update, weight):
            return cpu_kernels.add_norm(
                residual, update, scale, weight, bias, eps, subtract_mean=subtract_mean
            )
    if update is not None:
        residual = add_residual(residual, update, scale)
    if weight is None:
        return residual, residual
    if subtract_mean:
        return residual, layer_norm(residual, weight, bias, eps)
    return residual, rms_norm(residual, weight, eps)


def add_norm_quantized(
    residual: torch.Tensor,
    update: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    quant: InputQuant,
    *,
    subtract_mean: bool,
) -> tuple[torch.Tensor, LinearInput]:
    """`add_rms_norm`, or `add_layer_norm` if `subtract_mean`, for linear layers that quantize.

    The normalized sum is quantized in the same kernel where that is possible. Elsewhere it is
    returned as it is, and the linear layers quantize it.
    """
    if _has_triton_kernel(residual) and update is not None and weight is not None:
        return add_norm_quantized_triton(
            residual, update.contiguous(), scale, weight, bias, eps, quant, subtract_mean
        )
    added = residual if update is None else update
    is_bfloat16 = quant.dtype == torch.bfloat16
    if is_bfloat16 and weight is not None and _has_cpu_kernel(residual, added, weight):
        total, rounded = cpu_kernels.add_norm_rounded(
            residual, update, scale, weight, bias, eps, subtract_mean=subtract_mean
        )
        return total, QuantizedInput(rounded, torch.empty(0), len(residual), residual.dtype)
    return _add_norm(residual, update, scale, weight, bias, eps, subtract_mean=subtract_mean)


def act_and_mul_quantized(
    gate_up: torch.Tensor, activation: Activation, quant: InputQuant
) -> LinearInput:
    """`act_and_mul` for a linear layer that quantizes, in the same kernel where possible."""
    if runs_triton(gate_up) and gate_up.is_contiguous():
        return act_and_mul_quantized_triton(gate_up, activation, quant)
    return act_and_mul(gate_up, activation)


def norm_heads(
    x: torch.Tensor, weight: torch.Tensor, eps: float, subtract_mean: bool = False
) -> torch.Tensor:
    """Normalize each head: `rms_norm`, or `layer_norm` if `subtract_mean`, of its dimensions.

    x: [T, N, D]; weight: [D], or [N, D] with a weight of its own for each head.
    """
    if weight.dim() == 1:
        return layer_norm(x, weight, None, eps) if subtract_mean else rms_norm(x, weight, eps)
    wide = x.float()
    size = x.shape[-1:]
    if subtract_mean:
        normed = torch_layer_norm(wide, size, eps=eps)
    else:
        normed = torch_rms_norm(wide, size, eps=eps)
    return (normed * weight.float()).to(x.dtype)


def apply_gate(
    x: torch.Tensor,
    gate: torch.Tensor,
    activation: Literal["identity", "sigmoid", "softplus"],
) -> torch.Tensor:
    """x multiplied by the activated gate. x: [R, size]; gate: [R, size], or [R, 1]."""
    if (
        cpu_kernels.supports(x)
        and cpu_kernels.supports(gate)
        and x.is_contiguous()
        and gate.stride(1) == 1
    ):
        return cpu_kernels.apply_gate(x, gate, activation)
    wide = gate.float()
    if activation == "sigmoid":
        wide = wide.sigmoid()
    elif activation == "softplus":
        wide = softplus(wide)
    return x * wide.to(x.dtype)


def cat_heads(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[T, N, D] each, joined along N."""
    if not all(cpu_kernels.supports(part) and _is_compact(part) for part in parts):
        return torch.cat(tuple(parts), dim=1)
    num_tokens, _, head_dim = parts[0].shape
    y = torch.empty(num_tokens, sum(part.shape[1] for part in parts) * head_dim)
    first_column = 0
    for part in parts:
        columns = part.shape[1] * head_dim
        cpu_kernels.copy_columns(
            part.as_strided((num_tokens, columns), (part.stride(0), 1)), y, first_column
        )
        first_column += columns
    return y.view(num_tokens, -1, head_dim)


def _is_compact(x: torch.Tensor) -> bool:
    """Whether the last two dimensions of x [T, N, D] are contiguous."""
    return x.stride()[1:] == (x.shape[2], 1)


def scale_tokens_(x: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply each token of x [T, N, D] by its factor in place.

    factors: float32 [T]; they are rounded to the dtype of x first.
    """
    if cpu_kernels.supports(x) and x.stride()[1:] == (x.shape[2], 1):
        cpu_kernels.scale_tokens_(x, factors)
        return
    x.mul_(factors[:, None, None].to(x.dtype))


def add_rms_norm_triton(
    residual: torch.Tensor, update: torch.Tensor, scale: float, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` as one kernel. residual, update: contiguous, at most MAX_HIDDEN wide."""
    return _add_norm_triton(residual, update, scale, weight, None, eps, subtract_mean=False)


def add_layer_norm_triton(
    residual: torch.Tensor,
    update: torch.Tensor,
    scale: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_layer_norm` as one kernel. residual, update: contiguous, at most MAX_HIDDEN wide."""
    return _add_norm_triton(residual, update, scale, weight, bias, eps, subtract_mean=True)


def _add_norm_triton(
    residual: torch.Tensor,
    update: torch.Tensor,
    scale: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    subtract_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.empty_like(residual)
    normed = torch.empty_like(residual)
    _launch_add_norm(
        residual, update, scale, weight, bias, eps, total, normed, None, None, subtract_mean
    )
    return total, normed


def add_norm_quantized_triton(
    residual: torch.Tensor,
    update: torch.Tensor,
    scale: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    quant: InputQuant,
    subtract_mean: bool,
) -> tuple[torch.Tensor, QuantizedInput]:
    """`add_norm_quantized` as one kernel. residual, update: as `add_rms_norm_triton` takes them.

    The result equals `quantize_input` of the normalized sum.
    """
    total = torch.empty_like(residual)
    rows, size = residual.shape
    normed = quant.empty(rows, size, residual)
    _launch_add_norm(
        residual,
        update,
        scale,
        weight,
        bias,
        eps,
        total,
        normed.values,
        normed.scales,
        quant,
        subtract_mean,
    )
    return total, normed


def _launch_add_norm(
    residual: torch.Tensor,
    update: torch.Tensor,
    scale: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    total: torch.Tensor,
    normed: torch.Tensor,
    normed_scales: torch.Tensor | None,
    quant: InputQuant | None,
    subtract_mean: bool,
) -> None:
    """Write the sum to `total` and the normalized sum, quantized or not, to `normed`."""
    rows, size = residual.shape
    tile = max(128, 1 << (size - 1).bit_length())
    with torch.cuda.device_of(residual):
        _add_norm_kernel[(rows,)](
            residual,
            update,
            weight,
            bias,
            total,
            normed,
            normed_scales,
            None if quant is None else quant.scale,
            scale,
            eps,
            size,
            1 if normed_scales is None else normed_scales.shape[1],
            SUBTRACT_MEAN=subtract_mean,
            GROUP=0 if quant is None else quant.group_size,
            MAX_VALUE=0.0 if quant is None else quant.max_value,
            E8M0=quant is not None and quant.scale_format == "e8m0",
            TILE=tile,
            num_warps=max(1, min(16, tile // 512)),
        )


def act_and_mul_triton(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`act_and_mul` as one kernel. gate_up: contiguous [T, 2 * size]."""
    rows, both = gate_up.shape
    y = gate_up.new_empty(rows, both // 2)
    with torch.cuda.device_of(gate_up):
        _act_and_mul_kernel[rows, -(-both // 2048)](
            gate_up, y, both // 2, ACTIVATION=activation, TILE=1024
        )
    return y


def act_and_mul_quantized_triton(
    gate_up: torch.Tensor, activation: Activation, quant: InputQuant
) -> QuantizedInput:
    """`act_and_mul_quantized` as one kernel. gate_up: contiguous [T, 2 * size].

    The result equals `quantize_input` of `act_and_mul_triton`.
    """
    rows, both = gate_up.shape
    size = both // 2
    y = quant.empty(rows, size, gate_up)
    one_scale_per_row = not quant.group_size and quant.scale is None
    tile = 1024
    if one_scale_per_row:
        # A program computes whole rows: in one tile, or tile by tile, twice.
        tile = min(MAX_ACTIVATED, max(128, 1 << (size - 1).bit_length()))
    tiles = -(-size // tile)
    with torch.cuda.device_of(gate_up):
        _act_and_mul_quantize_kernel[rows, 1 if one_scale_per_row else tiles](
            gate_up,
            y.values,
            y.scales,
            quant.scale,
            size,
            y.scales.shape[1],
            ACTIVATION=activation,
            GROUP=quant.group_size,
            MAX_VALUE=quant.max_value,
            E8M0=quant.scale_format == "e8m0",
            IS_ONE_TILE=not one_scale_per_row or tiles == 1,
            TILE=tile,
            num_warps=min(16, max(4, tile // 512)),
        )
    return y


def act_triton(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`act` as one kernel. x: contiguous."""
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _act_kernel[(-(-x.numel() // 1024),)](x, y, x.numel(), ACTIVATION=activation, TILE=1024)
    return y


def xielu_triton(
    x: torch.Tensor,
    alpha_p: torch.Tensor,
    alpha_n: torch.Tensor,
    beta: torch.Tensor,
    eps: torch.Tensor,
) -> torch.Tensor:
    """`xielu` as one kernel. x: contiguous."""
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _xielu_kernel[(-(-x.numel() // 1024),)](
            x, y, x.numel(), alpha_p, alpha_n, beta, eps, TILE=1024
        )
    return y


def swiglu_clamped_triton(gate_up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """`swiglu_clamped` as one kernel. gate_up: contiguous [T, 2 * size]."""
    rows, both = gate_up.shape
    y = gate_up.new_empty(rows, both // 2)
    with torch.cuda.device_of(gate_up):
        _swiglu_clamped_kernel[rows, -(-both // 2048)](
            gate_up, y, both // 2, limit, alpha, TILE=1024
        )
    return y


@jit
def _add_norm_kernel(
    residual: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    normed_scales: tl.tensor,
    static_scale: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    num_scales: tl.tensor,
    SUBTRACT_MEAN: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    E8M0: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program computes one row: an RMS norm, or a layer norm with SUBTRACT_MEAN.

    As in torch, the sum is rounded to the dtype before the norm. With `normed_scales`, the norm is
    then quantized, see `store_quantized`.
    """
    d = tl.arange(0, TILE)
    at = tl.program_id(0).to(tl.int64) * size + d
    inside = d < size
    x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    x = (x + scale * added).to(total.dtype.element_ty)
    tl.store(total + at, x, mask=inside)
    wide = x.to(tl.float32)
    if SUBTRACT_MEAN:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / size, 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    wide *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        wide += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if normed_scales is None:
        tl.store(normed + at, wide.to(normed.dtype.element_ty), mask=inside)
    else:
        row = tl.program_id(0).to(tl.int64)
        store_quantized(
            wide.to(total.dtype.element_ty).to(tl.float32),
            normed + row * size,
            normed_scales + row * num_scales,
            static_scale,
            size,
            GROUP,
            MAX_VALUE,
            E8M0,
            TILE,
        )


@jit
def _act_and_mul_kernel(
    gate_up: tl.tensor, y: tl.tensor, size: tl.tensor, ACTIVATION: tl.constexpr, TILE: tl.constexpr
) -> None:
    """A program computes TILE outputs of a row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    out = _activated_tile(gate_up + row * 2 * size, d, size, ACTIVATION)
    tl.store(y + row * size + d, out, mask=d < size)


@jit
def _activated_tile(
    gate_up: tl.tensor, d: tl.tensor, size: tl.tensor, ACTIVATION: tl.constexpr
) -> tl.tensor:
    """The outputs d of a row that begins at `gate_up`, in its dtype; 0 from `size` on."""
    inside = d < size
    gate = tl.load(gate_up + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + size + d, mask=inside, other=0.0).to(tl.float32)
    return (_activate_tile(gate, ACTIVATION) * up).to(gate_up.dtype.element_ty)


@jit
def _act_and_mul_quantize_kernel(
    gate_up: tl.tensor,
    q: tl.tensor,
    scales: tl.tensor,
    static_scale: tl.tensor,
    size: tl.tensor,
    num_scales: tl.tensor,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    E8M0: tl.constexpr,
    IS_ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program computes TILE outputs of a row, or all of them unless IS_ONE_TILE.

    A row of several tiles is computed twice: for its scale, and then for its values.
    """
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * 2 * size
    q += row * size
    scales += row * num_scales
    d = tl.arange(0, TILE)
    if IS_ONE_TILE:
        first = tl.program_id(1) * TILE
        out = _activated_tile(gate_up, first + d, size, ACTIVATION).to(tl.float32)
        if GROUP:
            scales += first // GROUP
        left = size - first
        store_quantized(out, q + first, scales, static_scale, left, GROUP, MAX_VALUE, E8M0, TILE)
    else:
        bits = 0
        for first in tl.range(0, size, TILE):
            out = _activated_tile(gate_up, first + d, size, ACTIVATION).to(tl.float32)
            bits = tl.maximum(bits, largest_bits(out))
        scale = scale_of_largest(bits, MAX_VALUE)
        tl.store(scales, scale)
        for first in tl.range(0, size, TILE):
            out = _activated_tile(gate_up, first + d, size, ACTIVATION).to(tl.float32)
            values = quantize(out, scale, MAX_VALUE).to(q.dtype.element_ty)
            tl.store(q + first + d, values, mask=first + d < size)


@jit
def _act_kernel(
    x: tl.tensor, y: tl.tensor, size: tl.tensor, ACTIVATION: tl.constexpr, TILE: tl.constexpr
) -> None:
    """A program computes TILE elements."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    values = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    out = _activate_tile(values, ACTIVATION)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=at < size)


@jit
def _activate_tile(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """act(x) in float32.

    silu(x) = x sigmoid(x); gelu_tanh(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u).
    """
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu_tanh":
        y = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "gelu":
        y = x * (1 + tl.erf(x * 0.7071067811865476)) * 0.5
    else:
        positive = tl.where(x < 0, 0.0, x)  # NaN stays NaN
        y = positive * positive
    return y


@jit
def _xielu_kernel(
    x: tl.tensor,
    y: tl.tensor,
    size: tl.tensor,
    alpha_p: tl.tensor,
    alpha_n: tl.tensor,
    beta: tl.tensor,
    eps: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program computes TILE elements. alpha_p, alpha_n, beta, eps: one element each."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    values = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    slope = tl.load(beta).to(tl.float32)
    ap = _softplus(tl.load(alpha_p).to(tl.float32))
    an = slope + _softplus(tl.load(alpha_n).to(tl.float32))
    limit = tl.load(eps).to(tl.float32)
    m = tl.where(values < limit, values, limit)
    # e^m - 1 - m: near 0, where that would cancel, the first terms of its series.
    series = 1 / 720 + m * (1 / 5040 + m * (1 / 40320 + m * (1 / 362880)))
    series = m * m * (0.5 + m * (1 / 6 + m * (1 / 24 + m * (1 / 120 + m * series))))
    curve = tl.where(m > -0.7, series, tl.exp(m) - 1 - m)
    negative = an * (curve + (m - values))
    out = tl.where(values > 0, ap * values * values, negative) + slope * values
    tl.store(y + at, out.to(y.dtype.element_ty), mask=at < size)


@jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x); from 20 on, x itself, as in torch."""
    return tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))


@jit
def _swiglu_clamped_kernel(
    gate_up: tl.tensor,
    y: tl.tensor,
    size: tl.tensor,
    limit: tl.tensor,
    alpha: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program computes TILE outputs of a row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = d < size
    gate = tl.load(gate_up + row * 2 * size + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + d, mask=inside, other=0.0).to(tl.float32)
    out = clamped_swiglu(gate, up, limit, alpha)
    tl.store(y + row * size + d, out.to(y.dtype.element_ty), mask=inside)


@jit
def clamped_swiglu(gate: tl.tensor, up: tl.tensor, limit: tl.tensor, alpha: tl.tensor) -> tl.tensor:
    """`swiglu_clamped` of float32 tensors in a Triton kernel. NaN stays NaN."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    return (up + 1) * gate / (1 + tl.exp(-alpha * gate))
