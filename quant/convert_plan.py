"""Plans `llmkit convert`: whether and how another format holds a checkpoint's values."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import DTYPE_NAMES
from llmkit.checkpoint.gptq_format import BITS as GPTQ_BITS
from llmkit.checkpoint.modelopt_format import ALGORITHMS, algorithm_of
from llmkit.checkpoint.quantized_formats import (
    FORMATS,
    format_of,
    packed_tensors,
    parse_quantization,
)
from llmkit.checkpoint.quantized_weight import (
    Format,
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import (
    CheckpointWriter,
    HeaderFunction,
    plan_files,
    safetensors_header,
)
from llmkit.common.errors import InputError, LlmkitError
from llmkit.common.progress import Progress
from llmkit.model.checkpoint_tensors import (
    carried_tensors,
    checkpoint_tensors,
    packed_name,
    scheme_of,
    with_pre_quant_scales,
)
from llmkit.model.parameter_table import parameters
from llmkit.model.wrappers import head_modules, module_names
from llmkit.quant.convert_difference import (
    does_not_carry_over,
    pre_quant_scale_reason,
    stored_difference,
)
from llmkit.quant.convert_source import ConvertSource, StoredWeight
from llmkit.quant.output_layout import (
    carried_modules,
    output_config,
    output_files,
    unquantized_dtype,
)
from llmkit.quant.parameter_writer import ParameterWriter

# The integers that formats of weight-only quantization hold.
_INTEGER_BITS: dict[str, tuple[int, ...]] = {"gptq": GPTQ_BITS, "gptq_v2": GPTQ_BITS, "awq": (4,)}
# Formats whose readers take every linear layer as quantized that is not under `ignore`.
_NAMES_ROUTERS = ("compressed-tensors", "modelopt", "fp8")


@dataclass(frozen=True)
class ConvertPlan:
    """A checked conversion. Every weight was read, and the target's format holds its values."""

    source: ConvertSource
    quantization: QuantizationConfig  # of the output, as its readers understand it
    tensors: list[TensorInfo]  # of the output
    written: dict[str, Scheme]  # the output's scheme of each weight

    @property
    def format(self) -> str:
        """The output's format."""
        return self.quantization.format

    @property
    def files(self) -> dict[str, list[TensorInfo]]:
        """The output's tensors by safetensors file."""
        return plan_files(self.tensors)

    @property
    def headers(self) -> HeaderFunction:
        """What makes the headers of files."""
        return safetensors_header

    @property
    def identity(self) -> dict[str, object]:
        """What decides the bytes, beside the source."""
        return {"quantization": asdict(self.quantization)}

    @property
    def float32_tensors(self) -> list[str]:
        """Tensors that the source has in blocks, and the output in float32."""
        if self.source.format != "gguf":
            return []
        stored = self.source.checkpoint.tensors
        return [
            info.name
            for info in self.tensors
            if info.dtype == "F32" and info.name in stored and stored[info.name].ggml_type != "F32"
        ]

    @property
    def config(self) -> dict[str, Any]:
        """The output's config.json."""
        checkpoint = self.source.checkpoint
        return output_config(checkpoint, self.quantization, _config_dtype(checkpoint))

    def side_files(self) -> dict[str, bytes]:
        """The output's other files: the source's, with those of the new format for the old."""
        return output_files(self.source.checkpoint, self.quantization)

    def output(self, writer: CheckpointWriter) -> CheckpointOutput:
        """What writes the weights."""
        return CheckpointOutput(self, writer)

    def packed_tensors(self, weight: StoredWeight) -> tuple[PackedTensor, ...]:
        """What the output stores in place of a weight."""
        scheme = self.written[weight.name]
        return packed_tensors(self.quantization, weight.module, scheme, *weight.shape)


class CheckpointOutput:
    """Writes the tensors of a plan, and reads weights back."""

    def __init__(self, plan: ConvertPlan, writer: CheckpointWriter) -> None:
        self._plan = plan
        self._writer = writer
        source = plan.source
        self.parameters = ParameterWriter(
            source.checkpoint, source.spec, plan.quantization, plan.tensors, writer
        )
        self._sizes = {info.name: info.nbytes for info in plan.tensors}

    def write_weight(self, weight: StoredWeight, values: QuantizedWeight) -> None:
        """Write a weight in the target's format."""
        scheme = self._plan.written[weight.name]
        self.parameters.write_quantized_tensor(weight.name, replace(values, scheme=scheme))

    def read_back(self, weight: StoredWeight) -> QuantizedWeight:
        """A weight that was written."""
        stored = {
            row.suffix: self._writer.read_back(packed_name(weight.name, row.suffix))
            for row in self._plan.packed_tensors(weight)
        }
        form = format_of(self._plan.quantization)
        return form.unpack(self._plan.written[weight.name], stored)

    def stored_bytes(self, name: str) -> int:
        """The size of a dense tensor, or of what is stored in place of it."""
        weight = self._plan.source.weights.get(name)
        if weight is None:
            return self._sizes[name]
        rows = self._plan.packed_tensors(weight)
        return sum(self._sizes[packed_name(name, row.suffix)] for row in rows)


def _config_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the output's config.json: that of the source's, where it says one."""
    for config in (checkpoint.config, checkpoint.text_config):
        for key in ("dtype", "torch_dtype"):
            for dtype, name in DTYPE_NAMES.items():
                if config.get(key) == str(dtype).removeprefix("torch."):
                    return name
    return unquantized_dtype(checkpoint, None)


def plan_conversion(source: ConvertSource, target: Format, progress: Progress) -> ConvertPlan:
    """Read all weights, and plan their output in the format `target`. Nothing is written.

    Raises InputError, naming the tensor and what would be lost, when a weight does not carry over,
    and for scales of the KV cache that are none.
    """
    for weight in source.weights.values():
        reason = _scheme_reason(target, weight)
        if reason:
            raise does_not_carry_over(source, weight.name, reason)
    for parameter in parameters(source.spec):
        source.read_kv_scales(parameter)
    written: dict[str, Scheme] = {}
    scale_dtypes: dict[str, str] = {}
    progress.start("check", len(source.weights), "weights")
    for weight in source.weights.values():
        values = source.read(weight)
        scheme = _exact_scheme(target, weight.scheme, values)
        reason = _value_reason(target, scheme, values)
        if reason:
            raise does_not_carry_over(source, weight.name, reason)
        written[weight.name] = scheme
        scale_dtypes[weight.name] = DTYPE_NAMES[values.scales.dtype]
        progress.advance(1, weight.name)
    progress.finish()
    written = _with_common_symmetry(written)
    quantization = _readable(source, _config(source, target, written), written)
    tensors = _planned_tensors(source, quantization, scale_dtypes)
    return ConvertPlan(source, quantization, tensors, written)


def _scheme_reason(target: Format, weight: StoredWeight) -> str:
    """Why the target has no place for weights of this scheme; "" when it has."""
    scheme = weight.scheme
    bits = _INTEGER_BITS.get(target)
    if bits is not None and (scheme.kind != "int" or scheme.inputs != "none"):
        return f"{target} has integers and inputs in 16 bits only, and this is {scheme.label}"
    if bits is not None and scheme.bits not in bits:
        return f"{target} has {' or '.join(map(str, bits))} bits only, and this is {scheme.label}"
    if target == "awq" and weight.parameter.is_lm_head:
        return "awq has no place for a quantized output projection"
    if target == "fp8":
        is_tensor = scheme.block_rows == -1 and scheme.inputs in ("token", "tensor")
        is_block = scheme.block_rows > 1 and scheme.inputs == "group"
        if not scheme.is_fp8 or scheme.scale_format != "float" or not (is_tensor or is_block):
            return f"fp8 has FP8 in blocks or with one scale, and this is {scheme.label}"
    has_fixed_inputs = scheme.scale_format == "e8m0" and scheme.inputs == "tensor"
    if target == "compressed-tensors" and has_fixed_inputs:
        return f"compressed-tensors has no {scheme.label}"
    # Integers may turn out to be symmetric when they are read.
    if target == "modelopt" and algorithm_of(replace(scheme, symmetric=True)) is None:
        names = ", ".join(ALGORITHMS)
        return f"modelopt has {names} only, and this is {scheme.label}"
    try:
        FORMATS[target].tensors(scheme, *weight.shape)
    except LlmkitError as error:
        return f"{error.what}. {error.expected}"
    return ""


def _exact_scheme(target: Format, scheme: Scheme, weight: QuantizedWeight) -> Scheme:
    """The scheme in the output. The zero points decide whether integers are symmetric."""
    if scheme.kind != "int" or scheme.inputs != "none":
        return scheme
    is_symmetric = bool((weight.zeros == scheme.half).all())
    return replace(scheme, symmetric=is_symmetric and target != "awq")


def _value_reason(target: Format, scheme: Scheme, weight: QuantizedWeight) -> str:
    """What the target would lose of a weight's values; "" when it holds them bit for bit."""
    if weight.pre_quant_scale is not None:
        return pre_quant_scale_reason(target)
    scales = weight.scales.float()
    if not bool(scales.isfinite().all()):
        return "some of its scales are not finite"
    form = FORMATS[target]
    try:
        stored = form.pack(scheme, replace(weight, scheme=scheme))
        found = form.unpack(scheme, stored)
    except LlmkitError as error:
        return f"{error.what}. {error.expected}"
    return stored_difference(weight, found)


def _with_common_symmetry(schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    """The schemes, with zero points for all weights of the same bits and groups if one has them.

    Engines fuse layers such as q, k and v, whose schemes must be equal then.
    """
    asymmetric = {replace(s, symmetric=True) for s in schemes.values() if not s.symmetric}
    return {
        name: replace(scheme, symmetric=replace(scheme, symmetric=True) not in asymmetric)
        for name, scheme in schemes.items()
    }


def _config(
    source: ConvertSource, target: Format, schemes: dict[str, Scheme]
) -> QuantizationConfig:
    """The `quantization_config` of the output."""
    spec = source.spec
    of_source = source.checkpoint.quantization
    common = Counter(schemes.values()).most_common(1)[0][0]
    ignore: dict[str, None] = {}
    overrides: dict[str, Scheme] = {}
    head_names = head_modules(spec)
    # Mixed schemes of modelopt have no default: it names every module.
    has_default = target != "modelopt" or len(set(schemes.values())) == 1
    for parameter in parameters(spec):
        for name in parameter.source_names:
            module = name.removesuffix(".weight")
            is_head = parameter.is_lm_head
            modules = head_names if is_head else module_names(spec, module)
            scheme = schemes.get(name)
            is_router = len(parameter.shape) == 2 and parameter.name.startswith("layers.")
            is_router = is_router and target in _NAMES_ROUTERS
            if scheme is None and (parameter.is_linear or is_router):
                ignore |= dict.fromkeys(modules)
            elif scheme is not None and (scheme != common or not has_default):
                overrides |= dict.fromkeys(modules, scheme)
    if f"{spec.lm_head_name}.weight" not in schemes:
        ignore = dict.fromkeys([*head_names, *ignore])
    return QuantizationConfig(
        target,
        common if has_default else None,
        tuple(ignore),
        tuple(overrides.items()),
        carried=carried_modules(source.checkpoint, spec),
        kv=of_source.kv if of_source else "",
        method=of_source.method if of_source else "",
        damp=of_source.damp if of_source else QuantizationConfig.damp,
    )


def _readable(
    source: ConvertSource, config: QuantizationConfig, schemes: dict[str, Scheme]
) -> QuantizationConfig:
    """The config with what only its readers decide: the names of KV scales.

    Raises InputError when readers of the written config would not find the schemes.
    """
    if config.format in ("awq", "fp8") and config.overrides:
        names = ", ".join(dict.fromkeys(scheme.label for scheme in schemes.values()))
        raise InputError(
            f"{source.checkpoint.reference} has layers of different schemes ({names}), and"
            f" {config.format} has one for all",
            "compressed-tensors, or gptq for integers, was expected",
        )
    written = json.loads(json.dumps(format_of(config).config_dict(config)))
    parsed = parse_quantization(written)
    for parameter in parameters(source.spec):
        for name in parameter.source_names:
            found = scheme_of(parameter, name, parsed)
            if found != schemes.get(name):
                labels = [s.label if s else "not quantized" for s in (schemes.get(name), found)]
                raise does_not_carry_over(
                    source, name, f"{config.format} would say {labels[1]}, and it is {labels[0]}"
                )
    return with_pre_quant_scales(replace(config, kv_scales=parsed.kv_scales), source.spec)


def _planned_tensors(
    source: ConvertSource, quantization: QuantizationConfig, scale_dtypes: dict[str, str]
) -> list[TensorInfo]:
    """Every tensor of the output, with the dtype that keeps its values."""
    stored = checkpoint_tensors(source.spec, quantization)
    planned = [
        TensorInfo(name, _dtype(source, packed, scale_dtypes), packed.shape)
        for name, (_, packed) in stored.items()
    ]
    carried = carried_tensors(source.checkpoint, source.spec).values()
    return planned + [
        TensorInfo(info.name, source.dense_dtype(info.name), info.shape) for info in carried
    ]


def _dtype(source: ConvertSource, packed: PackedTensor, scale_dtypes: dict[str, str]) -> str:
    if not packed.is_quantized:
        return source.dense_dtype(packed.name)
    # compressed-tensors stores 16-bit scales in any of both dtypes.
    is_half_scale = packed.suffix == "weight_scale" and packed.dtype == "BF16"
    if is_half_scale and scale_dtypes[packed.source_name] == "F16":
        return "F16"
    return packed.dtype
