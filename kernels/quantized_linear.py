"""Products with quantized weights on a GPU: y = x W' + b with W [N, K] held in 4 or 8 bits.

What they compute is `QuantizedWeight.dequantize` and, for inputs of 8 bits, `rounding.token_codes`.
Legend: M rows of x, N outputs, K inputs, G groups of inputs. Codes lie in words of 16 bits with F = 16 / bits fields, W
words to a block of F W inputs: field f of word [b, n, w] is for output n and input (b F + f) W + w. So a field of
a tile of words is a tile of the weight, in the registers that a tensor core takes it from.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, pad

from llmkit.kernels.jit import jit, tl
from llmkit.kernels.rounding import FP8, FP8_MAX, INT8_MAX
from llmkit.kernels.tuning import Tunable

CROSSOVER = 512  # rows above which it is faster to dequantize W once, at most
# Up to how many rows: rows and outputs of a tile, warps, stages, programs wanted for each multiprocessor.
TILES = ((16, 16, 64, 2, 4, 4), (32, 32, 64, 4, 3, 3), (CROSSOVER, 64, 64, 4, 2, 3))
TILE_OF_FLOAT32 = (CROSSOVER, 16, 64, 4, 2, 4)
TILE = Tunable("grouped_product", ((16, 32, 64), (32, 64, 128), (2, 4, 8), (2, 3, 4, 5), (1, 2, 3, 4, 6, 8)))
MOST_ROWS = Tunable("grouped_rows", ((32, 64, 128, 256, CROSSOVER),))  # the crossover


class GroupedProduct:
    """W = (codes - zeros) * scales, with inputs in the model's dtype.

    codes: uint8 [N, K], of `bits` 4 or 8; scales: float [N, G], of which 16 bits of the fraction are kept; zeros: uint8
    [N, G]; group: inputs of a group, a multiple of 32, or -1 for whole rows; bias: [N].
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int,
                 bias: torch.Tensor | None = None) -> None:  # fmt: skip
        N, K = codes.shape
        fields, symmetric = 16 // bits, bool((zeros == 1 << (bits - 1)).all())
        width = 32 if group % 64 == 32 or K % (64 * fields) else 64
        codes = pad(codes, (0, -K % (width * fields))).view(N, -1, fields, width)
        if bits == 4:
            codes = codes[:, :, ::2] | codes[:, :, 1::2] << 4
        self._words = codes.permute(1, 0, 3, 2).contiguous().view(torch.int16)
        self._grids = (((scales.float().view(torch.int32) + 128) & -256) | zeros).T.contiguous()  # a load for both
        self._form = {"BITS": bits, "GROUP": group if group > 0 else 1 << 30, "SYMMETRIC": symmetric, "W": width}
        self._bias, self.nbytes = bias, self._words.nbytes + self._grids.nbytes

    def __call__(self, x: torch.Tensor, splits: int = 0) -> torch.Tensor:
        """x: [..., K]. Returns [..., N] in x's dtype. splits: how many sums the blocks make, 0 for the best."""
        rows, (blocks, N) = x.reshape(-1, x.shape[-1]).contiguous(), self._words.shape[:2]
        M, K = rows.shape
        shape: tuple[object, ...] = (self._form["BITS"], self._form["GROUP"], N, K, x.dtype)
        if M > CROSSOVER or MOST_ROWS.config(shape, (CROSSOVER,), x.device)[0] < M:
            return linear(x, self.dequantize(K, x.dtype), self._bias)
        tile = TILE_OF_FLOAT32 if x.dtype == torch.float32 else next(tile for tile in TILES if tile[0] >= M)
        shape = (*shape, max(16, 1 << (M - 1).bit_length()))
        BM, BN, warps, stages, programs = TILE.config(shape, tile[1:], x.device)
        tiles = (-(-M // BM), -(-N // BN))
        if not splits:
            cores = torch.cuda.get_device_properties(x.device).multi_processor_count
            splits = max(1, min(programs * cores // (tiles[0] * tiles[1]), blocks // 2, 16))
        each = -(-blocks // splits)
        splits = -(-blocks // each)  # of which none is empty
        y = torch.empty(splits, M, N, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            bias, kernel = None if splits > 1 else self._bias, _grouped_product[(*tiles, splits)]
            kernel(rows, self._words, self._grids, bias, y, M, N, K, each, **self._form, BM=BM, BN=BN, STAGES=stages,
                   num_warps=warps)  # fmt: skip
        return (finish(y, M, x.dtype, self._bias) if splits > 1 else y[0]).view(*x.shape[:-1], N)

    def dequantize(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight [N, K]."""
        blocks, N = self._words.shape[:2]
        weight = torch.empty(N, columns, dtype=dtype, device=self._words.device)
        with torch.cuda.device_of(weight):
            _dequantize[(blocks, -(-N // 64))](self._words, self._grids, weight, N, columns, **self._form, BN=64)
        return weight


class RoundedProduct:
    """Weights and inputs of 8 bits, int8 or FP8 e4m3, multiplied as such; each row of either has a scale of its own.

    codes: [N, K], N and K multiples of 8, or of 16 for FP8; scales: [N, 1]; scale: float32 [1] stored for all inputs.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
                 scale: torch.Tensor | None = None) -> None:  # fmt: skip
        self._codes, self._scales, self._scale = codes.T, scales.float().T.contiguous(), scale
        self._bias = bias.to(torch.bfloat16) if bias is not None and codes.dtype == FP8 else bias
        self.nbytes = codes.nbytes + self._scales.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K]. Returns [..., N] in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        codes, scales = quantize_rows(rows, self._codes.dtype, self._scale)
        if codes.dtype == FP8:  # a few rows wait for memory: their sums may as well be exact
            fast = len(rows) > 64
            y = torch._scaled_mm(codes, self._codes, scales, self._scales, self._bias, None, torch.bfloat16, fast)
            y = y.to(x.dtype)
        else:
            sums = torch._int_mm(codes, self._codes)[None]
            y = finish(sums, len(rows), x.dtype, self._bias, scales, self._scales)
        return y.view(*x.shape[:-1], y.shape[1])


def quantize_rows(x: torch.Tensor, dtype: torch.dtype,
                  scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [M, K] in codes of int8 or FP8, and their scales, float32 [M, 1]: each row's own, or `scale` [1].

    Of int8 there are as many rows as `_int_mm` takes: at least 32, in eights; those beyond M are not set.
    """
    (M, K), floats = x.shape, dtype == FP8
    codes = x.new_empty(M if floats else max(32, M + -M % 8), K, dtype=dtype)
    scales, tile = x.new_empty(M, 1, dtype=torch.float32), 1 << (K - 1).bit_length()
    most, warps = FP8_MAX if floats else INT8_MAX, min(16, max(4, tile // 1024))
    with torch.cuda.device_of(x):
        _quantize_rows[(M,)](x, scale, codes, scales, K, MOST=most, TILE=tile, num_warps=warps)
    return codes, scales


def finish(sums: torch.Tensor, rows: int, dtype: torch.dtype, bias: torch.Tensor | None,
           row_scales: torch.Tensor | None = None, scales: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """The first rows of sums [splits, M, N] added up, times row_scales [M, 1] and scales [1, N], plus the bias [N]."""
    splits, M, N = sums.shape
    y = torch.empty(rows, N, dtype=dtype, device=sums.device)
    with torch.cuda.device_of(sums):
        _finish[(rows, -(-N // 512))](sums, row_scales, scales, bias, y, M, N, SPLITS=splits, TILE=512)
    return y


@jit
def _values(word: tl.tensor, grid: tl.tensor, FIELD: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
            dtype: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Codes less zeros, exact in any dtype. A code in the last bits of a large power of two is a float already."""
    short: tl.constexpr = BITS == 4 and dtype != tl.float32
    kind: tl.constexpr = dtype if short else tl.float32
    large: tl.constexpr = (128.0 if dtype == tl.bfloat16 else 1024.0) if short else 8388608.0
    pattern: tl.constexpr = (0x4300 if dtype == tl.bfloat16 else 0x6400) if short else 0x4B000000
    zero = (1 << (BITS - 1)) * 1.0 if SYMMETRIC else (grid & 255).to(kind)[:, None]
    code = ((word >> (FIELD * BITS)) & ((1 << BITS) - 1)).to(tl.int16 if short else tl.int32)
    return ((code | pattern).to(kind, bitcast=True) - (large + zero)).to(dtype)


@jit
def _dequantize(words: tl.tensor, grids: tl.tensor, weight: tl.tensor, N: tl.tensor, K: tl.tensor, BITS: tl.constexpr,
                GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, W: tl.constexpr, BN: tl.constexpr) -> None:  # fmt: skip
    """BN outputs of one block."""
    block, n, w = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, W)
    word = tl.load(words + (block * N + n[:, None]) * W + w[None, :], mask=(n < N)[:, None], other=0)
    for field in tl.static_range(16 // BITS):
        k = (block * (16 // BITS) + field) * W
        grid = tl.load(grids + tl.minimum(k, K - 1) // GROUP * N + n, mask=n < N, other=0)
        scale = (grid & -256).to(tl.float32, bitcast=True)[:, None]
        values = (_values(word, grid, field, BITS, SYMMETRIC, tl.float32) * scale).to(weight.dtype.element_ty)
        at, inside = n.to(tl.int64)[:, None] * K + k + w[None, :], (n < N)[:, None] & (k + w < K)[None, :]
        tl.store(weight + at, values, mask=inside)


@jit
def _grouped_product(x: tl.tensor, words: tl.tensor, grids: tl.tensor, bias: tl.tensor, y: tl.tensor, M: tl.tensor,
                     N: tl.tensor, K: tl.tensor, each: tl.tensor, BITS: tl.constexpr, GROUP: tl.constexpr,
                     SYMMETRIC: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                     STAGES: tl.constexpr) -> None:  # fmt: skip
    """A tile of one sum, of `each` blocks, as W x': so W goes from registers into the product, scaled after it."""
    F: tl.constexpr = 16 // BITS
    SPAN: tl.constexpr = F * W if GROUP % (F * W) == 0 else (GROUP if F * W % GROUP == 0 else W)  # of one scale
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    w, first, total = tl.arange(0, W), tl.program_id(2) * each, tl.zeros((BN, BM), tl.float32)
    for block in tl.range(first, tl.minimum(first + each, tl.cdiv(K, F * W)), num_stages=STAGES):
        word = tl.load(words + (block * N + n[:, None]) * W + w[None, :], mask=(n < N)[:, None], other=0)
        for field in tl.static_range(F):
            k = (block * F + field) * W
            if field * W % SPAN == 0:
                grid = tl.load(grids + tl.minimum(k, K - 1) // GROUP * N + n, mask=n < N, other=0)
                part = tl.zeros((BN, BM), tl.float32)
            at, inside = m[None, :] * K + (k + w)[:, None], (m < M)[None, :] & (k + w < K)[:, None]
            turned = tl.load(x + at, mask=inside, other=0.0)
            values = _values(word, grid, field, BITS, SYMMETRIC, x.dtype.element_ty)
            part = tl.dot(values, turned, part, input_precision="ieee")
            if (field + 1) * W % SPAN == 0:
                total += part * (grid & -256).to(tl.float32, bitcast=True)[:, None]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2) * M + m[None, :]) * N + n[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@jit
def _finish(sums: tl.tensor, row_scales: tl.tensor, scales: tl.tensor, bias: tl.tensor, y: tl.tensor, M: tl.tensor,
            N: tl.tensor, SPLITS: tl.constexpr, TILE: tl.constexpr) -> None:  # fmt: skip
    """TILE outputs of a row."""
    m, n = tl.program_id(0), tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.load(sums + m * N + n, mask=n < N, other=0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + (split * M + m) * N + n, mask=n < N, other=0)
    if row_scales is not None:
        total *= tl.load(row_scales + m) * tl.load(scales + n, mask=n < N, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)


@jit
def own_scale(x: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """That of `rounding.token_codes` for each row. The largest magnitude is found among bit patterns, where NaN is
    beyond infinity and is not lost."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=len(x.shape) - 1)
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), MOST)
    return tl.maximum(scale, 1e-12, propagate_nan=tl.PropagateNan.ALL)


@jit
def codes_of(x: tl.tensor, scale: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """`rounding.tensor_codes`; MOST: the largest code."""
    least = -128.0 if MOST == 127 else -MOST
    steps = tl.clamp(tl.div_rn(x, scale), least, MOST, propagate_nan=tl.PropagateNan.ALL)
    # Adding and subtracting 1.5 * 2^23 quanta rounds to a multiple of the quantum, ties to even.
    shift = 12582912.0
    if MOST == 448:  # e4m3 keeps 3 bits after the leading one, which is 2^-6 or more
        leading = (steps.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(leading, 0.015625) * 1572864.0
    return (steps + shift) - shift


@jit
def _quantize_rows(x: tl.tensor, given: tl.tensor, codes: tl.tensor, scales: tl.tensor, K: tl.tensor,
                   MOST: tl.constexpr, TILE: tl.constexpr) -> None:  # fmt: skip
    """One row."""
    m, k = tl.program_id(0), tl.arange(0, TILE)
    row = tl.load(x + m * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = own_scale(row, MOST) if given is None else tl.load(given)
    tl.store(codes + m * K + k, codes_of(row, scale, MOST).to(codes.dtype.element_ty), mask=k < K)
    tl.store(scales + m, scale)
