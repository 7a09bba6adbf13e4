"""Quantizing layer by layer: each linear is calibrated on what the quantized part of the model before it puts out.

A decoder layer has two blocks, and each block its linears in two stages; a stage's inputs depend on the stage before
it. For every stage the calibration micro-batches run through the block up to the stage's linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import QuantizationConfig
from llmkit.model.decoder import DecoderLayer
from llmkit.model.layout import Parameter, parameters
from llmkit.quant.gptq import Hessian, gptq, relative_error
from llmkit.quant.grid import round_to_nearest
from llmkit.quant.methods import scale_dtype
from llmkit.quant.storage import Storage
from llmkit.quant.stream import LayerStream, MicroBatch, Step

EXPERT_SHARE = 0.005  # an expert that saw fewer of the calibration tokens has no Hessian worth the name
EXPERT_GROUPS = 4  # nor one that saw fewer tokens than this many groups have columns

Run = Callable[[torch.Tensor, Step], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """Half of a decoder layer: how to run it, and its linears by stage."""

    run: Run
    stages: tuple[tuple[str, ...], ...]
    routed: bool  # experts: a micro-batch may miss a linear


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
        if storage.done(rows) and index in recorded:
            written.advance(written.layer(index), batches)
            found = recorded[index]
        else:
            for row in rows:
                if not row.linear:
                    storage.cast(row)
            layer = mixed.layer(index)
            weights = {row.module.removeprefix(f"layers.{index}."): row for row in rows if row.linear}
            done = _quantize_layer(layer, weights, batches, storage, damp, source.device, progress)
            found = [entry for _, _, entry in done]
            storage.record(index, found)
            for row, weight, _ in done:
                storage.pack(row, weight)
            storage.writer.commit()
        linears += found
        worst = max(found, key=lambda entry: entry["error"])
        progress.advance(1, f"{worst['name']} error {worst['error']:.2e}")
    progress.finish()
    return linears


def round_layers(storage: Storage, progress: Progress, device: torch.device) -> list[dict[str, Any]]:
    """Without calibration, one parameter at a time: round what is quantized to the nearest code, cast the rest.

    Returns what the report says of each linear; its error is that of the weights themselves.
    """
    rows = parameters(storage.spec)
    linears = []
    progress.start("write", len(rows), "tensors")
    for row in rows:
        quantization = storage.quantization
        if quantization is None or not row.linear:
            storage.cast(row)
        else:
            dense = read_parameter(storage.source, row, torch.float32, device)
            weight = round_to_nearest(
                dense, quantization.bits, quantization.group_size, search=False, dtype=scale_dtype(quantization)
            )
            lost = (dense - weight.dequantize()).square().sum() / dense.square().sum().clamp(min=1e-30)
            linears.append(_entry(row, weight, lost.item(), "rtn"))
            if not storage.done([row]):
                storage.pack(row, _on_cpu(weight))
        storage.writer.commit()
        progress.advance(1, row.name)
    progress.finish()
    return linears


Done = tuple[Parameter, QuantizedWeight, dict[str, Any]]


def _quantize_layer(
    layer: DecoderLayer,
    rows: Mapping[str, Parameter],
    batches: Sequence[MicroBatch],
    storage: Storage,
    damp: float,
    device: torch.device,
    progress: Progress,
) -> list[Done]:
    """Quantize the linears of a layer, putting each quantized weight in place, and move `batches` past the layer."""
    done: list[Done] = []
    for block in blocks(layer):
        for stage in block.stages:
            inputs = [(one, one.hidden.to(device, non_blocking=True)) for one in batches[:0]]
            assert not inputs
            hessians = _hessians(layer, stage, block, batches, device)
            for name in stage:
                weight, entry = _quantize_linear(layer.linears[name].weight, rows[name], hessians.pop(name),
                                                 block.routed, storage, damp)
                layer.linears[name].weight = weight.dequantize()
                done.append((rows[name], _on_cpu(weight), entry))
                progress.advance(0, f"{entry['name']} error {entry['error']:.2e}")
        for one in batches:
            one.hidden = block.run(one.hidden.to(device), one.step).cpu()
    return done
