"""The linear layers of the decoder: dense ones, and packed ones for serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmkit.checkpoint.microscaling import E8M0_BIAS
from llmkit.checkpoint.quantized_weight import QuantizedWeight, ScaleFormat, Scheme
from llmkit.checkpoint.stored_tensors import E8M0_NAN
from llmkit.common.options import CpuActivations
from llmkit.kernels import fp8_block_linear, humming_linear, w4a4_linear
from llmkit.kernels.activation_quant import (
    fake_quantize_per_group,
    fake_quantize_per_token,
    fake_quantize_static,
)
from llmkit.kernels.cpu import cpu_kernels, float32_product
from llmkit.kernels.cpu.cpu_kernels import FourBitType, PackedWeight
from llmkit.kernels.cpu.cpu_linear import CpuLinear
from llmkit.kernels.fp4_expert import Fp4Expert
from llmkit.kernels.input_quant import InputQuant, LinearInput, QuantizedInput
from llmkit.kernels.linear_kernel import LinearKernel
from llmkit.kernels.quantized_linear import Fp4Linear, WeightOnlyLinear
from llmkit.kernels.triton_support import device_capability, tl
from llmkit.kernels.w4a4_linear import W4A4Linear
from llmkit.kernels.w8a8_linear import W8A8Linear, scales_rows

MIN_CAPABILITY = (8, 0)  # of GPUs that the kernels of quantized weights run on
MIN_FP8_CAPABILITY = (8, 9)  # of GPUs that multiply 8-bit floats
MIN_FP4_CAPABILITY = (10, 0)  # of GPUs that multiply 4-bit floats
# How the compiled CPU kernels quantize inputs by token and group.
CPU_GROUP_INPUTS: dict[tuple[str, ScaleFormat], cpu_kernels.InputType] = {
    ("fp8", "float"): "fp8_group",
    ("fp8", "e8m0"): "fp8_e8m0",
    ("fp4", "e8m0"): "fp4_e8m0",
    ("fp4", "e4m3"): "fp4_e4m3",
}
# They may quantize their inputs.
QUANTIZING_KERNELS = (W8A8Linear, fp8_block_linear.Fp8BlockLinear, CpuLinear)


@dataclass(frozen=True)
class ActivationQuant:
    """Fake quantization of activations.

    With a stored scale, or with one for each token, or for each token and group of channels.
    """

    value_type: str  # "int8", "fp8" or "fp4"
    # float32 [1]; None: each token has its own. With groups: the scale of their e4m3 scales.
    scale: torch.Tensor | None = None
    group_size: int = 0  # channels that share a token's scale; 0: all
    scale_format: ScaleFormat = "float"  # of groups

    @classmethod
    def of(
        cls, scheme: Scheme, scale: torch.Tensor | None = None, group_size: int | None = None
    ) -> ActivationQuant | None:
        """How a linear layer of this scheme quantizes its inputs; None when it does not.

        scale: the stored scale. group_size: where it is not the scheme's.
        """
        if scheme.input_type is None:
            return None
        if scheme.inputs != "group":
            return cls(scheme.input_type, scale)
        size = scheme.group_size if group_size is None else group_size
        return cls(scheme.input_type, scale, size, scheme.scale_format)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., C] in and out."""
        if self.group_size:
            return fake_quantize_per_group(
                x, self.value_type, self.group_size, self.scale_format, self.scale
            )
        if self.scale is None:
            return fake_quantize_per_token(x, self.value_type)
        return fake_quantize_static(x, self.scale, self.value_type)


class Linear(nn.Module):
    """y = quantize(x) W' + b with a dense weight [out, in].

    It is an nn.Module so that calibration can hook it.
    """

    if TYPE_CHECKING:  # nn.Module's own returns Any

        def __call__(self, x: LinearInput) -> torch.Tensor: ...

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation_quant: ActivationQuant | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.activation_quant = activation_quant
        # [in]: the inputs are multiplied by it first. `serving_linear` sets it.
        self.pre_quant_scale: torch.Tensor | None = None

    @property
    def input_quant(self) -> InputQuant | None:
        """How the kernel before may quantize the inputs; None: it must not."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]."""
        return float32_product.linear(self._prepare_inputs(x), self.weight, self.bias)

    def forward_into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`forward` of x [n, in], written to out [n, out] of the same dtype by torch's product."""
        x = self._prepare_inputs(x)
        if self.bias is None:
            return torch.mm(x, self.weight.T, out=out)
        return torch.addmm(self.bias, x, self.weight.T, out=out)

    def _prepare_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs as the weight is multiplied by them."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        return x if self.activation_quant is None else self.activation_quant(x)


class PackedLinear(Linear):
    """A linear layer with a packed weight, for serving only.

    `weight` is on the meta device: it has a shape but no values.
    """

    def __init__(
        self,
        kernel: LinearKernel,
        shape: tuple[int, int],
        activation_quant: ActivationQuant | None = None,
    ) -> None:
        super().__init__(torch.empty(shape, device="meta"), None, activation_quant)
        self.kernel = kernel

    @property
    def input_quant(self) -> InputQuant | None:
        """How the kernel quantizes its inputs; None if it takes them as they are."""
        if self.pre_quant_scale is not None:
            return None
        return self.kernel.input_quant if isinstance(self.kernel, QUANTIZING_KERNELS) else None

    def __call__(self, x: LinearInput) -> torch.Tensor:
        """x: [..., in], or as `input_quant` says. Returns [..., out]. Hooks do not run."""
        if isinstance(x, QuantizedInput):
            assert isinstance(self.kernel, QUANTIZING_KERNELS)
            return self.kernel(x)
        return self.kernel(self._prepare_inputs(x))


def common_input_quant(linears: Sequence[Linear]) -> InputQuant | None:
    """How the inputs of several linear layers are quantized; None unless all do it alike."""
    first = linears[0].input_quant if linears else None
    if first is None or not all(first.is_same(linear.input_quant) for linear in linears[1:]):
        return None
    return first


def serving_linear(
    parts: Sequence[torch.Tensor | QuantizedWeight],
    bias: torch.Tensor | None,
    activation_quant: ActivationQuant | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    cpu_activations: CpuActivations = "float32",
    is_expert: bool = False,
) -> Linear:
    """The linear layer that serves a weight, for inputs of `dtype`.

    Its outputs equal those of a dense layer in float32, up to the order of summation and, on a GPU,
    rounding to `dtype`. A GPU quantizes inputs only where it multiplies their type with that of the
    weights: with a weight-only kernel they stay as they are.
    parts: the weight in parts of some rows each: float tensors [rows, in], or quantized weights. On
    a GPU, their scheme must be `supported_on_gpu`.
    bias: [out], of `dtype`.
    cpu_activations: what a CPU rounds inputs to, where the weight's stored type allows it.
    is_expert: whether it is a layer of an expert; a GPU then runs all experts in one kernel.
    """
    pre_quant_scale, parts = _split_pre_quant_scale(parts, dtype)
    if pre_quant_scale is not None:
        layer = serving_linear(
            parts, bias, activation_quant, dtype, device, cpu_activations, is_expert
        )
        layer.pre_quant_scale = pre_quant_scale.to(device)
        return layer
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    parts = _merge_parts([_in_kernel_bits(part) for part in parts])
    on_cpu = torch.device(device).type == "cpu"
    if len(parts) == 1 and isinstance(parts[0], QuantizedWeight):
        weight = parts[0]
        if not on_cpu:
            kernel = _gpu_kernel(weight, bias, activation_quant, dtype, device, is_expert)
            return PackedLinear(kernel, shape)
        is_w8a8 = weight.scheme.inputs == "token" and weight.scheme.input_type == "int8"
        is_w8a8 = is_w8a8 and supports_w8a8(weight)
        if is_w8a8 and keeps_weights_packed():
            return PackedLinear(CpuLinear([pack_weight(weight)], bias, inputs="int8"), shape)
    if on_cpu and keeps_weights_packed():
        weights = [pack_weight(part) for part in parts]
        if activation_quant is None:
            return PackedLinear(CpuLinear(weights, bias, inputs=cpu_activations), shape)
        input_type = cpu_input_type(activation_quant, weights)
        if input_type is None:  # inputs that are quantized already stay as they are
            return PackedLinear(CpuLinear(weights, bias), shape, activation_quant)
        input_scale = activation_quant.scale
        kernel = CpuLinear(weights, bias, inputs=input_type, input_scale=input_scale)
        return PackedLinear(kernel, shape)
    dense = [part.dequantize() if isinstance(part, QuantizedWeight) else part for part in parts]
    joined = dense[0] if len(dense) == 1 else torch.cat(dense)
    return Linear(joined.to(dtype), bias, activation_quant)


def keeps_weights_packed() -> bool:
    """Whether a CPU keeps weights in their stored type, and hidden states in float32."""
    return cpu_kernels.library is not None


def held_dtype(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type that a CPU holds a dense weight in: as stored if `dtype` has all its values.

    Other weights are rounded to `dtype`. Both are float32, bfloat16 or float16.
    """
    return stored if torch.promote_types(stored, dtype) == dtype else dtype


def gpu_capability(device: torch.device | str) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) without one or without Triton."""
    if tl is None or not torch.cuda.is_available():
        return (0, 0)
    return device_capability(device)


def supported_on_gpu(
    scheme: Scheme,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    capability: tuple[int, int],
    is_expert: bool = False,
) -> bool:
    """Whether a weight [out, in] stays quantized on a CUDA device, for inputs of `dtype`."""
    return gpu_kernel_type(scheme, shape, dtype, capability, is_expert) is not None


def gpu_kernel_type(
    scheme: Scheme,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    capability: tuple[int, int],
    is_expert: bool = False,
) -> type[LinearKernel] | None:
    """The kernel of a quantized weight [out, in] on a GPU; None: the weight is dequantized."""
    if capability < MIN_CAPABILITY:
        return None
    has_fp8_groups = scheme.is_fp8 and scheme.inputs == "group"
    if is_expert and not (scheme.is_fp4 or has_fp8_groups):
        return None
    if scheme.is_fp4:
        has_groups = shape[-1] % scheme.group_size == 0
        has_kernel = scheme.group_size == 16 or scheme.group_size % 32 == 0
        if not has_groups or not has_kernel:
            return None
        if is_expert:
            return Fp4Expert if dtype.itemsize == 2 else None
        has_products = capability >= MIN_FP4_CAPABILITY and scheme.input_type == "fp4"
        fits = w4a4_linear.GROUP_SIZES.get(scheme.scale_format) == scheme.group_size
        return W4A4Linear if has_products and fits and dtype.itemsize == 2 else Fp4Linear
    if has_fp8_groups:
        fits = scheme.group_size in fp8_block_linear.GROUP_SIZES
        return fp8_block_linear.Fp8BlockLinear if fits else None
    if scheme.is_fp8:
        aligned = all(size % 16 == 0 for size in shape) and dtype != torch.float32
        if aligned and scheme.inputs != "none" and capability >= MIN_FP8_CAPABILITY:
            return W8A8Linear
        # Inputs keep their dtype.
        fits = scheme.group_size in (-1, *fp8_block_linear.GROUP_SIZES)
        return fp8_block_linear.Fp8BlockLinear if fits else None
    if scheme.inputs == "none" or scheme.input_type == "fp8":
        return WeightOnlyLinear if max(scheme.group_size, 0) % 32 == 0 else None
    aligned = all(size % 8 == 0 for size in shape)
    is_w8a8 = scheme.bits == 8 and scheme.inputs == "token"
    return W8A8Linear if aligned and is_w8a8 else None


def _gpu_kernel(
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    activation_quant: ActivationQuant | None,
    dtype: torch.dtype,
    device: torch.device | str,
    is_expert: bool,
) -> LinearKernel:
    """The kernel that `gpu_kernel_type` names."""
    scheme = weight.scheme
    capability = gpu_capability(device)
    kind = gpu_kernel_type(scheme, weight.shape, dtype, capability, is_expert)
    if kind is fp8_block_linear.Fp8BlockLinear:
        group_size = scheme.group_size
        scales = weight.scales
        if group_size == -1:  # a row's scale is that of all its groups
            group_size = max(fp8_block_linear.GROUP_SIZES)
            scales = scales.expand(-1, -(-weight.shape[1] // group_size))
        return fp8_block_linear.Fp8BlockLinear(
            weight.q,
            scales,
            group_size,
            bias,
            quantize_inputs=scheme.inputs == "group" and capability >= MIN_FP8_CAPABILITY,
            scale_format="e8m0" if scheme.scale_format == "e8m0" else "float",
        )
    if kind is Fp4Expert:
        return Fp4Expert(weight.q, weight.scales, bias, weight.global_scale)
    if kind is W4A4Linear:
        input_scale = None if activation_quant is None else activation_quant.scale
        return W4A4Linear(weight.q, weight.scales, bias, weight.global_scale, input_scale)
    if kind is Fp4Linear:
        size = scheme.group_size
        return Fp4Linear(weight.q, weight.scales, size, bias, weight.global_scale)
    if kind is WeightOnlyLinear:
        sizes = (weight.shape, scheme.bits, scheme.group_size)
        if humming_linear.is_chosen(*sizes, scheme.symmetric, dtype, device):
            zeros = None if scheme.symmetric else weight.zeros
            other = humming_linear.try_humming_linear(
                weight.q, weight.scales, zeros, scheme.group_size, dtype, bias
            )
            if other is not None:
                return other
        return WeightOnlyLinear(
            weight.q, weight.scales, weight.zeros, scheme.bits, scheme.group_size, bias
        )
    assert kind is W8A8Linear and activation_quant is not None
    return W8A8Linear(
        weight.q if scheme.kind == "float" else _as_int8(weight.q),
        weight.scales,
        bias,
        activation_quant.scale,
        row_scaling=scales_rows(capability, torch.__version__),
    )


def _split_pre_quant_scale(
    parts: Sequence[torch.Tensor | QuantizedWeight], dtype: torch.dtype
) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | QuantizedWeight]]:
    """The `pre_quant_scale` [in] that all parts have, of `dtype`, and the parts without it.

    Parts that differ in it are dequantized, with it.
    """
    scales = [part.pre_quant_scale if isinstance(part, QuantizedWeight) else None for part in parts]
    first = scales[0]
    if all(scale is None for scale in scales):
        return None, parts
    if first is not None and all(
        scale is not None and torch.equal(scale, first) for scale in scales
    ):
        plain = [
            replace(part, pre_quant_scale=None) if isinstance(part, QuantizedWeight) else part
            for part in parts
        ]
        return first.to(dtype), plain
    dense = [
        part.dequantize(dtype) if isinstance(part, QuantizedWeight) else part for part in parts
    ]
    return None, dense


def _merge_parts(
    parts: Sequence[torch.Tensor | QuantizedWeight],
) -> Sequence[torch.Tensor | QuantizedWeight]:
    """Concatenate parts that all have the same scheme or dtype; return other parts unchanged."""
    if len(parts) == 1:
        return parts
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(tensors) == len(parts):
        same_dtype = len({tensor.dtype for tensor in tensors}) == 1
        return [torch.cat(tensors)] if same_dtype else parts
    weights = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(weights) < len(parts):
        return parts
    # The scales of blocks lie here for every row, so that blocks of other rows do not matter.
    schemes = [replace(weight.scheme, block_rows=1) for weight in weights]
    dtypes = [weight.scales.dtype for weight in weights]
    if len(set(zip(schemes, dtypes, strict=True))) > 1:
        return parts
    # Each part has a global scale of its own: here one for each row.
    global_scales = [
        weight.global_scale.expand(len(weight.q))
        for weight in weights
        if weight.global_scale is not None
    ]
    return [
        QuantizedWeight(
            torch.cat([weight.q for weight in weights]),
            torch.cat([weight.scales for weight in weights]),
            torch.cat([weight.zeros for weight in weights]),
            schemes[0],
            global_scale=torch.cat(global_scales) if global_scales else None,
        )
    ]


def _in_kernel_bits(part: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedWeight:
    """The weight in the bits of a kernel: integers of 2 and 3 bits are held in 4."""
    if isinstance(part, QuantizedWeight) and part.scheme.bits < 4:
        return part.with_bits(4)
    return part


def supports_w8a8(weight: QuantizedWeight) -> bool:
    """Whether the weight can be multiplied with 8-bit inputs as integers."""
    scheme = weight.scheme
    return (
        scheme.kind == "int"
        and scheme.bits == 8
        and scheme.symmetric
        and weight.scales.shape == (weight.shape[0], 1)
    )


def cpu_input_type(
    quant: ActivationQuant, weights: Sequence[PackedWeight]
) -> cpu_kernels.InputType | None:
    """How the compiled CPU kernels quantize the inputs of these weights; None: they do not."""
    has_one_group = quant.scale_format == "float" and quant.group_size >= weights[0].shape[1]
    if quant.value_type == "fp8" and (has_one_group or not quant.group_size):
        return "fp8_token" if quant.scale is None else "fp8_static"
    found = CPU_GROUP_INPUTS.get((quant.value_type, quant.scale_format))
    for weight in weights:
        num_groups = 1 if weight.scales is None else len(weight.scales)
        has_groups = weight.shape[1] == num_groups * quant.group_size
        if found is None or not has_groups or not cpu_kernels.supports_inputs(weight, found):
            return None
    return found


def pack_weight(weight: torch.Tensor | QuantizedWeight) -> PackedWeight:
    """Pack a weight [rows, in] for the compiled CPU kernels; its values stay exact."""
    if isinstance(weight, torch.Tensor):
        return PackedWeight.pack(
            weight if weight.dtype in cpu_kernels.WEIGHT_TYPES else weight.float()
        )
    weight = weight.with_even_groups() if weight.scheme.kind == "float" else weight
    scheme = weight.scheme
    scales = weight.scales.float()
    columns = weight.shape[1]
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    values_per_word = 8 if scheme.bits == 4 else 4
    if group_size != columns and (columns % group_size or group_size % values_per_word):
        return PackedWeight.pack(weight.dequantize().float())
    if scheme.kind == "float":
        has_nan = scheme.is_fp8 and bool(((weight.q.view(torch.uint8) & 0x7F) == 0x7F).any())
        # The kernels' FP8 has no NaN. bfloat16 represents every FP8 value exactly.
        q = weight.q.to(torch.bfloat16) if has_nan else weight.q
        stored, factors = _stored_scales(weight)
        four_bit_type: FourBitType = "fp4" if scheme.is_fp4 else "uint4"
        return PackedWeight.pack(q, stored, scale_factors=factors, four_bit_type=four_bit_type)
    if scheme.bits == 4 and bool((weight.zeros == 8).all()):
        return PackedWeight.pack(weight.q, scales, four_bit_type="int4")
    if scheme.bits == 4:
        return PackedWeight.pack(weight.q, scales, scales * weight.zeros.float())
    int8_zeros = weight.zeros.float() - 128
    offsets = scales * int8_zeros if bool(int8_zeros.any()) else None
    return PackedWeight.pack(_as_int8(weight.q), scales, offsets)


def _stored_scales(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [rows, G] of floats as `PackedWeight.pack` takes them, and factors [rows] of bytes.

    The bytes are those of a checkpoint: e8m0, or e4m3 times the global scale.
    """
    scales = weight.scales.float()
    if weight.scheme.scale_format == "e8m0":
        exponents = torch.frexp(scales).exponent - 1 + E8M0_BIAS
        return exponents.clamp_(0, E8M0_NAN - 1).to(torch.uint8), torch.ones(len(scales))
    if weight.global_scale is None:
        return scales, None
    factors = weight.global_scale.float().expand(len(scales))
    return (scales / factors[:, None]).to(torch.float8_e4m3fn), factors


def _as_int8(q: torch.Tensor) -> torch.Tensor:
    """uint8 values minus 128, as int8."""
    return (q ^ 128).view(torch.int8)
