"""The quantization methods as data, and what the chosen method and options mean for one model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.modelopt_format import ALGORITHMS, MODELOPT_KV_SCALES
from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import KV_SCALES, Format, QuantizationConfig, Scheme
from llmkit.common.errors import InputError, UsageError
from llmkit.model.checkpoint_tensors import with_pre_quant_scales
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.model.wrappers import head_modules, module_names
from llmkit.quant.algorithm import Algorithm, AutoRound, NormTuning
from llmkit.quant.awq import AwqSmoother, ClippingQuantizer
from llmkit.quant.gptq import GptqQuantizer
from llmkit.quant.grid import FULL_SEARCH, RangeSearch
from llmkit.quant.input_stats import StatKind
from llmkit.quant.number_formats import NUMBER_FORMATS, NumberFormat
from llmkit.quant.quantize_options import Effort
from llmkit.quant.round_to_nearest import RtnQuantizer
from llmkit.quant.smoothquant import SmoothQuant

# The group sizes that every engine has kernels for. The largest gives the smallest checkpoint.
GROUP_SIZES = (128, 64, 32)
FAST_AWQ_GRID = 5  # ratios that AWQ tries with --effort fast
DAMP = 0.01  # GPTQ's damping, as a share of the Hessian's mean diagonal
# Where learned rounding goes on from GPTQ's values. It fits the calibration text more closely, so
# GPTQ leaves more room.
DAMP_BEFORE_LEARNING = 0.1
HIGH_EFFORT = AutoRound(steps=20, tokens=4096)  # learned rounding with --effort high
# The share of the earlier layers' errors that a weight corrects (see `asymmetric_target`).
ASYMMETRY = 0.25


@dataclass(frozen=True)
class Method:
    """One value of --method: how values are chosen."""

    # The values of --scheme that it can choose values for; the first is the default. Empty: a cast,
    # nothing is quantized.
    schemes: tuple[str, ...] = ()
    format: Format = "compressed-tensors"  # the default, where it can store the scheme
    calibrated: bool = False
    grouped: bool = True  # False: integers have one scale per row, whatever the scheme allows
    symmetric: bool = True  # the default where weights may have zero points
    dtype: torch.dtype | None = None  # of a cast
    cast_bits: int = 16

    @property
    def bits(self) -> tuple[int, ...]:
        """The values of --bits that go with it."""
        if not self.schemes:
            return (self.cast_bits,)
        schemes = [NUMBER_FORMATS[name].scheme for name in self.schemes]
        return tuple(sorted({scheme.bits for scheme in schemes if not scheme.preset}))


_ALL_SCHEMES = ("w4a16", *(name for name in NUMBER_FORMATS if name != "w4a16"))
METHODS: dict[str, Method] = {
    "bf16": Method(dtype=torch.bfloat16),
    "fp16": Method(dtype=torch.float16),
    # Short names of rtn.
    "int8": Method(("w8a16", "w8a8"), grouped=False),
    "fp8": Method(("fp8", "fp8-static", "fp8-block")),
    # GPTQ, where values have few bits with the correction of the earlier layers' errors.
    "auto": Method(_ALL_SCHEMES, calibrated=True),
    "gptq": Method(_ALL_SCHEMES, "gptq", calibrated=True),
    "awq": Method(("w4a16", "w4afp8"), "awq", calibrated=True, symmetric=False),
    "rtn": Method(_ALL_SCHEMES),
}
# Whether weights are symmetric in the formats that support only one kind (see docs/formats.md).
FORMAT_SYMMETRY: dict[str, bool] = {"gptq": True, "awq": False, "modelopt": True}
# The formats that can store schemes of different layers, and an integer output projection beside
# other schemes.
MIXED_FORMAT = "compressed-tensors"
# The 8-bit KV caches whose scales a format holds.
_KV_CACHES = {"compressed-tensors": ("fp8", "int8"), "modelopt": ("fp8",)}
GGUF_SCHEME = "q4_k_m"  # the default of --format gguf
CAST_FORMATS: tuple[Format, ...] = ("gguf",)  # that tensors in 16 bits may be written in


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
    scheme_name: str | None = None  # --scheme
    damp: float | None = None  # --damp; None: the default

    @property
    def method_row(self) -> Method:
        """The method's row of METHODS."""
        return METHODS[self.method]

    @property
    def chosen_scheme(self) -> str | None:
        """The name of the scheme in NUMBER_FORMATS; None for a cast."""
        schemes = self.method_row.schemes
        if not schemes:
            return None
        name = self.scheme_name or schemes[0]
        if self.scheme_name is None and self.format == "gguf" and GGUF_SCHEME in schemes:
            return GGUF_SCHEME
        if self.scheme_name is None and f"w{self.bits}a16" in schemes:
            name = f"w{self.bits}a16"
        if name == "w8a16" and self.activations:
            return "w8a8"
        if name == "fp8" and self.static_activations:
            return "fp8-static"
        return name

    @property
    def number_format(self) -> NumberFormat | None:
        """The row of `chosen_scheme`; None for a cast."""
        return None if self.chosen_scheme is None else NUMBER_FORMATS[self.chosen_scheme]

    @property
    def grouped(self) -> bool:
        """Whether --group-size chooses the groups that share a scale."""
        number_format = self.number_format
        return (
            number_format is not None and number_format.has_group_option and self.method_row.grouped
        )

    @property
    def may_be_asymmetric(self) -> bool:
        """Whether weights may have zero points."""
        number_format = self.number_format
        return self.grouped and number_format is not None and number_format.may_be_asymmetric

    @property
    def chosen_format(self) -> str | None:
        """The format on disk; None for a cast.

        The default is the method's where it can store the scheme, otherwise the scheme's first, and
        compressed-tensors for mixed precision.
        """
        if self.format is not None:
            return self.format
        if self.mixed:
            return MIXED_FORMAT
        if self.number_format is None:
            return None
        preferred = self.method_row.format
        formats = self.number_format.formats
        return preferred if preferred in formats else formats[0]

    @property
    def chosen_bits(self) -> int:
        """The bits of a weight."""
        number_format = self.number_format
        return self.method_row.cast_bits if number_format is None else number_format.scheme.bits

    @property
    def calibrated(self) -> bool:
        """Whether the model runs on calibration text."""
        number_format = self.number_format
        if self.method_row.calibrated or self.kv:
            return True
        if number_format is None:
            return False
        if number_format.scheme.has_input_scale or self.smooths_inputs:
            return True
        return self.method in ("int8", "fp8") and self.effort in ("high", "max")

    @property
    def searches(self) -> bool:
        """Whether the ranges of groups are searched."""
        return self.effort != "fast" and (self.grouped or self._has_coarse_scales)

    @property
    def rounding_search(self) -> RangeSearch | None:
        """The search where values are rounded to nearest: only among scales with few values."""
        return FULL_SEARCH if self.searches and self._has_coarse_scales else None

    @property
    def _has_coarse_scales(self) -> bool:
        """Whether the scales of groups have few values, so that the nearest is not the best."""
        number_format = self.number_format
        return number_format is not None and number_format.scheme.scale_format != "float"

    @property
    def smooths_inputs(self) -> bool:
        """Whether SmoothQuant moves outliers of inputs into the weights."""
        return self.chosen_scheme == "w8a8" and self.method != "awq"

    def check(self) -> None:
        """Raises UsageError, naming the values that are supported, for conflicting options."""
        method = METHODS.get(self.method)
        if method is None:
            raise UsageError(
                f"--method {self.method} is not known", f"One of {', '.join(METHODS)} was expected"
            )
        self._check_scheme(method)
        self._check_grid(method)
        self._check_activations()
        self._check_format()
        self._check_symmetry()
        self._check_effort()
        if self.kv and self.chosen_format is not None:
            known = _KV_CACHES.get(self.chosen_format, ())
            if self.kv not in known:
                which = f"an {self.kv.upper()}" if known else "a"
                raise UsageError(
                    f"--format {self.chosen_format} has no place for the scales of {which} KV"
                    " cache",
                    todo="Use --format compressed-tensors",
                )
        if self.mixed:
            self._check_mixed()
        if self.lm_head is not None:
            self._check_lm_head(self.lm_head)

    @property
    def useful_efforts(self) -> tuple[Effort, ...]:
        """The values of --effort that are worth their time; others are refused."""
        calibrates_more = self.method in ("int8", "fp8") and self.chosen_format != "gguf"
        if self._may_learn_rounding or calibrates_more:
            return "fast", "normal", "high", "max"
        return "fast", "normal"

    def _check_effort(self) -> None:
        """More effort learns the rounding of calibrated methods; others would ignore it."""
        useful = self.useful_efforts
        if self.effort in useful:
            return
        expected = f"{', '.join(useful[:-1])} or {useful[-1]}"
        asked = f"--method {self.method}"
        todo = ""
        if self.method in ("bf16", "fp16", "rtn"):
            todo = "Choose a calibrated method, such as --method auto"
        elif self.chosen_format == "gguf":
            asked = "--format gguf"
        elif self.chosen_scheme is not None:
            asked += f" and --scheme {self.chosen_scheme}"
        raise UsageError(f"--effort {self.effort} does nothing with {asked}", expected, todo)

    def _check_mixed(self) -> None:
        if self.scheme_name is not None or self.bits is not None:
            option = "scheme" if self.scheme_name is not None else "bits"
            raise UsageError(
                f"--{option} is one scheme for all layers, and --target-kl and --target-bits choose"
                " one for each",
                todo=f"Leave out --{option}, and name the engine and the GPU: --for vllm@h100",
            )
        if self.chosen_format != MIXED_FORMAT or not self.may_be_asymmetric:
            raise UsageError(
                "--target-kl and --target-bits choose a scheme for each layer, "
                "which one setting for all cannot",
                f"They go with {_grouped_methods()} and --format compressed-tensors",
            )

    def _check_scheme(self, method: Method) -> None:
        name = self.scheme_name
        if name is None:
            return
        if name not in NUMBER_FORMATS:
            raise UsageError(
                f"--scheme {name} is not known", f"One of {', '.join(NUMBER_FORMATS)} was expected"
            )
        if name not in method.schemes:
            others = [other for other, row in METHODS.items() if name in row.schemes]
            raise UsageError(
                f"--method {self.method} and --scheme {name} do not go together",
                ", ".join(method.schemes) + " goes with the method"
                if method.schemes
                else "A cast was asked for, and no --scheme was expected",
                f"Use --method {' or '.join(others)}",
            )

    def _check_grid(self, method: Method) -> None:
        if self.bits is not None and self.bits not in method.bits:
            pairs = ", ".join(
                f"{name} {bits}" for name, row in METHODS.items() for bits in row.bits
            )
            raise UsageError(
                f"--method {self.method} and --bits {self.bits} do not go together",
                f"The pairs that do: {pairs}",
            )
        if self.bits is not None and self.bits != self.chosen_bits:
            raise UsageError(
                f"--scheme {self.scheme_name} has {self.chosen_bits} bits, and --bits is"
                f" {self.bits}",
                todo="Leave out --bits",
            )
        if self.group_size is not None and not self.grouped:
            of_scheme = self.scheme_name is not None and method.grouped
            asked = f"--scheme {self.scheme_name}" if of_scheme else f"--method {self.method}"
            found = self.number_format.scheme.group_size if self.number_format else -1
            has = "no groups" if found == -1 else f"groups of {found}"
            expected = f"Groups go with {_grouped_methods()}"
            if of_scheme:
                expected = f"--group-size goes with {', '.join(_GROUPED_SCHEMES)}"
            raise UsageError(f"{asked} has {has}, and --group-size is {self.group_size}", expected)

    def _check_format(self) -> None:
        if self.format is None:
            return
        number_format = self.number_format
        asked = f"--method {self.method}"
        if self.scheme_name is not None:
            asked = f"--scheme {self.scheme_name}"
        formats = number_format.formats if number_format else CAST_FORMATS
        if self.format not in formats:
            if self.format == "awq" and self.grouped:
                raise UsageError(
                    "--format awq holds 4 bits only"
                    if self.chosen_bits != 4
                    else f"--format awq has no place for inputs that are quantized ({asked})",
                    todo="Use --format compressed-tensors"
                    + (f" for {self.chosen_bits} bits" if self.chosen_bits != 4 else ""),
                )
            expected = ", ".join(formats)
            if number_format is None:
                expected += ", or safetensors only, and no --format"
            if self.format == "modelopt":
                expected += f"; modelopt has {', '.join(ALGORITHMS)} only"
            raise UsageError(
                f"{asked} and --format {self.format} do not go together", f"Expected {expected}"
            )

    def _check_symmetry(self) -> None:
        if self.symmetric is None:
            return
        if not self.may_be_asymmetric:
            asked = f"--method {self.method}"
            if self.scheme_name is not None:
                asked = f"--scheme {self.scheme_name}"
            raise UsageError(
                f"{asked} has a symmetric grid",
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
        number_format = self.number_format
        has_inputs = number_format is not None and number_format.scheme.inputs != "none"
        rounds_inputs = has_inputs and self.method in ("int8", "fp8", "rtn", "gptq", "auto")
        # With --target-kl and --target-bits, --activations limits the candidates.
        if self.activations and not self.mixed and not rounds_inputs:
            raise UsageError(
                f"--method {self.method} rounds no activations",
                "--activations goes with int8 (fp8 has it always)",
                "Choose a --scheme that has them",
            )
        if self.static_activations and self.chosen_scheme != "fp8-static":
            raise UsageError(
                f"--method {self.method} has no fixed activation scales"
                if self.scheme_name is None
                else f"--scheme {self.scheme_name} has no fixed activation scales",
                "--static goes with fp8",
            )

    def _check_lm_head(self, lm_head: int) -> None:
        if self.chosen_format is None:
            raise UsageError(
                f"--lm-head {lm_head}: --method {self.method} is a cast", todo="Leave out --lm-head"
            )
        if self.chosen_format not in ("gptq", MIXED_FORMAT):
            raise UsageError(
                f"--lm-head {lm_head}: the {self.chosen_format} format has no place for a quantized"
                " one",
                todo="Leave out --lm-head",
            )
        supported: tuple[int, ...] = (4, 8)
        if self.chosen_format == "gptq":
            supported = (self.chosen_bits,)
        elif not self.grouped:
            supported = (8,)
        if lm_head not in supported:
            raise UsageError(
                f"--lm-head is {lm_head}",
                f"{' or '.join(map(str, supported))} bits go with the other options",
            )

    def scheme(self, group_size: int) -> Scheme | None:
        """How linear layers are stored; None for a cast.

        group_size: of schemes that leave it open.
        """
        number_format = self.number_format
        if number_format is None:
            return None
        scheme = number_format.scheme_in(self.chosen_format)
        if not self.grouped:
            return scheme
        symmetric = True
        if self.may_be_asymmetric:
            symmetric = self.method_row.symmetric if self.symmetric is None else self.symmetric
            symmetric = FORMAT_SYMMETRY.get(self.chosen_format or "", symmetric)
        return replace(scheme, group_size=group_size, symmetric=symmetric)

    def lm_head_scheme(self, scheme: Scheme | None) -> Scheme | None:
        """How the output projection is stored when the other linears have `scheme`.

        None when it is not quantized. It has integers, in the groups that the others have if theirs
        are integers too.
        """
        if scheme is None or self.lm_head is None:
            return None
        group_size = scheme.group_size if scheme.kind == "int" else -1
        return Scheme(self.lm_head, group_size, scheme.symmetric)

    @property
    def _may_learn_rounding(self) -> bool:
        """Whether more effort learns the rounding: that of integers in groups and of FP4."""
        number_format = self.number_format
        if number_format is None or not self.method_row.calibrated or self.chosen_format == "gguf":
            return False
        scheme = number_format.scheme
        return scheme.is_fp4 or (scheme.kind == "int" and self.grouped)

    @property
    def learned_rounding(self) -> AutoRound | None:
        """How rounding is learned; None where it is not."""
        if self.effort not in ("high", "max") or not self._may_learn_rounding:
            return None
        return HIGH_EFFORT if self.effort == "high" else AutoRound()

    @property
    def dampening_frac(self) -> float:
        """GPTQ's damping, as a share of the Hessian's mean diagonal."""
        if self.damp is not None:
            return self.damp
        return DAMP if self.learned_rounding is None else DAMP_BEFORE_LEARNING

    def algorithm(self, *, is_native: bool = True) -> Algorithm:
        """How a calibrated run quantizes the layers.

        is_native: whether the model's family is native, without which nothing can be smoothed.
        """
        learned = self.learned_rounding
        norm_tuning = None if learned is None else NormTuning()
        is_fast = self.effort == "fast"
        gptq = GptqQuantizer(self.dampening_frac, FULL_SEARCH if self.searches else None)
        smoother = SmoothQuant() if self.smooths_inputs else None
        scheme = None if self.number_format is None else self.number_format.scheme
        is_fp4 = scheme is not None and scheme.is_fp4
        if self.method == "auto" and is_native and not is_fast:
            return Algorithm(gptq.asymmetric(ASYMMETRY), smoother, learned, norm_tuning)
        if self.method == "awq" and is_fast:
            return Algorithm(RtnQuantizer(), AwqSmoother(FAST_AWQ_GRID))
        if self.method == "awq" and learned is None:
            return Algorithm(ClippingQuantizer(), AwqSmoother())
        if self.method == "awq" or (self.method == "gptq" and learned is not None and not is_fp4):
            return Algorithm(gptq, AwqSmoother(), learned, norm_tuning)
        if self.method in ("gptq", "auto"):
            return Algorithm(gptq, smoother, learned, norm_tuning)
        if self.method in ("int8", "fp8") and self.effort in ("high", "max"):
            return Algorithm(gptq, smoother)
        has_input_scale = scheme is not None and scheme.has_input_scale
        required_stats: frozenset[StatKind] = frozenset({"magnitudes"} if has_input_scale else ())
        return Algorithm(RtnQuantizer(self.rounding_search, required_stats), smoother)


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
    if format_name is None or (format_name == "gguf" and options.number_format is None):
        return None
    linears = [
        parameter
        for parameter in parameters(spec)
        if parameter.is_linear and not set(checkpoint_modules(parameter)) <= set(ignore)
    ]
    group_size = -1
    if options.grouped:
        group_size = resolve_group_size(linears, options.group_size)
    scheme = options.scheme(group_size)
    if scheme is not None and options.chosen_scheme is not None and not scheme.preset:
        check_groups(linears, options.chosen_scheme, scheme)
    lm_head_scheme = options.lm_head_scheme(scheme)
    ignored: list[str] = []
    head_names = head_modules(spec)
    if lm_head_scheme is None:
        ignored += head_names
    if format_name in ("compressed-tensors", "fp8", "modelopt") and scheme is not None:
        # Readers of these formats take every linear layer as quantized that is not under `ignore`.
        ignored += _router_modules(spec)
    ignored += ignore
    overrides: tuple[tuple[str, Scheme], ...] = ()
    if lm_head_scheme is not None and format_name != "gptq":
        overrides = tuple((name, lm_head_scheme) for name in head_names)
    quantization = QuantizationConfig(
        _known_format(format_name),
        scheme,
        tuple(ignored),
        overrides,
        kv=options.kv,
        kv_scales=MODELOPT_KV_SCALES if format_name == "modelopt" else KV_SCALES,
        method=options.method,
    )
    return with_pre_quant_scales(quantization, spec)


def with_mixed_schemes(
    quantization: QuantizationConfig, spec: ModelSpec, schemes: Mapping[str, Scheme | None]
) -> QuantizationConfig:
    """`quantization` with other schemes for some linears, by runtime module; None: not quantized.

    The scheme of most linears becomes that of the whole config, which keeps it short.
    """
    counts = Counter(scheme for scheme in schemes.values() if scheme is not None)
    common = counts.most_common(1)[0][0] if counts else quantization.scheme
    ignore = list(quantization.ignore)
    overrides = list(quantization.overrides)
    for parameter in parameters(spec):
        if not parameter.is_linear or parameter.module not in schemes:
            continue
        scheme = schemes[parameter.module]
        modules = config_modules(spec, parameter)
        if scheme is None:
            ignore += modules
        elif scheme != common:
            overrides += [(module, scheme) for module in modules]
    return replace(quantization, scheme=common, ignore=tuple(ignore), overrides=tuple(overrides))


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
    """The dtype of a scheme's scales in a `QuantizedWeight` that a format stores exactly."""
    if scheme.scale_format != "float" or format_name == "gguf":
        return torch.float32
    columns = 128 if scheme.group_size == -1 else scheme.group_size
    for packed in FORMATS[format_name].tensors(scheme, 128, columns):
        if packed.suffix in ("scales", "weight_scale", "weight_scale_inv"):
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


def check_groups(linears: Sequence[Parameter], name: str, scheme: Scheme) -> None:
    """Raises InputError, with the layer, for groups of a fixed size that do not divide every layer.

    Scales of blocks of rows and columns may belong to smaller blocks at the end.
    """
    size = scheme.group_size
    if size == -1 or scheme.block_rows != 1:
        return
    for parameter in linears:
        in_features = parameter.shape[1]
        if in_features % size:
            raise InputError(
                f"--scheme {name} has groups of {size}, which do not divide {parameter.module} with"
                f" {in_features} in_features",
                todo=f"Leave such layers out (--keep {parameter.name.split('.')[-2]}), or choose"
                " another --scheme",
            )


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
    for number_format in NUMBER_FORMATS.values():
        for known in number_format.formats:
            if name == known:
                return known
    raise AssertionError(name)


_GROUPED_SCHEMES = [name for name, row in NUMBER_FORMATS.items() if row.has_group_option]


def _grouped_methods() -> str:
    """The methods whose default scheme has groups of a size to choose."""
    return ", ".join(
        name
        for name, method in METHODS.items()
        if method.grouped and method.schemes and method.schemes[0] in _GROUPED_SCHEMES
    )
