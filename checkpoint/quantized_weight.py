"""A quantized weight in memory, and the config of how a checkpoint stores it, for all formats.

Legend: `out` rows, `in` columns, `G` groups along `in`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from typing import Literal

import torch

Format = Literal[
    "gptq", "gptq_v2", "awq", "compressed-tensors", "mxfp4", "fp8", "autofp8", "modelopt", "gguf"
]
# What quantized values are: integers of `bits`, or floats (FP8 is e4m3, FP4 is E2M1).
ValueKind = Literal["int", "float"]
# How a checkpoint stores the scales of groups.
# float: in 16 or 32 bits. e8m0: as powers of two in a byte (MXFP4, MXFP8). e4m3: in a byte, to be
# multiplied with one float32 scale of the whole weight (NVFP4).
ScaleFormat = Literal["float", "e8m0", "e4m3"]
# What the inputs of a linear layer are quantized to.
InputType = Literal["int8", "fp8", "fp4"]
# What numbers a tensor of scales may hold; "": it holds no scales.
# finite: of integers, where some writers (AutoRound) have negative scales. not negative: of floats,
# where weights that are all zero may have the scale 0. positive: of inputs, which are divided by
# theirs, and of the scales of groups.
ScaleRule = Literal["", "finite", "not negative", "positive"]
KV_SCALES = ("k_scale", "v_scale")
# The suffix of a tensor [in] that a layer's inputs are multiplied by.
PRE_QUANT_SCALE = "pre_quant_scale"
_TEXT_MODELS = ("language_model", "text_model")
# What names of the text model's modules begin with, in multimodal models of all versions of
# transformers; longer ones first.
_TEXT_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.text_model.",
    "model.",
)
# The values of a 4-bit float (E2M1) by its code. The highest bit is the sign.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Scheme:
    """How the weight of one linear layer, and its inputs at run time, are quantized."""

    bits: int
    group_size: int = -1  # along `in`; -1: one scale per output row
    symmetric: bool = True
    kind: ValueKind = "int"  # float: FP8 e4m3, or with 4 bits FP4 E2M1
    # none: not quantized; token: a dynamic scale per token; group: a dynamic scale per token and
    # group of `group_size` inputs, in `scale_format`; tensor: one stored scale.
    inputs: Literal["none", "token", "group", "tensor"] = "none"
    block_rows: int = 1  # output rows that share their scales; -1: all rows
    scale_format: ScaleFormat = "float"
    # What inputs are quantized to; None when they are not. The default is the type of the weights,
    # in 8 bits for integers.
    input_type: InputType | None = None
    # GGUF's name of the types of a model's tensors ("Q4_K_M"); the other fields are those of the
    # most common one. "": another format.
    preset: str = ""

    def __post_init__(self) -> None:
        input_type = self.input_type
        if self.inputs == "none":
            input_type = None
        elif input_type is None:
            float_type: InputType = "fp4" if self.bits == 4 else "fp8"
            input_type = float_type if self.kind == "float" else "int8"
        object.__setattr__(self, "input_type", input_type)

    def groups(self, in_features: int) -> int:
        """The number of groups in a row of `in_features` weights."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    @property
    def label(self) -> str:
        """A description for people: "INT4 in groups of 64", "INT8, inputs too"."""
        if self.preset:
            return self.preset
        name = f"INT{self.bits}"
        if self.kind == "float":
            prefix = {"float": "", "e8m0": "MX", "e4m3": "NV"}[self.scale_format]
            name = f"{prefix}FP{self.bits}"
        has_own_groups = self.group_size == -1 or self.scale_format != "float"
        group_text = "" if has_own_groups else f" in groups of {self.group_size}"
        if self.block_rows == -1:
            group_text = " with one scale per weight"
        elif self.block_rows > 1:
            group_text = f" in blocks of {self.block_rows}x{self.group_size}"
        zeros = "" if self.symmetric else " with zero points"
        is_same_type = self.input_type == ("int8" if self.kind == "int" else f"fp{self.bits}")
        inputs = "inputs too" if is_same_type else f"inputs in {str(self.input_type).upper()}"
        input_texts = {
            "none": "",
            "token": f", {inputs}",
            "group": f", {inputs}" + ("" if has_own_groups else f" in groups of {self.group_size}"),
            "tensor": f", {inputs} by a fixed scale",
        }
        return name + group_text + zeros + input_texts[self.inputs]

    @property
    def is_fp8(self) -> bool:
        """Whether quantized values are 8-bit floats (e4m3)."""
        return self.kind == "float" and self.bits == 8

    @property
    def is_fp4(self) -> bool:
        """Whether quantized values are codes of 4-bit floats (see FP4_VALUES)."""
        return self.kind == "float" and self.bits == 4

    @property
    def has_input_scale(self) -> bool:
        """Whether the checkpoint stores a scale of the inputs."""
        has_global_scale = self.inputs == "group" and self.scale_format == "e4m3"
        return self.inputs == "tensor" or has_global_scale

    @property
    def half(self) -> int:
        """The quantized value of zero for a symmetric scheme. Floats have no offset."""
        return 1 << (self.bits - 1) if self.kind == "int" else 0


@dataclass(frozen=True)
class QuantizationConfig:
    """How a checkpoint's linear weights are stored: the `quantization_config` of its config.json.

    Modules have checkpoint names ("model.layers.0.mlp.up_proj"). `ignore` and `overrides` hold
    names, or regular expressions after "re:". `ignore` wins over an override, and an override over
    `scheme`.
    """

    format: Format
    # The scheme of linear layers without an override; None: those layers are not quantized.
    scheme: Scheme | None
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[tuple[str, Scheme], ...] = ()
    # What the names of modules that do not run begin with ("vision_tower."). They are stored as
    # they were, and readers that run them are told so. Only set for writing.
    carried: tuple[str, ...] = ()
    # The dtype of a quantized KV cache; the checkpoint stores its scales for each layer.
    kv: Literal["", "fp8", "int8"] = ""
    kv_scales: tuple[str, str] = KV_SCALES  # what these scales of keys and values are called
    # The method that quantized the weights (gptq, rtn, int8); "" when the checkpoint does not say.
    method: str = ""
    # GPTQ's damping: the share of the mean diagonal that was added to the Hessian. It is only
    # recorded.
    damp: float = 0.01
    # The quantized modules that store a pre_quant_scale. The names are those of the tensors.
    pre_quant_scales: tuple[str, ...] = ()

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer; None when it is not quantized."""
        if module not in self._found:
            self._found[module] = self._find_scheme(module)
        return self._found[module]

    def has_pre_quant_scale(self, module: str) -> bool:
        """Whether a linear layer stores the numbers that its inputs are multiplied by."""
        return module in self._scaled_modules

    @cached_property
    def _scaled_modules(self) -> frozenset[str]:
        return frozenset(self.pre_quant_scales)

    def _find_scheme(self, module: str) -> Scheme | None:
        names = self._spellings(module)
        if _matches_any(self.ignore, names):
            return None
        for entry, scheme in self.overrides:
            if _matches_any((entry,), names):
                return scheme
        return self.scheme

    @cached_property
    def _found(self) -> dict[str, Scheme | None]:
        """The results of `scheme_of`: lists of hundreds of patterns meet thousands of experts."""
        return {}

    def _spellings(self, module: str) -> tuple[str, ...]:
        """The names that entries may have for a module: first its own.

        In a multimodal model they depend on the version of transformers that wrote the entry.
        """
        if not self._names_text_model and not any(part in module for part in _TEXT_MODELS):
            return (module,)
        if module.endswith("lm_head"):
            return tuple(dict.fromkeys((module, "lm_head", "language_model.lm_head")))
        prefix = next((prefix for prefix in _TEXT_PREFIXES if module.startswith(prefix)), None)
        if prefix is None:
            return (module,)
        rest = module.removeprefix(prefix)
        return tuple(dict.fromkeys((module, *(other + rest for other in _TEXT_PREFIXES))))

    @cached_property
    def _names_text_model(self) -> bool:
        entries = (*self.ignore, *(entry for entry, _ in self.overrides))
        return any(part in entry for entry in entries for part in _TEXT_MODELS)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The distinct schemes; `scheme` comes first."""
        found = [self.scheme] if self.scheme else []
        return tuple(dict.fromkeys([*found, *(scheme for _, scheme in self.overrides)]))


@cache
def _pattern(expression: str) -> re.Pattern[str]:
    """re's own cache is too small for lists that name hundreds of modules."""
    return re.compile(expression)


def _matches_any(entries: Iterable[str], modules: Sequence[str]) -> bool:
    for entry in entries:
        if not entry.startswith("re:"):
            if entry in modules:
                return True
            continue
        match = _pattern(entry[3:]).match
        for module in modules:
            if match(module) is not None:
                return True
    return False


@dataclass
class QuantizedWeight:
    """W[o, i] = scales[o, g(i)] * (q[o, i] - zeros[o, g(i)]), with g(i) = i // group_size.

    q: uint8 [out, in], 0 .. 2^bits - 1; float8_e4m3fn for FP8. In FP4, q is a code that stands for
    one of FP4_VALUES.
    scales: float16, bfloat16 or float32 [out, G]. The rows of a block have equal scales. With
    `scheme.scale_format` e8m0 they are powers of two, with e4m3 e4m3 values times `global_scale`.
    zeros: uint8 [out, G]; `scheme.half` everywhere when symmetric.
    input_scale: float32 [1] when the inputs have a stored scale: `scheme.inputs` is "tensor", or
    "group" with the scale format e4m3, where each group's scale is e4m3 times this.
    global_scale: float32 [1] with the scale format e4m3, otherwise None.
    pre_quant_scale: [in] of any float dtype. The inputs are multiplied by it before the layer, so
    column i of the dense weight is W[:, i] * pre_quant_scale[i]. None: there is none.
    """

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    scheme: Scheme
    input_scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""
        rows, columns = self.q.shape
        return rows, columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight [out, in], computed in float32 and cast to `dtype`."""
        rows, columns = self.shape
        size = columns if self.scheme.group_size == -1 else self.scheme.group_size
        dense = self.values()
        if columns % size:  # the last group is smaller
            index = torch.arange(columns, device=dense.device) // size
            dense.sub_(self.zeros.float()[:, index]).mul_(self.scales.float()[:, index])
        else:
            groups = dense.view(rows, -1, size)
            groups.sub_(self.zeros.float().unsqueeze(2)).mul_(self.scales.float().unsqueeze(2))
        if self.pre_quant_scale is not None:
            dense.mul_(self.pre_quant_scale.float())
        return dense.to(dtype)

    def values(self) -> torch.Tensor:
        """q as float32, a new tensor."""
        if not self.scheme.is_fp4:
            return self.q.float()
        positive = torch.tensor(FP4_VALUES, device=self.q.device)
        return torch.cat((positive, -positive))[self.q.int()]

    def rows(self, rows: slice) -> QuantizedWeight:
        """The weight of some rows."""
        return self.select(lambda values: values[rows])

    def select(self, rows_of: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedWeight:
        """The weight of the rows that `rows_of` returns of a tensor [out, ...]."""
        q, scales, zeros = (rows_of(values) for values in (self.q, self.scales, self.zeros))
        return replace(self, q=q, scales=scales, zeros=zeros)

    def with_even_groups(self) -> QuantizedWeight:
        """The same weight with groups that divide the columns. Scales are repeated for that."""
        columns = self.shape[1]
        size = self.scheme.group_size
        if size == -1 or columns % size == 0:
            return self
        smaller = math.gcd(columns, size)
        index = torch.arange(0, columns, smaller, device=self.scales.device) // size
        scheme = replace(self.scheme, group_size=smaller)
        scales, zeros = self.scales[:, index], self.zeros[:, index]
        return replace(self, scales=scales, zeros=zeros, scheme=scheme)

    def with_bits(self, bits: int) -> QuantizedWeight:
        """The same weight in integers of more bits; a symmetric one stays symmetric."""
        scheme = replace(self.scheme, bits=bits)
        offset = scheme.half - self.scheme.half
        return replace(self, q=self.q + offset, zeros=self.zeros + offset, scheme=scheme)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        found = {
            name: None if values is None else values.to(device)
            for name, values in (
                ("input_scale", self.input_scale),
                ("global_scale", self.global_scale),
                ("pre_quant_scale", self.pre_quant_scale),
            )
        }
        return QuantizedWeight(
            self.q.to(device),
            self.scales.to(device),
            self.zeros.to(device),
            self.scheme,
            found["input_scale"],
            found["global_scale"],
            found["pre_quant_scale"],
        )


@dataclass(frozen=True)
class PackedTensor:
    """One tensor that a checkpoint stores for a weight, and how it is sliced with the weight.

    A quantized weight is stored as several tensors (qweight, scales, ...), a dense weight as one.

    `out` describes the rows of the dense weight in this tensor, and `in_` its columns. Each is a
    pair (dim, per_element): the dimension of this tensor along which the rows (columns) extend, and
    the number of dense rows (columns) in one element. It is None when the tensor does not extend
    along them. The dense interval [a, b) is the interval [a / per_element, b / per_element) of this
    tensor, and both ends must be multiples of `per_element`. Example: GPTQ's INT4 qweight packs 8
    columns of the dense weight into one int32, so out = (1, 1) and in_ = (0, 8). With 3 bits a word
    has a fraction of 32/3 columns, and ends are multiples of 32.
    """

    suffix: str  # "qweight", "weight_scale", ...
    dtype: str  # as in a safetensors header; "": a dense tensor of any float dtype
    shape: tuple[int, ...]
    out: tuple[int, int | Fraction] | None
    in_: tuple[int, int | Fraction] | None
    # How a slice gets its values, when they are not copied.
    # group_index: group numbers, counted from the first group of the slice (GPTQ's g_idx).
    # shape: the shape of the dense slice (compressed-tensors' weight_shape).
    derived: Literal["", "group_index", "shape"] = ""
    # Its elements may cover more than the slice of the weight: an element that the slice's first or
    # last row (column) cuts is stored whole, on both sides of the cut.
    covers: bool = False
    scale: ScaleRule = ""
    # Set by `checkpoint_tensors`, for a checkpoint of a given model:
    name: str = ""  # "model.layers.3.mlp.up_proj.qweight"
    source_name: str = ""  # the dense tensor it stands for; "" for a KV scale
    source_shape: tuple[int, ...] = ()
    group_size: int = -1
    num_experts: int = 0  # dimension 0 of a tensor that holds the weights of several experts

    def over_experts(self, num_experts: int) -> PackedTensor:
        """The tensor that holds the like of this for several experts, in a new dimension 0."""
        shift = [axis and (axis[0] + 1, axis[1]) for axis in (self.out, self.in_)]
        return replace(
            self,
            shape=(num_experts, *self.shape),
            out=shift[0],
            in_=shift[1],
            num_experts=num_experts,
        )

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a checkpoint may store it in this shape: a number is stored as [] or as [1]."""
        return shape == self.shape or {shape, self.shape} == {(), (1,)}

    @property
    def is_quantized(self) -> bool:
        """Whether it belongs to a quantized weight, and not to a dense one."""
        return bool(self.dtype)
