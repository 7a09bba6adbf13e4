"""humming-kernels (https://github.com/vllm-project/humming): W4A16 products, where installed.

The library compiles its kernels with NVRTC when a shape is first used. `llmkit doctor --tune`
measures it beside `WeightOnlyLinear`. Without a measurement it is not used.
Legend: M rows of x, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llmkit.kernels.tuned_configs import Tunable

DISTRIBUTION = "humming-kernels"
BITS = 4
OURS = 0
HUMMING = 1
# Which library holds a weight. Its layout serves all numbers of rows, so there is one choice.
LIBRARY = Tunable("w4a16_library", ((OURS, HUMMING),))
CHOICES = {OURS: "Triton", HUMMING: "humming"}
# The library rearranges tiles of 64 outputs and 32 inputs.
OUTPUTS_MULTIPLE = 64
INPUTS_MULTIPLE = 32


class HummingLinear:
    """W = (q - zeros) * scales, with inputs in `dtype`, float16 or bfloat16.

    q: uint8 [N, K], 0 .. 15; scales: float [N, G], which are rounded to `dtype`; zeros: uint8
    [N, G], None if all are 8; group_size: inputs per group, or -1 for whole rows; bias: [N].
    `supports` says which shapes are taken. Raises whatever the library raises where it cannot
    compile.
    """

    def __init__(
        self,
        q: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        group_size: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> None:
        N, K = q.shape
        library: Any = importlib.import_module("humming.layer")
        tensors = {"weight": pack_codes(q), "weight_scale": scales.to(dtype).contiguous()}
        if zeros is not None:  # eight outputs share a word
            tensors["zero_point"] = pack_codes(zeros.T).T.contiguous()
        if bias is not None:
            tensors["bias"] = bias.to(dtype)
        config = {
            "quant_method": "humming",
            "dtype": f"uint{BITS}",
            "group_size": max(group_size, 0),
            "has_zero_point": zeros is not None,
        }
        with torch.cuda.device_of(q):
            self.layer: Any = library.HummingLayer(
                shape_n=N,
                shape_k=K,
                weight_config=config,
                has_bias=bias is not None,
                torch_dtype=dtype,
            ).to(q.device)
            self.layer.load_from_tensors(tensors)
            self.layer.transform()
            self._unwrap_parameters()
            # All of the shape's kernels are compiled here, not while serving.
            self(torch.zeros(1, K, dtype=dtype, device=q.device))
        self.nbytes = sum(
            tensor.nbytes for tensor in vars(self.layer).values() if torch.is_tensor(tensor)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K]. Returns [..., N] in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        with torch.cuda.device_of(x):
            y: torch.Tensor = self.layer(inputs=rows)
        return y.view(*x.shape[:-1], y.shape[1])

    def _unwrap_parameters(self) -> None:
        """Make the layer's parameters plain tensors, which offloading to the CPU replaces."""
        for name, parameter in list(self.layer.named_parameters()):
            delattr(self.layer, name)
            setattr(self.layer, name, parameter.data)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [R, C] with 4-bit codes as int32 [R, C / 8]. The first code has the lowest bits."""
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    return pairs.flatten().view(torch.int32).view(len(codes), -1)


@cache
def installed_version() -> str | None:
    """The installed version of the library; None without it."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def supports(shape: tuple[int, ...], bits: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether the library is installed and takes such a weight [out, in] and inputs of `dtype`."""
    out_features, in_features = shape
    return (
        installed_version() is not None
        and bits == BITS
        and dtype in (torch.float16, torch.bfloat16)
        and out_features % OUTPUTS_MULTIPLE == 0
        and in_features % INPUTS_MULTIPLE == 0
        and (group_size == -1 or in_features % group_size == 0)
    )


def is_chosen(
    shape: tuple[int, ...],
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> bool:
    """Whether the library was measured to be faster for such a weight [out, in] on this GPU."""
    if not supports(shape, bits, group_size, dtype):
        return False
    zeros = "symmetric" if symmetric else "asymmetric"
    key = (bits, group_size, *shape, dtype, zeros, installed_version())
    return LIBRARY.config(key, (OURS,), torch.device(device))[0] == HUMMING


def try_humming_linear(
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> HummingLinear | None:
    """See `HummingLinear`; None, with a warning on stderr, if the library fails."""
    try:
        return HummingLinear(q, scales, zeros, group_size, dtype, bias)
    except Exception as error:  # it needs NVRTC and CUDA's headers, and a build for this torch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.stderr.write(
            f"llmkit: warning: {DISTRIBUTION} failed for a weight {list(q.shape)} ({reason}); "
            "llmkit's own kernel is used\n"
        )
        return None


def status(device: torch.device) -> str:
    """For how many measured weights the library is used on this GPU, for `doctor`; "" for none."""
    installed = installed_version()
    if installed is None:
        return ""
    entries = LIBRARY.measured(device)
    measured = [config for name, config in entries.items() if name.endswith(f" {installed}")]
    faster = measured.count((HUMMING,))
    if not faster:
        return ""
    return f"{DISTRIBUTION} {installed} was faster for {faster} of {len(measured)} measured shapes"
