"""Quantizes the layers of a model that runs by transformers' own modeling code, with calibration.

The whole model is in memory. Each layer is calibrated on the outputs of the quantized layers before
it; all linears of a layer are calibrated in one pass. Legend: L tokens of a window, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress
from llmkit.model.full_forward import make_batch
from llmkit.model.linear import ActivationQuant, Linear
from llmkit.model.parameter import Parameter
from llmkit.model.parameter_table import parameters
from llmkit.model.transformers_model import TransformersModel
from llmkit.model.weight_loader import load_model
from llmkit.quant.algorithm import Algorithm, QuantizeJob, QuantTarget, Solver
from llmkit.quant.input_stats import InputStats
from llmkit.quant.parameter_writer import ParameterWriter
from llmkit.quant.quantize_linear import Entry, quant_target, report_entry, solve_locally


class _LayerReachedError(Exception):
    """Ends a forward pass at the first layer."""


class LayerRunner:
    """Runs the layers of a model on windows of one length, one layer at a time.

    Raises InputError for a model whose layers read something that depends on the tokens besides the
    hidden states.
    """

    def __init__(self, model: TransformersModel, window: torch.Tensor) -> None:
        """window: the token ids [L] of any window."""
        self.model = model
        self._positions, self._batch = make_batch(model, [len(window)])
        cache = model.new_kv_cache(self._batch.num_blocks, self._batch.block_size)
        # All layers share one cache: a layer reads only what it has just written.
        self._caches = [cache] * len(model.spec.layers)
        self._arguments = self._layer_arguments(window)
        others = self._layer_arguments(window.flip(0))
        if not _are_equal(self._arguments, others):
            raise InputError(
                f"the layers of {model.spec.architecture} read more than hidden states, so they"
                " cannot be calibrated one at a time",
                todo="Use --method rtn, int8 or fp8, which need no calibration",
            )

    def embed(self, window: torch.Tensor) -> torch.Tensor:
        """The input [1, L, H] of the first layer for the token ids [L] of a window."""
        found: list[torch.Tensor] = []

        def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _LayerReachedError

        handle = self.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            self._run(window)
        except _LayerReachedError:
            pass
        finally:
            handle.remove()
        return found[0].cpu()

    def run_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """[1, L, H] in and out, on the CPU."""
        args, kwargs = self._arguments[index]
        with self.model.step(self._batch, self._caches):
            output = self.model.layers[index](hidden.to(self.model.device), *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        result: torch.Tensor = output.cpu()
        return result

    def _layer_arguments(
        self, window: torch.Tensor
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of every layer besides the hidden states."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            found.append((args[1:], others))

        handles = [
            layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.model.layers
        ]
        try:
            self._run(window)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _run(self, window: torch.Tensor) -> None:
        self.model(window.to(self.model.device), self._positions, self._batch, self._caches)


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return all(map(_are_equal, first, second))
    if isinstance(first, dict):
        return all(_are_equal(first[name], second[name]) for name in first)
    return True


@torch.no_grad()
def quantize_transformers_layers(
    source: Checkpoint,
    windows: torch.Tensor,
    writer: ParameterWriter,
    algorithm: Algorithm,
    device: torch.device,
    progress: Progress,
    solver: Solver = solve_locally,
) -> list[Entry]:
    """Quantize every layer, calibrated on token windows [n, L]; commit after each layer.

    Returns the report's entries of the linears.
    """
    model = load_model(source, torch.float32, device, spec=writer.spec)
    assert isinstance(model, TransformersModel)
    rows_of_layer: list[list[Parameter]] = [[] for _ in model.layers]
    for row in parameters(writer.spec):
        if row.name.startswith("layers."):
            rows_of_layer[row.layers[0]].append(row)
    runner = LayerRunner(model, windows[0])
    hidden = [runner.embed(window) for window in windows]
    progress.start("quantize", len(model.layers), "layers")
    entries: list[Entry] = []
    for index, rows in enumerate(rows_of_layer):
        found = (quant_target(row, writer.quantization) for row in rows)
        targets = [target for target in found if target is not None]
        layer_entries: list[Entry] = []
        stats = _collect(runner, index, targets, hidden, algorithm)
        jobs = _jobs(model, targets, stats, algorithm)
        for target, result in zip(targets, solver(algorithm.quantizer, jobs), strict=True):
            assert result.error is not None
            if not math.isfinite(result.error):
                raise InputError(
                    f"the weights or inputs of {target.parameter.module} are so large "
                    "that float32 overflows",
                    "Weights that give finite activations were expected",
                )
            module = target.parameter.module
            quant = ActivationQuant.of(target.scheme, result.weight.input_scale)
            bias = model.linear(module).bias
            dense = result.weight.dequantize()
            model.replace_linear(module, Linear(dense, bias, quant))
            writer.write_quantized(target.parameter, result.weight.to("cpu"))
            layer_entries.append(
                report_entry(
                    target,
                    result.method,
                    result.error,
                    result.num_tokens,
                    result.dampening_frac,
                    result.fallback,
                )
            )
        hidden = [runner.run_layer(index, states) for states in hidden]
        if not all(bool(torch.isfinite(states).all()) for states in hidden):
            raise InputError(
                f"the output of layer {index} is not finite: its values overflow float32",
                "Weights that give finite activations were expected",
            )
        for row in rows:
            if quant_target(row, writer.quantization) is None:
                writer.write_cast(row)
        writer.record_layer(index, layer_entries)
        writer.commit()
        entries += layer_entries
        progress.advance(1, f"layer {index}")
    progress.finish()
    return entries


def _collect(
    runner: LayerRunner,
    index: int,
    targets: list[QuantTarget],
    hidden: list[torch.Tensor],
    algorithm: Algorithm,
) -> dict[str, InputStats]:
    """The input statistics of a layer's linears, by name within the layer."""
    model = runner.model
    stats: dict[str, InputStats] = {}
    handles = []

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def collect(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            stats[name].add(inputs[0], first_tokens=_first_tokens(inputs[0], hidden[0]))

        return collect

    for target in targets:
        columns = target.parameter.shape[1]
        stats[target.name] = InputStats(columns, algorithm.required_stats, model.device)
        linear: nn.Module = model.linear(target.parameter.module)
        handles.append(linear.register_forward_pre_hook(hook(target.name)))
    try:
        if algorithm.required_stats:
            for states in hidden:
                runner.run_layer(index, states)
    finally:
        for handle in handles:
            handle.remove()
    return stats


def _first_tokens(inputs: torch.Tensor, states: torch.Tensor) -> range:
    """The rows of windows' first tokens in a linear's inputs [..., in].

    states: hidden states [n, L, H] of windows; all have this shape. An expert reads some of the
    tokens: none is first.
    """
    num_rows = inputs.numel() // inputs.shape[-1]
    num_windows, length, _ = states.shape
    return range(0, num_rows if num_rows == num_windows * length else 0, length)


def _jobs(
    model: TransformersModel,
    targets: list[QuantTarget],
    stats: dict[str, InputStats],
    algorithm: Algorithm,
) -> Iterator[QuantizeJob]:
    for target in targets:
        input_stats = stats.pop(target.name)
        fallback = None
        if algorithm.required_stats and not input_stats.num_tokens:
            fallback = "saw no calibration tokens"
        weight = model.linear(target.parameter.module).weight.detach()
        yield QuantizeJob(target, weight, input_stats, fallback)
