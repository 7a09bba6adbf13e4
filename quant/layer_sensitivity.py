"""Measures how much KL divergence each scheme costs at each linear, for mixed precision.

Each linear is quantized alone, as it will be at run time, to one scheme, and the divergence of the
model's output is measured. All these variants of the model run through the layers together, so the
model is read once, or a few times where the hidden states of all variants do not fit in memory.

Within a linear, the KL is about proportional to the squared error of its output. That error is
known for every scheme without running the layers that follow, so the KL of the other schemes is
computed from it. Schemes that cannot be worth their bits are left out.

Legend: T tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight, Scheme
from llmkit.common.progress import Progress
from llmkit.model.decoder import DecoderLayer
from llmkit.quant.algorithm import QuantizeJob, Quantizer
from llmkit.quant.calibrate_layer import collect_input_stats, input_quant, sublayers
from llmkit.quant.input_stats import InputStats, StatKind, sum_of_squares
from llmkit.quant.layer_stream import LayerStream, MicroBatch
from llmkit.quant.memory_estimate import SENSITIVITY_TOKENS, VARIANT_BYTES
from llmkit.quant.quantize_linear import quantize_linear
from llmkit.quant.scheme_candidates import UNQUANTIZED, LinearUnit

MAX_WINDOW_TOKENS = 128
# A scheme is a choice if its error is at most this much above the line through the errors of better
# choices of fewer and of more bits.
SLACK = 1.25
NAME_UNIFORM = ""  # the variants that quantize all linears, among the names of units

_Variant = tuple[str, str]  # the name of a unit, or NAME_UNIFORM, and that of a choice
_Weights = dict[str, QuantizedWeight]  # of linears, by name


@dataclass(frozen=True)
class SchemeCost:
    """What one choice costs at a unit."""

    stored_bits: int  # of all linears, with scales
    kl: float  # nats per token
    scheme: Scheme | None  # None: not quantized


@dataclass(frozen=True)
class LayerSensitivity:
    """What each choice costs at a unit of linears that get the same scheme."""

    name: str
    modules: tuple[str, ...]  # runtime modules
    num_weights: int
    # By the name of the choice, of those that may be worth their bits; UNQUANTIZED has a KL of 0.
    costs: Mapping[str, SchemeCost]


@dataclass(frozen=True)
class UniformCost:
    """What one scheme costs at all linears. Linears that cannot have it stay as they are."""

    name: str
    stored_bits: int
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """The result of `measure_sensitivity`."""

    layers: list[LayerSensitivity]
    uniform: list[UniformCost]


@torch.no_grad()
def measure_sensitivity(
    source: LayerStream,
    units: Sequence[LinearUnit],
    quantizer: Quantizer,
    windows: torch.Tensor,
    progress: Progress,
) -> Sensitivity:
    """What every scheme of every unit costs, on token windows [n, L].

    The statistics of inputs that the quantizer needs are collected on all windows, and the KL is
    measured on a few of them.
    """
    text = windows[:, : min(MAX_WINDOW_TOKENS, windows.shape[1])]
    text = text[: max(1, SENSITIVITY_TOKENS // text.shape[1])]
    max_variants = max(1, VARIANT_BYTES // (text.numel() * source.spec.hidden_size * 4))
    kl: dict[_Variant, float] = {}
    first_layer: int | None = 0
    while first_layer is not None:
        progress.start("sensitivity", len(source.spec.layers), "layers")
        found, first_layer = _run_pass(
            source, units, quantizer, (windows, text), (first_layer, max_variants), progress
        )
        kl |= found
        progress.finish()
    layers = []
    for unit in units:
        costs = {
            choice: SchemeCost(unit.stored_bits(choice), kl[unit.name, choice], scheme)
            for choice, scheme in unit.schemes.items()
            if (unit.name, choice) in kl
        }
        costs[UNQUANTIZED] = SchemeCost(unit.stored_bits(UNQUANTIZED), 0.0, None)
        layers.append(LayerSensitivity(unit.name, unit.modules, unit.num_weights, costs))
    uniform = []
    for (name, choice), value in kl.items():
        if name == NAME_UNIFORM:
            chosen = [choice if choice in unit.schemes else UNQUANTIZED for unit in units]
            bits = sum(map(LinearUnit.stored_bits, units, chosen))
            uniform.append(UniformCost(choice, bits, value))
    return Sensitivity(layers, uniform)


def _run_pass(
    source: LayerStream,
    units: Sequence[LinearUnit],
    quantizer: Quantizer,
    windows: tuple[torch.Tensor, torch.Tensor],
    limits: tuple[int, int],
    progress: Progress,
) -> tuple[dict[_Variant, float], int | None]:
    """The KL of the variants of some layers, and the first layer that is left; None: none.

    windows: for statistics, and for the measurement. limits: the first layer whose linears are
    measured, and how many variants there may be.
    The first pass also has the variants that quantize all linears.
    """
    first_layer, max_variants = limits
    (base,) = source.embed(windows[1], windows[1].numel())
    needs_text = "hessian" in quantizer.required_stats
    calibration = source.embed(windows[0]) if needs_text else [base.snapshot()]
    names = dict.fromkeys(choice for unit in units for choice in unit.schemes)
    uniform = {choice: base.snapshot() for choice in names if first_layer == 0}
    singles: dict[str, MicroBatch] = {}  # by name of the unit
    # By choice, over that of the unit's variant in `singles`.
    relative_errors: dict[str, dict[str, float]] = {}
    left: int | None = None
    for index in range(len(source.spec.layers)):
        layer = source.layer(index)
        source.run_layer(layer, list(singles.values()))
        of_layer = [unit for unit in units if unit.layer == index]
        if left is None and index >= first_layer and len(singles) >= max_variants and of_layer:
            left = index
        is_measured = index >= first_layer and left is None
        is_quantized = is_measured or bool(uniform)
        stats = _input_stats(layer, of_layer if is_quantized else (), quantizer, calibration)
        quantized: dict[_Variant, _Weights] = {}
        for unit in of_layer if is_quantized else ():
            for choice in unit.schemes:
                weights = _quantize_unit(layer, unit, choice, quantizer, stats)
                quantized[unit.name, choice] = weights
        for choice, variant in uniform.items():
            everything: _Weights = {}
            for unit in of_layer:
                everything |= quantized.get((unit.name, choice), {})
            _run_with(source, layer, everything, variant)
        for unit in of_layer if is_measured else ():
            errors = {
                choice: _output_error(layer, quantized[unit.name, choice], stats)
                for choice in unit.schemes
            }
            choices = _worth_their_bits(unit, errors)
            if not choices:  # no scheme fits
                continue
            measured = max(choices, key=lambda choice: errors[choice])
            largest = errors[measured] or 1.0  # all errors are 0 then
            relative_errors[unit.name] = {choice: errors[choice] / largest for choice in choices}
            variant = base.snapshot()
            _run_with(source, layer, quantized[unit.name, measured], variant)
            singles[unit.name] = variant
        source.run_layer(layer, [base])
        progress.advance(1, f"{len(singles)} variants")
    variants = [*uniform.values(), *singles.values()]
    divergences = _kl_divergences(source, base, variants)
    kl = {
        (NAME_UNIFORM, choice): value for choice, value in zip(uniform, divergences, strict=False)
    }
    for name, value in zip(singles, divergences[len(uniform) :], strict=True):
        for choice, error in relative_errors[name].items():
            kl[name, choice] = value * error
    return kl, left


def _output_error(layer: DecoderLayer, weights: _Weights, stats: Mapping[str, InputStats]) -> float:
    """The squared error of the outputs of linears with these weights, on sampled inputs."""
    total = 0.0
    for name, weight in weights.items():
        if not stats[name].has_sample:  # an expert that no token chose
            continue
        x = stats[name].sample
        rounded = input_quant(name, weight)
        output = (x if rounded is None else rounded(x)) @ weight.dequantize().T
        total += sum_of_squares(output - x @ layer.linears[name].weight.T)
    return total


def _worth_their_bits(unit: LinearUnit, errors: Mapping[str, float]) -> list[str]:
    """The choices whose errors are not far above the lower convex hull of errors by bits."""
    points = [(unit.stored_bits(choice), error) for choice, error in errors.items()]
    points.append((unit.stored_bits(UNQUANTIZED), 0.0))
    found = []
    for choice, error in errors.items():
        bits = unit.stored_bits(choice)
        lines = [
            left[1] + (right[1] - left[1]) * (bits - left[0]) / max(1, right[0] - left[0])
            for left in points
            for right in points
            if left[0] <= bits <= right[0]
        ]
        if error <= SLACK * min(lines):
            found.append(choice)
    return found


def _input_stats(
    layer: DecoderLayer,
    units: Sequence[LinearUnit],
    quantizer: Quantizer,
    batches: list[MicroBatch],
) -> dict[str, InputStats]:
    """The statistics of the inputs of all linears, by name; advances `batches` by the layer."""
    linears = {
        target.name
        for unit in units
        for choice in list(unit.schemes)[:1]
        for target in unit.targets(choice)
    }
    stats: dict[str, InputStats] = {}
    sample: frozenset[StatKind] = frozenset({"sample"})
    required = quantizer.required_stats | sample
    for sublayer in sublayers(layer):
        names = [name for group in sublayer.linear_groups for name in group if name in linears]
        stats |= collect_input_stats(layer, sublayer, names, batches, required)
        for micro_batch in batches:
            micro_batch.advance(layer.index, sublayer.run)
    return stats


def _quantize_unit(
    layer: DecoderLayer,
    unit: LinearUnit,
    choice: str,
    quantizer: Quantizer,
    stats: Mapping[str, InputStats],
) -> _Weights:
    """The linears of a unit as a checkpoint with this choice has them."""
    weights: _Weights = {}
    for target in unit.targets(choice):
        found = stats[target.name]
        fallback = None
        if quantizer.required_stats and not found.num_tokens:
            fallback = "an expert that no token chose"
        job = QuantizeJob(target, layer.linears[target.name].weight, found.clone(), fallback)
        weight = quantize_linear(quantizer, job).weight
        assert isinstance(weight, QuantizedWeight), "mixed precision has no GGUF presets"
        weights[target.name] = weight
    return weights


def _run_with(
    source: LayerStream, layer: DecoderLayer, weights: _Weights, variant: MicroBatch
) -> None:
    """Run a variant through the layer with some of its linears quantized."""
    original = {}
    for name, weight in weights.items():
        linear = layer.linears[name]
        original[name] = linear.weight
        linear.weight = weight.dequantize()
        linear.activation_quant = input_quant(name, weight)
    source.run_layer(layer, [variant])
    for name, dense in original.items():
        layer.linears[name].weight = dense
        layer.linears[name].activation_quant = None


def _kl_divergences(
    source: LayerStream, base: MicroBatch, variants: Iterable[MicroBatch]
) -> list[float]:
    """KL(base || variant) in nats per token, from the logits of each variant."""
    decoder = source.decoder_without_layers(with_head=True)

    def log_probs(batch: MicroBatch) -> torch.Tensor:
        hidden = batch.hidden.to(source.device)
        hidden = decoder.normalize(hidden)
        return torch.log_softmax(decoder.logits(hidden), dim=-1)

    reference = log_probs(base)
    probs = reference.exp()
    divergences = []
    for variant in variants:
        # The difference first: the KL of 8-bit schemes is below the rounding of a sum of entropies.
        difference = log_probs(variant).sub_(reference).mul_(probs)
        divergences.append(max(0.0, -difference.sum().item() / len(reference)))
    return divergences
