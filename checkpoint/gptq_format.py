"""The GPTQ v1 format, as AutoGPTQ defined it and vLLM, SGLang and transformers read it.

For W[out, in] of `b` bits with G groups:

    qweight  int32   [in*b/32, out]  packed along `in`
    qzeros   int32   [G, out*b/32]   packed along `out`; each zero point is stored minus one
    scales   float16 [G, out]
    g_idx    int32   [in]            the group of each column
"""

from __future__ import annotations

import json
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
from llmkit.common.errors import InputError


class GptqFormat:
    """Reads and writes GPTQ v1.

    It writes symmetric weights only: v1 cannot hold a zero point of 0.
    """

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight.

        Raises InputError for sizes that do not pack.
        """
        per_word = 32 // scheme.bits
        for name, size in (("input", in_), ("output", out)):
            if size % per_word:
                raise InputError(
                    f"GPTQ with {scheme.bits} bits cannot store a [{out}, {in_}] weight",
                    f"A multiple of {per_word} {name} features was expected",
                )
        groups = scheme.groups(in_)
        along = None if scheme.group_size == -1 else (0, scheme.group_size)
        return (
            PackedTensor("qweight", "I32", (in_ // per_word, out), (1, 1), (0, per_word)),
            PackedTensor("qzeros", "I32", (groups, out // per_word), (1, per_word), along),
            PackedTensor("scales", "F16", (groups, out), (1, 1), along),
            PackedTensor("g_idx", "I32", (in_,), None, (0, 1), "group_index"),
        )

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix.

        Raises InputError for an asymmetric weight and for scales beyond float16.
        """
        bits = scheme.bits
        in_ = weight.shape[1]
        if not bool((weight.zeros == 1 << (bits - 1)).all()):
            raise InputError(
                "Asymmetric values cannot be stored as GPTQ v1", "Symmetric values were expected"
            )
        scales = weight.scales.to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise InputError(
                "A scale is too large for GPTQ's float16",
                f"At most {torch.finfo(torch.float16).max:g}",
            )
        size = in_ if scheme.group_size == -1 else scheme.group_size
        return {
            "qweight": pack(weight.q, bits).t().contiguous(),
            "qzeros": pack((weight.zeros - 1).t(), bits),
            "scales": scales.t().contiguous(),
            "g_idx": (torch.arange(in_) // size).to(torch.int32),
        }

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. `g_idx` may be absent.

        Raises InputError when shapes disagree and for act-order.
        """
        bits = scheme.bits
        qweight = tensors["qweight"]
        qzeros = tensors["qzeros"]
        scales = tensors["scales"]
        in_ = qweight.shape[0] * 32 // bits
        out = qweight.shape[1]
        for expected in self.tensors(scheme, out, in_):
            if expected.suffix not in tensors:
                continue
            shape = tuple(tensors[expected.suffix].shape)
            if shape != expected.shape:
                raise InputError(
                    f"{expected.suffix} has shape {list(shape)}",
                    f"{list(expected.shape)} was expected",
                )
        g_idx = tensors.get("g_idx")
        size = in_ if scheme.group_size == -1 else scheme.group_size
        if g_idx is not None and not torch.equal(
            g_idx.long(), torch.arange(in_, device=g_idx.device) // size
        ):
            raise _act_order_error()
        # A zero point z is stored as z - 1 modulo 2^bits, so that all bits set means 0.
        zeros = (unpack(qzeros, bits, out) + 1) & ((1 << bits) - 1)
        return QuantizedWeight(
            unpack(qweight.t(), bits, in_), scales.t().contiguous(), zeros.t().contiguous(), scheme
        )

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Modules that are not quantized are in `dynamic`, as GPTQModel and vLLM read it.
        """
        assert config.scheme is not None and not config.overrides and not config.kv, (
            "GPTQ has one scheme"
        )
        ignored = [entry for entry in config.ignore if entry != "lm_head"]
        document: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": config.scheme.bits,
            "group_size": config.scheme.group_size,
            "sym": config.scheme.symmetric,
            "desc_act": False,
            "static_groups": True,
            "true_sequential": True,
            "damp_percent": config.damp,
            "lm_head": "lm_head" not in config.ignore,
        }
        ignored += [f"re:{re.escape(prefix)}.*" for prefix in config.carried]
        if ignored:
            document["dynamic"] = {_to_dynamic(entry): {} for entry in ignored}
        document["meta"] = {"quantizer": ["llmkit"], "method": config.method}
        return document

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config`.

        Raises InputError for GPTQ v2, act-order and options per module.
        """
        bits = d.get("bits")
        size = d.get("group_size", -1)
        if bits not in (4, 8):
            raise InputError(f"This GPTQ checkpoint has {bits} bits", "4 or 8 were expected")
        if type(size) is not int or (size < 1 and size != -1):
            raise InputError(
                f"This GPTQ checkpoint has the group size {size}",
                "-1 or a positive number was expected",
            )
        checkpoint_format = d.get("checkpoint_format") or "gptq"
        if checkpoint_format != "gptq":
            raise InputError(
                f"This GPTQ checkpoint has checkpoint_format {checkpoint_format}",
                "gptq (v1) was expected",
            )
        if d.get("desc_act") and size != -1:
            raise _act_order_error()
        dynamic = d.get("dynamic") or {}
        if not isinstance(dynamic, dict) or any(
            not str(pattern).startswith("-:") for pattern in dynamic
        ):
            raise InputError(
                "This GPTQ checkpoint sets options per module (dynamic)", "One setting was expected"
            )
        method = (d.get("meta") or {}).get("method", "gptq")
        ignore = [] if d.get("lm_head") else ["lm_head"]
        ignore += [_from_dynamic(str(pattern)) for pattern in dynamic]
        damp = d.get("damp_percent")
        damp = damp if isinstance(damp, float) else QuantizationConfig.damp
        scheme = Scheme(bits, size, bool(d.get("sym", True)))
        return QuantizationConfig("gptq", scheme, tuple(ignore), method=str(method), damp=damp)

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """quantize_config.json, which AutoGPTQ and old engines read."""
        return {
            "quantize_config.json": (json.dumps(self.config_dict(config), indent=2) + "\n").encode()
        }


def _to_dynamic(entry: str) -> str:
    """The key of GPTQModel's `dynamic` for an ignored module or "re:" pattern.

    The key is "-:" followed by a regular expression.
    """
    return "-:" + (entry[3:] if entry.startswith("re:") else re.escape(entry) + "$")


def _from_dynamic(key: str) -> str:
    """The inverse of `_to_dynamic`."""
    pattern = key[2:]
    name = pattern.removesuffix("$").replace("\\", "")
    return name if re.escape(name) + "$" == pattern else "re:" + pattern


def _act_order_error() -> InputError:
    return InputError(
        "This GPTQ checkpoint keeps its columns in activation order (desc_act)",
        "Groups in the order of the columns were expected",
        "Quantize the original model with llmkit quantize --method gptq",
    )
