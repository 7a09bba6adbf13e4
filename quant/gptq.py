"""GPTQ (Frantar et al., 2022, arXiv 2210.17323).

One column is rounded at a time, and the columns after it are corrected for its error.

Legend: `out` rows, `in` columns, `G` groups along `in`. H is the Hessian of the squared output
error, 2/n X'X over the n calibration tokens. Hinv is the upper Cholesky factor of H's inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.quant.algorithm import QuantizeResult, QuantTarget
from llmkit.quant.gptq_block import FP4_VALUES, FP8_VALUES, quantize_block
from llmkit.quant.grid import FULL_SEARCH, Grid, RangeSearch, fit_grid
from llmkit.quant.input_stats import (
    InputStats,
    StatKind,
    lost_fraction,
    output_energy,
    sum_of_squares,
)
from llmkit.quant.memory_estimate import trim_heap

BLOCK_SIZE = 128  # columns whose corrections of later columns are applied in one matrix product
_CHUNK_ROWS = 512  # rows processed at a time
# Multiples of the dampening that are tried until H is positive definite.
DAMPENING_MULTIPLES = (1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class GptqQuantizer:
    """Chooses quantized values that keep a linear's output close to the original."""

    dampening_frac: float = 0.01  # added to H's diagonal, as a fraction of its mean
    search: RangeSearch | None = FULL_SEARCH
    required_stats: frozenset[StatKind] = frozenset({"hessian"})
    true_sequential: bool = True
    # The share of the earlier layers' errors that a weight corrects; above 0 it needs the residual.
    asymmetry: float = 0.0

    def asymmetric(self, asymmetry: float) -> GptqQuantizer:
        """The same quantizer, which corrects this share of the earlier layers' errors."""
        residual: frozenset[StatKind] = frozenset({"residual"})
        required_stats = self.required_stats - residual
        if asymmetry > 0:
            required_stats |= residual
        return replace(self, required_stats=required_stats, asymmetry=asymmetry)

    def quantize(
        self, target: QuantTarget, weight: torch.Tensor, input_stats: InputStats
    ) -> QuantizeResult:
        """Quantize a weight [out, in]. Columns whose inputs are all zero become zero.

        Consumes the Hessian.
        """
        assert input_stats.hessian is not None
        weight = weight.float()
        dead = input_stats.hessian.diagonal() == 0
        if bool(dead.any()):
            input_stats.hessian.diagonal()[dead] = 1.0
            weight = weight.masked_fill(dead, 0.0)
        residual = input_stats.take_residual()
        if residual is not None:
            weight = asymmetric_target(
                weight, input_stats.hessian, residual, self.asymmetry, self.dampening_frac
            )
            del residual
        # Measured on SmolLM2: the importance lowers the output error of q, k and v by 5 to 9 %,
        # and that of the other linears by 0.3 %. sqrt makes a copy, so the Hessian can be freed.
        importance = input_stats.hessian.diagonal().clamp(min=0).sqrt()
        grid = fit_grid(
            weight, target.scheme, target.scale_dtype, self.search, importance, target.row_blocks
        )
        energy = output_energy(weight, input_stats.hessian)
        # Free the buffers of the search before there are two matrices of the Hessian's size.
        trim_heap()
        quantized, dampening_frac, lost = gptq(
            weight, input_stats, grid, dampening_frac=self.dampening_frac
        )
        error = lost_fraction(lost, energy)
        if dampening_frac is None:
            reason = "its Hessian is not positive definite even with the most damping"
            return QuantizeResult(quantized, "rtn", None, reason, error)
        return QuantizeResult(quantized, "gptq", dampening_frac, None, error)


def asymmetric_target(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    residual: torch.Tensor,
    asymmetry: float,
    dampening_frac: float,
) -> torch.Tensor:
    """The weight [out, in] that GPTQ approximates to correct the earlier layers' errors (GPTAQ).

    With the inputs X and those of the unquantized model, X_dense, the quantized weight Q shall have
    a small |Q X - W X_dense|^2 (Li et al., 2025, arXiv 2504.02692). That differs by a constant from
    |(Q - T) X|^2 with T = W + W R inverse(H), so GPTQ on T minimizes it. R and H are the residual
    and the Hessian of `InputStats`. A full correction would fit the calibration text too closely:
    `asymmetry` is its share. Returns the weight itself if no dampening makes H positive definite.
    """
    dampened = hessian.clone()
    dampened.diagonal().add_(dampening_frac * hessian.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(dampened)
    del dampened
    if info.item() != 0:
        return weight
    correction = torch.cholesky_solve((weight @ residual).T, factor).T
    if not bool(torch.isfinite(correction).all()):
        return weight
    return weight + asymmetry * correction


def gptq(
    weight: torch.Tensor,
    input_stats: InputStats,
    grid: Grid,
    *,
    dampening_frac: float = 0.01,
    act_order: bool = True,
    block_size: int = BLOCK_SIZE,
) -> tuple[QuantizedWeight, float | None, float]:
    """Quantize a float32 weight [out, in] on `grid` with the Hessian of `input_stats`.

    The weight is not changed. The Hessian is consumed: there are never more than two matrices of
    its size. Its diagonal must hold no zero. With `act_order` the columns are visited from the
    largest diagonal of H to the smallest. Groups keep their columns, so the quantized values are
    stored in the original order, without a group index.

    Returns the quantized weight, the dampening fraction that was used and the lost output energy,
    tr(dW H dW'). The fraction is None when no dampening was enough and the weight was rounded to
    nearest.
    """
    hessian = input_stats.take_hessian()
    columns = weight.shape[1]
    group_size = columns if grid.scheme.group_size == -1 else grid.scheme.group_size
    perm = torch.arange(columns, device=weight.device)
    if act_order:
        perm = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = _permute(hessian, perm.flip(0))
    hinv, used_frac, added = _reversed_hinv(hessian, dampening_frac)
    if hinv is None:
        quantized = grid.round(weight)
        reversed_error = (weight - quantized.dequantize())[:, perm.flip(0)]
        return quantized, None, output_energy(reversed_error, hessian)
    del hessian
    group_index = (torch.arange(columns, device=weight.device) // group_size)[perm]
    q, lost = _quantize_columns(
        _permuted_columns(weight, perm), hinv, grid, group_index, block_size
    )
    quantized = grid.weight_of(torch.empty_like(q).index_copy_(0, perm, q).T.contiguous())
    # The loop measures the loss against the dampened H. Subtract the dampening's part.
    lost = max(0.0, lost - added * squared_distance(weight, quantized))
    return quantized, used_frac, lost


def _permute(matrix: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """matrix[perm][:, perm], with one copy at a time."""
    result = matrix[perm]
    for start in range(0, len(result), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        result[rows] = result[rows][:, perm]
    return result


def _permuted_columns(weight: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """weight.T[perm], with one copy at a time.

    A column of the weight is a contiguous row of the result. That makes the column loop fast.
    """
    result = torch.empty(weight.shape[1], len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        result[:, rows] = weight[rows][:, perm].T
    return result


def _reversed_hinv(
    hessian: torch.Tensor, dampening_frac: float
) -> tuple[torch.Tensor | None, float | None, float]:
    """Hinv [in, in] of a Hessian, both with rows and columns in reverse order.

    H = R R' with R upper triangular is the Cholesky factorization of the reversed H, and Hinv is
    R's inverse. That takes one factorization and one triangular inverse; H itself is never
    inverted. Returns Hinv, the dampening as a fraction of the mean diagonal, and the value added to
    the diagonal. Hinv is None when no dampening makes H positive definite.
    """
    mean = hessian.diagonal().mean().item()
    undampened = hessian.diagonal().clone()
    for multiple in DAMPENING_MULTIPLES:
        fraction = dampening_frac * multiple
        hessian.diagonal().copy_(undampened + fraction * mean)
        factor, info = torch.linalg.cholesky_ex(hessian)
        if info.item() == 0:
            _invert_lower_triangle(factor)
            diagonal_is_finite = bool(torch.isfinite(factor.diagonal()).all())
            if diagonal_is_finite and bool(torch.isfinite(factor[-1]).all()):
                return factor, fraction, fraction * mean
        del factor
    hessian.diagonal().copy_(undampened)
    return None, None, 0.0


def _invert_lower_triangle(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, a chunk of rows at a time."""
    for start in range(0, len(lower), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        identity = torch.eye(len(lower[rows]), dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[rows, rows], identity, upper=False)
        product = lower[rows, :start] @ lower[:start, :start]
        product = corner @ product
        lower[rows, :start] = product.neg_()
        lower[rows, rows] = corner


def _quantize_columns(
    weight: torch.Tensor,
    reversed_hinv: torch.Tensor,
    grid: Grid,
    group_index: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, float]:
    """Quantize a transposed weight [in, out], which is consumed, block by block.

    group_index [in]: the group of each row. Returns the quantized values as bytes [in, out], and
    the sum of all squared errors over Hinv's diagonal.
    """
    max_q = (1 << grid.scheme.bits) - 1
    if grid.scheme.kind == "float":
        max_q = FP4_VALUES if grid.scheme.is_fp4 else FP8_VALUES
    scales = grid.scales.T.float().contiguous()
    zeros = grid.zeros.T.float().contiguous()
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    lost = torch.zeros((), dtype=torch.float64, device=weight.device)
    columns = len(weight)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        # Hinv's rows of this block, from the diagonal on.
        hinv_rows = reversed_hinv[columns - stop : columns - start, : columns - start].flip(0, 1)
        hinv_block = hinv_rows[:, : stop - start]
        hinv_after = hinv_rows[:, stop - start :]
        groups = group_index[start:stop]
        block_q, errors = quantize_block(
            weight[start:stop], hinv_block, scales[groups], zeros[groups], max_q
        )
        q[start:stop] = grid.codes(block_q)
        weight[stop:].addmm_(hinv_after.T, errors, alpha=-1)
        lost += errors.square().sum(dtype=torch.float64)
    return q, lost.item()


def squared_distance(weight: torch.Tensor, quantized: QuantizedWeight) -> float:
    """The sum of squared differences between a weight and its quantized version."""
    total = 0.0
    for start in range(0, len(weight), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        total += sum_of_squares(weight[rows] - quantized.rows(rows).dequantize())
    return total
