"""Quantizing layer by layer: each linear is calibrated on what the quantized part of the model before it puts out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.compressed_tensors import KINDS
from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.quantized import QuantizationConfig, QuantizedWeight
from llmkit.checkpoint.reading import row_chunks
from llmkit.kernels.rounding import FP8_MAX, INT8_MAX, TINY
from llmkit.model.decoder import DecoderLayer
from llmkit.model.layout import Parameter, parameters
from llmkit.model.linear import Rounding
from llmkit.model.loader import kv_scales, scheme_of
from llmkit.quant.algorithm import Algorithm, Coder, Job, Learn, Mover, Quantized, Site, Solve
from llmkit.quant.calibrate import Block, blocks, largest_kv, observe
from llmkit.quant.edges import edge_to, move
from llmkit.quant.grid import FULL_SEARCH, Search, round_to_nearest
from llmkit.quant.learn import Windows, learn_layer
from llmkit.quant.memory import give_back
from llmkit.quant.methods import scale_dtype
from llmkit.quant.nearest import Nearest, fixed_scale
from llmkit.quant.statistics import Statistics, quadratic, share, squares
from llmkit.quant.storage import Storage
from llmkit.quant.stream import LayerStream, MicroBatch, read_ahead

EXPERT_SHARE = 0.005  # an expert that saw fewer of the calibration tokens has no Hessian worth the name,
EXPERT_TOKENS = 128  # nor has one that saw fewer than these

ERROR_ROWS = 1024  # of a weight whose error is measured at once

Entry = dict[str, Any]  # what the report says of a linear


@dataclass
class LayerRun:
    """A decoder layer while it is quantized."""

    index: int
    layer: DecoderLayer
    rows: list[Parameter]
    sites: dict[str, Site]  # the linears to quantize, by name within the layer
    done: dict[str, tuple[Quantized, Entry]]
    changed: set[str]  # the vectors (norms, biases) that took up scales, by name within the layer
    kv: dict[str, torch.Tensor]  # scales by checkpoint tensor
    dense: dict[str, torch.Tensor] = field(default_factory=dict)  # the weights as they were before rounding,
    seen: dict[str, Statistics] = field(default_factory=dict)  # and their inputs, kept for learning


def solved(coder: Coder, job: Job) -> Quantized:
    """The coder's codes, or the nearest under searched scales where there is a reason; what they lose is in `error`."""
    if job.fallback is not None:
        result = Nearest(FULL_SEARCH).quantize(job.site, job.weight, job.seen)
        result.fallback = job.fallback
    else:
        result = coder.quantize(job.site, job.weight, job.seen)
    if job.site.scheme.inputs == "tensor":
        result.weight.input_scale = fixed_scale(job.seen)
    if result.error is None:
        result.error = output_error(job.weight, result.weight, job.seen)
    result.tokens = job.seen.tokens
    return result


def solve_here(coder: Coder, jobs: Iterable[Job]) -> Iterator[Quantized]:
    """One after the other, in this process."""
    return (solved(coder, job) for job in jobs)


@torch.no_grad()
def quantize_layers(
    source: LayerStream,
    written: LayerStream,
    windows: torch.Tensor,
    storage: Storage,
    algorithm: Algorithm,
    progress: Progress,
    offload: Path | None = None,
    solve: Solve = solve_here,
) -> list[Entry]:
    """Quantize every decoder layer, calibrated on token windows [n, L]; commit after each layer.

    `source` gives the tensors to quantize, `written` those of the output, in which the embedding already is. Layers
    that an interrupted run has committed are read back. Hidden states lie in files of `offload` when it is given.
    Returns what the report says of each linear.
    """

    def read(row: Parameter) -> torch.Tensor:  # what is not quantized is used as it is stored
        return storage.as_stored(row, source.device) if storage.scheme(row) is None else source.read(row)

    mixed = LayerStream(source.spec, read, source.device)
    recorded, learn = storage.recorded(), algorithm.learn
    linears: list[Entry] = []
    todo = [i for i in range(len(source.spec.layers)) if i not in recorded or not storage.done(source.rows(i))]
    # On CUDA the next layer is read while this one is quantized; on a CPU that would only double the memory.
    touched = [row.stages[0] for row in parameters(source.spec) if touches(row, storage)]
    last = max(touched, default=-1)  # the layers after it need not be run
    layers = read_ahead(mixed.layer, [i for i in todo if i <= last], ahead=source.device.type == "cuda")
    progress.start("quantize", len(source.spec.layers), "layers")
    batches = written.embed(windows, folder=offload)
    wanted = source.embed(windows, folder=offload / "wanted" if offload else None) if learn else []
    for index in range(len(source.spec.layers)):
        rows = source.rows(index)
        started = time.perf_counter()
        if learn and index <= last:
            source.advance(source.layer(index), wanted)
        if index not in todo:
            if index < last:
                written.advance(written.layer(index), batches)
            found = recorded[index]
        elif index > last:
            found = []
            for row in rows:
                storage.cast(row)
            storage.record(index, found)
            storage.writer.commit()
        else:
            sites = {site.name: site for row in rows if (site := site_of(row, storage.quantization)) is not None}
            run = LayerRun(index, next(layers), rows, sites, {}, set(), {})
            before = [one.before() for one in batches] if learn else []
            _quantize_layer(run, batches, storage, algorithm, progress, solve)
            if learn:
                examples = Windows(before, wanted, windows.shape[1], learn, source)
                _learn(run, examples, batches, learn, progress)
            found = [entry for _, entry in run.done.values()]
            storage.record(index, found)
            _write_layer(run, storage)
            storage.writer.commit()
            del run  # the next layer is about to be read
        linears += found
        speed = windows.numel() / (time.perf_counter() - started)
        worst = max(found, key=lambda entry: float(entry["error"]), default=None)
        note = f"{worst['name']} error {worst['error']:.2e}, " if worst else ""
        progress.advance(1, f"{note}{speed:,.0f} tokens/s")
    progress.finish()
    return linears


def touches(row: Parameter, storage: Storage) -> bool:
    """Whether a layer's parameter is quantized, or makes keys and values that are."""
    return row.linear and (storage.scheme(row) is not None or bool(kv_scales(row, storage.quantization)))


def site_of(row: Parameter, quantization: QuantizationConfig | None) -> Site | None:
    """The site of a row; None when it is not quantized."""
    scheme = scheme_of(row, row.tensors[0], quantization)
    if scheme is None or quantization is None:
        return None
    name = row.module.removeprefix(f"layers.{row.stages[0]}.")
    return Site(row, name, scheme, scale_dtype(quantization.format, scheme))


@torch.no_grad()
def round_parameters(storage: Storage, device: torch.device, progress: Progress) -> list[Entry]:
    """Without calibration, one tensor at a time: round what is quantized to the nearest code, cast the rest.

    Returns what the report says of each linear; its error is that of the weights themselves.
    """
    rows = parameters(storage.spec)
    linears: list[Entry] = []
    progress.start("write", len(rows), "tensors")
    for row in rows:
        linears += write_row(row, storage, device)
        storage.writer.commit()
        progress.advance(1, row.name)
    progress.finish()
    return linears


def write_row(row: Parameter, storage: Storage, device: torch.device, search: Search | None = None) -> list[Entry]:
    """Write a parameter without calibration, rounded or cast; what the report says of it when it is rounded.

    search: of the ranges of codes of fewer than 8 bits.
    """
    site = site_of(row, storage.quantization)
    if site is None:
        storage.cast(row)
        return []
    return [_round_row(site, storage, device, search if site.scheme.bits < 8 else None)]


def _round_row(site: Site, storage: Storage, device: torch.device, search: Search | None) -> Entry:
    """Round a parameter's tensors, a few rows at a time, and write them; the error is that of the weights."""
    lost = energy = 0.0
    for tensor in site.row.tensors:
        pieces: list[QuantizedWeight] = []
        for rows in row_chunks(storage.source.tensors[tensor]):
            dense = storage.source.read_slice(tensor, [rows], 0).to(device, torch.float32)
            piece = round_to_nearest(dense, site.scheme, site.dtype, search)
            lost += squares(dense - piece.dequantize())
            energy += squares(dense)
            pieces.append(piece.to("cpu"))
        codes, scales, zeros = (
            torch.cat(parts) for parts in zip(*((p.codes, p.scales, p.zeros) for p in pieces), strict=True)
        )
        storage.pack_tensor(tensor, QuantizedWeight(codes, scales, zeros, site.scheme))
    return _entry(site, "rtn", lost / energy if energy else 0.0)


def _quantize_layer(
    run: LayerRun,
    batches: Sequence[MicroBatch],
    storage: Storage,
    algorithm: Algorithm,
    progress: Progress,
    solve: Solve,
) -> None:
    """Quantize the linears of a layer, put each quantized weight in its place, and take `batches` past the layer."""
    attention, mlp = blocks(run.layer)
    _calibrate_kv(run, attention, batches, storage)
    for block in (attention, mlp):
        seen: dict[str, Statistics] = {}
        if algorithm.mover:
            seen = _move_scales(run, block, batches, storage, algorithm, algorithm.mover)
        for position, stage in enumerate(block.stages):
            names = [name for name in stage if name in run.sites]
            if not algorithm.mover or (algorithm.coder.sequential and position > 0):
                seen |= observe(run.layer, block, names, batches, algorithm.needs)
            give_back()  # what running the layer took, before a Hessian is factorised
            jobs = (_job(run, block, name, seen.pop(name), batches, algorithm) for name in names)
            for name, result in zip(names, solve(algorithm.coder, jobs), strict=True):
                entry = _checked(run.sites[name], result)
                linear, scheme = run.layer.linears[name], run.sites[name].scheme
                if algorithm.learn:
                    run.dense[name] = linear.weight
                linear.weight = result.weight.dequantize()
                if scheme.inputs != "none":
                    linear.rounding = Rounding(scheme.kind, result.weight.input_scale)
                result.weight = result.weight.to("cpu")
                run.done[name] = (result, entry)
                progress.advance(0, f"{entry['name']} error {entry['error']:.2e}")
        block.take(batches)
        if not all(bool(torch.isfinite(one.hidden).all()) for one in batches):
            raise InputError(
                f"what layer {run.index} puts out is not finite: its values overflow float32",
                "Weights that give finite activations were expected",
            )


def _move_scales(
    run: LayerRun,
    block: Block,
    batches: Sequence[MicroBatch],
    storage: Storage,
    algorithm: Algorithm,
    mover: Mover,
) -> dict[str, Statistics]:
    """Let `mover` move scales into the block's linears; the statistics of their inputs afterwards."""
    names = [name for stage in block.stages for name in stage if name in run.sites]
    seen = observe(run.layer, block, names, batches, algorithm.needs)
    dtypes = {
        row.name.removeprefix(f"layers.{run.index}."): storage.dtypes[row.tensors[0]]
        for row in run.rows
        if len(row.shape) == 1
    }
    for name in names:
        edge = edge_to(storage.spec, run.layer, run.sites[name].row)
        # A linear that stays in 16 bits would be rounded anew: what feeds the edge has to be quantized, or a norm.
        if edge is None or seen[name].tokens == 0 or (edge.rows is not None and edge.source not in run.sites):
            continue
        scales = mover.scales(run.sites[name], edge, run.layer.linears[name].weight, seen[name])
        if scales is not None:
            seen[name].divide(move(run.layer, edge, scales, dtypes))
            run.changed.add(f"{edge.source}.{'weight' if edge.rows is None else 'bias'}")
    return seen


def _job(
    run: LayerRun, block: Block, name: str, seen: Statistics, batches: Sequence[MicroBatch], algorithm: Algorithm
) -> Job:
    """What is to be done with a linear: where an expert saw too little, there is a reason to round it only."""
    if algorithm.learn:
        run.seen[name] = seen.copy()
    enough = max(EXPERT_TOKENS, EXPERT_SHARE * sum(one.tokens for one in batches)) if block.routed else 1
    reason = None
    if algorithm.needs and seen.tokens < enough:
        reason = f"saw {seen.tokens} calibration tokens of the {int(enough)} an expert needs"
    return Job(run.sites[name], run.layer.linears[name].weight, seen, reason)


def _checked(site: Site, result: Quantized) -> Entry:
    """What the report says of a result, which is to be finite."""
    assert result.error is not None
    if not math.isfinite(result.error):
        raise InputError(
            f"the weights or inputs of {site.row.module} are so large that float32 overflows",
            "Weights that give finite activations were expected",
        )
    return _entry(site, result.method, result.error, result.tokens, result.damp, result.fallback)


def _learn(run: LayerRun, examples: Windows, batches: Sequence[MicroBatch], learn: Learn, progress: Progress) -> None:
    """Improve the codes of a layer together, and take `batches` past the layer once more."""
    found = {
        name: result.weight
        for name, (result, _) in run.done.items()
        if result.weight.scheme.kind == "int" and ".experts." not in name
    }
    if not found:
        return

    def note(text: str) -> None:
        progress.advance(0, f"layer {run.index}: {text}")

    dense = {name: run.dense[name] for name in found}
    for name, weight in learn_layer(run.layer, dense, found, examples, learn, run.index, note).items():
        if weight is found[name]:
            return
        result, entry = run.done[name]
        result.weight = weight.to("cpu")
        entry["method"] += ", learned"
        entry["error"] = output_error(run.dense[name], weight, run.seen[name])
    for one, before in zip(batches, examples.inputs, strict=True):
        hidden = before.hidden.to(one.step.device)
        one.hidden = run.layer(hidden, one.step.rotations, one.step.batch, one.step.cache).cpu()


def output_error(weight: torch.Tensor, quantized: QuantizedWeight, seen: Statistics) -> float:
    """The share of the output's energy that is lost: tr(dW H dW') / tr(W H W'); by sampled inputs, or of the weights
    themselves, where there is no Hessian. Some rows at a time."""
    sample = seen.sample if seen.hessian is None and seen.sampled else None

    def energy(part: torch.Tensor) -> float:
        if seen.hessian is not None and seen.tokens:
            return quadratic(part, seen.hessian)
        return squares(part if sample is None else sample @ part.T)

    lost = whole = 0.0
    for start in range(0, len(weight), ERROR_ROWS):
        rows = slice(start, start + ERROR_ROWS)
        whole += energy(weight[rows])
        lost += energy(weight[rows] - quantized.rows(rows).dequantize())
    return share(lost, whole)


def _calibrate_kv(run: LayerRun, attention: Block, batches: Sequence[MicroBatch], storage: Storage) -> None:
    """Find the scales of an 8-bit KV cache and let the layer round its keys and values from here on."""
    for row in run.rows:
        names = kv_scales(row, storage.quantization)
        if not names or storage.quantization is None:
            continue
        kind = KINDS[storage.quantization.kv]
        largest = FP8_MAX if kind == "float" else INT8_MAX
        sizes = largest_kv(attention, batches)
        for (name, tensor), size in zip(names.items(), sizes, strict=True):
            run.kv[tensor] = (size / largest).clamp(min=TINY)
            scale = run.kv[tensor].to(batches[0].step.device)
            run.layer.rounding[name.removeprefix(f"layers.{run.index}.")] = Rounding(kind, scale)


def _write_layer(run: LayerRun, storage: Storage) -> None:
    """Write everything the layer is made of."""
    prefix = f"layers.{run.index}."
    for row in run.rows:
        name = row.name.removeprefix(prefix)
        module = name.rpartition(".")[0]
        if module in run.done and name.endswith(".weight"):
            storage.pack(row, run.done[module][0].weight)
        elif name not in run.changed:
            storage.cast(row)
        elif module in run.layer.norms:
            storage.put(row, run.layer.norms[module] - storage.spec.norm_offset)
        else:
            bias = run.layer.linears[module].bias
            assert bias is not None
            storage.put(row, bias)
    for tensor, scale in run.kv.items():
        storage.put_scale(tensor, scale)


def _entry(
    site: Site, method: str, error: float, tokens: int = 0, damp: float | None = None, reason: str | None = None
) -> Entry:
    """What the report says of a linear; `reason`: why it was not quantized by the method asked for."""
    return {
        "name": site.row.module,
        "tensors": list(site.row.tensors),
        "shape": list(site.row.shape),
        "method": method,
        "bits": site.scheme.bits,
        "group_size": site.scheme.group_size,
        "error": error,
        "tokens": tokens,
        "damp": damp,
        "fallback": reason,
    }
