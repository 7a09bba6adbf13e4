"""Loads the compiled CPU kernels. A wrapper for each takes tensors and passes addresses to C.

The kernels compute in float32 on x86 processors with AVX2 and on 64-bit Arm, in the fastest of
several levels of instructions that the processor has. Each has a reference in torch, which runs in
all other cases: on GPUs, in 16 bits, on other processors, and where llmkit was installed without a
C compiler.

Legend: T tokens, N heads, D head_dim. For linear layers: R rows, C columns (outputs), K depth
(inputs), G groups.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from llmkit.common.cpu_threads import ThreadCount, choose_threads
from llmkit.common.errors import InputError
from llmkit.common.options import CpuActivations

try:
    from llmkit.kernels.cpu import _cpu_kernels
except ImportError:
    _cpu_kernels = None  # type: ignore[assignment]

FourBitType = Literal["uint4", "int4", "fp4"]
PANEL_WIDTH = 16  # columns of a panel of packed weights
# The numbers are those of cpu_kernels.h.
WEIGHT_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 7,
}
# 4-bit values, which are uint8 until packing puts two in a byte: codes 0 to 15, codes minus 8, and
# 4-bit floats (E2M1).
FOUR_BIT_TYPES: dict[FourBitType, int] = {"uint4": 4, "int4": 5, "fp4": 6}
COMPRESSED_BF16 = 8  # bfloat16 in 12 bits (compressed_bf16.h)
COMPRESSED_HEADER_BYTES = 64  # of a compressed panel
UNIT_DEPTH = 8  # inputs of a unit of a compressed panel
MAX_COMPRESSED_SHARE = 0.9  # of the size in bfloat16; above it a weight is not compressed
# Scales in float32, or in a byte: e4m3, and e8m0, which are exponents in uint8.
SCALE_TYPES = {torch.float32: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}
# The dtypes of a KV cache.
KV_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu2": 3}
SWIGLU_CLAMPED = 4
# What a gate goes through before the product.
GATE_ACTIVATIONS = {"identity": 0, "sigmoid": 1, "softplus": 2}
FP8_DIVISOR = 256  # the kernels' values of FP8 weights and of e4m3 scales are so much smaller
# What the inputs of a linear layer are rounded to: nothing, bfloat16, or int8 with a scale for each
# token and group of the weight; or, as `activation_quant` has it, FP8 or FP4 with a scale for each
# token, one stored scale, or a scale for each token and group of the weight, in a format of scales.
InputType = Literal[
    "float32",
    "bfloat16",
    "int8",
    "fp8_token",
    "fp8_static",
    "fp8_group",
    "fp8_e8m0",
    "fp4_e8m0",
    "fp4_e4m3",
]
INPUT_TYPES: dict[InputType, int] = {
    "float32": 0,
    "bfloat16": 1,
    "int8": 2,
    "fp8_token": 4,
    "fp8_static": 5,
    "fp8_group": 6,
    "fp8_e8m0": 7,
    "fp4_e8m0": 8,
    "fp4_e4m3": 9,
}
# Inputs that are bfloat16 already, as `add_norm_rounded` writes them.
ROUNDED_INPUTS = 3
TILE_ROWS = 32  # rounded inputs have memory for a multiple of so many rows
# What `--cpu-activations auto` rounds inputs to, by the weight's type.
# int8 is no default: what it costs has been measured with one model only (docs/benchmarks.md).
AUTO_INPUTS: dict[torch.dtype, InputType] = {
    torch.bfloat16: "bfloat16",
    torch.int8: "bfloat16",
    torch.uint8: "bfloat16",  # 4-bit values
    torch.float8_e4m3fn: "bfloat16",
}
LEVEL_VARIABLE = "LLMKIT_CPU_LEVEL"
# Weights below 32 bits are padded with zeros to a multiple of so many inputs.
DEPTH_MULTIPLE = 64
# Every level multiplies bfloat16 by a weight whose groups have a multiple of so many inputs; with
# other groups, AMX multiplies float32.
GROUP_MULTIPLE = 32


def levels() -> list[str]:
    """The levels of instructions that this processor has kernels for, the fastest last."""
    return [] if _cpu_kernels is None else _cpu_kernels.levels()


def level() -> str | None:
    """The level in use: the one of LLMKIT_CPU_LEVEL, else the fastest; None without kernels."""
    available = levels()
    wanted = os.environ.get(LEVEL_VARIABLE)
    if wanted in available:
        return wanted
    return available[-1] if available else None


def _load() -> ModuleType | None:
    name = level()  # `check_level` refuses a wrong LLMKIT_CPU_LEVEL, where a message can be shown
    if name is None:
        return None
    assert _cpu_kernels is not None
    _cpu_kernels.set_level(name)
    _cpu_kernels.set_num_threads(choose_threads().count)
    return _cpu_kernels


# The extension module; None where the kernels do not run. Tests set it to None to run the torch
# references.
library = _load()


def has_bfloat16() -> bool:
    """Whether the level multiplies bfloat16 by bfloat16."""
    return library is not None and bool(library.has_bfloat16())


def has_compression() -> bool:
    """Whether the level takes weights that `PackedWeight.compressed` has compressed."""
    return library is not None and bool(library.has_compression())


def compresses(dtype: torch.dtype, inputs: InputType) -> bool:
    """Whether weights of this dtype, without scales, are held compressed for such inputs."""
    return dtype == torch.bfloat16 and inputs == "bfloat16" and has_compression()


def check_level() -> None:
    """Raise InputError when LLMKIT_CPU_LEVEL is not a level of this processor."""
    wanted = os.environ.get(LEVEL_VARIABLE)
    available = levels()
    if not wanted or wanted in available:
        return
    expected = f"One of {', '.join(available)} was expected"
    if not available:
        expected = f"The compiled kernels are {status()}"
    raise InputError(
        f"{LEVEL_VARIABLE}: this processor has no level {wanted!r}", expected, "Change or unset it"
    )


def use_threads(wanted: int | None = None) -> ThreadCount:
    """Set the threads of the compiled kernels and of torch, and return how many there are and why.

    wanted: None: as many as this process may use (see `choose_threads`). torch keeps a number for
    each Python thread that calls it; this sets the calling thread's and that of later threads.
    Raises InputError for a wrong LLMKIT_CPU_LEVEL.
    """
    check_level()
    threads = choose_threads(wanted)
    set_num_threads(threads.count)
    return threads


def set_num_threads(count: int) -> None:
    """Let the compiled kernels and torch use this many threads."""
    torch.set_num_threads(count)
    if _cpu_kernels is not None:
        _cpu_kernels.set_num_threads(count)


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Let torch use only the calling thread inside the block; the compiled kernels keep theirs.

    After an operator, torch's threads spin for a while, on the cores that the kernels need. And an
    operator waits for all of its threads, however late another process lets them run.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class CallRecorder:
    """Runs the compiled kernels and records each call: the kernel's name and its arguments."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._calls: list[tuple[str, tuple[float, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self._compiled, name)

        def run_and_record(*arguments: float) -> None:
            self._calls.append((name, arguments))
            kernel(*arguments)

        return run_and_record

    def program(self) -> bytes:
        """The recorded calls, in the form that `library.run` takes."""
        program: bytes = self._compiled.program(self._calls)
        return program


@contextmanager
def intercept(interceptor: Any) -> Iterator[None]:
    """Send every kernel call inside the block to `interceptor` instead of the compiled library.

    The interceptor has the same functions as the library. Usually it records a call and forwards
    it to the library. Only one thread may call kernels inside the block.
    """
    global library
    compiled = library
    library = interceptor
    try:
        yield
    finally:
        library = compiled


@contextmanager
def recording() -> Iterator[CallRecorder]:
    """Record the kernel calls made inside the block. The compiled kernels must be available."""
    assert library is not None
    recorder = CallRecorder(library)
    with intercept(recorder):
        yield recorder


def status() -> str:
    """Return "on", or "off" and the reason why the compiled kernels do not run here."""
    if library is not None:
        return "on"
    if _cpu_kernels is None:
        return "off, llmkit was installed without a C compiler"
    return "off, a processor that is neither x86 with AVX2 nor 64-bit Arm"


def supports(x: torch.Tensor) -> bool:
    """Whether the compiled kernels can compute with this tensor. They compute no gradients."""
    return (
        x.dtype is torch.float32
        and library is not None
        and x.is_cpu
        and not torch.is_grad_enabled()
    )


@dataclass(frozen=True)
class PackedWeight:
    """A weight in panels of PANEL_WIDTH output columns: w = scales * q - offsets, or w = q.

    q: of a dtype in WEIGHT_TYPES, in the order that `pack` makes; uint8 if the weight is bfloat16
    and compressed. scales: of a dtype in SCALE_TYPES, [G, C rounded up to whole panels].
    scale_factors: of scales in a byte, float32 [C rounded up to whole panels]. offsets: float32,
    the shape of `scales`.
    """

    q: torch.Tensor
    shape: tuple[int, int]  # [C, K]
    scales: torch.Tensor | None = None
    scale_factors: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    four_bit_type: FourBitType = "uint4"  # what q stands for if it has 4 bits
    is_compressed: bool = False

    @classmethod
    def pack(
        cls,
        q: torch.Tensor,
        scales: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        *,
        scale_factors: torch.Tensor | None = None,
        four_bit_type: FourBitType = "uint4",
    ) -> PackedWeight:
        """Pack a weight.

        q: [C, K], floats, int8, or 4-bit values in uint8. FP8 (e4m3) must have scales and no NaN.
        With several groups, a group has a multiple of 2 inputs (16 bits), 4 (8 bits) or 8 (4
        bits).
        scales: [C, G], of any float dtype, or one byte each: e4m3 without NaN, or uint8 of e8m0, of
        which 0 (2^-127) counts as 0. scale_factors: float32 [C], with scales in a byte only: a
        scale is the byte's value times its row's factor.
        offsets: [C, G].
        four_bit_type: what q stands for if it has 4 bits: codes 0 to 15; "int4": codes minus 8;
        "fp4": codes of E2M1, which must have scales.
        """
        is_fp8 = q.dtype == torch.float8_e4m3fn
        factor = 1.0  # from the kernels' values to what they stand for
        if four_bit_type == "fp4":  # the kernel multiplies by twice the values, which are integers
            assert scales is not None
            factor = 0.5
        if is_fp8:
            assert scales is not None
            factor = float(FP8_DIVISOR)
            q = q.view(torch.int8)
        if scale_factors is not None:
            assert scales is not None
            if scales.dtype == torch.float8_e4m3fn:
                factor *= FP8_DIVISOR
            scale_factors = scale_factors.float() * factor
        elif scales is not None:
            scales = scales.float() * factor
        cols, depth = q.shape
        num_panels = -(-cols // PANEL_WIDTH)
        # A word of 32 bits holds consecutive inputs of a column.
        word_values = 8 if q.dtype == torch.uint8 else 4 // q.element_size()
        padded_depth = depth + (-depth % DEPTH_MULTIPLE if word_values > 1 else 0)
        q = pad(q, (0, padded_depth - depth, 0, num_panels * PANEL_WIDTH - cols))
        words = q.view(num_panels, PANEL_WIDTH, padded_depth // word_values, word_values)
        words = words.transpose(1, 2)
        if q.dtype == torch.uint8:  # a byte holds inputs k and k + 4
            words = words[..., :4] | words[..., 4:] << 4
        if is_fp8:  # the columns of an input lie together
            words = words.transpose(2, 3).contiguous().view(torch.float8_e4m3fn)
        return cls(
            words.contiguous(),
            (cols, depth),
            None if scales is None else _pad_columns(scales, num_panels),
            None if scale_factors is None else _pad_columns(scale_factors, num_panels),
            None if offsets is None else _pad_columns(offsets.float(), num_panels),
            four_bit_type,
        )

    def compressed(self) -> PackedWeight:
        """A weight of bfloat16 in 12 bits, without loss; itself where that saves too little.

        The level must have compression. Products with inputs in bfloat16 keep their bits; other
        inputs are not possible.
        """
        assert library is not None
        assert self.dtype == torch.bfloat16
        assert self.scales is None
        assert self.offsets is None
        num_panels, steps = self.q.shape[:2]
        depth = steps * 2
        panel_bytes = COMPRESSED_HEADER_BYTES + depth * PANEL_WIDTH * 3 // 2
        unit_bytes = UNIT_DEPTH * PANEL_WIDTH * 2
        top_exponents = torch.empty(num_panels, dtype=torch.int32)
        num_uncompressed = torch.empty(num_panels, dtype=torch.int32)
        arguments = (
            self.q.data_ptr(),
            num_panels,
            depth,
            top_exponents.data_ptr(),
            num_uncompressed.data_ptr(),
        )
        library.measure_bf16(*arguments)
        # The units that stay uncompressed, their indices, and one index more, in whole lines.
        units = num_uncompressed.long()
        lines = units * (unit_bytes // 64) + (units * 4 + 4 + 63) // 64
        lines[units == 0] = 0
        starts = num_panels * panel_bytes + (lines.cumsum(0) - lines) * 64
        size = num_panels * panel_bytes + int(lines.sum()) * 64
        if size > MAX_COMPRESSED_SHARE * self.q.nbytes:
            return self
        q = torch.empty(size, dtype=torch.uint8)
        library.compress_bf16(*arguments, starts.data_ptr(), q.data_ptr())
        return replace(self, q=q, is_compressed=True)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values; uint8 for 4 bits."""
        return torch.bfloat16 if self.is_compressed else self.q.dtype

    @property
    def _weight_type(self) -> int:
        """The number of the C code."""
        if self.is_compressed:
            return COMPRESSED_BF16
        if self.q.dtype == torch.uint8:
            return FOUR_BIT_TYPES[self.four_bit_type]
        return WEIGHT_TYPES[self.q.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the values, scales, their factors and offsets together."""
        parts = (self.q, self.scales, self.scale_factors, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    @cached_property
    def kernel_arguments(self) -> tuple[int, int, int, int, int, int, int, int, int]:
        """The weight as the C code takes it.

        Weight type, scale type, addresses of q, scales, their factors and offsets, columns, depth
        and group size.
        """
        cols, depth = self.shape
        num_groups = 1 if self.scales is None else len(self.scales)
        return (
            self._weight_type,
            SCALE_TYPES[torch.float32 if self.scales is None else self.scales.dtype],
            self.q.data_ptr(),
            address(self.scales),
            address(self.scale_factors),
            address(self.offsets),
            cols,
            depth,
            depth // num_groups,
        )


def _pad_columns(values: torch.Tensor, num_panels: int) -> torch.Tensor:
    """[C, G] -> [G, num_panels * PANEL_WIDTH], or [C] -> [num_panels * PANEL_WIDTH]"""
    is_fp8 = values.dtype == torch.float8_e4m3fn  # torch pads no FP8
    bits = values.view(torch.uint8) if is_fp8 else values
    missing = num_panels * PANEL_WIDTH - len(values)
    padded = pad(bits.movedim(0, -1), (0, missing)).contiguous()
    return padded.view(torch.float8_e4m3fn) if is_fp8 else padded


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    first_column: int,
    inputs: InputType = "float32",
    input_scale: torch.Tensor | None = None,
) -> None:
    """y[:, first_column : first_column + C] = x W' + bias.

    x: [R, K], whose last dimension is contiguous; y: [R, columns], contiguous; bias: padded to
    whole panels. inputs: what x is rounded to. `supports_inputs` says which weights take which.
    x in bfloat16: the result of `add_norm_rounded`. input_scale: float32 [1], the stored scale of
    the inputs, with "fp8_static" and "fp4_e4m3".
    """
    assert library is not None
    rows, y_stride = y.shape
    input_type = ROUNDED_INPUTS if x.dtype == torch.bfloat16 else INPUT_TYPES[inputs]
    weight_type, scale_type, *addresses, cols, depth, group_size = weight.kernel_arguments
    library.linear(
        weight_type,
        input_type,
        scale_type,
        x.data_ptr(),
        x.stride(0),
        *addresses,
        address(bias),
        y.data_ptr() + 4 * first_column,
        y_stride,
        rows,
        cols,
        depth,
        group_size,
        address(input_scale),
    )


def supports_inputs(weight: PackedWeight, inputs: InputType) -> bool:
    """Whether `linear` multiplies this weight by inputs that are rounded to `inputs`."""
    if weight.is_compressed:
        return inputs == "bfloat16"
    if inputs == "int8":
        return weight.dtype in (torch.int8, torch.uint8)
    if inputs == "bfloat16":
        # bfloat16 holds values of 8 and 4 bits, but not those of float16.
        return weight.dtype not in (torch.float32, torch.float16) and has_bfloat16()
    if inputs.startswith("fp4"):
        return weight.dtype == torch.uint8 and weight.four_bit_type == "fp4"
    return True


def inputs_for(weight: PackedWeight, activations: CpuActivations) -> InputType:
    """What the inputs of a linear layer with this weight are rounded to.

    activations: the wish of `--cpu-activations`. Inputs stay in float32 where the weight's type or
    the processor does not allow it.
    """
    wanted = AUTO_INPUTS.get(weight.dtype, "float32") if activations == "auto" else activations
    return wanted if supports_inputs(weight, wanted) else "float32"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `elementwise.rms_norm`. x: contiguous."""
    return add_norm(x, None, 1.0, weight, None, eps, subtract_mean=False)[1]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """See `elementwise.layer_norm`. x: contiguous."""
    return add_norm(x, None, 1.0, weight, bias, eps, subtract_mean=True)[1]


def add_norm(
    x: torch.Tensor,
    update: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    subtract_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + scale * update (x without an update), and its norm: an RMS norm or a layer norm.

    x, update: contiguous, of one shape.
    """
    y = torch.empty_like(x)
    return _add_norm(x, update, scale, weight, bias, eps, y, subtract_mean=subtract_mean), y


def add_norm_rounded(
    x: torch.Tensor,
    update: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    subtract_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_norm` of x [R, K], with the norm in bfloat16, as linear layers round their inputs.

    K: a multiple of DEPTH_MULTIPLE. The norm has R rounded up to TILE_ROWS rows; those after R are
    uninitialized. The level must have bfloat16.
    """
    rows, size = x.shape
    y = torch.empty(rows + -rows % TILE_ROWS, size, dtype=torch.bfloat16)
    return _add_norm(x, update, scale, weight, bias, eps, y, subtract_mean=subtract_mean), y


def _add_norm(
    x: torch.Tensor,
    update: torch.Tensor | None,
    scale: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    *,
    subtract_mean: bool,
) -> torch.Tensor:
    """Write the norm to y and return the sum."""
    assert library is not None
    total = x if update is None else torch.empty_like(x)
    size = x.shape[-1]
    library.norm(
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        y.data_ptr(),
        x.numel() // size,
        size,
        subtract_mean,
        address(update),
        total.data_ptr(),
        y.dtype == torch.bfloat16,
        eps,
        scale,
    )
    return total


def norm_heads_(x: torch.Tensor, weight: torch.Tensor, eps: float, subtract_mean: bool) -> None:
    """`elementwise.norm_heads` in place. x: [T, N, D]; its last two dimensions are contiguous."""
    assert library is not None
    num_tokens, num_heads, head_dim = x.shape
    library.norm_heads(
        x.data_ptr(),
        x.stride(0),
        num_tokens,
        num_heads,
        head_dim,
        weight.data_ptr(),
        head_dim if weight.dim() == 2 else 0,
        subtract_mean,
        eps,
    )


def add_residual(residual: torch.Tensor, update: torch.Tensor, scale: float) -> torch.Tensor:
    """See `elementwise.add_residual`. Both are contiguous."""
    assert library is not None
    y = torch.empty_like(residual)
    library.add_residual(
        residual.data_ptr(), update.data_ptr(), y.data_ptr(), residual.numel(), scale
    )
    return y


def scale_tokens_(x: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply each token of x [T, N, D] by its factor, float32 [T], in place.

    The last two dimensions of x are contiguous.
    """
    assert library is not None
    num_tokens, num_heads, head_dim = x.shape
    library.scale_tokens(
        x.data_ptr(), x.stride(0), num_tokens, num_heads * head_dim, factors.data_ptr()
    )


def apply_rotary_emb_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> None:
    """See `elementwise.apply_rotary_emb_`. x: [T, N, D]; its last dimension is contiguous."""
    assert library is not None
    num_tokens, num_heads, _ = x.shape
    library.apply_rotary_emb(
        x.data_ptr(),
        x.stride(0),
        num_tokens,
        num_heads,
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1] // 2,
        interleaved,
    )


def store_kv(
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    *,
    static_scales: bool,
) -> None:
    """Write keys and values [T, 2K, D] to their slots of a cache [2K, blocks, block_size, D].

    The last two dimensions of kv are contiguous. cache: of a dtype in KV_TYPES. scales: of an 8-bit
    cache, float32 [2K, blocks, block_size, 1], which are computed and written, or with
    static_scales [2K, 1, 1], which are read.
    """
    assert library is not None
    num_tokens, num_heads, head_dim = kv.shape
    library.store_kv(
        kv.data_ptr(),
        kv.stride(0),
        num_tokens,
        num_heads,
        head_dim,
        slot_mapping.data_ptr(),
        KV_TYPES[cache.dtype],
        cache.data_ptr(),
        cache.stride(0),
        address(scales),
        static_scales,
    )


def act_and_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `elementwise.act_and_mul`. gate_up: contiguous [T, 2 * size]."""
    assert library is not None
    rows, both = gate_up.shape
    size = both // 2
    y = torch.empty(rows, size)
    code = ACTIVATIONS[activation]
    library.act_and_mul(gate_up.data_ptr(), y.data_ptr(), rows, size, code, 0.0, 0.0)
    return y


def act(x: torch.Tensor, activation: str) -> torch.Tensor:
    """See `elementwise.act`. x: contiguous."""
    assert library is not None
    y = torch.empty_like(x)
    library.act(x.data_ptr(), y.data_ptr(), 1, x.numel(), ACTIVATIONS[activation])
    return y


def xielu(
    x: torch.Tensor,
    alpha_p: torch.Tensor,
    alpha_n: torch.Tensor,
    beta: torch.Tensor,
    eps: torch.Tensor,
) -> torch.Tensor:
    """See `elementwise.xielu`. x: contiguous. All are float32."""
    assert library is not None
    y = torch.empty_like(x)
    library.xielu(
        x.data_ptr(),
        y.data_ptr(),
        x.numel(),
        alpha_p.data_ptr(),
        alpha_n.data_ptr(),
        beta.data_ptr(),
        eps.data_ptr(),
    )
    return y


def swiglu_clamped(gate_up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """See `elementwise.swiglu_clamped`. gate_up: contiguous [T, 2 * size]."""
    assert library is not None
    rows, both = gate_up.shape
    size = both // 2
    y = torch.empty(rows, size)
    library.act_and_mul(gate_up.data_ptr(), y.data_ptr(), rows, size, SWIGLU_CLAMPED, limit, alpha)
    return y


def apply_gate(x: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    """See `elementwise.apply_gate`.

    x: contiguous [R, size]. gate: [R, 1] or [R, size]; its last dimension is contiguous.
    """
    assert library is not None
    y = torch.empty_like(x)
    rows, size = x.shape
    library.apply_gate(
        x.data_ptr(),
        gate.data_ptr(),
        gate.stride(0),
        y.data_ptr(),
        rows,
        size,
        gate.shape[1] == 1,
        GATE_ACTIVATIONS[activation],
    )
    return y


def copy_columns(x: torch.Tensor, y: torch.Tensor, first_column: int) -> None:
    """y[:, first_column : first_column + columns] = x. x: [R, columns]; y: contiguous."""
    assert library is not None
    rows, size = x.shape
    library.copy_rows(
        x.data_ptr(), x.stride(0), y.data_ptr() + 4 * first_column, y.shape[1], rows, size
    )


def has_compact_rows(x: torch.Tensor) -> bool:
    """Whether x is [n, V] with contiguous rows that are not empty."""
    return x.dim() == 2 and x.shape[1] > 0 and x.stride(1) == 1


def argmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of the largest value of each row of x [n, V], and whether its values are finite.

    x: `has_compact_rows`. Returns int64 [n] (the first column on a tie; NaN counts as the largest)
    and bool [n].
    """
    assert library is not None
    rows, cols = x.shape
    ids = torch.empty(rows, dtype=torch.int64)
    is_finite = torch.empty(rows, dtype=torch.bool)
    library.argmax(x.data_ptr(), x.stride(0), rows, cols, ids.data_ptr(), is_finite.data_ptr())
    return ids, is_finite
