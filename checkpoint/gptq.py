"""GPTQ v1 on disk, as AutoGPTQ defined it and vLLM, SGLang and transformers read it.

For W[out, in] of `b` bits, G groups: qweight int32 [in*b/32, out] packed along `in`; qzeros int32
[G, out*b/32] packed along `out`, each zero point stored minus one; scales float16 [G, out]; g_idx int32 [in].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized import PackedTensor, QuantizationConfig, QuantizedWeight


class GptqFormat:
    """Reads symmetric and asymmetric GPTQ v1; writes symmetric only (v1 cannot hold a zero point of 0)."""

    def tensors(self, config: QuantizationConfig, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The tensors of a quantized [out, in_] weight. Raises InputError when the sizes cannot be packed."""
        per_word = 32 // config.bits
        for name, size in (("input", in_), ("output", out)):
            if size % per_word:
                raise InputError(
                    f"GPTQ with {config.bits} bits cannot store a [{out}, {in_}] weight",
                    f"A multiple of {per_word} {name} features was expected",
                )
        groups = config.groups(in_)
        along = None if config.group_size == -1 else (0, config.group_size)
        return (
            PackedTensor("qweight", "I32", (in_ // per_word, out), (1, 1), (0, per_word)),
            PackedTensor("qzeros", "I32", (groups, out // per_word), (1, per_word), along),
            PackedTensor("scales", "F16", (groups, out), (1, 1), along),
            PackedTensor("g_idx", "I32", (in_,), None, (0, 1), "group_index"),
        )

    def pack(self, config: QuantizationConfig, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for asymmetric codes and scales beyond float16."""
        bits, in_ = config.bits, weight.shape[1]
        if not bool((weight.zeros == 1 << (bits - 1)).all()):
            raise InputError("Asymmetric codes cannot be stored as GPTQ v1", "Symmetric codes were expected")
        scales = weight.scales.to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise InputError("A scale is too large for GPTQ's float16", f"At most {torch.finfo(torch.float16).max:g}")
        size = in_ if config.group_size == -1 else config.group_size
        return {
            "qweight": pack(weight.codes, bits).t().contiguous(),
            "qzeros": pack((weight.zeros - 1).t(), bits),
            "scales": scales.t().contiguous(),
            "g_idx": (torch.arange(in_) // size).to(torch.int32),
        }

    def unpack(self, config: QuantizationConfig, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix; `g_idx` may be absent.

        Raises InputError when shapes disagree or when columns are in activation order.
        """
        bits = config.bits
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        in_, out = qweight.shape[0] * 32 // bits, qweight.shape[1]
        for part in self.tensors(config, out, in_):
            found = tuple(tensors[part.suffix].shape) if part.suffix in tensors else part.shape
            if found != part.shape:
                raise InputError(f"{part.suffix} has shape {list(found)}", f"{list(part.shape)} was expected")
        g_idx = tensors.get("g_idx")
        size = in_ if config.group_size == -1 else config.group_size
        if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(in_, device=g_idx.device) // size):
            raise _activation_order()
        # Stored minus one, modulo 2^bits: what is stored as all ones was a zero point of 0.
        zeros = (unpack(qzeros, bits, out) + 1) & ((1 << bits) - 1)
        return QuantizedWeight(
            unpack(qweight.t(), bits, in_), scales.t().contiguous(), zeros.t().contiguous(), bits, config.group_size
        )

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": config.symmetric,
            "desc_act": False,
            "static_groups": True,
            "true_sequential": True,
            "damp_percent": config.damp,
            "lm_head": "lm_head" not in config.ignore,
            "meta": {"quantizer": ["llmkit"], "method": config.method},
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """A `quantization_config`. Raises InputError for what cannot be read: v2, act-order, per-module options."""
        bits, size = d.get("bits"), d.get("group_size", -1)
        if bits not in (4, 8):
            raise InputError(f"This GPTQ checkpoint has {bits} bits", "4 or 8 were expected")
        if type(size) is not int or (size < 1 and size != -1):
            raise InputError(f"This GPTQ checkpoint has the group size {size}", "-1 or a positive number was expected")
        if (stored := d.get("checkpoint_format") or "gptq") != "gptq":
            raise InputError(f"This GPTQ checkpoint has checkpoint_format {stored}", "gptq (v1) was expected")
        if d.get("desc_act") and size != -1:
            raise _activation_order()
        if d.get("dynamic"):
            raise InputError("This GPTQ checkpoint sets options per module (dynamic)", "One setting was expected")
        method = (d.get("meta") or {}).get("method", "gptq")
        symmetric = bool(d.get("sym", True))
        ignore = () if d.get("lm_head") else ("lm_head",)
        damp = d.get("damp_percent")
        damp = damp if isinstance(damp, float) else QuantizationConfig.damp
        return QuantizationConfig("gptq", bits, size, symmetric, ignore, str(method), damp)

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """quantize_config.json, which AutoGPTQ and older engines read."""
        return {"quantize_config.json": (json.dumps(self.config_dict(config), indent=2) + "\n").encode()}


def _activation_order() -> InputError:
    return InputError(
        "This GPTQ checkpoint keeps its columns in activation order (desc_act)",
        "Groups in the order of the columns were expected",
        "Quantize the original model with llmkit quantize --method gptq",
    )
