"""What a recipe would take: memory, disk and time of each stage, from headers and plans, with nothing written.

A stage whose model an earlier stage has yet to write is planned on the tensors that one would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from llmkit.bench.recipe import GATE, Stage
from llmkit.bench.run_recipe import Work
from llmkit.bench.workload import SCENARIOS
from llmkit.checkpoint.errors import InputError, LlmkitError
from llmkit.checkpoint.progress import SilentProgress
from llmkit.checkpoint.reading import CHUNK_BYTES, SafetensorsRows
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.layout import parameters
from llmkit.quant import estimate
from llmkit.quant.plan import Plan, QuantizeOptions, make_plan, plan_figures
from llmkit.quant.storage import output_config
from llmkit.runtime.load import EngineOptions, EnginePlan, plan_engine
from llmkit.shard.plan import plan_shards
from llmkit.shard.shard import shard

BASE_BYTES = 512 * 2**20  # libraries and small change
COPIES = 8  # chunks in flight while a checkpoint is split
START_S = {"cpu": 5.0, "cuda": 30.0}  # a server's, beside reading the weights
LOADS = ("mode", "concurrency", "rate", "trace", "requests")  # of bench: how long these take is not planned
BANDWIDTH = {"cpu": 1e10, "cuda": 2e12}  # bytes a second at which a decode step reads the weights


@dataclass(frozen=True)
class Estimate:
    """What a stage would take; None where it is not known. Times are right within a factor of three or so."""

    stage: str
    run: str
    there: bool = False  # it would be skipped
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """A checkpoint, there or planned. `reference` is what there is of it: for a planned one, what it is made from."""

    reference: str
    checkpoint: Checkpoint
    there: bool
    ranks: tuple[int, int, int] = (1, 1, 1)  # TP, PP, EP of a planned layout

    @property
    def weights(self) -> int:
        """Parameters of the model, as it computes."""
        return sum(math.prod(row.shape) for row in parameters(model_spec(self.checkpoint.config)))

    @property
    def weight_bytes(self) -> int:
        """On disk."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values()) or self.checkpoint.weight_bytes


class Planner:
    """Plans the stages of a work directory. `options` gives a quantize or serve stage's as its command makes them."""

    def __init__(self, work: Work, options: Callable[[Stage], QuantizeOptions | EngineOptions]) -> None:
        self.work, self.options = work, options
        self.made: dict[str, Model] = {}  # by stage

    def plan(self) -> list[Estimate]:
        """All stages, in order. Raises what the stages themselves would refuse before they begin."""
        estimates = []
        for stage in self.work.recipe.stages.values():
            try:
                estimates.append(self._stage(stage))
            except LlmkitError as error:
                raise type(error)(f"stage {stage.name}: {error.what}", error.expected, error.todo) from error
        return estimates

    def _stage(self, stage: Stage) -> Estimate:
        if stage.run == GATE:
            return Estimate(stage.name, stage.run)
        output = self.work.output(stage)
        if self.work.is_there(stage):
            assert output is not None
            if output.is_dir():
                self.made[stage.name] = Model(str(output), open_checkpoint(output), True)
            return Estimate(stage.name, stage.run, there=True)
        rules = {"quantize": self._quantize, "shard": self._shard, "bench": self._bench, "serve": self._serve}
        return rules[stage.run](stage)

    def _model(self, reference: str) -> Model:
        if reference not in self.made:
            path = self.work.path(reference)
            self.made[reference] = Model(path, open_checkpoint(path), True)
        return self.made[reference]

    def _quantize(self, stage: Stage) -> Estimate:
        model = self._model(stage.settings["model"])
        if not model.there and (model.checkpoint.quantization is not None or max(model.ranks) > 1):
            raise InputError(
                f"{stage.settings['model']} will be quantized or sharded already", "A whole model of 16 or 32 bits"
            )
        options = self.options(stage)
        assert isinstance(options, QuantizeOptions)
        # Under a name that is free: what is there now would be replaced.
        plan = make_plan(model.reference, self.work.folder / f"{stage.name}.planned", options, SilentProgress())
        figures = plan_figures(plan)
        self.made[stage.name] = Model(model.reference, _planned(plan), False)
        return Estimate(
            stage.name, stage.run, False, figures["memory_bytes"], figures["disk_bytes"], figures["seconds"]
        )

    def _shard(self, stage: Stage) -> Estimate:
        model = self._model(stage.settings["model"])
        settings = stage.settings
        tp, pp, ep = settings["tp"], settings["pp"], settings["ep"]
        layers = tuple(map(int, settings["pp_layers"].split(","))) if settings["pp_layers"] else ()
        checkpoint = model.checkpoint
        if model.there:
            out = self.work.folder / stage.name
            made = shard(model.reference, out, tp, pp, ep, layers, form=settings["format"], dry_run=True)
        else:
            spec = model_spec(checkpoint.config)
            made = plan_shards(spec, checkpoint.quantization, checkpoint.tensors, tp, pp, ep, layers)
        size = made.to_json()["bytes"]
        self.made[stage.name] = Model(model.reference, checkpoint, False, (tp, made.pp, ep))
        seconds = (model.weight_bytes + 2 * size) / estimate.READ
        return Estimate(stage.name, stage.run, False, BASE_BYTES + COPIES * CHUNK_BYTES, size, seconds)

    def _serve(self, stage: Stage) -> Estimate:
        options = self.options(stage)
        assert isinstance(options, EngineOptions)
        model = self._model(stage.settings["model"])
        if max(model.ranks) > 1:
            tp, pp, ep = model.ranks
            options = replace(options, tp=tp, pp=pp, ep=ep)
        plan = plan_engine(model.checkpoint, options)
        seconds = START_S[plan.device.type] + model.weight_bytes / estimate.READ
        return Estimate(stage.name, stage.run, False, _memory(plan), 0, seconds)

    def _bench(self, stage: Stage) -> Estimate:
        settings = stage.settings
        named = [name for _, name in stage.references(("models", "baseline"))]
        names = [name for name in dict.fromkeys(named) if not self._is_figures(name)]
        device = resolve_device(settings["device"])
        rate = estimate.flops_per_second(device)
        memory, seconds = [0], 0.0
        for name in names:
            model = self._model(name)
            length = settings["max_model_len"]
            length = None if length == "auto" else length
            tp, pp, ep = model.ranks
            options = EngineOptions(settings["device"], settings["dtype"], length, tp=tp, pp=pp, ep=ep)
            memory.append(_memory(plan_engine(model.checkpoint, options)))
            seconds += 2 * (START_S[device.type] + model.weight_bytes / estimate.READ)
            if settings["quality"]:
                seconds += 2 * model.weights * settings["windows"] * settings["window_tokens"] / rate
            if settings["speed"]:
                seconds += settings["repeats"] * _load_seconds(model, settings, rate, BANDWIDTH[device.type])
        together = sum(memory) if device.type == "cpu" else max(memory)
        known = not settings["tasks"] and not (settings["speed"] and any(settings.get(key) for key in LOADS))
        return Estimate(stage.name, stage.run, False, together, 2**20, seconds if known else None)

    def _is_figures(self, reference: str) -> bool:
        """Whether a bench stage's baseline is no checkpoint, but a report or a server."""
        stage = self.work.recipe.stages.get(reference)
        return stage.run == "bench" if stage else reference.endswith(".json") or "://" in reference


def _memory(plan: EnginePlan) -> int:
    """What one engine takes, of a rank where there are several."""
    return BASE_BYTES + plan.memory.weights + plan.memory.workspace + plan.memory.kv_cache


def _load_seconds(model: Model, settings: Mapping[str, Any], rate: float, bandwidth: float) -> float:
    """One round of every scenario: prompts at the rate of products, steps at that of reading the weights."""
    seconds = 0.0
    for name in settings["scenario"]:
        if name not in SCENARIOS:
            continue
        scenario = SCENARIOS[name]
        lengths = scenario.lengths(Random(0))[: settings["limit"]]  # noqa: S311
        prompts, outputs = sum(pair[0] for pair in lengths), sum(pair[1] for pair in lengths)
        steps = outputs / max(1, min(scenario.clients, len(lengths)))
        seconds += 2 * model.weights * (prompts + outputs) / rate + steps * model.weight_bytes / bandwidth
    return seconds


def _planned(plan: Plan) -> Checkpoint:
    """The output of a quantize stage as it will be: headers only, there is nothing to read."""
    tensors = {
        tensor.name: TensorInfo(tensor.name, tensor.dtype, tensor.shape, file, 0, tensor.nbytes)
        for file, part in plan.files.items()
        for tensor in part
    }
    config = output_config(plan.source, plan.quantization, plan.dtype)
    return Checkpoint(
        str(plan.out), plan.out, "safetensors", config, plan.source.generation_config, plan.source.side_files, tensors,
        plan.quantization, None, (), SafetensorsRows(plan.out),
    )  # fmt: skip
