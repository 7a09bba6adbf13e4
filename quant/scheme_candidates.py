"""Mixed precision: which schemes each linear may have, and how many bytes each of them takes.

Linears that an engine computes together, such as q, k and v, are one row of the parameter table.
All linears of a layer's experts are one unit, too: engines have one kernel for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import QuantizationConfig, Scheme
from llmkit.checkpoint.safetensors_header import byte_count
from llmkit.common.errors import UsageError
from llmkit.model.checkpoint_tensors import scheme_of
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.spec import ModelSpec
from llmkit.quant.algorithm import QuantTarget
from llmkit.quant.methods import GROUP_SIZES, MIXED_FORMAT, MethodOptions, scale_dtype
from llmkit.quant.number_formats import NUMBER_FORMATS

UNQUANTIZED = "16-bit"  # the name of the choice that leaves a linear as it is
UNQUANTIZED_BITS = 16
SMALL_GROUPS = 32  # 4-bit integers are also tried in groups of this size, as "w4a16-g32"
# Kernels of GPUs multiply tiles: the sizes of a weight are multiples of this.
TILE = 16
W4AFP8_GROUP = 128  # the only group size of the kernels that multiply INT4 by FP8


@dataclass(frozen=True)
class LinearUnit:
    """Linears that get the same scheme."""

    name: str
    parameters: tuple[Parameter, ...]
    # The schemes that fit the linears, by name; without UNQUANTIZED.
    schemes: Mapping[str, Scheme]

    @property
    def layer(self) -> int:
        """The decoder layer of the linears."""
        return self.parameters[0].layers[0]

    @property
    def num_weights(self) -> int:
        """The weights of all linears."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    @property
    def modules(self) -> tuple[str, ...]:
        """The runtime modules."""
        return tuple(parameter.module for parameter in self.parameters)

    def stored_bits(self, choice: str) -> int:
        """The bits of all tensors that a checkpoint stores for the linears, with the scales."""
        if choice == UNQUANTIZED:
            return UNQUANTIZED_BITS * self.num_weights
        packing = FORMATS[MIXED_FORMAT]
        scheme = self.schemes[choice]
        num_bytes = 0
        for parameter in self.parameters:
            for name in parameter.source_names:
                rows = sum(source.shape[0] for source in parameter.sources_in(name))
                for packed in packing.tensors(scheme, rows, parameter.shape[1]):
                    num_bytes += byte_count(packed.dtype, packed.shape)
        return 8 * num_bytes

    def targets(self, choice: str) -> list[QuantTarget]:
        """The linears, each to be quantized to a choice."""
        scheme = self.schemes[choice]
        prefix = f"layers.{self.layer}."
        dtype = scale_dtype(MIXED_FORMAT, scheme)
        return [
            QuantTarget(row, row.module.removeprefix(prefix), scheme, dtype)
            for row in self.parameters
        ]


def linear_units(
    spec: ModelSpec,
    quantization: QuantizationConfig,
    names: Sequence[str],
    options: MethodOptions,
) -> list[LinearUnit]:
    """The units of all linears that `quantization` quantizes, in the order of the layers.

    names: the candidates, of NUMBER_FORMATS.
    """
    members: dict[str, list[Parameter]] = {}
    for parameter in parameters(spec):
        if not parameter.is_linear:
            continue
        if scheme_of(parameter, parameter.source_names[0], quantization) is None:
            continue
        name = re.sub(r"\.experts\.\d+\..*", ".experts", parameter.module)
        members.setdefault(name, []).append(parameter)
    units = []
    for name, rows in members.items():
        schemes: dict[str, Scheme] = {}
        for candidate in names:
            schemes |= _schemes(candidate, rows, options)
        units.append(LinearUnit(name, tuple(rows), _without_dominated(schemes)))
    return units


def check_target_bits(units: Sequence[LinearUnit], target_bits: float) -> None:
    """Raises UsageError when no choice has so few bits."""
    num_weights = sum(unit.num_weights for unit in units)
    smallest = sum(
        min(unit.stored_bits(choice) for choice in (*unit.schemes, UNQUANTIZED)) for unit in units
    )
    if units and target_bits * num_weights < smallest:
        least = math.ceil(100 * smallest / num_weights) / 100
        raise UsageError(
            f"--target-bits is {target_bits:g}, and the smallest schemes have {least:g} bits per"
            " weight with their scales",
            f"{least:g} to 16 bits were expected",
        )


def _schemes(
    candidate: str, rows: Sequence[Parameter], options: MethodOptions
) -> dict[str, Scheme]:
    """The schemes of a candidate that all of `rows` can have, by name."""
    scheme = NUMBER_FORMATS[candidate].scheme_in(MIXED_FORMAT)
    columns = math.gcd(*(row.shape[1] for row in rows))
    heights = [
        sum(source.shape[0] for source in row.sources_in(name))
        for row in rows
        for name in row.source_names
    ]
    if scheme.input_type is not None and math.gcd(columns, *(row.shape[0] for row in rows)) % TILE:
        return {}
    if candidate == "w4afp8":
        fits = columns % W4AFP8_GROUP == 0 and math.gcd(*heights) % W4AFP8_GROUP == 0
        return {candidate: replace(scheme, group_size=W4AFP8_GROUP)} if fits else {}
    if not NUMBER_FORMATS[candidate].has_group_option:
        # Linears that an engine concatenates must not share blocks of rows.
        has_blocks = math.gcd(*heights) % max(1, scheme.block_rows) == 0
        fits = scheme.group_size == -1 or columns % scheme.group_size == 0
        return {candidate: scheme} if has_blocks and fits else {}
    if NUMBER_FORMATS[candidate].may_be_asymmetric and options.may_be_asymmetric:
        symmetric = options.method_row.symmetric if options.symmetric is None else options.symmetric
        scheme = replace(scheme, symmetric=symmetric)
    if options.group_size is not None:
        return {candidate: replace(scheme, group_size=options.group_size)}
    group_size = next((size for size in GROUP_SIZES if columns % size == 0), -1)
    found = {candidate: replace(scheme, group_size=group_size)}
    if scheme.bits == 4 and group_size > SMALL_GROUPS:
        found[f"{candidate}-g{SMALL_GROUPS}"] = replace(scheme, group_size=SMALL_GROUPS)
    return found


def _without_dominated(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes, without those whose weights another one has without rounding inputs."""
    weights_only = [
        replace(scheme, inputs="none", input_type=None)
        for scheme in schemes.values()
        if scheme.inputs == "none"
    ]
    return {
        name: scheme
        for name, scheme in schemes.items()
        if scheme.inputs == "none"
        or replace(scheme, inputs="none", input_type=None) not in weights_only
    }
