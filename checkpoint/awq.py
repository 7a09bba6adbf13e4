"""AWQ's GEMM layout, as AutoAWQ defined it and vLLM, SGLang and transformers read it.

For W[out, in] of 4 bits, G groups: qweight int32 [in, out/8] and qzeros int32 [G, out/8] packed along `out` in the
order of ORDER; scales float16 [G, out]. Zero points are stored as they are, so every asymmetric grid fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized import PackedTensor, QuantizationConfig, QuantizedWeight, Scheme

BITS = 4
WORD = 32 // BITS  # codes of a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble n of a word, from the lowest, holds code ORDER[n] of its eight
INVERSE = tuple(ORDER.index(code) for code in range(WORD))


class AwqFormat:
    """Reads and writes AWQ GEMM checkpoints of 4 bits."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The tensors of a quantized [out, in_] weight. Raises InputError when the sizes cannot be packed."""
        if out % WORD:
            raise InputError(
                f"AWQ cannot store a [{out}, {in_}] weight", f"A multiple of {WORD} output features was expected"
            )
        groups = scheme.groups(in_)
        along = None if scheme.group_size == -1 else (0, scheme.group_size)
        return (
            PackedTensor("qweight", "I32", (in_, out // WORD), (1, WORD), (0, 1)),
            PackedTensor("qzeros", "I32", (groups, out // WORD), (1, WORD), along),
            PackedTensor("scales", "F16", (groups, out), (1, 1), along),
        )

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for scales beyond float16."""
        scales = weight.scales.to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise InputError("A scale is too large for AWQ's float16", f"At most {torch.finfo(torch.float16).max:g}")
        return {
            "qweight": pack(_reordered(weight.codes.t(), ORDER), BITS),
            "qzeros": pack(_reordered(weight.zeros.t(), ORDER), BITS),
            "scales": scales.t().contiguous(),
        }

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. Raises InputError when shapes disagree."""
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        in_, out = qweight.shape[0], qweight.shape[1] * WORD
        for part in self.tensors(scheme, out, in_):
            found = tuple(tensors[part.suffix].shape)
            if found != part.shape:
                raise InputError(f"{part.suffix} has shape {list(found)}", f"{list(part.shape)} was expected")
        codes, zeros = (_reordered(unpack(words, BITS, out), INVERSE) for words in (qweight, qzeros))
        return QuantizedWeight(codes.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous(), scheme)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        assert config.scheme is not None and not config.overrides and not config.kv, "AWQ has one scheme"
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": config.scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(config.ignore),
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """A `quantization_config`. Raises InputError for other bits and layouts."""
        bits, size = d.get("bits"), d.get("group_size", -1)
        if bits != BITS:
            raise InputError(f"This AWQ checkpoint has {bits} bits", f"{BITS} were expected")
        if type(size) is not int or (size < 1 and size != -1):
            raise InputError(f"This AWQ checkpoint has the group size {size}", "-1 or a positive number was expected")
        if (layout := str(d.get("version", "gemm")).lower()) != "gemm":
            raise InputError(f"This AWQ checkpoint has the version {layout}", "gemm was expected")
        if not d.get("zero_point", True):
            raise InputError("This AWQ checkpoint has no zero points", "zero_point: true was expected")
        # Readers look for these words anywhere in a module's name; whole names match themselves only.
        words = [str(word) for word in d.get("modules_to_not_convert") or ()]
        ignore = tuple(word if "." in word or word == "lm_head" else f"re:.*{word}" for word in words)
        if "lm_head" not in ignore:
            ignore = ("lm_head", *ignore)
        return QuantizationConfig("awq", Scheme(BITS, size, symmetric=False), ignore, method="awq")

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """None: everything is in config.json."""
        return {}


def _reordered(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """uint8 [n, out] with every eight codes of a row in `order`."""
    return codes.reshape(len(codes), -1, WORD)[:, :, list(order)].reshape(codes.shape)
