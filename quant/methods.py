"""The quantization methods as data, and what the chosen method and options mean for one model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, Scheme
from llmkit.common.errors import InputError, UsageError
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.wrappers import module_names
from llmkit.quant.algorithm import Algorithm, AutoRound
from llmkit.quant.awq import AwqSmoother, ClippingQuantizer
from llmkit.quant.gptq import GptqQuantizer
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.quantize_options import Effort
from llmkit.quant.round_to_nearest import RtnQuantizer
from llmkit.quant.smoothquant import SmoothQuant

# The group sizes that every engine has kernels for. The largest gives the smallest checkpoint.
GROUP_SIZES = (128, 64, 32)
FAST_AWQ_GRID = 5  # ratios that AWQ tries with --effort fast


@dataclass(frozen=True)
class Method:
    """One value of --method. The first of `bits` and of `formats` is the default."""

    bits: tuple[int, ...]
    formats: tuple[Format, ...] = ()  # empty: a cast, nothing is quantized
    calibrated: bool = False
    grouped: bool = False  # one scale per group of columns; otherwise one per row
    symmetric: bool = True  # the default of a format that supports both
    kind: Literal["int", "float"] = "int"
    dtype: torch.dtype | None = None  # of a cast


METHODS: dict[str, Method] = {
    "bf16": Method((16,), dtype=torch.bfloat16),
    "fp16": Method((16,), dtype=torch.float16),
    "int8": Method((8,), ("compressed-tensors",)),
    "fp8": Method((8,), ("compressed-tensors",), kind="float"),
    "gptq": Method((4, 8), ("gptq", "awq", "compressed-tensors"), calibrated=True, grouped=True),
    "awq": Method(
        (4,), ("awq", "gptq", "compressed-tensors"), calibrated=True, grouped=True, symmetric=False
    ),
    "rtn": Method((4, 8), ("compressed-tensors", "gptq", "awq"), grouped=True),
}
# Whether weights are symmetric in the formats that support only one kind (see docs/formats.md).
FORMAT_SYMMETRY: dict[str, bool] = {"gptq": True, "awq": False}


@dataclass(frozen=True)
class MethodOptions:
    """The options that say how weights are stored, before a model is known. None: the default."""

    method: str
    bits: int | None = None
    group_size: int | None = None
    format: str | None = None
    symmetric: bool | None = None
    activations: bool = False  # int8: quantize the inputs too
    static_activations: bool = False  # fp8: with a static scale
    kv: Literal["", "fp8", "int8"] = ""
    mixed: bool = False  # linears of different bits in one checkpoint
    effort: Effort = "normal"
    lm_head: int | None = None  # bits of the output projection; None: it is not quantized

    @property
    def method_row(self) -> Method:
        """The method's row of METHODS."""
        return METHODS[self.method]

    @property
    def chosen_format(self) -> str | None:
        """The format on disk; None for a cast.

        The default is the method's first, and compressed-tensors for mixed precision.
        """
        if self.format is not None:
            return self.format
        if self.mixed:
            return "compressed-tensors"
        formats = self.method_row.formats
        return formats[0] if formats else None

    @property
    def chosen_bits(self) -> int:
        """The bits of a weight; the default is the method's first."""
        return self.bits or self.method_row.bits[0]

    @property
    def calibrated(self) -> bool:
        """Whether the model runs on calibration text."""
        method = self.method_row
        if method.calibrated or self.static_activations or self.kv:
            return True
        if self.method == "int8" and self.activations:
            return True
        return bool(method.formats) and self.method != "rtn" and self.effort == "max"

    def check(self) -> None:
        """Raises UsageError, naming the values that are supported, for conflicting options."""
        method = METHODS.get(self.method)
        if method is None:
            raise UsageError(
                f"--method {self.method} is not known", f"One of {', '.join(METHODS)} was expected"
            )
        self._check_grid(method)
        self._check_format(method)
        self._check_symmetry(method)
        self._check_activations()
        if self.kv and self.chosen_format not in (None, "compressed-tensors"):
            raise UsageError(
                f"--format {self.chosen_format} has no place for the scales of a KV cache",
                todo="Use --format compressed-tensors",
            )
        if self.mixed and (self.chosen_format != "compressed-tensors" or not method.grouped):
            raise UsageError(
                "--target-kl and --target-bits mix layers of 4, 8 and 16 bits, "
                "which one setting for all cannot",
                f"They go with {_methods_where(_is_grouped)} and --format compressed-tensors",
            )
        if self.lm_head is not None:
            self._check_lm_head(self.lm_head)

    def _check_grid(self, method: Method) -> None:
        if self.bits is not None and self.bits not in method.bits:
            pairs = ", ".join(
                f"{name} {bits}" for name, row in METHODS.items() for bits in row.bits
            )
            raise UsageError(
                f"--method {self.method} and --bits {self.bits} do not go together",
                f"The pairs that do: {pairs}",
            )
        if self.group_size is not None and not method.grouped:
            raise UsageError(
                f"--method {self.method} has no groups, and --group-size is {self.group_size}",
                f"Groups go with {_methods_where(_is_grouped)}",
            )

    def _check_format(self, method: Method) -> None:
        if self.format is not None and self.format not in method.formats:
            formats = ", ".join(method.formats) or "safetensors only, and no --format"
            raise UsageError(
                f"--method {self.method} and --format {self.format} do not go together",
                f"Expected {formats}",
            )
        if self.chosen_format == "awq" and self.chosen_bits != 4:
            raise UsageError(
                "--format awq holds 4 bits only", todo="Use --format compressed-tensors for 8 bits"
            )

    def _check_symmetry(self, method: Method) -> None:
        if self.symmetric is None:
            return
        if not method.grouped:
            raise UsageError(
                f"--method {self.method} has a symmetric grid",
                "No --symmetric or --asymmetric was expected",
            )
        supported = FORMAT_SYMMETRY.get(self.chosen_format or "", self.symmetric)
        if self.symmetric != supported:
            chosen = "--symmetric" if self.symmetric else "--asymmetric"
            other = "--asymmetric" if self.symmetric else "--symmetric"
            raise UsageError(
                f"--format {self.chosen_format} does not support {chosen}",
                f"{other} goes with it",
                "Use --format compressed-tensors, which holds both",
            )

    def _check_activations(self) -> None:
        if self.activations and self.method not in ("int8", "fp8"):
            raise UsageError(
                f"--method {self.method} rounds no activations",
                "--activations goes with int8 (fp8 has it always)",
            )
        if self.static_activations and self.method != "fp8":
            raise UsageError(
                f"--method {self.method} has no fixed activation scales", "--static goes with fp8"
            )

    def _check_lm_head(self, lm_head: int) -> None:
        if self.chosen_format is None:
            raise UsageError(
                f"--lm-head {lm_head}: --method {self.method} is a cast", todo="Leave out --lm-head"
            )
        if self.chosen_format == "awq":
            raise UsageError(
                f"--lm-head {lm_head}: the awq format has no place for a quantized one",
                todo="Leave out --lm-head",
            )
        supported: tuple[int, ...] = (4, 8)
        if self.chosen_format == "gptq" or not self.method_row.grouped:
            supported = (self.chosen_bits,)
        if lm_head not in supported:
            raise UsageError(
                f"--lm-head is {lm_head}",
                f"{' or '.join(map(str, supported))} bits go with the other options",
            )

    def scheme(self, group_size: int) -> Scheme | None:
        """How linear layers are stored; None for a cast."""
        method = self.method_row
        if not method.formats:
            return None
        symmetric = method.symmetric if self.symmetric is None else self.symmetric
        symmetric = FORMAT_SYMMETRY.get(self.chosen_format or "", symmetric)
        inputs: Literal["none", "token", "tensor"] = "none"
        if method.kind == "float" or self.activations:
            inputs = "tensor" if self.static_activations else "token"
        return Scheme(
            self.chosen_bits,
            group_size if method.grouped else -1,
            symmetric or not method.grouped,
            method.kind,
            inputs,
        )

    def lm_head_scheme(self, scheme: Scheme | None) -> Scheme | None:
        """How the output projection is stored when the other linears have `scheme`.

        None when it is not quantized.
        """
        if scheme is None or self.lm_head is None:
            return None
        return replace(scheme, bits=self.lm_head, kind="int", inputs="none")

    def algorithm(self, dampening_frac: float) -> Algorithm:
        """How a calibrated run quantizes the layers."""
        best = self.effort == "max"
        fast = self.effort == "fast"
        search = FULL_SEARCH if self.method_row.grouped and not fast else None
        gptq = GptqQuantizer(dampening_frac, search)
        if self.method in ("gptq", "awq") and best:
            return Algorithm(gptq, AwqSmoother(), AutoRound())
        if self.method == "gptq":
            return Algorithm(gptq)
        if self.method == "awq" and fast:
            return Algorithm(RtnQuantizer(), AwqSmoother(FAST_AWQ_GRID))
        if self.method == "awq":
            return Algorithm(ClippingQuantizer(), AwqSmoother())
        smoother = SmoothQuant() if self.method == "int8" and self.activations else None
        if self.method in ("int8", "fp8") and best:
            return Algorithm(gptq, smoother)
        if self.static_activations:
            return Algorithm(RtnQuantizer(required_stats=frozenset({"magnitudes"})), smoother)
        return Algorithm(RtnQuantizer(), smoother)


def build_quantization_config(
    spec: ModelSpec, options: MethodOptions, ignore: Sequence[str] = ()
) -> QuantizationConfig | None:
    """How the linears of a model are stored; None when neither they nor the KV cache are quantized.

    ignore: checkpoint modules that are not quantized. Raises InputError, with the layer and the
    sizes that fit, for a group size that does not divide every layer.
    """
    format_name = options.chosen_format
    if format_name is None and options.kv:
        format_name = "compressed-tensors"
    if format_name is None:
        return None
    group_size = -1
    if options.method_row.grouped:
        linears = [
            parameter
            for parameter in parameters(spec)
            if parameter.is_linear and not set(checkpoint_modules(parameter)) <= set(ignore)
        ]
        group_size = resolve_group_size(linears, options.group_size)
    scheme = options.scheme(group_size)
    lm_head_scheme = options.lm_head_scheme(scheme)
    ignored: list[str] = []
    head_names = list(dict.fromkeys(["lm_head", *module_names(spec, spec.lm_head_name)]))
    if lm_head_scheme is None:
        ignored += head_names
    if format_name == "compressed-tensors" and scheme is not None:
        # Readers of this format take every linear layer as quantized that is not under `ignore`.
        ignored += _router_modules(spec)
    ignored += ignore
    overrides: tuple[tuple[str, Scheme], ...] = ()
    if lm_head_scheme is not None and format_name != "gptq":
        overrides = tuple((name, lm_head_scheme) for name in head_names)
    return QuantizationConfig(
        _known_format(format_name),
        scheme,
        tuple(ignored),
        overrides,
        kv=options.kv,
        method=options.method,
    )


def with_mixed_bits(
    quantization: QuantizationConfig, spec: ModelSpec, bits: Mapping[str, int]
) -> QuantizationConfig:
    """`quantization` with other bits for some linears, by runtime module; 16: not quantized."""
    assert quantization.scheme is not None
    ignore = list(quantization.ignore)
    overrides = list(quantization.overrides)
    for parameter in parameters(spec):
        module_bits = bits.get(parameter.module) if parameter.is_linear else None
        if module_bits is None or module_bits == quantization.scheme.bits:
            continue
        modules = config_modules(spec, parameter)
        if module_bits == 16:
            ignore += modules
        else:
            scheme = replace(quantization.scheme, bits=module_bits)
            overrides += [(module, scheme) for module in modules]
    return replace(quantization, ignore=tuple(ignore), overrides=tuple(overrides))


def checkpoint_modules(parameter: Parameter) -> list[str]:
    """The checkpoint modules of a parameter, in order."""
    return [tensor.removesuffix(".weight") for tensor in parameter.source_names]


def config_modules(spec: ModelSpec, parameter: Parameter) -> list[str]:
    """The names of a parameter's modules for a `quantization_config`, in order."""
    return [name for module in checkpoint_modules(parameter) for name in module_names(spec, module)]


def ignored_modules(spec: ModelSpec, pattern: str | None, layers: range | None) -> list[str]:
    """The checkpoint modules that are not quantized.

    They are those that `pattern` matches, together with the modules that are fused with them, and
    those outside `layers`. Raises UsageError for an invalid pattern and for one without a match.
    """
    try:
        expression = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise UsageError(
            f"--keep {pattern} is not a regular expression ({error})",
            todo="Escape special characters",
        ) from error
    linears = [parameter for parameter in parameters(spec) if parameter.is_linear]
    ignored: list[str] = []
    has_match = False
    for parameter in linears:
        modules = checkpoint_modules(parameter)
        matches = expression is not None and any(expression.search(module) for module in modules)
        has_match = has_match or matches
        outside = layers is not None and parameter.layers[0] not in layers
        if matches or outside:
            ignored += config_modules(spec, parameter)
    if expression is not None and not has_match:
        example = checkpoint_modules(linears[0])[0]
        raise UsageError(
            f"--keep {pattern} finds no linear layer", f"They have names such as {example}"
        )
    return ignored


def scale_dtype(format_name: str, scheme: Scheme) -> torch.dtype:
    """The dtype that a format stores a scheme's scales in."""
    columns = 128 if scheme.group_size == -1 else scheme.group_size
    for packed in FORMATS[format_name].tensors(scheme, 128, columns):
        if packed.suffix in ("scales", "weight_scale"):
            return DTYPES[packed.dtype]
    raise AssertionError(f"format {format_name} stores no scales")


def resolve_group_size(linears: list[Parameter], group_size: int | None) -> int:
    """`group_size`, or without one the largest of GROUP_SIZES that divides every layer, or -1.

    Raises InputError, with the layer and the sizes that fit, for a size that does not divide.
    """
    common = math.gcd(*(parameter.shape[1] for parameter in linears))
    if group_size is None:
        return next((size for size in GROUP_SIZES if common % size == 0), -1)
    if group_size == -1:
        return group_size
    for parameter in linears:
        in_features = parameter.shape[1]
        if group_size < 1 or in_features % group_size:
            sizes = [size for size in range(8, common + 1, 8) if common % size == 0]
            raise InputError(
                f"group size {group_size} does not divide {parameter.module}, "
                f"which has {in_features} in_features",
                f"The sizes that divide every layer: {', '.join(map(str, [*sizes, -1]))}",
            )
    return group_size


def _router_modules(spec: ModelSpec) -> list[str]:
    """The modules of the layers' matrices that are never quantized: the routers of experts."""
    modules: list[str] = []
    for parameter in parameters(spec):
        is_matrix = len(parameter.shape) == 2
        if is_matrix and not parameter.is_linear and parameter.name.startswith("layers."):
            modules += config_modules(spec, parameter)
    return modules


def _known_format(name: str) -> Format:
    """`name` as the literal type."""
    for known in ("gptq", "awq", "compressed-tensors"):
        if name == known:
            return known
    raise AssertionError(name)


def _is_grouped(method: Method) -> bool:
    return method.grouped


def _methods_where(condition: Callable[[Method], bool]) -> str:
    return ", ".join(name for name, method in METHODS.items() if condition(method))
