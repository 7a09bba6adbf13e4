"""Linear layers with quantized weights on a GPU: y = x W' + b with W [N, K] held in 4 or 8 bits.

The results agree with `QuantizedWeight.dequantize`.
Legend: M rows of x, N outputs, K inputs, G groups of inputs.

Quantized values are packed into 16-bit words of F = 16 / bits fields. A block of W
words holds F * W inputs of one output: field f of word [b, n, w] is for output n and input
(b * F + f) * W + w. One field of a tile of words is therefore a tile of the weight, already in the
registers that a tensor core reads. `unpack_ptx` takes a field out of two words at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import linear, pad

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.float_bits import E4M3_DIVISOR, e2m1, scale_of_byte
from llmkit.kernels.triton_support import (
    device_capability,
    interprets,
    is_amd,
    jit,
    jit_without_specializing,
    multiplies_from_shared_memory,
    runs_ptx,
    tl,
)
from llmkit.kernels.tuned_configs import Tunable
from llmkit.kernels.unpack_ptx import (
    field_offsets,
    raw_powers,
    unpack_fp4_ptx,
    unpack_ptx,
    unpack_raw_ptx,
)

MAX_FUSED_ROWS = 512  # with more rows, dequantizing W first is faster on every GPU
# Each entry: the largest number of rows, then rows and outputs of a tile, warps, stages, and
# programs per multiprocessor.
TILES = ((8, 8, 64, 2, 4, 4), (16, 16, 64, 2, 4, 4), (32, 32, 64, 4, 3, 3))
# Twice the outputs for as many warps: fewer instructions for a weight, and half the programs. So
# this tile is for weights that have WIDE_PROGRAMS of them for each multiprocessor without partial
# sums. Four of them run at once on a multiprocessor of Hopper, and three on one of an A100.
WIDE_TILE = (8, 8, 128, 2, 3, 4)
WIDE_PROGRAMS = 3
# A tile of 256 rows unpacks each weight once for that many. Only some GPUs multiply W from shared
# memory, so that the warps share what they unpacked: see `multiplies_from_shared_memory`.
LARGE_TILES = (
    (64, 64, 64, 4, 2, 3),
    (128, 128, 128, 8, 2, 2),
    (MAX_FUSED_ROWS, 256, 128, 8, 2, 1),
)
# With Triton 3.6, the sums of 256 rows and 128 outputs do not fit into Blackwell's tensor memory.
LARGE_TILES_10 = (*LARGE_TILES[:2], (MAX_FUSED_ROWS, 256, 64, 4, 2, 1))
LARGE_TILES_8 = ((64, 64, 128, 8, 2, 1), (MAX_FUSED_ROWS, 128, 128, 8, 2, 1))
RAW_ROWS = 16  # of a tile up to which zero points are subtracted from sums: see RAW
LARGE_ROWS = 128  # rows of a tile from which on weights are scaled instead of sums
FLOAT32_TILE = (MAX_FUSED_ROWS, 16, 64, 4, 2, 4)
TILE = Tunable(
    "grouped_product",
    ((8, 16, 32, 64, 128, 256), (32, 64, 128), (2, 4, 8), (2, 3, 4, 5), (1, 2, 3, 4, 6, 8)),
)
MAX_SPLITS = 16  # partial sums over the inputs
# With more rows than this, W is dequantized first; measured for each GPU.
FUSED_ROWS = Tunable("grouped_rows", ((32, 64, 128, 256, MAX_FUSED_ROWS),))
SCALE_BIAS = 127  # of the exponents of e8m0 scales


def pack_words(q: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Words of a weight's quantized values, uint8 [N, K]: int16 [blocks, N, width]."""
    N, K = q.shape
    fields = 16 // bits
    q = pad(q, (0, -K % (width * fields))).view(N, -1, fields, width)
    if bits == 4:
        q = q[:, :, ::2] | q[:, :, 1::2] << 4
    return q.permute(1, 0, 3, 2).contiguous().view(torch.int16)


class WordsLinear:
    """A weight in words, with inputs in the model's dtype.

    words: of `pack_words`. scales: [G, N], as the kernel's SCALES says. factors: float32 [N], what
    outputs are multiplied with; None: nothing. constants: of the kernel. power: see `SCALED`.
    """

    def __init__(
        self,
        words: torch.Tensor,
        scales: torch.Tensor,
        factors: torch.Tensor | None,
        constants: Mapping[str, int | str],
        bias: torch.Tensor | None,
        power: float = 1.0,
    ) -> None:
        self.words = words
        self.scales = scales
        self.factors = factors
        self._constants = dict(constants)
        self._bias = bias
        self._power = power
        self.nbytes = words.nbytes + scales.nbytes + (0 if factors is None else factors.nbytes)

    def __call__(self, x: torch.Tensor, splits: int = 0) -> torch.Tensor:
        """x: [..., K]. Returns [..., N] in x's dtype.

        splits: the number of partial sums over the inputs; 0: chosen so that the GPU is busy.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        num_blocks, N = self.words.shape[:2]
        M, K = rows.shape
        kind = self._constants["BITS"] if self._constants["SCALES"] == "float" else "fp4"
        shape: tuple[object, ...] = (kind, self._constants["GROUP"], N, K, x.dtype)
        if M > MAX_FUSED_ROWS or FUSED_ROWS.config(shape, (MAX_FUSED_ROWS,), x.device)[0] < M:
            return linear(x, self.dequantize(K, x.dtype), self._bias)
        major = gpu_major(x.device)
        num_cores = gpu_cores(x.device)
        default = default_tile(M, x.dtype, major)
        if default == TILES[0] and takes_wide_tile(
            self._constants, x.dtype, N, K, num_cores, major
        ):
            default = WIDE_TILE
        shape = (*shape, rows_class(M))
        BM, BN, warps, stages, programs = TILE.config(shape, default[1:], x.device)
        tiles = (-(-M // BM), -(-N // BN))
        if not splits:
            wanted = programs * num_cores // (tiles[0] * tiles[1])
            splits = max(1, min(wanted, num_blocks // 2, MAX_SPLITS))
        blocks_per_split = -(-num_blocks // splits)
        splits = -(-num_blocks // blocks_per_split)  # so that no split is empty
        y_dtype = torch.float32 if splits > 1 else x.dtype
        y = torch.empty(splits, M, N, dtype=y_dtype, device=x.device)
        with torch.cuda.device_of(x):
            compiled = _weight_only_linear_kernel[(*tiles, splits)](
                rows,
                self.words,
                self.scales,
                self.factors,
                None if splits > 1 else self._bias,
                y,
                self._power if BM >= LARGE_ROWS else 1.0,
                M,
                N,
                K,
                blocks_per_split,
                **self._constants,
                **tile_constants(self._constants, x.dtype, K, BM, major),
                BM=BM,
                BN=BN,
                STAGES=stages,
                num_warps=warps,
                **compiler_options(BM, is_fp4=kind == "fp4", major=major),
            )
        TILE.notify_observer(compiled)
        result = epilogue(y, M, x.dtype, self._bias) if splits > 1 else y[0]
        return result.view(*x.shape[:-1], N)

    def dequantize(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight [N, K], for K columns."""
        num_blocks, N = self.words.shape[:2]
        weight = torch.empty(N, columns, dtype=dtype, device=self.words.device)
        with torch.cuda.device_of(weight):
            _dequantize_kernel[(num_blocks, -(-N // 64))](
                self.words,
                self.scales,
                self.factors,
                weight,
                N,
                columns,
                **self._constants,
                BN=64,
            )
        return weight


class WeightOnlyLinear(WordsLinear):
    """W = (q - zeros) * scales, with inputs in the model's dtype.

    q: uint8 [N, K], with `bits` 4 or 8; scales: float [N, G], rounded to 16 bits of mantissa;
    zeros: uint8 [N, G]; group_size: inputs per group, a multiple of 32, or -1 for whole rows;
    bias: [N].
    """

    def __init__(
        self,
        q: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        bits: int,
        group_size: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        symmetric = bool((zeros == 1 << (bits - 1)).all())
        width = 32 if group_size % 64 == 32 or q.shape[1] % (64 * 16 // bits) else 64
        # The zero point replaces the lowest 8 bits of the float32 scale, so that one load reads
        # both.
        scale_bits = (scales.float().view(torch.int32) + 128) & -256
        # Weights that are scaled in float16 stay below 2^14, and above the subnormal numbers.
        largest = math.frexp(float(scales.abs().max()))[1] if scales.numel() else 0
        super().__init__(
            pack_words(q, bits, width),
            (scale_bits | zeros).T.contiguous(),
            None,
            {
                "BITS": bits,
                "GROUP": group_size if group_size > 0 else 1 << 30,
                "SYMMETRIC": symmetric,
                "W": width,
                "SCALES": "float",
            },
            bias,
            2.0 ** (14 - bits - largest),
        )


class Fp4Linear(WordsLinear):
    """W = value(codes) * scales in FP4 (E2M1), with inputs in the model's dtype.

    codes: uint8 [N, K], of 4 bits; scales: float [N, G]; group_size: 32 for powers of two (MXFP4),
    16 or a multiple of 32; global_scale: of NVFP4, see `scale_bytes`; bias: [N].
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        group_size: int,
        bias: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> None:
        scale_bytes, factors = fp4_scale_bytes(scales, global_scale)
        super().__init__(
            pack_words(codes, 4, 16 if group_size == 16 else 32),
            scale_bytes.T.contiguous(),
            factors,
            {
                "BITS": 4,
                "GROUP": group_size,
                "SYMMETRIC": True,
                "W": 16 if group_size == 16 else 32,
                "SCALES": "e8m0" if global_scale is None else "e4m3",
            },
            bias,
        )


def fp4_scale_bytes(
    scales: torch.Tensor, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [N, G] of FP4 as bytes, uint8 [N, G], and a factor for each output, float32 [N].

    global_scale: float32 [1] or [N], of scales that are e4m3 times it; the bytes are e4m3, and the
    kernels' values 256 times smaller. None: scales are powers of two; the bytes are e8m0, with the
    largest scale as 1, so that float16 holds what they are multiplied with.
    """
    if global_scale is not None:
        return e4m3_scale_bytes(scales, global_scale)
    N = len(scales)
    exponents = torch.frexp(scales.float()).exponent - 1
    largest = exponents.amax() if scales.numel() else 0
    relative = (exponents - largest + SCALE_BIAS).clamp_(min=0)
    one = torch.ones(N, device=scales.device)
    return relative.to(torch.uint8), torch.ldexp(one, one.int() * largest)


def e4m3_scale_bytes(
    scales: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp4_scale_bytes` of scales that are e4m3 times `global_scale`."""
    factors = global_scale.float().reshape(-1).expand(len(scales))
    divisors = torch.where(factors == 0, 1.0, factors)
    steps = scales.float() / divisors[:, None]
    return steps.to(FP8).view(torch.uint8), factors * E4M3_DIVISOR


def compiler_options(tile_rows: int, *, is_fp4: bool = False, major: int = 9) -> dict[str, int]:
    """Triton's options for a tile.

    Without a limit, ptxas spills registers of small tiles, of Blackwell's up to 64 rows, and of
    FP4's large ones where they multiply from registers, to fit more programs. With 255 registers,
    four programs of two warps fit into a multiprocessor, as many as TILES asks for. AMD's compiler
    has no such option.
    """
    if is_amd():
        return {}
    has_shared_operands = multiplies_from_shared_memory(major)
    if tile_rows <= 16 or (is_fp4 and tile_rows >= LARGE_ROWS and not has_shared_operands):
        return {"maxnreg": 255}
    is_blackwell = has_shared_operands and major > 9
    return {"maxnreg": 168} if is_blackwell and tile_rows <= 64 else {}


def rows_class(rows: int) -> int:
    """The most rows for which the configuration of `rows` rows is measured."""
    return max(TILES[0][0], 1 << (rows - 1).bit_length())


def gpu_major(device: torch.device) -> int:
    """The first number of a GPU's compute capability; 9 for Triton's interpreter."""
    return 9 if interprets else device_capability(device)[0]


def gpu_cores(device: torch.device) -> int:
    """The number of a GPU's multiprocessors; an H100's for Triton's interpreter."""
    return 132 if interprets else torch.cuda.get_device_properties(device).multi_processor_count


def default_tile(rows: int, dtype: torch.dtype, major: int) -> tuple[int, ...]:
    """The entry for a number of rows that runs where nothing was measured.

    major: of the GPU's compute capability.
    """
    if dtype == torch.float32:
        return FLOAT32_TILE
    large: tuple[tuple[int, ...], ...] = LARGE_TILES_8
    if multiplies_from_shared_memory(major):
        large = LARGE_TILES if major == 9 else LARGE_TILES_10
    return next(tile for tile in TILES + large if tile[0] >= rows)


def takes_wide_tile(
    constants: Mapping[str, int | str],
    dtype: torch.dtype,
    outputs: int,
    columns: int,
    num_cores: int,
    major: int,
) -> bool:
    """Whether few rows of inputs have WIDE_TILE where nothing was measured.

    constants: of the weight. num_cores: multiprocessors of the GPU. major: of its compute
    capability. With float16 on 8.x, and with zero points, the wide tile would spill registers.
    """
    num_programs = -(-outputs // WIDE_TILE[2])
    if num_programs < WIDE_PROGRAMS * num_cores or (dtype == torch.float16 and major == 8):
        return False
    return is_raw_product(constants, dtype, columns)


def is_raw_product(constants: Mapping[str, int | str], dtype: torch.dtype, columns: int) -> bool:
    """Whether zero points of a weight are subtracted from sums of few rows: see RAW.

    With zero points of its own for each output, or a part of a block at the end of the inputs, the
    kernel would spill registers.
    """
    is_int4 = constants["BITS"] == 4 and constants["SCALES"] == "float"
    is_even = columns % (4 * int(constants["W"])) == 0
    is_symmetric = bool(constants["SYMMETRIC"])
    return is_int4 and is_symmetric and is_even and dtype != torch.float32 and not is_amd()


def tile_constants(
    constants: Mapping[str, int | str], dtype: torch.dtype, columns: int, tile_rows: int, major: int
) -> dict[str, object]:
    """The kernel's constants that depend on the inputs, on their columns and on the tile's rows.

    constants: of the weight. major: of the GPU's compute capability.
    """
    bits, width = int(constants["BITS"]), int(constants["W"])
    is_fp4 = constants["SCALES"] != "float"
    large = tile_rows >= LARGE_ROWS
    scaled = large or constants["SCALES"] == "e4m3"  # groups of 16 have many sums
    packs = dtype != torch.float32 and runs_ptx()
    is_raw = tile_rows <= RAW_ROWS and is_raw_product(constants, dtype, columns)
    texts: tuple[str | None, ...] = (None,) * 4
    offsets = [0.0] * 4
    if packs and is_fp4:
        texts = unpack_fp4_ptx(dtype, scaled)
    elif packs and is_raw:
        texts = unpack_raw_ptx(dtype)
    elif packs:
        # Words of 8-bit values have only two fields.
        texts = unpack_ptx(bits, dtype, bool(constants["SYMMETRIC"]), large) * 2
        offsets = field_offsets(bits, dtype)
    return {
        # Half a block at a time, so that two stages fit into shared memory.
        "COLUMNS": width // 2 if large and width == 64 else width,
        "EVEN": columns % (16 // bits * width) == 0,
        "X_FIRST": large and multiplies_from_shared_memory(major),
        "SCALED": scaled,
        **{f"PTX{field}": texts[field] for field in range(4)},
        "OFFSET_EVEN": offsets[0],
        "OFFSET_ODD": offsets[1],
        "RAW": is_raw,
        **{f"POWER{field}": raw_powers(dtype)[field] for field in range(3)},
    }


def epilogue(
    sums: torch.Tensor,
    rows: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    row_scales: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over the splits of sums [splits, M, N], scale the result, and add the bias [N].

    row_scales: [M, 1] and scales: [1, N], both or neither. Returns the first `rows` rows in
    `dtype`.
    """
    splits, M, N = sums.shape
    y = torch.empty(rows, N, dtype=dtype, device=sums.device)
    with torch.cuda.device_of(sums):
        _epilogue_kernel[(rows, -(-N // 512))](
            sums,
            row_scales,
            scales,
            bias,
            y,
            M,
            N,
            splits,
            MAX_SPLITS=1 if splits == 1 else MAX_SPLITS,
            TILE=512,
        )
    return y


@jit
def _unpack_field(
    word: tl.tensor,
    scale_and_zero: tl.tensor,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALES: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """q - zero for one field of the words, exact in any dtype.

    The conversion from integer to float is free: q is written into the lowest mantissa bits of a
    power of two, which gives the float power + q.
    """
    if SCALES != "float":
        return e2m1((word.to(tl.int32) >> (FIELD * BITS)) & 15).to(dtype)
    is_short: tl.constexpr = BITS == 4 and dtype != tl.float32
    kind: tl.constexpr = dtype if is_short else tl.float32
    power: tl.constexpr = (128.0 if dtype == tl.bfloat16 else 1024.0) if is_short else 8388608.0
    pattern: tl.constexpr = (0x4300 if dtype == tl.bfloat16 else 0x6400) if is_short else 0x4B000000
    zero = (1 << (BITS - 1)) * 1.0 if SYMMETRIC else (scale_and_zero & 255).to(kind)[:, None]
    q = ((word >> (FIELD * BITS)) & ((1 << BITS) - 1)).to(tl.int16 if is_short else tl.int32)
    return ((q | pattern).to(kind, bitcast=True) - (power + zero)).to(dtype)


@jit
def _dequantize_kernel(
    words: tl.tensor,
    scales_and_zeros: tl.tensor,
    factors: tl.tensor,
    weight: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    W: tl.constexpr,
    SCALES: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """A program dequantizes BN outputs of one block."""
    block = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    w = tl.arange(0, W)
    word_at = words + (block * N + n[:, None]) * W + w[None, :]
    word = tl.load(word_at, mask=(n < N)[:, None], other=0)
    for field in tl.static_range(16 // BITS):
        k = (block * (16 // BITS) + field) * W
        scale_and_zero_at = scales_and_zeros + tl.minimum(k, K - 1) // GROUP * N + n
        scale_and_zero = tl.load(scale_and_zero_at, mask=n < N, other=0)
        scale = _scale(scale_and_zero, SCALES)
        if factors is not None:
            scale *= tl.load(factors + n, mask=n < N, other=0.0)
        values = _unpack_field(word, scale_and_zero, field, BITS, SYMMETRIC, SCALES, tl.float32)
        values *= scale[:, None]
        at = n.to(tl.int64)[:, None] * K + k + w[None, :]
        inside = (n < N)[:, None] & (k + w < K)[None, :]
        tl.store(weight + at, values.to(weight.dtype.element_ty), mask=inside)


@jit
def _scale(stored: tl.tensor, SCALES: tl.constexpr) -> tl.tensor:
    """Scales as float32. SCALES: see `_weight_only_linear_kernel`."""
    if SCALES == "float":
        scale = (stored & -256).to(tl.float32, bitcast=True)
    else:
        scale = scale_of_byte(stored, SCALES)
    return scale


@jit
def _unpack_fp4_pairs(
    word: tl.tensor,
    scale: tl.tensor,
    dtype: tl.constexpr,
    PTX: tl.constexpr,
    SCALED: tl.constexpr,
) -> tl.tensor:
    """The values of one field of the words, or values * scale if SCALED, by `unpack_fp4_ptx`.

    `dtype` holds the scales and the products exactly.
    """
    scale = scale.to(dtype)[:, None]
    if SCALED:
        q = tl.inline_asm_elementwise(PTX, "=r,r,r", [word, scale], scale.dtype, True, 2)
    else:
        q = tl.inline_asm_elementwise(PTX, "=r,r", [word], scale.dtype, True, 2)
    return q


@jit
def _unpack_pairs(
    word: tl.tensor,
    scale_and_zero: tl.tensor,
    scale: tl.tensor,
    dtype: tl.constexpr,
    PTX: tl.constexpr,
    OFFSET: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    LARGE: tl.constexpr,
) -> tl.tensor:
    """q - zero for one field of the words, or (q - zero) * scale if LARGE, by `unpack_ptx`."""
    # The lowest mantissa bits of 2^23 hold the zero point.
    zero = ((scale_and_zero & 255) | 0x4B000000).to(tl.float32, bitcast=True)
    term = ((8388608.0 - OFFSET) - zero).to(dtype)[:, None]
    high = scale.to(dtype)
    low = (scale - high.to(tl.float32)).to(dtype)[:, None]
    high = high[:, None]
    if SYMMETRIC:
        if LARGE:
            q = tl.inline_asm_elementwise(PTX, "=r,r,r,r", [word, high, low], high.dtype, True, 2)
        else:
            q = tl.inline_asm_elementwise(PTX, "=r,r", [word], high.dtype, True, 2)
    elif LARGE:
        operands = [word, term, high, low]
        q = tl.inline_asm_elementwise(PTX, "=r,r,r,r,r", operands, high.dtype, True, 2)
    else:
        q = tl.inline_asm_elementwise(PTX, "=r,r,r", [word, term], high.dtype, True, 2)
    return q


@jit
def _unpack_raw(
    word: tl.tensor,
    like: tl.tensor,
    PTX: tl.constexpr,
    FIELD: tl.constexpr,
    POWER: tl.constexpr,
) -> tl.tensor:
    """q + POWER for one field of 4 bits of the words, in the dtype of `like`."""
    if PTX is None:
        q = (((word >> (FIELD * 4)) & 15).to(tl.float32) + POWER).to(like.dtype)
    else:
        q = tl.inline_asm_elementwise(PTX, "=r,r", [word], like.dtype, True, 2)
    return q


@jit_without_specializing("M", "blocks_per_split")
def _weight_only_linear_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scales_and_zeros: tl.tensor,
    factors: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    power: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    blocks_per_split: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    W: tl.constexpr,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    X_FIRST: tl.constexpr,
    SCALED: tl.constexpr,
    PTX0: tl.constexpr,
    PTX1: tl.constexpr,
    PTX2: tl.constexpr,
    PTX3: tl.constexpr,
    OFFSET_EVEN: tl.constexpr,
    OFFSET_ODD: tl.constexpr,
    RAW: tl.constexpr,
    POWER0: tl.constexpr,
    POWER1: tl.constexpr,
    POWER2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """A program computes one tile of one split, COLUMNS words of a block at a time.

    With few rows it computes W x': then tensor cores take W from registers, and each group's sum
    is scaled. SCALED: W is scaled instead, times `power`. X_FIRST: it computes x W', for which the
    warps put what they unpacked into shared memory. RAW: W is multiplied as q plus the powers of
    two that unpacking leaves (POWER0, and those of odd and even fields), and a group's sum starts
    at x times what is too much: one small product, which is the same for all outputs. EVEN holds.
    SCALES: "float": scales and zero points in one word, of integers. "e8m0" or "e4m3": scales in a
    byte, of FP4, see `scale_of_byte`; `factors` then has one for each output.
    """
    F: tl.constexpr = 16 // BITS
    PARTS: tl.constexpr = W // COLUMNS
    dtype: tl.constexpr = x.dtype.element_ty
    # The number of consecutive inputs within a block that share a scale.
    SPAN: tl.constexpr = F * W if GROUP % (F * W) == 0 else (GROUP if F * W % GROUP == 0 else W)
    # The rows of RAW's product: one tensor core instruction of each warp.
    WARPS: tl.constexpr = 2 if PTX0 is None else tl.extra.cuda.num_warps()
    POWER_ROWS: tl.constexpr = 16 * WARPS if 16 * WARPS < BN else BN
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # Outputs after the last are computed like the last, and not stored.
    n_inside = tl.minimum(n, N - 1)
    w = tl.arange(0, COLUMNS)
    first = tl.program_id(2) * blocks_per_split
    stop = tl.minimum(first + blocks_per_split, tl.cdiv(K, F * W))
    word_at = words + n_inside[:, None] * W + w[None, :]
    x_at = x + m[None, :] * K + w[:, None]
    x_inside = tl.broadcast_to((m < M)[None, :], (COLUMNS, BM))
    total = tl.zeros((BM, BN) if X_FIRST else (BN, BM), tl.float32)
    for turn in tl.range(first * PARTS, stop * PARTS, num_stages=STAGES):
        block = turn // PARTS
        column = turn % PARTS * COLUMNS
        word = tl.load(word_at + (block * N * W + column))
        for field in tl.static_range(F):
            k = (block * F + field) * W
            if field * W % SPAN == 0:
                scale_and_zero_at = scales_and_zeros + tl.minimum(k, K - 1) // GROUP * N + n_inside
                scale_and_zero = tl.load(scale_and_zero_at)
                scale = _scale(scale_and_zero, SCALES)
                if SCALED:
                    scale *= power
                elif RAW:
                    excess = tl.zeros((POWER_ROWS, BM), tl.float32)
                    for other in tl.static_range(field, field + SPAN // W):
                        column_of = (block * F + other) * W
                        x_transposed = tl.load(x_at + column_of, mask=x_inside, other=0.0)
                        power_above_q = POWER0 if other == 0 else POWER1 if other % 2 else POWER2
                        terms = tl.full((POWER_ROWS, W), -8.0 - power_above_q, dtype)
                        excess = tl.dot(terms, x_transposed, excess)
                    part = tl.broadcast_to(excess[None], (BN // POWER_ROWS, POWER_ROWS, BM))
                    part = tl.reshape(part, (BN, BM))
                else:
                    part = tl.zeros((BN, BM), tl.float32)
            inside = x_inside if EVEN else x_inside & (k + column + w < K)[:, None]
            x_transposed = tl.load(x_at + (k + column), mask=inside, other=0.0)
            if RAW:
                values = _unpack_raw(
                    word,
                    x_transposed,
                    PTX0 if field == 0 else PTX1 if field == 1 else PTX2 if field == 2 else PTX3,
                    field,
                    POWER0 if field == 0 else POWER1 if field % 2 else POWER2,
                )
            elif PTX0 is None:
                values = _unpack_field(word, scale_and_zero, field, BITS, SYMMETRIC, SCALES, dtype)
                if SCALED:
                    values = (values.to(tl.float32) * scale[:, None]).to(dtype)
            elif SCALES != "float":
                values = _unpack_fp4_pairs(
                    word,
                    scale,
                    dtype,
                    PTX0 if field == 0 else PTX1 if field == 1 else PTX2 if field == 2 else PTX3,
                    SCALED,
                )
            else:
                values = _unpack_pairs(
                    word,
                    scale_and_zero,
                    scale,
                    dtype,
                    PTX0 if field == 0 else PTX1 if field == 1 else PTX2 if field == 2 else PTX3,
                    OFFSET_ODD if field % 2 else OFFSET_EVEN,
                    SYMMETRIC,
                    SCALED,
                )
            if X_FIRST:
                total = tl.dot(tl.trans(x_transposed), tl.trans(values), total)
            elif SCALED:
                total = tl.dot(values, x_transposed, total, input_precision="ieee")
            else:
                part = tl.dot(values, x_transposed, part, input_precision="ieee")
                if (field + 1) * W % SPAN == 0:
                    total += part * scale[:, None]
    if X_FIRST:
        total = tl.trans(total)
    if SCALED:
        total /= power
    if factors is not None:
        total *= tl.load(factors + n, mask=n < N, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2) * M + m[None, :]) * N + n[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@jit_without_specializing("M", "splits")
def _epilogue_kernel(
    sums: tl.tensor,
    row_scales: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    splits: tl.tensor,
    MAX_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program computes TILE outputs of a row. There are up to MAX_SPLITS splits.

    The number of splits is no constant, because it differs from step to step.
    """
    m = tl.program_id(0).to(tl.int64)  # a prompt's sums may be more than 2^31
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.load(sums + m * N + n, mask=n < N, other=0).to(tl.float32)
    for split in tl.static_range(1, MAX_SPLITS):
        mask = n < tl.where(splits > split, N, 0)
        total += tl.load(sums + (split * M + m) * N + n, mask=mask, other=0)
    if row_scales is not None:
        total *= tl.load(row_scales + m) * tl.load(scales + n, mask=n < N, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)
