"""A module with the documented surface of humming-kernels, computed in plain torch.

It refuses tensors of other names, shapes and dtypes than the library's, and multiplies with what
the tensors mean there: codes of 4 bits, the first in the lowest bits, minus 8 or a zero point.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from llmkit.kernels import humming_linear

VERSION = "0.1.19"


class HummingLayer(nn.Module):
    """A linear layer: load its tensors, move it, transform it, call it."""

    built: list[HummingLayer]  # set by `install`

    def __init__(
        self,
        shape_n: int,
        shape_k: int,
        weight_config: dict[str, Any],
        has_bias: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert weight_config["quant_method"] == "humming" and weight_config["dtype"] == "uint4"
        assert torch_dtype in (torch.float16, torch.bfloat16)
        self.group_size = weight_config["group_size"] or shape_k
        self.has_zero_point = weight_config["has_zero_point"]
        self.ready = False
        groups = shape_k // self.group_size
        shapes = {
            "weight": ((shape_n, shape_k // 8), torch.int32),
            "weight_scale": ((shape_n, groups), torch_dtype),
        }
        if self.has_zero_point:
            shapes["zero_point"] = ((shape_n // 8, groups), torch.int32)
        if has_bias:
            shapes["bias"] = ((shape_n,), torch_dtype)
        for name, (shape, dtype) in shapes.items():
            values = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            setattr(self, name, values)
        self.built.append(self)

    def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        expected = dict(self.named_parameters())
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            found = (tensor.shape, tensor.dtype)
            assert found == (expected[name].shape, expected[name].dtype), (name, found)
        self.load_state_dict(tensors)

    def transform(self) -> None:
        n, words = self.weight.shape
        assert n % 64 == 0 and words * 8 % 32 == 0
        if self.weight.device.type == "meta":
            raise RuntimeError("Could not locate the NVRTC library in CUDA path")
        self.ready = True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert self.ready and inputs.ndim == 2 and inputs.is_contiguous()
        assert inputs.dtype == self.weight_scale.dtype
        zeros = torch.tensor([[8.0]])
        if self.has_zero_point:
            zeros = _codes(self.zero_point.T).T.repeat_interleave(self.group_size, dim=1)
        scales = self.weight_scale.float().repeat_interleave(self.group_size, dim=1)
        y = inputs.float() @ ((_codes(self.weight) - zeros) * scales).T
        bias = getattr(self, "bias", None)
        return (y if bias is None else y + bias.float()).to(inputs.dtype)


def _codes(words: torch.Tensor) -> torch.Tensor:
    """The values of the codes in int32 [rows, words]: float [rows, 8 * words]."""
    codes = [(words >> shift) & 15 for shift in range(0, 32, 4)]
    return torch.stack(codes, dim=-1).flatten(1).float()


def install(monkeypatch: pytest.MonkeyPatch) -> list[HummingLayer]:
    """Install the module. Returns the layers that are built, as they come."""
    package = ModuleType("humming")
    module = ModuleType("humming.layer")
    HummingLayer.built = []
    module.HummingLayer = HummingLayer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming", package)
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    assert importlib.import_module("humming.layer") is module
    monkeypatch.setattr(humming_linear, "installed_version", lambda: VERSION)
    return HummingLayer.built
