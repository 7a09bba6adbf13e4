"""The format of NVIDIA's Model-Optimizer, which TensorRT-LLM, vLLM and SGLang read.

For W[out, in], by `quant_algo`:

    FP8                        weight          e4m3 [out, in]
                               weight_scale    float32 []
                               input_scale     float32 []
    FP8_PER_CHANNEL_PER_TOKEN  weight          e4m3 [out, in]
                               weight_scale    float32 [out]
    FP8_PB_WO                  weight          e4m3 [out, in]
                               weight_scale    float32 [ceil(out/128), 1, ceil(in/128), 1]
    NVFP4, W4A16_NVFP4         weight          uint8 [out, in/2], see `microscaling`
                               weight_scale    e4m3 [out, in/16]
                               weight_scale_2  float32 []
                               input_scale     float32 [], not with W4A16_NVFP4
    MXFP8                      weight          e4m3 [out, in]
                               weight_scale    uint8 [out, in/32], e8m0
    W4A8_MXFP4_FP8             weight          uint8 [out, in/2], see `microscaling`
                               weight_scale    uint8 [out, in/32], e8m0
                               input_scale     float32 [], may be missing
    W4A8_MXFP4_MXFP8           the same without input_scale
    W4A16_MXFP4                the same without input_scale
    NVFP4_AWQ                  NVFP4's tensors
                               pre_quant_scale bfloat16 [in], of some layers
    W4A16_AWQ                  weight          uint8 [out/2, in], rows 2i and 2i+1 in the low and
                                               high four bits of a byte, in two's complement
                               weight_scale    bfloat16 [out, in/group_size]; others are read
                               pre_quant_scale bfloat16 [in], of o_proj and down_proj at least

The inputs of a layer are multiplied by its pre_quant_scale, before they are quantized. TensorRT-LLM
needs that of INT4 for every linear that it does not fuse with others, and ignores it for those that
it does. NVFP4_AWQ is read only.

Model-Optimizer writes W4A8_MXFP4_FP8, and TensorRT-LLM reads the same tensors under the three names
of MXFP4. Model-Optimizer's preset of MXFP4 alone has no name of its own and writes `mxfp4`, with or
without quantized inputs: such files do not say which, so they are refused.

MIXED_PRECISION names the algorithm of each module in `quantized_layers`. Scales of a KV cache are
`k_proj.k_scale` and `v_proj.v_scale`.

hf_quant_config.json describes this ({"producer": ..., "quantization": {...}}), and in newer files
config.json does too, as a `quantization_config` of `quant_method` modelopt with other names for the
same fields. Both are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from llmkit.checkpoint.block_scales import (
    block_scale_shape,
    gather_block_scales,
    unpack_fp8,
)
from llmkit.checkpoint.compressed_tensors_groups import group_dict
from llmkit.checkpoint.microscaling import GROUP_SIZES, MicroscalingLayout
from llmkit.checkpoint.model_files import MODELOPT_FILE
from llmkit.checkpoint.quantized_weight import (
    KV_SCALES,
    PRE_QUANT_SCALE,
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.checkpoint.stored_tensors import check_stored
from llmkit.common.errors import InputError

MIXED = "MIXED_PRECISION"
ALGORITHMS = {
    "FP8": Scheme(8, kind="float", inputs="tensor", block_rows=-1),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(8, kind="float", inputs="token"),
    "FP8_PB_WO": Scheme(8, 128, kind="float", inputs="group", block_rows=128),
    "NVFP4": Scheme(4, GROUP_SIZES["e4m3"], kind="float", inputs="group", scale_format="e4m3"),
    "W4A16_NVFP4": Scheme(4, GROUP_SIZES["e4m3"], kind="float", scale_format="e4m3"),
    "MXFP8": Scheme(8, GROUP_SIZES["e8m0"], kind="float", inputs="group", scale_format="e8m0"),
    "W4A8_MXFP4_FP8": Scheme(
        4, GROUP_SIZES["e8m0"], kind="float", inputs="tensor", scale_format="e8m0", input_type="fp8"
    ),
    "W4A8_MXFP4_MXFP8": Scheme(
        4, GROUP_SIZES["e8m0"], kind="float", inputs="group", scale_format="e8m0", input_type="fp8"
    ),
    "W4A16_MXFP4": Scheme(4, GROUP_SIZES["e8m0"], kind="float", scale_format="e8m0"),
    "W4A16_AWQ": Scheme(4, 128),  # or groups of another size
}
# Other names of algorithms. Tensors show which layers have a pre_quant_scale.
_SAME_SCHEME = {"NVFP4_AWQ": "NVFP4"}
# What algorithms become in checkpoints without any input_scale. TensorRT-LLM then gives the inputs
# of MXFP4 one dynamic scale; here each token has its own.
_WITHOUT_INPUT_SCALES = {
    ALGORITHMS["NVFP4"]: ALGORITHMS["W4A16_NVFP4"],
    ALGORITHMS["W4A8_MXFP4_FP8"]: replace(ALGORITHMS["W4A8_MXFP4_FP8"], inputs="token"),
}
# The names of KV scales in Model-Optimizer's files; vLLM also reads those beside the projections.
MODELOPT_KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")
_MICROSCALING = MicroscalingLayout(
    "weight", "weight_scale_2", "input_scale", stores_inverse=False, scalar_shape=()
)
_PRODUCER = {"name": "modelopt"}  # engines know the format by this name
_WRITTEN_NAMES = {"FP8_PB_WO": "fp8_pb_wo"}  # TensorRT-LLM knows it in lower case only


class ModeloptFormat:
    """Reads and writes checkpoints whose `quant_method` is modelopt."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight.

        Raises InputError for groups that do not divide the columns, and for INT4 without groups or
        with an odd number of rows.
        """
        if scheme.scale_format != "float":
            return _MICROSCALING.tensors(scheme, out, in_)
        if scheme.kind == "int":
            return _int4_tensors(scheme, out, in_)
        weight = PackedTensor("weight", "F8_E4M3", (out, in_), (0, 1), (1, 1))
        scale = PackedTensor("weight_scale", "F32", (out,), (0, 1), None, scale="not negative")
        if scheme.block_rows == -1:
            scale = replace(scale, shape=(), out=None)
        elif scheme.block_rows > 1:
            rows, columns = block_scale_shape(scheme, out, in_)
            scale = replace(
                scale,
                shape=(rows, 1, columns, 1),
                out=(0, scheme.block_rows),
                in_=(2, scheme.group_size),
            )
        if scheme.inputs == "tensor":
            input_scale = PackedTensor("input_scale", "F32", (), None, None, scale="positive")
            return weight, scale, input_scale
        return weight, scale

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix.

        Raises InputError for scales that do not fit, and for zero points.
        """
        if scheme.scale_format != "float":
            return _MICROSCALING.pack(scheme, weight)
        if scheme.kind == "int":
            return _pack_int4(weight)
        scales = gather_block_scales(weight.scales.float(), scheme)
        shape = self.tensors(scheme, *weight.shape)[1].shape
        stored = {"weight": weight.q.contiguous(), "weight_scale": scales.reshape(shape)}
        if weight.input_scale is not None:
            stored["input_scale"] = weight.input_scale.float().reshape(())
        return stored

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix.

        Raises InputError as `check_stored`.
        """
        if scheme.scale_format != "float":
            return _MICROSCALING.unpack(scheme, tensors)
        if scheme.kind == "int":
            return _unpack_int4(scheme, tensors)
        return unpack_fp8(scheme, tensors, self.tensors, "weight_scale", "input_scale")

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json. Raises InputError as `hf_quant_config`."""
        quantization = _quantization(config)
        document: dict[str, Any] = {"quant_method": "modelopt"}
        targets: dict[Scheme, list[str]] = {config.scheme: ["Linear"]} if config.scheme else {}
        for module, scheme in config.overrides:
            targets.setdefault(scheme, []).append(module)
        groups = {}
        for index, (scheme, names) in enumerate(targets.items()):
            group = group_dict(scheme, names)
            groups[f"group_{index}"] = {
                key: value
                for key, value in group.items()
                if key in ("weights", "targets") or (key == "input_activations" and value)
            }
        document["config_groups"] = groups
        for name in ("quant_algo", "group_size", "quantized_layers"):
            if name in quantization:
                document[name] = quantization[name]
        document["ignore"] = quantization["exclude_modules"]
        if config.kv:
            document["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        document["producer"] = _PRODUCER
        return document

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config` or a hf_quant_config.json.

        Raises InputError, naming the field, for other algorithms. Whether inputs of NVFP4 and the
        KV cache are quantized depends on the tensors, too: see `with_stored_scales`.
        """
        fields = _Fields.of(d)
        overrides: tuple[tuple[str, Scheme], ...] = ()
        default_scheme: Scheme | None = None
        if fields.algorithm == MIXED:
            if not fields.layers:
                raise _unsupported("quantized_layers", "none", "the algorithm of each module")
            overrides = tuple((str(name), _scheme(layer)) for name, layer in fields.layers.items())
        else:
            default_scheme = _scheme(fields.default)
        ignore = tuple(dict.fromkeys(_ignore_entry(name) for name in fields.excluded))
        return QuantizationConfig(
            "modelopt",
            default_scheme,
            ignore,
            overrides,
            kv=fields.kv,
            kv_scales=MODELOPT_KV_SCALES,
            method="modelopt",
        )

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """hf_quant_config.json, which TensorRT-LLM reads."""
        document = {"producer": _PRODUCER, "quantization": _quantization(config)}
        return {MODELOPT_FILE: (json.dumps(document, indent=2) + "\n").encode()}


@dataclass(frozen=True)
class _Fields:
    """What both files say, by one set of names."""

    algorithm: object
    default: Mapping[str, Any]  # the fields of modules without fields of their own
    kv: Literal["", "fp8"]
    excluded: tuple[str, ...]
    layers: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, d: Mapping[str, Any]) -> _Fields:
        """Raises InputError for values of a wrong type, and for KV caches other than FP8."""
        details = d.get("quantization")
        if isinstance(details, dict):
            excluded = details.get("exclude_modules")
            kv_algorithm = details.get("kv_cache_quant_algo")
        else:
            details = d
            excluded = d.get("ignore", d.get("exclude_modules"))
            kv_algorithm = d.get("kv_cache_scheme") or d.get("kv_cache_quant_algo")
            if isinstance(kv_algorithm, dict):
                is_fp8 = kv_algorithm.get("num_bits") == 8 and kv_algorithm.get("type") == "float"
                kv_algorithm = "FP8" if is_fp8 else kv_algorithm
        if kv_algorithm not in (None, "", "FP8"):
            raise _unsupported("kv_cache_quant_algo", kv_algorithm, "FP8 or none")
        excluded = [] if excluded is None else excluded
        if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
            raise _unsupported("exclude_modules", excluded, "a list of module names")
        layers = details.get("quantized_layers") or {}
        if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
            raise _unsupported("quantized_layers", layers, "an object of modules")
        algorithm = details.get("quant_algo")
        return cls(
            algorithm.upper() if isinstance(algorithm, str) else algorithm,
            details,
            "fp8" if kv_algorithm else "",
            tuple(excluded),
            layers,
        )


def with_stored_scales(config: QuantizationConfig, tensors: Collection[str]) -> QuantizationConfig:
    """The config of a checkpoint with these tensors.

    They show which layers have a `pre_quant_scale`.
    Checkpoints without any `input_scale` say NVFP4, too, and quantize weights alone; those of
    W4A8_MXFP4_FP8 scale their inputs at run time. Those without scales of keys and values keep the
    KV cache in 16 bits here.
    """
    if not tensors:
        return config
    suffix = f".{PRE_QUANT_SCALE}"
    modules = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    config = replace(config, pre_quant_scales=tuple(modules))
    has_scales = {
        suffix: any(name.endswith(f".{suffix}") for name in tensors)
        for suffix in ("input_scale", *KV_SCALES, *MODELOPT_KV_SCALES)
    }
    if not has_scales["input_scale"]:
        changed = _WITHOUT_INPUT_SCALES
        config = replace(
            config,
            scheme=changed.get(config.scheme, config.scheme) if config.scheme else None,
            overrides=tuple((name, changed.get(s, s)) for name, s in config.overrides),
        )
    if not has_scales[KV_SCALES[0]]:
        return replace(config, kv="")
    return config if has_scales[MODELOPT_KV_SCALES[0]] else replace(config, kv_scales=KV_SCALES)


def check_same_config(
    first: QuantizationConfig, second: QuantizationConfig, tensors: Iterable[str]
) -> None:
    """Raises InputError when hf_quant_config.json (`first`) and config.json (`second`) disagree.

    They agree when they mean the same for every module that has scales among `tensors`.
    """
    names = f"{MODELOPT_FILE} and config.json"
    todo = "Download both again, or remove the one that does not belong to the weights"
    if first.kv != second.kv:
        kv = [config.kv.upper() or "not quantized" for config in (first, second)]
        raise InputError(
            f"{names} disagree about the KV cache: {kv[0]} and {kv[1]}",
            "The same in both was expected",
            todo,
        )
    if (first.scheme, set(first.ignore), dict(first.overrides)) == (
        second.scheme,
        set(second.ignore),
        dict(second.overrides),
    ):
        return
    for name in tensors:
        module, _, suffix = name.rpartition(".")
        if suffix != "weight_scale":
            continue
        schemes = [config.scheme_of(module) for config in (first, second)]
        if schemes[0] != schemes[1]:
            found = ["not quantized" if s is None else s.label for s in schemes]
            raise InputError(
                f"{names} disagree about {module}: {found[0]} and {found[1]}",
                "The same in both was expected",
                todo,
            )


def _int4_tensors(scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
    size = scheme.group_size
    if size < 1 or in_ % size:
        raise InputError(
            f"W4A16_AWQ cannot store a [{out}, {in_}] weight"
            + (" with one scale for each row" if size < 1 else f" in groups of {size}"),
            f"A size of groups that divides {in_} was expected",
        )
    if out % 2:
        raise InputError(
            f"W4A16_AWQ cannot store a [{out}, {in_}] weight",
            "An even number of output features was expected",
        )
    return (
        PackedTensor("weight", "U8", (out // 2, in_), (0, 2), (1, 1)),
        PackedTensor("weight_scale", "BF16", (out, in_ // size), (0, 1), (1, size), scale="finite"),
    )


def _pack_int4(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    scheme = weight.scheme
    if not bool((weight.zeros == scheme.half).all()):
        raise InputError("W4A16_AWQ has no zero points", "Symmetric values were expected")
    codes = weight.q ^ scheme.half  # q - 8 in two's complement of four bits
    # Scales in float16, of a converted checkpoint, stay as they are.
    is_half = weight.scales.dtype == torch.float16
    scales = weight.scales if is_half else weight.scales.to(torch.bfloat16)
    return {"weight": codes[0::2] | codes[1::2] << 4, "weight_scale": scales.contiguous()}


def _unpack_int4(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    packed, scales = tensors["weight"], tensors["weight_scale"]
    check_stored(_int4_tensors(scheme, 2 * packed.shape[0], packed.shape[1]), tensors)
    q = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1) ^ scheme.half
    zeros = torch.full(scales.shape, scheme.half, dtype=torch.uint8, device=scales.device)
    return QuantizedWeight(q, scales, zeros, scheme)


def _quantization(config: QuantizationConfig) -> dict[str, Any]:
    """The `quantization` of hf_quant_config.json.

    Raises InputError for schemes and names of modules that the format has no words for.
    """
    excluded = [_wildcard(entry) for entry in config.ignore]
    excluded += [f"{prefix.removesuffix('.')}*" for prefix in config.carried]
    document: dict[str, Any] = {}
    if config.overrides:
        assert config.scheme is None, "quantized_layers names every module"
        document["quant_algo"] = MIXED
        layers = {name: _layer(scheme) for name, scheme in config.overrides}
        patterns = [name for name in layers if name.startswith("re:")]
        if patterns:
            raise InputError(
                f"modelopt has no place for {patterns[0]}", "Names of modules were expected"
            )
        document["quantized_layers"] = layers
    else:
        assert config.scheme is not None, "modelopt quantizes weights"
        document |= _layer(config.scheme)
    if config.kv == "int8":
        raise InputError("modelopt has no place for an INT8 KV cache", "FP8 was expected")
    document["kv_cache_quant_algo"] = "FP8" if config.kv else None
    document["exclude_modules"] = excluded
    return document


def _layer(scheme: Scheme) -> dict[str, Any]:
    """The fields of a scheme."""
    name = algorithm_of(scheme)
    if name is None:
        labels = ", ".join(known.label for known in ALGORITHMS.values())
        raise InputError(
            f"modelopt has no name for {scheme.label}", f"One of {labels} was expected"
        )
    fields: dict[str, Any] = {"quant_algo": _WRITTEN_NAMES.get(name, name)}
    if scheme.kind == "int" or scheme.scale_format != "float":
        fields["group_size"] = scheme.group_size
    if scheme.kind == "int":
        fields |= {"has_zero_point": False, "pre_quant_scale": True}
    return fields


def algorithm_of(scheme: Scheme) -> str | None:
    """The `quant_algo` of a scheme; None when Model-Optimizer's format has none."""
    if scheme.kind == "int" and scheme.group_size > 0:
        scheme = replace(scheme, group_size=ALGORITHMS["W4A16_AWQ"].group_size)
    return next((name for name, known in ALGORITHMS.items() if scheme == known), None)


def with_group_size(entry: Mapping[str, Any], of_file: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of config.json with the group size that only hf_quant_config.json has.

    Model-Optimizer 0.47 leaves it out of config.json for W4A16_AWQ.
    """
    details = of_file.get("quantization")
    group_size = details.get("group_size") if isinstance(details, dict) else None
    return {"group_size": group_size, **entry}


def _scheme(fields: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quant_algo`. Raises InputError for another, or for other groups."""
    algorithm = fields.get("quant_algo")
    group_size = fields.get("group_size")
    name = algorithm.upper() if isinstance(algorithm, str) else algorithm
    expected = f"{', '.join((*ALGORITHMS, *_SAME_SCHEME))} or {MIXED}"
    scheme = ALGORITHMS.get(_SAME_SCHEME.get(name, name)) if isinstance(name, str) else None
    if scheme is None:
        raise _unsupported("quant_algo", algorithm or "none", expected)
    if scheme.kind == "int":
        size = scheme.group_size if group_size is None else group_size
        if type(size) is not int or size < 1:
            raise _unsupported("group_size", group_size, f"a positive number for {name}")
        if fields.get("has_zero_point"):
            raise _unsupported("has_zero_point", True, f"false for {name}")
        return replace(scheme, group_size=size)
    # FP8 has no groups, and some files say 0 or 16 all the same.
    if scheme.scale_format != "float" and group_size not in (None, 0, scheme.group_size):
        raise _unsupported("group_size", group_size, f"{scheme.group_size} for {name}")
    return scheme


# A pattern without a star excludes a module and those inside it, as in vLLM.
_INSIDE = r"(\..*)?$"


def _ignore_entry(name: str) -> str:
    """An entry of `exclude_modules` as an entry of `QuantizationConfig.ignore`."""
    if name == "lm_head":
        return name
    pattern = "".join(_WILDCARDS.get(sign, re.escape(sign)) for sign in name)
    return f"re:{pattern}{_INSIDE}"


_WILDCARDS = {"*": ".*", "?": "."}


def _wildcard(entry: str) -> str:
    """The inverse of `_ignore_entry`; a name stays what it is.

    Raises InputError for a regular expression that is no wildcard.
    """
    if not entry.startswith("re:"):
        return entry
    pattern = entry[3:].removesuffix(_INSIDE)
    if not entry.endswith("$") and not pattern.endswith(".*"):
        pattern += ".*"  # without an end, it matches the beginning of names
    pattern = pattern.removesuffix("$")
    name = re.sub(
        r"\\(.)|\.\*|\.", lambda found: found[1] or ("*" if found[0] == ".*" else "?"), pattern
    )
    if _ignore_entry(name) != f"re:{pattern}{_INSIDE}":
        raise InputError(
            f"modelopt has no place for the regular expression {entry[3:]}",
            "Names of modules or wildcards were expected",
        )
    return name


def _unsupported(field: str, value: object, expected: str) -> InputError:
    return InputError(
        f"This Model-Optimizer checkpoint has {field} {str(value)[:200]}", f"Expected {expected}"
    )
