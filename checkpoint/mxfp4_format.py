"""MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss stores its experts.

A value is a 4-bit float, E2M1: a sign, two bits of exponent, one of mantissa. The 32 values of a
block share a power of two, E8M0. For W[out, in] of one expert:

    blocks  uint8 [out, in/32, 16]  two values in a byte, the first in the low half
    scales  uint8 [out, in/32]      the block's values are multiplied by 2^(scale - 127)

A checkpoint stores the experts of a layer in one tensor, with the expert as the first dimension:
`experts.down_proj_blocks` and `experts.down_proj_scales` stand for `experts.down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from llmkit.checkpoint.microscaling import (
    GROUP_SIZES,
    decode_e8m0,
    encode_e8m0,
    pack_fp4,
    unpack_fp4,
)
from llmkit.checkpoint.quantized_weight import (
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.checkpoint.stored_tensors import check_stored
from llmkit.common.errors import InputError

BLOCK_SIZE = GROUP_SIZES["e8m0"]  # values that share a scale
SCHEME = Scheme(4, BLOCK_SIZE, kind="float", scale_format="e8m0")
# The tensors that are stored in MXFP4; other linear layers are dense.
EXPERTS = r"re:.*\.experts\.(gate_up_proj|down_proj)$"


class Mxfp4Format:
    """Reads and writes the experts of gpt-oss."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of one expert's [out, in_] weight.

        Raises InputError for sizes that do not pack.
        """
        if in_ % BLOCK_SIZE:
            raise InputError(
                f"MXFP4 cannot store a [{out}, {in_}] weight",
                f"A multiple of {BLOCK_SIZE} input features was expected",
            )
        blocks = in_ // BLOCK_SIZE
        return (
            PackedTensor("blocks", "U8", (out, blocks, BLOCK_SIZE // 2), (0, 1), (1, BLOCK_SIZE)),
            PackedTensor(
                "scales", "U8", (out, blocks), (0, 1), (1, BLOCK_SIZE), scale="not negative"
            ),
        )

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for scales that are no powers of two."""
        return {
            "blocks": pack_fp4(weight.q).view(len(weight.q), -1, BLOCK_SIZE // 2),
            "scales": encode_e8m0(weight.scales),
        }

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight of one expert from its stored tensors by suffix.

        Raises InputError as `check_stored`.
        """
        blocks = tensors["blocks"]
        scales = tensors["scales"]
        if blocks.ndim != 3 or blocks.shape[2] != BLOCK_SIZE // 2:
            raise InputError(
                f"blocks has shape {list(blocks.shape)}",
                f"[rows, columns / {BLOCK_SIZE}, {BLOCK_SIZE // 2}] was expected",
            )
        check_stored(self.tensors(scheme, len(blocks), blocks.shape[1] * BLOCK_SIZE), tensors)
        q = unpack_fp4(blocks).view(len(blocks), -1)
        powers = decode_e8m0(scales)
        return QuantizedWeight(q, powers, torch.zeros_like(scales), scheme)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        words = [entry.removeprefix("re:").removesuffix(_BOUNDARY) for entry in config.ignore]
        return {"quant_method": "mxfp4", "modules_to_not_convert": words}

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config`. Raises InputError for a list that cannot be read."""
        words = d.get("modules_to_not_convert") or ()
        if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
            raise InputError(
                f"This MXFP4 checkpoint has modules_to_not_convert: {words}",
                "A list of module names was expected",
            )
        # The words are regular expressions that match a module or the modules inside it.
        ignore = tuple(f"re:{word}{_BOUNDARY}" for word in words)
        for word in words:
            try:
                re.compile(word)
            except re.error as error:
                raise InputError(
                    f"This MXFP4 checkpoint has {word} in modules_to_not_convert ({error})",
                    "Names or regular expressions were expected",
                ) from error
        return QuantizationConfig("mxfp4", None, ignore, ((EXPERTS, SCHEME),), method="mxfp4")

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """No files: config.json holds everything."""
        return {}


_BOUNDARY = r"(\.|$)"
