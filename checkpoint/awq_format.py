"""AWQ's GEMM format, as AutoAWQ defined it and vLLM, SGLang and transformers read it.

For W[out, in] of 4 bits with G groups:

    qweight  int32   [in, out/8]  packed along `out` in the order 0, 2, 4, 6, 1, 3, 5, 7
    qzeros   int32   [G, out/8]   packed in the same way
    scales   float16 [G, out]

Zero points are stored unchanged, so that every asymmetric scheme fits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized_weight import (
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.checkpoint.stored_tensors import check_stored
from llmkit.common.errors import InputError

BITS = 4
PACK_FACTOR = 32 // BITS  # quantized values in a word


class AwqFormat:
    """Reads and writes AWQ GEMM checkpoints of 4 bits."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight.

        Raises InputError for sizes that do not pack.
        """
        if out % PACK_FACTOR:
            raise InputError(
                f"AWQ cannot store a [{out}, {in_}] weight",
                f"A multiple of {PACK_FACTOR} output features was expected",
            )
        groups = scheme.groups(in_)
        along = None if scheme.group_size == -1 else (0, scheme.group_size)
        return (
            PackedTensor("qweight", "I32", (in_, out // PACK_FACTOR), (1, PACK_FACTOR), (0, 1)),
            PackedTensor("qzeros", "I32", (groups, out // PACK_FACTOR), (1, PACK_FACTOR), along),
            PackedTensor("scales", "F16", (groups, out), (1, 1), along, scale="finite"),
        )

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for scales beyond float16."""
        scales = weight.scales.to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise InputError(
                "A scale is too large for AWQ's float16",
                f"At most {torch.finfo(torch.float16).max:g}",
            )
        return {
            "qweight": pack(_evens_first(weight.q.t()), BITS),
            "qzeros": pack(_evens_first(weight.zeros.t()), BITS),
            "scales": scales.t().contiguous(),
        }

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. Raises InputError as `check_stored`."""
        qweight = tensors["qweight"]
        qzeros = tensors["qzeros"]
        scales = tensors["scales"]
        in_ = qweight.shape[0]
        out = qweight.shape[1] * PACK_FACTOR
        check_stored(self.tensors(scheme, out, in_), tensors)
        q = _in_order(unpack(qweight, BITS, out))
        zeros = _in_order(unpack(qzeros, BITS, out))
        return QuantizedWeight(
            q.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous(), scheme
        )

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        assert config.scheme is not None and not config.overrides and not config.kv, (
            "AWQ has one scheme"
        )
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": config.scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [
                *config.ignore,
                *(prefix.removesuffix(".") for prefix in config.carried),
            ],
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config`. Raises InputError for other bits and formats."""
        bits = d.get("bits")
        size = d.get("group_size", -1)
        if bits != BITS:
            raise InputError(f"This AWQ checkpoint has {bits} bits", f"{BITS} were expected")
        if type(size) is not int or (size < 1 and size != -1):
            raise InputError(
                f"This AWQ checkpoint has the group size {size}",
                "-1 or a positive number was expected",
            )
        awq_version = str(d.get("version", "gemm")).lower()
        if awq_version != "gemm":
            raise InputError(
                f"This AWQ checkpoint has the version {awq_version}", "gemm was expected"
            )
        if not d.get("zero_point", True):
            raise InputError(
                "This AWQ checkpoint has no zero points", "zero_point: true was expected"
            )
        # AWQ readers skip a module when its name contains one of these words. A full name, which
        # has dots, matches only that module.
        words = [str(word) for word in d.get("modules_to_not_convert") or ()]
        ignore = tuple(
            word if "." in word or word == "lm_head" else f"re:.*{re.escape(word)}"
            for word in words
        )
        if "lm_head" not in ignore:
            ignore = ("lm_head", *ignore)
        return QuantizationConfig("awq", Scheme(BITS, size, symmetric=False), ignore, method="awq")

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """No files: config.json holds everything."""
        return {}


def _evens_first(q: torch.Tensor) -> torch.Tensor:
    """Reorder uint8 [n, out] as words hold it: of each eight values the even ones come first."""
    return q.reshape(len(q), -1, PACK_FACTOR // 2, 2).transpose(2, 3).reshape(q.shape)


def _in_order(q: torch.Tensor) -> torch.Tensor:
    """The inverse of `_evens_first`."""
    return q.reshape(len(q), -1, 2, PACK_FACTOR // 2).transpose(2, 3).reshape(q.shape)
