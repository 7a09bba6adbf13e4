"""The methods as data, and what a choice of options means for one model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.formats import FORMATS
from llmkit.checkpoint.quantized import Format, QuantizationConfig, Scheme
from llmkit.model.layout import Parameter, parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.algorithm import Algorithm, Learn
from llmkit.quant.awq import AwqScales, Clipped
from llmkit.quant.gptq import Gptq
from llmkit.quant.grid import FULL_SEARCH
from llmkit.quant.nearest import Nearest
from llmkit.quant.smoothquant import SmoothQuant

GROUP_SIZES = (128, 64, 32)  # what every engine has kernels for, the best compression first
ROUTED_TENSORS = "compressed-tensors"  # its readers take every linear layer for quantized that is not listed


@dataclass(frozen=True)
class Method:
    """How codes are chosen. The first of `bits` and of `formats` is the default."""

    bits: tuple[int, ...]
    formats: tuple[Format, ...] = ()  # none: a cast, nothing is quantized
    calibrated: bool = False
    grouped: bool = False  # one scale per group of columns; otherwise one per row
    symmetric: bool = True  # where the format leaves a choice
    kind: Literal["int", "float"] = "int"
    dtype: torch.dtype | None = None  # of a cast


METHODS: dict[str, Method] = {
    "bf16": Method((16,), dtype=torch.bfloat16),
    "fp16": Method((16,), dtype=torch.float16),
    "int8": Method((8,), ("compressed-tensors",)),
    "fp8": Method((8,), ("compressed-tensors",), kind="float"),
    "gptq": Method((4, 8), ("gptq", "awq", "compressed-tensors"), calibrated=True, grouped=True),
    "awq": Method((4,), ("awq", "gptq", "compressed-tensors"), calibrated=True, grouped=True, symmetric=False),
    "rtn": Method((4, 8), ("compressed-tensors", "gptq", "awq"), grouped=True),
}
FORCED_SYMMETRY: dict[str, bool] = {"gptq": True, "awq": False}  # what the layout can hold (FORMATS: v1, GEMM)
Effort = Literal["fast", "normal", "max"]


@dataclass(frozen=True)
class Choice:
    """What the options say about how weights are stored, before a model is looked at. None: the default."""

    method: str
    bits: int | None = None
    group_size: int | None = None
    format: str | None = None
    symmetric: bool | None = None
    activations: bool = False  # int8: round the inputs too
    static_activations: bool = False  # fp8: with one fixed scale
    kv: Literal["", "fp8", "int8"] = ""
    mixed: bool = False  # several numbers of bits in one checkpoint
    effort: Effort = "normal"
    lm_head: int | None = None  # bits of the output projection; None: it stays as it is

    @property
    def entry(self) -> Method:
        """The method's row of METHODS."""
        return METHODS[self.method]

    def check(self) -> None:
        """Raises UsageError when the options do not go together, telling those that do."""
        method, name = METHODS.get(self.method), self.method
        if method is None:
            raise UsageError(f"--method {name} is not known", f"One of {', '.join(METHODS)} was expected")
        if self.bits is not None and self.bits not in method.bits:
            pairs = ", ".join(f"{other} {bits}" for other, entry in METHODS.items() for bits in entry.bits)
            raise UsageError(
                f"--method {name} and --bits {self.bits} do not go together", f"The pairs that do: {pairs}"
            )
        if self.group_size is not None and not method.grouped:
            raise UsageError(
                f"--method {name} has no groups, and --group-size is {self.group_size}",
                f"Groups go with {_those(lambda entry: entry.grouped)}",
            )
        if self.format is not None and self.format not in method.formats:
            formats = ", ".join(method.formats) or "safetensors only, and no --format"
            raise UsageError(f"--method {name} and --format {self.format} do not go together", f"Expected {formats}")
        form = self.chosen_format
        if form == "awq" and (self.bits or method.bits[0]) != 4:
            raise UsageError("--format awq holds 4 bits only", todo="Use --format compressed-tensors for 8 bits")
        if self.symmetric is not None:
            if not method.grouped:
                raise UsageError(f"--method {name} has a symmetric grid", "No --symmetric or --asymmetric was expected")
            if self.symmetric != FORCED_SYMMETRY.get(form or "", self.symmetric):
                wanted, other = ("--symmetric", "--asymmetric") if self.symmetric else ("--asymmetric", "--symmetric")
                raise UsageError(
                    f"--format {form} cannot hold what {wanted} asks for",
                    f"{other} goes with it",
                    "Use --format compressed-tensors, which holds both",
                )
        if self.activations and name not in ("int8", "fp8"):
            raise UsageError(
                f"--method {name} rounds no activations", "--activations goes with int8 (fp8 has it always)"
            )
        if self.static_activations and name != "fp8":
            raise UsageError(f"--method {name} has no fixed activation scales", "--static goes with fp8")
        if self.kv and form not in (None, "compressed-tensors"):
            raise UsageError(
                f"--format {form} has no place for the scales of a KV cache", todo="Use --format compressed-tensors"
            )
        if self.mixed and (form != "compressed-tensors" or not method.grouped):
            raise UsageError(
                "--target-kl and --target-bits mix layers of 4, 8 and 16 bits, which one setting for all cannot",
                f"They go with {_those(lambda entry: entry.grouped)} and --format compressed-tensors",
            )

        if self.lm_head is not None:
            self._check_head(form)

    def _check_head(self, form: str | None) -> None:
        if form in (None, "awq"):
            what = "the awq format has no place for a quantized one" if form else f"--method {self.method} is a cast"
            raise UsageError(f"--lm-head {self.lm_head}: {what}", todo="Leave out --lm-head")
        bits = self.bits or self.entry.bits[0]
        allowed = (bits,) if form == "gptq" or not self.entry.grouped else (4, 8)
        if self.lm_head not in allowed:
            raise UsageError(
                f"--lm-head is {self.lm_head}", f"{' or '.join(map(str, allowed))} bits go with the other options"
            )

    @property
    def chosen_format(self) -> str | None:
        """The format, by default the method's first (compressed-tensors for mixed precision); None for a cast."""
        if self.mixed and self.format is None:
            return "compressed-tensors"
        return self.format or (self.entry.formats[0] if self.entry.formats else None)

    def head_scheme(self, scheme: Scheme | None) -> Scheme | None:
        """How the output projection is stored when the other linears are stored by `scheme`; None: as it is."""
        if scheme is None or self.lm_head is None:
            return None
        return replace(scheme, bits=self.lm_head, kind="int", inputs="none")

    def scheme(self, group_size: int) -> Scheme | None:
        """How linear layers are stored; None for a cast."""
        method, form = self.entry, self.chosen_format
        if not method.formats:
            return None
        symmetric = FORCED_SYMMETRY.get(form or "", method.symmetric if self.symmetric is None else self.symmetric)
        inputs: Literal["none", "token", "tensor"] = "none"
        if method.kind == "float" or self.activations:
            inputs = "tensor" if self.static_activations else "token"
        size = group_size if method.grouped else -1
        return Scheme(self.bits or method.bits[0], size, symmetric or not method.grouped, method.kind, inputs)

    @property
    def calibrated(self) -> bool:
        """Whether the model has to be run on calibration text."""
        quantized = bool(self.entry.formats) and self.method != "rtn"
        return bool(
            self.entry.calibrated
            or (self.activations and self.method == "int8")
            or self.static_activations
            or self.kv
            or (quantized and self.effort == "max")
        )

    def algorithm(self, damp: float) -> Algorithm:
        """How the layers of a calibrated run are quantized."""
        best, fast = self.effort == "max", self.effort == "fast"
        gptq = Gptq(damp, FULL_SEARCH if self.entry.grouped and not fast else None)
        if self.method == "gptq":
            return Algorithm(gptq, AwqScales(), Learn()) if best else Algorithm(gptq)
        if self.method == "awq":
            if best:
                return Algorithm(gptq, AwqScales(), Learn())
            return Algorithm(Nearest(), AwqScales(5)) if fast else Algorithm(Clipped(), AwqScales())
        nearest = Nearest(needs=frozenset({"magnitudes"})) if self.static_activations else Nearest()
        coder = gptq if best and self.method in ("int8", "fp8") else nearest
        return Algorithm(coder, SmoothQuant() if self.method == "int8" and self.activations else None)


def quantization_of(spec: ModelSpec, choice: Choice, keep: Sequence[str] = ()) -> QuantizationConfig | None:
    """How the linear layers of `spec` are stored; None when nothing is quantized, not even the KV cache.

    keep: checkpoint modules that are left as they are. Raises InputError for a group size that does not divide,
    naming the layer and the sizes that do.
    """
    form = choice.chosen_format or ("compressed-tensors" if choice.kv else None)
    if form is None:
        return None
    rows = parameters(spec)
    size = -1
    if choice.entry.grouped:
        linears = [row for row in rows if row.linear and not modules_of(row) <= set(keep)]
        size = group_size_of(linears, choice.group_size)
    others = [row for row in rows if len(row.shape) == 2 and not row.linear and row.name.startswith("layers.")]
    routers = [tensor.removesuffix(".weight") for row in others for tensor in row.tensors]
    scheme = choice.scheme(size)
    head = choice.head_scheme(scheme)
    kept_head = ("lm_head",) if head is None else ()
    ignore = (*kept_head, *(routers if form == ROUTED_TENSORS and scheme is not None else ()), *keep)
    overrides = (("lm_head", head),) if head is not None and form != "gptq" else ()
    return QuantizationConfig(_format(form), scheme, ignore, overrides, kv=choice.kv, method=choice.method)


def mixed(quantization: QuantizationConfig, spec: ModelSpec, bits: Mapping[str, int]) -> QuantizationConfig:
    """`quantization` with other bits for some linears, by runtime module; 16 leaves one as it is."""
    assert quantization.scheme is not None
    ignore, overrides = list(quantization.ignore), list(quantization.overrides)
    for row in parameters(spec):
        if not row.linear or (chosen := bits.get(row.module)) is None or chosen == quantization.scheme.bits:
            continue
        for tensor in row.tensors:
            module = tensor.removesuffix(".weight")
            if chosen == 16:
                ignore.append(module)
            else:
                overrides.append((module, replace(quantization.scheme, bits=chosen)))
    return replace(quantization, ignore=tuple(ignore), overrides=tuple(overrides))


def modules_of(row: Parameter) -> set[str]:
    """The checkpoint modules of a parameter."""
    return {tensor.removesuffix(".weight") for tensor in row.tensors}


def kept_modules(spec: ModelSpec, pattern: str | None, layers: range | None) -> list[str]:
    """Checkpoint modules to leave unquantized: those that `pattern` finds, with what is run together with them, and
    everything outside `layers`. Raises UsageError for a pattern that is none or finds nothing."""
    try:
        expression = re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise UsageError(
            f"--keep {pattern} is not a regular expression ({error})", todo="Escape special characters"
        ) from error
    kept, found = [], False
    for row in parameters(spec):
        if not row.linear:
            continue
        modules = [tensor.removesuffix(".weight") for tensor in row.tensors]
        matches = expression is not None and any(expression.search(module) for module in modules)
        found |= matches
        if matches or (layers is not None and row.stages[0] not in layers):
            kept += modules
    if expression is not None and not found:
        some = next(row.tensors[0].removesuffix(".weight") for row in parameters(spec) if row.linear)
        raise UsageError(f"--keep {pattern} finds no linear layer", f"They have names such as {some}")
    return kept


def scale_dtype(format_name: str, scheme: Scheme) -> torch.dtype:
    """The dtype that a format stores a scheme's scales in."""
    tensors = FORMATS[format_name].tensors(scheme, 128, 128 if scheme.group_size == -1 else scheme.group_size)
    return next(DTYPES[packed.dtype] for packed in tensors if packed.suffix in ("scales", "weight_scale"))


def group_size_of(linears: list[Parameter], wanted: int | None) -> int:
    """`wanted`, or the largest of GROUP_SIZES that divides every layer, or -1 when none does.

    Raises InputError for a size that does not divide, naming the layer and the sizes that do.
    """
    common = math.gcd(*(row.shape[1] for row in linears))
    if wanted is None:
        return next((size for size in GROUP_SIZES if common % size == 0), -1)
    if wanted == -1:
        return wanted
    sizes = [size for size in range(8, common + 1, 8) if common % size == 0]
    for row in linears:
        if wanted < 1 or row.shape[1] % wanted:
            raise InputError(
                f"group size {wanted} does not divide {row.module}, which has {row.shape[1]} in_features",
                f"The sizes that divide every layer: {', '.join(map(str, [*sizes, -1]))}",
            )
    return wanted


def _format(name: str) -> Format:
    for known in ("gptq", "awq", "compressed-tensors"):
        if name == known:
            return known
    raise AssertionError(name)


def _those(wanted: object) -> str:
    assert callable(wanted)
    return ", ".join(name for name, entry in METHODS.items() if wanted(entry))
