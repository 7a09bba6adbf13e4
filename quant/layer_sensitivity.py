"""Measures how much KL divergence each scheme costs at each linear, for mixed precision.

Each linear is quantized alone, as it will be at run time, and the divergence of the model's output
is measured. All these variants of the model run through the layers together, so the model is read
once, or a few times where the hidden states of all variants do not fit in memory.

Legend: T tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llmkit.checkpoint.quantized_weight import Scheme
from llmkit.common.progress import Progress
from llmkit.model.decoder import DecoderLayer
from llmkit.model.linear import ActivationQuant
from llmkit.quant.algorithm import QuantizeJob, Quantizer
from llmkit.quant.calibrate_layer import collect_input_stats, sublayers
from llmkit.quant.input_stats import InputStats
from llmkit.quant.layer_stream import LayerStream, MicroBatch
from llmkit.quant.quantize_linear import quantize_linear
from llmkit.quant.scheme_candidates import UNQUANTIZED, LinearUnit

MAX_TOKENS = 512  # of the calibration text, for the measurement
MAX_WINDOW_TOKENS = 128
MAX_VARIANT_BYTES = 2**30  # of the hidden states of all variants that run together
NAME_UNIFORM = ""  # the variants that quantize all linears, among the names of units

_Variant = tuple[str, str]  # the name of a unit, or NAME_UNIFORM, and that of a choice
# What stands for a linear while a variant runs: its weight, and how its inputs are rounded.
_Replacements = dict[str, tuple[torch.Tensor, ActivationQuant | None]]


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
    costs: Mapping[str, SchemeCost]  # by the name of the choice; UNQUANTIZED has a KL of 0


@dataclass(frozen=True)
class Sensitivity:
    """The result of `measure_sensitivity`."""

    layers: list[LayerSensitivity]
    # The KL of the model in which all linears have one scheme, by its name. A linear that cannot
    # have it stays as it is.
    uniform_kl: dict[str, float]


@dataclass
class _Pass:
    """The variants that run through the layers together."""

    # The choices that are tried for the units of each layer.
    choices: dict[int, list[str]] = field(default_factory=dict)
    uniform: list[str] = field(default_factory=list)
    num_variants: int = 0


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
    text = text[: max(1, MAX_TOKENS // text.shape[1])]
    variant_bytes = text.numel() * source.spec.hidden_size * 4
    passes = _passes(units, max(1, MAX_VARIANT_BYTES // variant_bytes))
    progress.start("sensitivity", len(passes) * len(source.spec.layers), "layers")
    kl: dict[_Variant, float] = {}
    for one_pass in passes:
        kl |= _run_pass(source, units, quantizer, (windows, text), one_pass, progress)
    progress.finish()
    layers = []
    for unit in units:
        costs = {
            choice: SchemeCost(unit.stored_bits(choice), kl[unit.name, choice], scheme)
            for choice, scheme in unit.schemes.items()
        }
        costs[UNQUANTIZED] = SchemeCost(unit.stored_bits(UNQUANTIZED), 0.0, None)
        layers.append(LayerSensitivity(unit.name, unit.modules, unit.num_weights, costs))
    uniform = {choice: value for (name, choice), value in kl.items() if name == NAME_UNIFORM}
    return Sensitivity(layers, uniform)


def _passes(units: Sequence[LinearUnit], max_variants: int) -> list[_Pass]:
    """All variants, in passes of at most `max_variants`, or the variants of one layer."""
    passes: list[_Pass] = []
    names = dict.fromkeys(choice for unit in units for choice in unit.schemes)
    for choice in names:
        is_first = True
        for layer in dict.fromkeys(unit.layer for unit in units):
            num_variants = sum(choice in unit.schemes for unit in units if unit.layer == layer)
            num_variants += is_first
            if not passes or passes[-1].num_variants + num_variants > max_variants:
                passes.append(_Pass())
            if is_first:
                passes[-1].uniform.append(choice)
                is_first = False
            passes[-1].choices.setdefault(layer, []).append(choice)
            passes[-1].num_variants += num_variants
    return passes


def _run_pass(
    source: LayerStream,
    units: Sequence[LinearUnit],
    quantizer: Quantizer,
    windows: tuple[torch.Tensor, torch.Tensor],
    one_pass: _Pass,
    progress: Progress,
) -> dict[_Variant, float]:
    """The KL of the variants of one pass. windows: for statistics, and for the measurement."""
    (base,) = source.embed(windows[1], windows[1].numel())
    needs_text = "hessian" in quantizer.required_stats
    calibration = source.embed(windows[0]) if needs_text else [base.snapshot()]
    variants = {(NAME_UNIFORM, choice): base.snapshot() for choice in one_pass.uniform}
    singles: dict[_Variant, MicroBatch] = {}
    for index in range(len(source.spec.layers)):
        layer = source.layer(index)
        source.run_layer(layer, list(singles.values()))
        of_layer = [unit for unit in units if unit.layer == index]
        choices = list(dict.fromkeys([*one_pass.uniform, *one_pass.choices.get(index, ())]))
        stats = _input_stats(layer, of_layer if choices else (), quantizer, calibration)
        for choice in choices:
            replaced: dict[str, _Replacements] = {}
            for unit in of_layer:
                if choice in unit.schemes:
                    replaced[unit.name] = _quantize_unit(layer, unit, choice, quantizer, stats)
            if choice in one_pass.uniform:
                everything = {name: new for unit in replaced.values() for name, new in unit.items()}
                _run_with(source, layer, everything, variants[NAME_UNIFORM, choice])
            if choice not in one_pass.choices.get(index, ()):
                continue
            for name, replacements in replaced.items():
                variant = base.snapshot()
                _run_with(source, layer, replacements, variant)
                singles[name, choice] = variant
        source.run_layer(layer, [base])
        progress.advance(1, f"{len(singles)} variants")
    variants |= singles
    return dict(zip(variants, _kl_divergences(source, base, variants.values()), strict=True))


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
    required = quantizer.required_stats | {"magnitudes"}
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
) -> _Replacements:
    """The linears of a unit as a checkpoint with this choice has them."""
    replacements: _Replacements = {}
    for target in unit.targets(choice):
        weight = layer.linears[target.name].weight
        found = stats[target.name]
        fallback = None
        if quantizer.required_stats and not found.num_tokens:
            fallback = "an expert without tokens"
        job = QuantizeJob(target, weight, found.clone(), fallback)
        quantized = quantize_linear(quantizer, job).weight
        inputs = ActivationQuant.of(target.scheme, quantized.input_scale)
        replacements[target.name] = quantized.dequantize(), inputs
    return replacements


def _run_with(
    source: LayerStream, layer: DecoderLayer, replacements: _Replacements, variant: MicroBatch
) -> None:
    """Run a variant through the layer with some other linears."""
    original = {}
    for name, (weight, activation_quant) in replacements.items():
        linear = layer.linears[name]
        original[name] = linear.weight, linear.activation_quant
        linear.weight = weight
        linear.activation_quant = activation_quant
    source.run_layer(layer, [variant])
    for name, (weight, activation_quant) in original.items():
        layer.linears[name].weight = weight
        layer.linears[name].activation_quant = activation_quant


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
