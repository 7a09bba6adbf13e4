"""Which kernel computes each kind of work on a machine, and why, for `llmkit doctor`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.fp8_block_linear import Fp8BlockLinear
from llmkit.kernels.quantized_linear import Fp4Linear, WeightOnlyLinear
from llmkit.kernels.w4a4_linear import W4A4Linear
from llmkit.kernels.w8a8_linear import W8A8Linear, scales_rows
from llmkit.model.linear import MIN_CAPABILITY, MIN_FP8_CAPABILITY, gpu_kernel_type

SCHEMES = {
    "W4A16": Scheme(4, 128),
    "W8A8": Scheme(8, inputs="token"),
    "FP8": Scheme(8, kind="float", inputs="token"),
    "FP8 blocks": Scheme(8, 128, kind="float", inputs="group", block_rows=128),
    "MXFP8": Scheme(8, 32, kind="float", inputs="group", scale_format="e8m0"),
    "MXFP4": Scheme(4, 32, kind="float", inputs="group", scale_format="e8m0"),
    "NVFP4": Scheme(4, 16, kind="float", inputs="group", scale_format="e4m3"),
    "W4AFP8": Scheme(4, 128, inputs="token", input_type="fp8"),
}
WORKS = ("attention", *SCHEMES, "sampler")
SHAPE = (4096, 4096)  # of a weight; odd shapes may have another kernel


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of a kind of work, for a model in bfloat16."""

    work: str  # one of WORKS
    kernel: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What decides about the kernels of a GPU."""

    capability: tuple[int, int]  # as `device_capability` has it
    is_amd: bool = False
    has_triton: bool = True
    torch_version: str = torch.__version__
    flash_attention: tuple[bool, str] = (False, "")  # `flash_attention.status`
    w4a16_library: str = ""  # `humming_linear.status`

    @property
    def name(self) -> str:
        """The architecture as people write it."""
        major, minor = self.capability
        return "an AMD GPU" if self.is_amd else f"sm_{major}{minor}"


def gpu_kernel_choices(gpu: Gpu) -> list[KernelChoice]:
    """The kernel of each kind of work on a GPU."""
    if not gpu.has_triton:
        why = "Triton is not installed"
        choices = [KernelChoice(work, "torch, dequantized when loaded", why) for work in SCHEMES]
        attention = KernelChoice("attention", "torch", why)
        return [attention, *choices, KernelChoice("sampler", "torch", why)]
    has_flash, flash_why = gpu.flash_attention
    return [
        KernelChoice("attention", "FlashAttention-3" if has_flash else "Triton", flash_why),
        *(_linear_choice(work, scheme, gpu) for work, scheme in SCHEMES.items()),
        KernelChoice("sampler", "Triton", "top-k, top-p and min-p without sorting"),
    ]


def _linear_choice(work: str, scheme: Scheme, gpu: Gpu) -> KernelChoice:
    kind = gpu_kernel_type(scheme, SHAPE, torch.bfloat16, gpu.capability)
    no_fp8 = f"{gpu.name} has no products of this FP8"
    if kind is None:
        oldest = "sm_{}{}".format(*MIN_CAPABILITY)
        why = f"{gpu.name} is older than {oldest}"
        return KernelChoice(work, "torch, dequantized when loaded", why)
    if kind is WeightOnlyLinear and gpu.w4a16_library:
        kernel = "humming, Triton for other shapes"
        why = gpu.w4a16_library
    elif kind is WeightOnlyLinear:
        kernel = "Triton, weight-only"
        why = "16-bit products; weights are dequantized in registers"
        if scheme.inputs != "none":
            why = "16-bit products; inputs stay as they are"
    elif kind is W4A4Linear:
        kernel = "Triton, FP4 products"
        why = f"{gpu.name} multiplies FP4; inputs are quantized by token and group"
    elif kind is Fp4Linear:
        kernel = "Triton, weight-only"
        why = "16-bit products; inputs stay as they are; experts of a layer in one kernel"
    elif kind is Fp8BlockLinear and gpu.capability < MIN_FP8_CAPABILITY:
        kernel = "Triton, weight-only"
        why = no_fp8
    elif kind is Fp8BlockLinear:
        kernel = "Triton, FP8 products"
        why = f"{gpu.name} multiplies FP8; inputs are quantized by token and group"
    elif scheme.kind == "int":
        kernel = "torch._int_mm"
        why = f"{gpu.name} multiplies int8; inputs are quantized by token"
    elif scales_rows(gpu.capability, gpu.torch_version):
        kernel = "torch._scaled_mm"
        why = f"{gpu.name} multiplies FP8; inputs are quantized by token"
    else:
        kernel = "torch._scaled_mm, scales in a Triton kernel after it"
        why = (
            f"row scales on {gpu.name} break CUDA graphs with torch "
            f"{gpu.torch_version.partition('+')[0]} (pytorch#177651); torch 2.12 mends it"
        )
    assert kind in (WeightOnlyLinear, Fp4Linear, W4A4Linear, Fp8BlockLinear, W8A8Linear)
    return KernelChoice(work, kernel, why)


def cpu_kernel_choices() -> list[KernelChoice]:
    """The kernel of each kind of work on this machine's CPU."""
    if cpu_kernels.library is None:
        why = f"the compiled kernels are {cpu_kernels.status()}"
        choices = [KernelChoice(work, "torch, dequantized when loaded", why) for work in SCHEMES]
        attention = KernelChoice("attention", "torch", why)
        return [attention, *choices, KernelChoice("sampler", "torch", why)]
    reasons = {
        "attention": "the cache is read in place",
        "W4A16": "weights stay in 4 bits; --cpu-activations chooses the products",
        "W8A8": "int8 products",
        "FP8": "weights stay in 8 bits and are widened in registers",
        "FP8 blocks": "weights stay in 8 bits and are widened in registers",
        "MXFP8": "weights stay in 8 bits and are widened in registers",
        "MXFP4": "weights stay in 4 bits; products of integers where inputs are FP4 too",
        "NVFP4": "weights stay in 4 bits; products of integers where inputs are FP4 too",
        "W4AFP8": "weights stay in 4 bits; inputs are rounded to FP8",
        "sampler": "compiled for greedy requests, torch for others",
    }
    kernel = f"compiled, level {cpu_kernels.level()}"
    return [KernelChoice(work, kernel, reasons[work]) for work in WORKS]
