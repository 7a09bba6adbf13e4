"""Quantizes decoder layers one after the other with calibration data.

Each linear is calibrated on the outputs of the quantized layers before it. The steps of a layer:
smooth, collect input statistics, quantize, learn the rounding (with --effort high and max), and
write. With these efforts, the norms are tuned and written after the last layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmkit.checkpoint.quantized_weight import QuantizedWeight
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress
from llmkit.kernels.activation_quant import MAX_VALUES, MIN_SCALE
from llmkit.model.checkpoint_tensors import kv_scales
from llmkit.model.decoder import DecoderLayer
from llmkit.model.linear import ActivationQuant
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.quant.algorithm import (
    Algorithm,
    AutoRound,
    NormTuning,
    QuantizeJob,
    QuantizeResult,
    QuantTarget,
    Smoother,
    Solver,
)
from llmkit.quant.auto_round import TuningWindows, layer_targets, tune_rounding
from llmkit.quant.calibrate_layer import (
    DenseSubLayer,
    RecordedInputs,
    SubLayer,
    collect_input_stats,
    input_quant,
    max_abs_kv,
    sublayers,
)
from llmkit.quant.input_stats import InputStats, fill_unseen_experts
from llmkit.quant.layer_stream import LayerStream, MicroBatch, StoredTensor, prefetch_layers
from llmkit.quant.memory_estimate import trim_heap
from llmkit.quant.norm_tuning import is_tuned_norm, tune_norms
from llmkit.quant.parameter_writer import ParameterWriter
from llmkit.quant.quantize_linear import (
    Entry,
    output_error,
    quant_target,
    report_entry,
    solve_locally,
)
from llmkit.quant.smoothing_mappings import apply_scales, find_mapping

# An expert that received fewer tokens is rounded to nearest: too few for a reliable Hessian.
MIN_EXPERT_TOKENS = 128
MIN_EXPERT_SHARE = 0.005  # of the calibration tokens


@dataclass
class LayerState:
    """A decoder layer while it is quantized."""

    index: int
    layer: DecoderLayer
    parameters: list[Parameter]
    targets: dict[str, QuantTarget]  # the linears to quantize, by name within the layer
    # The linears that are quantized, by name within the layer.
    results: dict[str, tuple[QuantizeResult, Entry]] = field(default_factory=dict)
    # The vectors (norms, biases) that smoothing changed, by name within the layer.
    smoothed_vectors: set[str] = field(default_factory=set)
    # The scales of an 8-bit KV cache, by checkpoint tensor.
    kv_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    # The scales that smoothing divided the inputs of linears by, by name within the layer.
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    # For learned rounding: the smoothed weights before quantization, and their input statistics.
    dense_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    input_stats: dict[str, InputStats] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """The prefix of the names of the layer's parameters."""
        return f"layers.{self.index}."


@torch.no_grad()
def quantize_layers(
    source: LayerStream,
    written: LayerStream,
    windows: torch.Tensor,
    writer: ParameterWriter,
    algorithm: Algorithm,
    progress: Progress,
    offload: Path | None = None,
    solver: Solver = solve_locally,
) -> list[Entry]:
    """Quantize every decoder layer, calibrated on token windows [n, L]; commit after each layer.

    source: the tensors to quantize.
    written: the tensors of the output, which already holds the embedding. Layers that an
        interrupted run has committed are read from it.
    offload: a folder for the hidden states; None keeps them in memory.

    Returns the report's entries of the linears.
    """
    num_layers = len(source.spec.layers)
    tunes_norms = algorithm.norm_tuning is not None
    recorded = writer.recorded_layers()
    staged = writer.staged_values()
    written = written.with_values({name: value.to(source.device) for name, value in staged.items()})

    def is_done(index: int) -> bool:
        rows = [row for row in source.layer_parameters(index) if row.name not in staged]
        return index in recorded and writer.is_written(rows)

    todo = [index for index in range(num_layers) if not is_done(index)]
    # The layers after the last quantized one need not run.
    last = last_quantized_layer(writer)
    layers = _layers_to_quantize(source, writer, [index for index in todo if index <= last])
    progress.start("quantize", num_layers, "layers")
    auto_round = algorithm.auto_round
    # The hidden states of the quantized model and, where it is compared, of the unquantized one.
    batches = written.embed(windows, folder=offload)
    target_batches: list[MicroBatch] = []
    if algorithm.runs_dense_model:
        target_batches = source.embed(windows, folder=offload / "targets" if offload else None)
    entries: list[Entry] = []
    for index in range(num_layers):
        started = time.perf_counter()
        dense_layer = None
        if algorithm.runs_dense_model and (index <= last or tunes_norms):
            dense_layer = source.layer(index)
            # For residuals, its sublayers run one by one beside those of the quantized layer.
            if index not in todo or index > last or not algorithm.is_asymmetric:
                source.run_layer(dense_layer, target_batches)
                dense_layer = None
        if index not in todo:
            # An interrupted run has written this layer.
            layer_entries = recorded[index]
            if index < last:
                written.run_layer(written.layer(index), batches)
        elif index > last:
            # Neither this layer nor any after it is quantized.
            layer_entries = []
            rows = source.layer_parameters(index)
            _write_unquantized_layer(index, rows, writer, tunes_norms=tunes_norms)
        else:
            state = _layer_state(index, next(layers), source, writer)
            layer_inputs: list[MicroBatch] = []
            if auto_round is not None:
                layer_inputs = [micro_batch.snapshot() for micro_batch in batches]
            dense = None if dense_layer is None else (dense_layer, target_batches)
            _quantize_layer(state, batches, writer, algorithm, progress, solver, dense)
            del dense, dense_layer
            if auto_round is not None:
                targets = _targets(state, layer_inputs, target_batches, auto_round, offload)
                tuning_windows = TuningWindows(
                    layer_inputs, targets, windows.shape[1], auto_round, source
                )
                _learn_rounding(state, tuning_windows, batches, auto_round, progress)
                del tuning_windows, targets, layer_inputs
            layer_entries = [entry for _, entry in state.results.values()]
            writer.record_layer(index, layer_entries)
            _write_layer(state, writer, tunes_norms=tunes_norms)
            writer.commit()
            # Free the layer before the next one is read.
            del state
        entries += layer_entries
        tokens_per_second = windows.numel() / (time.perf_counter() - started)
        progress.advance(1, f"{_worst_error(layer_entries)}{tokens_per_second:,.0f} tokens/s")
    progress.finish()
    if algorithm.norm_tuning is not None:
        del batches
        _tune_norms(
            source,
            written,
            windows,
            target_batches,
            writer,
            algorithm.norm_tuning,
            progress,
            offload,
        )
    return entries


def last_quantized_layer(writer: ParameterWriter) -> int:
    """The index of the last layer with a quantized linear or a quantized KV cache; -1: none."""
    last = -1
    for parameter in parameters(writer.spec):
        has_kv_scales = bool(kv_scales(parameter, writer.quantization))
        if parameter.is_linear and (writer.scheme(parameter) is not None or has_kv_scales):
            last = max(last, parameter.layers[0])
    return last


def _layers_to_quantize(
    source: LayerStream, writer: ParameterWriter, indices: Sequence[int]
) -> Iterator[DecoderLayer]:
    """Read the layers to quantize, in order."""

    def read(parameter: Parameter) -> torch.Tensor:
        # Unquantized parameters are used as the output stores them.
        if writer.scheme(parameter) is None:
            return writer.read_as_stored(parameter, source.device)
        return source.read(parameter)

    stream = LayerStream(source.spec, read, source.device)
    # On CUDA the next layer is read during the current one. On a CPU that would only double the
    # memory.
    return prefetch_layers(stream.layer, indices, prefetch=source.device.type == "cuda")


def _layer_state(
    index: int, layer: DecoderLayer, source: LayerStream, writer: ParameterWriter
) -> LayerState:
    rows = source.layer_parameters(index)
    targets: dict[str, QuantTarget] = {}
    for parameter in rows:
        target = quant_target(parameter, writer.quantization)
        if target is not None:
            targets[target.name] = target
    return LayerState(index, layer, rows, targets)


def _quantize_layer(
    state: LayerState,
    batches: Sequence[MicroBatch],
    writer: ParameterWriter,
    algorithm: Algorithm,
    progress: Progress,
    solver: Solver,
    dense: tuple[DecoderLayer, Sequence[MicroBatch]] | None = None,
) -> None:
    """Quantize a layer's linears in place and run `batches` through the quantized layer.

    dense: for residuals, the unquantized layer and its inputs, which are run through it.
    """
    layer_parts = sublayers(state.layer)
    dense_parts = _dense_sublayers(state, dense)
    _calibrate_kv(state, layer_parts[0], batches, writer)
    for sublayer, dense_sublayer in zip(layer_parts, dense_parts, strict=True):
        # The two models send different tokens to an expert.
        compared = None if sublayer.is_moe else dense_sublayer
        input_stats: dict[str, InputStats] = {}
        recorded = RecordedInputs()
        if algorithm.smoother is not None:
            input_stats = _smooth(state, sublayer, batches, writer, algorithm, algorithm.smoother)
        for position, group in enumerate(sublayer.linear_groups):
            names = [name for name in group if name in state.targets]
            collects_again = algorithm.quantizer.true_sequential and position > 0
            if algorithm.smoother is None or collects_again or compared is not None:
                input_stats |= collect_input_stats(
                    state.layer,
                    sublayer,
                    names,
                    batches,
                    algorithm.required_stats,
                    recorded,
                    compared,
                )
            fill_unseen_experts(input_stats)
            # Free the memory of the forward passes before a Hessian is factorized.
            trim_heap()
            jobs = (_job(state, name, input_stats.pop(name), batches, algorithm) for name in names)
            results = solver(algorithm.quantizer, jobs)
            for name, result in zip(names, results, strict=True):
                _take_result(state, name, result, algorithm)
                _, entry = state.results[name]
                progress.advance(0, f"{entry['name']} error {entry['error']:.2e}")
        sublayer.advance(batches, recorded)
        if dense_sublayer is not None:
            dense_sublayer.advance()
        if not all(_all_finite(micro_batch.hidden) for micro_batch in batches):
            raise InputError(
                f"the output of layer {state.index} is not finite: its values overflow float32",
                "Weights that give finite activations were expected",
            )


def _dense_sublayers(
    state: LayerState, dense: tuple[DecoderLayer, Sequence[MicroBatch]] | None
) -> Sequence[DenseSubLayer | None]:
    """The unquantized model's sublayers of a layer; None for each without `dense`."""
    if dense is None:
        return [None] * len(sublayers(state.layer))
    layer, batches = dense
    return [
        DenseSubLayer(layer, sublayer, batches, state.input_scales, RecordedInputs())
        for sublayer in sublayers(layer)
    ]


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN. A finite sum, which is much faster, proves it."""
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def _smooth(
    state: LayerState,
    sublayer: SubLayer,
    batches: Sequence[MicroBatch],
    writer: ParameterWriter,
    algorithm: Algorithm,
    smoother: Smoother,
) -> dict[str, InputStats]:
    """Smooth the sublayer's linears. Returns their input statistics after smoothing."""
    names = [name for group in sublayer.linear_groups for name in group if name in state.targets]
    input_stats = collect_input_stats(
        state.layer, sublayer, names, batches, algorithm.required_stats
    )
    vector_dtypes = {
        parameter.name.removeprefix(state.prefix): writer.dtypes[parameter.source_names[0]]
        for parameter in state.parameters
        if len(parameter.shape) == 1
    }
    for name in names:
        target = state.targets[name]
        mapping = find_mapping(state.layer, target.parameter)
        if mapping is None or input_stats[name].num_tokens == 0:
            continue
        # Skip a smooth layer that is a linear and stays in 16 bits: it would be rounded again.
        if mapping.rows is not None and mapping.smooth_layer not in state.targets:
            continue
        weight = state.layer.linears[name].weight
        scales = smoother.scales(target, mapping, weight, input_stats[name])
        if scales is None:
            continue
        used = apply_scales(state.layer, mapping, scales, vector_dtypes)
        input_stats[name].divide_inputs(used)
        state.input_scales[name] = used
        smoothed = ("bias",) if mapping.rows is not None else ("weight", "bias")
        state.smoothed_vectors.update(f"{mapping.smooth_layer}.{vector}" for vector in smoothed)
    return input_stats


def _job(
    state: LayerState,
    name: str,
    input_stats: InputStats,
    batches: Sequence[MicroBatch],
    algorithm: Algorithm,
) -> QuantizeJob:
    """The job of a linear. It falls back to rounding for an expert with too few tokens."""
    is_expert = ".experts." in name
    if algorithm.auto_round is not None and not is_expert:
        state.input_stats[name] = input_stats.clone()
        state.input_stats[name].residual = None
    min_tokens = 1
    if is_expert:
        num_tokens = sum(micro_batch.num_tokens for micro_batch in batches)
        min_tokens = max(MIN_EXPERT_TOKENS, math.ceil(MIN_EXPERT_SHARE * num_tokens))
    fallback = None
    if algorithm.required_stats and input_stats.num_tokens < min_tokens:
        needed = f"{min_tokens} an expert needs" if is_expert else f"{min_tokens} it needs"
        fallback = f"saw {input_stats.num_tokens} calibration tokens of the {needed}"
    weight = state.layer.linears[name].weight
    return QuantizeJob(state.targets[name], weight, input_stats, fallback)


def _take_result(
    state: LayerState, name: str, result: QuantizeResult, algorithm: Algorithm
) -> None:
    """Put a quantized weight into the layer and keep the result."""
    target = state.targets[name]
    assert result.error is not None
    if not math.isfinite(result.error):
        raise InputError(
            f"the weights or inputs of {target.parameter.module} are so large "
            "that float32 overflows",
            "Weights that give finite activations were expected",
        )
    entry = report_entry(
        target,
        result.method,
        result.error,
        result.num_tokens,
        result.dampening_frac,
        result.fallback,
    )
    linear = state.layer.linears[name]
    if algorithm.auto_round is not None:
        state.dense_weights[name] = linear.weight
    linear.weight = result.weight.dequantize()
    if isinstance(result.weight, QuantizedWeight):
        linear.activation_quant = input_quant(name, result.weight)
    result.weight = result.weight.to("cpu")
    state.results[name] = (result, entry)


def _targets(
    state: LayerState,
    inputs: Sequence[MicroBatch],
    outputs: Sequence[MicroBatch],
    settings: AutoRound,
    offload: Path | None,
) -> list[StoredTensor]:
    """What the quantized layer shall compute of its inputs (see `layer_targets`)."""
    quantized = {}
    for name, dense_weight in state.dense_weights.items():
        linear = state.layer.linears[name]
        quantized[name] = linear.weight, linear.activation_quant
        linear.weight = dense_weight
        linear.activation_quant = None
    targets = layer_targets(state.layer, inputs, outputs, settings.correction, offload)
    for name, (weight, activation_quant) in quantized.items():
        state.layer.linears[name].weight = weight
        state.layer.linears[name].activation_quant = activation_quant
    return targets


def _learn_rounding(
    state: LayerState,
    windows: TuningWindows,
    batches: Sequence[MicroBatch],
    settings: AutoRound,
    progress: Progress,
) -> None:
    """Improve the rounding of the layer's linears together and run `batches` through it again.

    Experts and weights in FP8 keep their values.
    """
    start = {
        name: result.weight
        for name, (result, _) in state.results.items()
        if isinstance(result.weight, QuantizedWeight)
        and not result.weight.scheme.is_fp8
        and ".experts." not in name
    }
    if not start:
        return

    def note(text: str) -> None:
        progress.advance(0, f"layer {state.index}: {text}")

    dense = {name: state.dense_weights[name] for name in start}
    learned = tune_rounding(state.layer, dense, start, windows, settings, state.index, note)
    for name, weight in learned.items():
        if weight is start[name]:  # learning did not help
            return
        result, entry = state.results[name]
        result.weight = weight.to("cpu")
        entry["method"] += ", learned"
        entry["error"] = output_error(dense[name], weight, state.input_stats[name])
    for micro_batch, layer_input in zip(batches, windows.inputs, strict=True):
        micro_batch.hidden = layer_input.hidden
        micro_batch.advance(state.index, lambda hidden, inputs: state.layer(hidden, *inputs))


def _calibrate_kv(
    state: LayerState,
    attention: SubLayer,
    batches: Sequence[MicroBatch],
    writer: ParameterWriter,
) -> None:
    """Find the scales of an 8-bit KV cache. From then on the layer rounds its keys and values."""
    quantization = writer.quantization
    for parameter in state.parameters:
        names = kv_scales(parameter, quantization)
        if not names or quantization is None:
            continue
        max_value = MAX_VALUES[quantization.kv]
        max_abs = max_abs_kv(state.layer, attention, batches)
        for (name, tensor), magnitude in zip(names.items(), max_abs, strict=True):
            scale = (magnitude / max_value).clamp(min=MIN_SCALE)
            state.kv_scales[tensor] = scale
            device_scale = scale.to(batches[0].context.device)
            module = name.removeprefix(state.prefix)
            state.layer.activation_quant[module] = ActivationQuant(quantization.kv, device_scale)


def _tune_norms(
    source: LayerStream,
    written: LayerStream,
    windows: torch.Tensor,
    targets: Sequence[MicroBatch],
    writer: ParameterWriter,
    settings: NormTuning,
    progress: Progress,
    offload: Path | None,
) -> None:
    """Tune the norms of the quantized model, and write them.

    targets: the unquantized model's hidden states after the last layer.
    """
    norms = [parameter for parameter in parameters(source.spec) if is_tuned_norm(parameter)]
    start = writer.staged_values()
    for parameter in norms:
        if parameter.name not in start:  # the one after the last layer
            start[parameter.name] = writer.read_as_stored(parameter, source.device)
    start = {name: value.to(source.device) for name, value in start.items()}
    dtypes = {norm.name: writer.dtypes[norm.source_names[0]] for norm in norms}
    tuned = tune_norms(
        source, written, windows, targets, start, dtypes, settings, progress, offload
    )
    for parameter in norms:
        writer.write_value(parameter, tuned[parameter.name])
    writer.commit()


def _write_layer(state: LayerState, writer: ParameterWriter, *, tunes_norms: bool) -> None:
    """Write all parameters of a quantized layer, except for norms that are tuned."""
    if tunes_norms:
        _stage_norms(state.index, state.parameters, state, writer)
    for parameter in state.parameters:
        name = parameter.name.removeprefix(state.prefix)
        module = name.rpartition(".")[0]
        if tunes_norms and is_tuned_norm(parameter):
            continue
        if module in state.results and name.endswith(".weight"):
            result, _ = state.results[module]
            writer.write_quantized(parameter, result.weight)
        elif name not in state.smoothed_vectors:
            writer.write_cast(parameter)
        elif module in state.layer.norms and name.endswith(".bias"):
            writer.write_value(parameter, state.layer.norm_biases[module])
        elif module in state.layer.norms:
            writer.write_value(parameter, state.layer.norms[module] - writer.spec.norm_offset)
        else:
            bias = state.layer.linears[module].bias
            assert bias is not None
            writer.write_value(parameter, bias)
    for tensor, scale in state.kv_scales.items():
        writer.write_kv_scale(tensor, scale)


def _stage_norms(
    index: int, rows: Sequence[Parameter], state: LayerState | None, writer: ParameterWriter
) -> None:
    """Keep the norms of a layer until they are tuned. state: None if it is not quantized."""
    values = {}
    for parameter in filter(is_tuned_norm, rows):
        module = parameter.name.removeprefix(f"layers.{index}.").removesuffix(".weight")
        if state is not None and f"{module}.weight" in state.smoothed_vectors:
            values[parameter.name] = state.layer.norms[module] - writer.spec.norm_offset
        else:
            values[parameter.name] = writer.read_as_stored(parameter, torch.device("cpu"))
    writer.stage_values(index, values)


def _write_unquantized_layer(
    index: int, rows: Sequence[Parameter], writer: ParameterWriter, *, tunes_norms: bool
) -> None:
    """Write a layer that is not quantized, except for norms that are tuned."""
    if tunes_norms:
        _stage_norms(index, rows, None, writer)
    for parameter in rows:
        if not (tunes_norms and is_tuned_norm(parameter)):
            writer.write_cast(parameter)
    writer.record_layer(index, [])
    writer.commit()


def _worst_error(entries: Sequence[Entry]) -> str:
    """The linear with the largest error, for the progress line."""
    if not entries:
        return ""
    worst = max(entries, key=lambda entry: float(entry["error"]))
    return f"{worst['name']} error {worst['error']:.2e}, "
