"""Quantizing layer by layer: each linear is calibrated on what the quantized part of the model before it puts out.

A decoder layer has two blocks, and each block its linears in two stages; a stage's inputs depend on the stage before
it. For every stage the calibration micro-batches run through the block, no further than the stage's linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import QuantizedWeight
from llmkit.model.decoder import DecoderLayer
from llmkit.model.layout import Parameter, parameters
from llmkit.model.loader import read_parameter
from llmkit.quant.gptq import Hessian, gptq, relative_error
from llmkit.quant.grid import round_to_nearest
from llmkit.quant.methods import scale_dtype
from llmkit.quant.storage import Storage
from llmkit.quant.stream import LayerStream, MicroBatch, Step

EXPERT_SHARE = 0.005  # an expert that saw fewer of the calibration tokens has no Hessian worth the name,
EXPERT_TOKENS = 128  # nor has one that saw fewer than these

Done = tuple[Parameter, QuantizedWeight, dict[str, Any]]  # the dictionary is the report's entry


@dataclass(frozen=True)
class Block:
    """Half of a decoder layer: how to run it, and its linears by stage."""

    run: Callable[[torch.Tensor, Step], torch.Tensor]
    stages: tuple[tuple[str, ...], ...]
    routed: bool  # by experts: a micro-batch may miss a linear


def blocks(layer: DecoderLayer) -> tuple[Block, Block]:
    """The two blocks of a layer."""

    def attention(hidden: torch.Tensor, step: Step) -> torch.Tensor:
        return layer.attention_block(hidden, step.rotations, step.batch, step.cache)

    def mlp(hidden: torch.Tensor, step: Step) -> torch.Tensor:
        return layer.mlp_block(hidden)

    def ending(kind: str) -> tuple[str, ...]:
        return tuple(name for name in layer.linears if name.startswith("mlp.") and name.endswith(kind))

    return (
        Block(attention, (("attn.qkv",), ("attn.o",)), routed=False),
        Block(mlp, (ending(".gate_up"), ending(".down")), routed=layer.layer.moe),
    )


@torch.inference_mode()
def quantize_layers(
    source: LayerStream,
    written: LayerStream,
    windows: torch.Tensor,
    storage: Storage,
    damp: float,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Quantize every decoder layer with GPTQ, calibrated on token windows [n, L]; commit after each layer.

    `source` gives the tensors to quantize, `written` those of the output, in which the embedding already is.
    Layers that an interrupted run has committed are read back. Returns what the report says of each linear.
    """
    # What is not quantized is used as it was stored.
    mixed = LayerStream(source.spec, lambda row: (source if row.linear else written).read(row), source.device)
    recorded = storage.recorded()
    linears: list[dict[str, Any]] = []
    progress.start("quantize", len(source.spec.layers), "layers")
    batches = written.embed(windows)
    for index in range(len(source.spec.layers)):
        rows = source.rows(index)
        if index in recorded and storage.done(rows):
            written.advance(written.layer(index), batches)
            found = recorded[index]
        else:
            for row in rows:
                if not row.linear:
                    storage.cast(row)
            layer = mixed.layer(index)
            weights = {row.module.removeprefix(f"layers.{index}."): row for row in rows if row.linear}
            done = _quantize_layer(layer, weights, batches, storage, damp, progress)
            found = [entry for _, _, entry in done]
            storage.record(index, found)
            for row, weight, _ in done:
                storage.pack(row, weight)
            storage.writer.commit()
        linears += found
        worst = max(found, key=lambda entry: float(entry["error"]))
        progress.advance(1, f"{worst['name']} error {worst['error']:.2e}")
    progress.finish()
    return linears


@torch.inference_mode()
def round_parameters(storage: Storage, device: torch.device, progress: Progress) -> list[dict[str, Any]]:
    """Without calibration, one parameter at a time: round what is quantized to the nearest code, cast the rest.

    Returns what the report says of each linear; its error is that of the weights themselves.
    """
    rows = parameters(storage.spec)
    linears = []
    progress.start("write", len(rows), "tensors")
    for row in rows:
        if storage.quantization is None or not row.linear:
            storage.cast(row)
        else:
            dense = read_parameter(storage.source, row, torch.float32, device)
            weight = _round(dense, storage, search=False)
            lost = (dense - weight.dequantize()).square().sum() / dense.square().sum().clamp(min=1e-30)
            linears.append(_entry(row, weight, "rtn", lost.item()))
            storage.pack(row, _on_cpu(weight))
        storage.writer.commit()
        progress.advance(1, row.name)
    progress.finish()
    return linears


def _quantize_layer(
    layer: DecoderLayer,
    rows: Mapping[str, Parameter],
    batches: Sequence[MicroBatch],
    storage: Storage,
    damp: float,
    progress: Progress,
) -> list[Done]:
    """Quantize the linears of a layer, put each quantized weight in its place, and take `batches` past the layer."""
    done: list[Done] = []
    for block in blocks(layer):
        for stage in block.stages:
            hessians = _hessians(layer, block, stage, batches)
            for name in stage:
                linear, hessian = layer.linears[name], hessians.pop(name)
                weight, entry = _quantize_linear(
                    linear.weight, rows[name], hessian, block.routed, storage, damp, batches
                )
                linear.weight = weight.dequantize()
                done.append((rows[name], _on_cpu(weight), entry))
                progress.advance(0, f"{entry['name']} error {entry['error']:.2e}")
        for one in batches:
            one.hidden = block.run(one.hidden.to(one.step.device), one.step).cpu()
    return done


def _quantize_linear(
    dense: torch.Tensor,
    row: Parameter,
    hessian: Hessian,
    routed: bool,
    storage: Storage,
    damp: float,
    batches: Sequence[MicroBatch],
) -> tuple[QuantizedWeight, dict[str, Any]]:
    """GPTQ where the inputs allow it; otherwise the nearest codes under searched scales, and the reason."""
    quantization = storage.quantization
    assert quantization is not None
    enough = max(EXPERT_TOKENS, EXPERT_SHARE * sum(len(one.hidden) for one in batches)) if routed else 1
    if hessian.tokens < enough:
        weight = _round(dense, storage, search=True)
        error = relative_error(dense, weight.dequantize(), hessian.matrix)
        reason = f"saw {hessian.tokens} calibration tokens of the {int(enough)} an expert needs"
        return weight, _entry(row, weight, "rtn", error, hessian.tokens, reason=reason)
    result = gptq(
        dense, hessian.matrix, quantization.bits, quantization.group_size, damp=damp, dtype=scale_dtype(quantization)
    )
    error = relative_error(dense, result.weight.dequantize(), hessian.matrix)
    if result.damp is None:
        reason = "its Hessian is not positive definite even with the most damping"
        return result.weight, _entry(row, result.weight, "rtn", error, hessian.tokens, reason=reason)
    return result.weight, _entry(row, result.weight, "gptq", error, hessian.tokens, damp=result.damp)


class _Seen(Exception):  # noqa: N818 - a signal, not an error
    """All linears of a stage have had their inputs of a micro-batch; what follows in the block is not needed."""


def _hessians(
    layer: DecoderLayer, block: Block, stage: Sequence[str], batches: Sequence[MicroBatch]
) -> dict[str, Hessian]:
    """The Hessian of each of a stage's linears over all micro-batches."""
    hessians = {name: Hessian(layer.linears[name].weight.shape[1], layer.linears[name].weight.device) for name in stage}
    waiting: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def take(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            hessians[name].add(inputs[0])
            waiting.discard(name)
            if not waiting and not block.routed:
                raise _Seen

        return take

    handles = [layer.linears[name].register_forward_pre_hook(hook(name)) for name in stage]
    try:
        for one in batches:
            waiting.update(stage)
            with suppress(_Seen):
                block.run(one.hidden.to(one.step.device), one.step)
    finally:
        for handle in handles:
            handle.remove()
    return hessians


def _round(dense: torch.Tensor, storage: Storage, *, search: bool) -> QuantizedWeight:
    quantization = storage.quantization
    assert quantization is not None
    return round_to_nearest(
        dense, quantization.bits, quantization.group_size, search=search, dtype=scale_dtype(quantization)
    )


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes.cpu(), weight.scales.cpu(), weight.zeros.cpu(), weight.bits, weight.group_size)


def _entry(
    row: Parameter,
    weight: QuantizedWeight,
    method: str,
    error: float,
    tokens: int = 0,
    *,
    damp: float | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """What the report says of a linear; `reason`: why it was not quantized by the method asked for."""
    return {
        "name": row.module,
        "tensors": list(row.tensors),
        "shape": list(row.shape),
        "method": method,
        "bits": weight.bits,
        "group_size": weight.group_size,
        "error": error,
        "tokens": tokens,
        "damp": damp,
        "fallback": reason,
    }
