"""The GPTQ formats, as AutoGPTQ and GPTQModel defined them and vLLM and transformers read them.

For W[out, in] of 2, 3, 4 or 8 bits (`b`) with G groups:

    qweight  int32   [in*b/32, out]  packed along `in`
    qzeros   int32   [G, out*b/32]   packed along `out`
    scales   float16 [G, out]
    g_idx    int32   [in]            the group of each column

With 3 bits three words hold 32 values, some of which lie in two words. In v1 (`checkpoint_format`
gptq) each zero point is stored minus one, in v2 (gptq_v2) as it is. A config may have other bits
and groups for some modules (`dynamic`, GPTQModel's mixed precision).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llmkit.checkpoint.packing import pack, unpack, word_values
from llmkit.checkpoint.quantized_weight import (
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.checkpoint.stored_tensors import check_stored
from llmkit.common.errors import InputError

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqFormat:
    """Reads and writes GPTQ v1 or v2.

    v1 cannot hold a zero point of 0: other readers add one to whole words, so that the stored -1
    would change its neighbour. It is read all the same.
    """

    name: Literal["gptq", "gptq_v2"] = "gptq"

    @property
    def _zero_offset(self) -> int:
        """What is added to a stored zero point."""
        return 1 if self.name == "gptq" else 0

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight.

        Raises InputError for sizes that do not pack.
        """
        bits = scheme.bits
        per_word = word_values(bits)
        multiple = per_word.numerator  # values that fill whole words
        for name, size in (("input", in_), ("output", out)):
            if size % multiple:
                raise InputError(
                    f"GPTQ with {bits} bits cannot store a [{out}, {in_}] weight",
                    f"A multiple of {multiple} {name} features was expected",
                )
        groups = scheme.groups(in_)
        along = None if scheme.group_size == -1 else (0, scheme.group_size)
        zeros_shape = (groups, out * bits // 32)
        return (
            PackedTensor("qweight", "I32", (in_ * bits // 32, out), (1, 1), (0, per_word)),
            PackedTensor("qzeros", "I32", zeros_shape, (1, per_word), along),
            PackedTensor("scales", "F16", (groups, out), (1, 1), along, scale="finite"),
            PackedTensor("g_idx", "I32", (in_,), None, (0, 1), "group_index"),
        )

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix.

        Raises InputError for zero points that the scheme or v1 cannot hold, and for scales beyond
        float16.
        """
        bits = scheme.bits
        in_ = weight.shape[1]
        if scheme.symmetric and not bool((weight.zeros == scheme.half).all()):
            raise InputError(
                "Asymmetric values cannot be stored as symmetric GPTQ",
                "Symmetric values were expected",
            )
        if self._zero_offset and not bool(weight.zeros.all()):
            raise InputError(
                "A zero point of 0 cannot be stored as GPTQ v1",
                "Zero points of at least 1 were expected",
                "Choose gptq_v2, awq or compressed-tensors",
            )
        scales = weight.scales.to(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise InputError(
                "A scale is too large for GPTQ's float16",
                f"At most {torch.finfo(torch.float16).max:g}",
            )
        size = in_ if scheme.group_size == -1 else scheme.group_size
        qzeros = pack((weight.zeros - self._zero_offset).t(), bits)
        return {
            "qweight": pack(weight.q, bits).t().contiguous(),
            "qzeros": qzeros,
            "scales": scales.t().contiguous(),
            "g_idx": (torch.arange(in_) // size).to(torch.int32),
        }

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. `g_idx` may be absent.

        Raises InputError as `check_stored`, and for act-order.
        """
        bits = scheme.bits
        qweight = tensors["qweight"]
        qzeros = tensors["qzeros"]
        scales = tensors["scales"]
        in_ = qweight.shape[0] * 32 // bits
        out = qweight.shape[1]
        expected = self.tensors(scheme, out, in_)
        check_stored((packed for packed in expected if packed.suffix in tensors), tensors)
        g_idx = tensors.get("g_idx")
        size = in_ if scheme.group_size == -1 else scheme.group_size
        if g_idx is not None and not torch.equal(
            g_idx.long(), torch.arange(in_, device=g_idx.device) // size
        ):
            raise _act_order_error()
        # In v1 a zero point z is stored as z - 1 modulo 2^bits, so that all bits set means 0.
        zeros = unpack(qzeros, bits, out) + self._zero_offset
        zeros &= (1 << bits) - 1
        q = unpack(qweight.t(), bits, in_)
        return QuantizedWeight(q, scales.t().contiguous(), zeros.t().contiguous(), scheme)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Modules that are not quantized, and those with other schemes, are in `dynamic`, as GPTQModel
        and vLLM read it.
        """
        assert config.scheme is not None and not config.kv, "GPTQ quantizes weights"
        ignored = [entry for entry in config.ignore if entry != "lm_head"]
        document: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
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
        dynamic: dict[str, dict[str, Any]] = {_to_dynamic("-:", entry): {} for entry in ignored}
        for entry, scheme in config.overrides:
            dynamic[_to_dynamic("+:", entry)] = {
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "sym": scheme.symmetric,
            }
        if dynamic:
            document["dynamic"] = dynamic
        document["meta"] = {"quantizer": ["llmkit"], "method": config.method}
        return document

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config`; its `checkpoint_format` says the version.

        Raises InputError for other formats and for act-order.
        """
        scheme = _parse_scheme(d)
        # GPTQModel calls it `format` too.
        field = "checkpoint_format" if d.get("checkpoint_format") else "format"
        checkpoint_format = d.get(field) or "gptq"
        if checkpoint_format not in ("gptq", "gptq_v2"):
            raise InputError(
                f"This GPTQ checkpoint has {field} {checkpoint_format}",
                "gptq (v1) or gptq_v2 was expected",
            )
        name: Literal["gptq", "gptq_v2"] = "gptq_v2" if checkpoint_format == "gptq_v2" else "gptq"
        pack_dtype = d.get("pack_dtype") or "int32"
        if pack_dtype != "int32":
            raise InputError(
                f"This GPTQ checkpoint has pack_dtype {pack_dtype}", "int32 was expected"
            )
        ignored, overrides = _parse_dynamic(d.get("dynamic") or {}, scheme)
        method = (d.get("meta") or {}).get("method", "gptq")
        ignore = [] if d.get("lm_head") else ["lm_head"]
        damp = d.get("damp_percent")
        damp = damp if isinstance(damp, float) else QuantizationConfig.damp
        return QuantizationConfig(
            name, scheme, (*ignore, *ignored), overrides, method=str(method), damp=damp
        )

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """quantize_config.json, which AutoGPTQ and old engines read."""
        return {
            "quantize_config.json": (json.dumps(self.config_dict(config), indent=2) + "\n").encode()
        }


def _parse_scheme(d: Mapping[str, Any], default: Scheme | None = None) -> Scheme:
    """The scheme of a config, or of an entry of `dynamic` where the config has `default`.

    Raises InputError for other bits and group sizes, and for act-order.
    """
    bits = d.get("bits", default.bits if default else None)
    size = d.get("group_size", default.group_size if default else -1)
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"This GPTQ checkpoint has {bits} bits", "2, 3, 4 or 8 were expected")
    if type(size) is not int or (size < 1 and size != -1):
        raise InputError(
            f"This GPTQ checkpoint has the group size {size}",
            "-1 or a positive number was expected",
        )
    if d.get("desc_act") and size != -1:
        raise _act_order_error()
    return Scheme(bits, size, bool(d.get("sym", default.symmetric if default else True)))


def _parse_dynamic(
    dynamic: object, default: Scheme
) -> tuple[list[str], tuple[tuple[str, Scheme], ...]]:
    """The ignored modules and the schemes of others, from GPTQModel's `dynamic`.

    It has regular expressions: "-:" for modules that are not quantized, "+:" or no prefix for those
    with other options. The first that matches the beginning of a name counts.
    """
    if not isinstance(dynamic, Mapping):
        raise InputError(
            f"This GPTQ checkpoint has dynamic {str(dynamic)[:200]}",
            "An object of patterns of modules was expected",
        )
    ignored: list[str] = []
    overrides: list[tuple[str, Scheme]] = []
    for key, options in dynamic.items():
        if key.startswith("-:"):
            entry = _from_dynamic(key)
            if overrides:  # which win, and `ignore` wins over them
                earlier = "|".join(f"(?:{_expression(entry)})" for entry, _ in overrides)
                entry = f"re:(?!{earlier}){_expression(entry)}"
            ignored.append(entry)
            continue
        if not isinstance(options, Mapping):
            raise InputError(
                f"This GPTQ checkpoint has dynamic {key}: {str(options)[:200]}",
                "Options such as bits were expected",
            )
        entry = _from_dynamic(key if key.startswith("+:") else f"+:{key}")
        overrides.append((entry, _parse_scheme(options, default)))
    return ignored, tuple(overrides)


def _to_dynamic(sign: str, entry: str) -> str:
    """The key of GPTQModel's `dynamic` for a module or a "re:" pattern.

    The key is the sign followed by a regular expression.
    """
    return sign + _expression(entry)


def _expression(entry: str) -> str:
    """The regular expression of an entry of `QuantizationConfig`."""
    return entry[3:] if entry.startswith("re:") else re.escape(entry) + "$"


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
