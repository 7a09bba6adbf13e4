"""Planning a recipe: the memory, disk and time of each stage, without writing anything.

The estimates come from the files' headers and from the commands' own plans. A stage that reads the
output of an earlier stage is planned with the tensors which that stage would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

from llmkit.bench.workload import SCENARIOS
from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.tensor_reader import CHUNK_BYTES, SafetensorsRows
from llmkit.common.errors import InputError, LlmkitError
from llmkit.common.progress import SilentProgress
from llmkit.model.device import resolve_device
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.pipeline.recipe import GATE, Stage
from llmkit.pipeline.run_recipe import RunDirectory
from llmkit.quant.output_layout import output_config
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_plan import QuantizePlan, make_plan, plan_summary
from llmkit.quant.time_estimate import READ_BYTES_PER_S, measure_speed
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_plan import EnginePlan, plan_engine
from llmkit.shard.shard_checkpoint import shard
from llmkit.shard.shard_plan import plan_shards

LIBRARY_BYTES = 512 * 2**20  # Python, torch and other libraries
CHUNKS_IN_FLIGHT = 8  # while a checkpoint is sharded
START_S = {"cpu": 5.0, "cuda": 30.0}  # of a server, without reading the weights
# A bench stage's time is not estimated when it has one of these settings.
UNPLANNED_LOADS = ("mode", "concurrency", "rate", "trace", "requests")
# Bytes per second at which a decode step reads the weights.
BANDWIDTH = {"cpu": 1e10, "cuda": 2e12}
REPORT_BYTES = 2**20


@dataclass(frozen=True)
class StageEstimate:
    """The needs of a stage; None: not known. Times are right within a factor of about three."""

    stage: str
    run: str
    there: bool = False  # whether the output is up to date, so that the stage would be skipped
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A document for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class StageModel:
    """A checkpoint that a stage reads: an existing one, or the planned output of another stage."""

    reference: str  # an existing checkpoint; for a planned one, the one it is made from
    checkpoint: Checkpoint
    exists: bool
    parallel_sizes: tuple[int, int, int] = (1, 1, 1)  # TP, PP, EP of a planned layout

    @property
    def num_parameters(self) -> int:
        """The number of parameters. Quantized ones count as the original ones."""
        return sum(math.prod(row.shape) for row in parameters(checkpoint_spec(self.checkpoint)))

    @property
    def weight_bytes(self) -> int:
        """The size of the weights on disk."""
        return (
            sum(info.nbytes for info in self.checkpoint.tensors.values())
            or self.checkpoint.weight_bytes
        )


class RecipePlanner:
    """Estimates the stages of a recipe."""

    def __init__(
        self,
        run_directory: RunDirectory,
        command_options: Callable[[Stage], QuantizeOptions | EngineOptions],
    ) -> None:
        """command_options: makes the options of a quantize or serve stage's command."""
        self.run_directory = run_directory
        self.command_options = command_options
        self._models: dict[str, StageModel] = {}  # by model reference or stage name

    def plan(self) -> list[StageEstimate]:
        """The estimates of all stages, in order. Raises the errors of the commands' own plans."""
        estimates = []
        for stage in self.run_directory.recipe.stages.values():
            try:
                estimates.append(self._estimate(stage))
            except LlmkitError as error:
                raise type(error)(
                    f"stage {stage.name}: {error.what}", error.expected, error.todo
                ) from error
        return estimates

    def _estimate(self, stage: Stage) -> StageEstimate:
        if stage.run == GATE:
            return StageEstimate(stage.name, stage.run)
        output = self.run_directory.output(stage)
        if self.run_directory.is_up_to_date(stage):
            assert output is not None
            if output.is_dir():
                checkpoint = open_checkpoint(output)
                self._models[stage.name] = StageModel(str(output), checkpoint, exists=True)
            return StageEstimate(stage.name, stage.run, there=True)
        estimators = {
            "quantize": self._quantize,
            "shard": self._shard,
            "bench": self._bench,
            "serve": self._serve,
        }
        return estimators[stage.run](stage)

    def _model(self, reference: str) -> StageModel:
        if reference not in self._models:
            path = self.run_directory.path(reference)
            self._models[reference] = StageModel(path, open_checkpoint(path), exists=True)
        return self._models[reference]

    def _quantize(self, stage: Stage) -> StageEstimate:
        model = self._model(stage.settings["model"])
        if not model.exists and (
            model.checkpoint.quantization is not None or max(model.parallel_sizes) > 1
        ):
            raise InputError(
                f"{stage.settings['model']} will be quantized or sharded already",
                "A whole model of 16 or 32 bits",
            )
        options = self.command_options(stage)
        assert isinstance(options, QuantizeOptions)
        # A name that does not exist: the plan refuses an existing output.
        output = self.run_directory.folder / f"{stage.name}.planned"
        plan = make_plan(model.reference, output, options, SilentProgress())
        summary = plan_summary(plan)
        self._models[stage.name] = StageModel(
            model.reference, _planned_checkpoint(plan), exists=False
        )
        return StageEstimate(
            stage.name,
            stage.run,
            memory_bytes=summary["memory_bytes"],
            disk_bytes=summary["disk_bytes"],
            seconds=summary["seconds"],
        )

    def _shard(self, stage: Stage) -> StageEstimate:
        model = self._model(stage.settings["model"])
        settings = stage.settings
        tp = settings["tp"]
        pp = settings["pp"]
        ep = settings["ep"]
        layers = tuple(map(int, settings["pp_layers"].split(","))) if settings["pp_layers"] else ()
        checkpoint = model.checkpoint
        if model.exists:
            output = self.run_directory.folder / stage.name
            plan = shard(
                model.reference,
                output,
                tp,
                pp,
                ep,
                layers,
                output_format=settings["format"],
                dry_run=True,
            )
        else:
            spec = checkpoint_spec(checkpoint)
            plan = plan_shards(
                spec, checkpoint.quantization, checkpoint.tensors, tp, pp, ep, layers
            )
        output_bytes = plan.to_json()["bytes"]
        self._models[stage.name] = StageModel(
            model.reference, checkpoint, exists=False, parallel_sizes=(tp, plan.pp, ep)
        )
        return StageEstimate(
            stage.name,
            stage.run,
            memory_bytes=LIBRARY_BYTES + CHUNKS_IN_FLIGHT * CHUNK_BYTES,
            disk_bytes=output_bytes,
            seconds=(model.weight_bytes + 2 * output_bytes) / READ_BYTES_PER_S,
        )

    def _serve(self, stage: Stage) -> StageEstimate:
        options = self.command_options(stage)
        assert isinstance(options, EngineOptions)
        model = self._model(stage.settings["model"])
        if max(model.parallel_sizes) > 1:
            tp, pp, ep = model.parallel_sizes
            options = replace(options, tp=tp, pp=pp, ep=ep)
        plan = plan_engine(model.checkpoint, options)
        seconds = START_S[plan.device.type] + model.weight_bytes / READ_BYTES_PER_S
        return StageEstimate(
            stage.name,
            stage.run,
            memory_bytes=_engine_bytes(plan),
            disk_bytes=0,
            seconds=seconds,
        )

    def _bench(self, stage: Stage) -> StageEstimate:
        settings = stage.settings
        references = [name for _, name in stage.references(("models", "baseline"))]
        names = [name for name in dict.fromkeys(references) if not self._has_no_checkpoint(name)]
        device = resolve_device(settings["device"])
        flops_per_s = measure_speed(device).flops_per_second
        max_model_len = settings["max_model_len"]
        if max_model_len == "auto":
            max_model_len = None
        engine_bytes = [0]
        seconds = 0.0
        for name in names:
            model = self._model(name)
            tp, pp, ep = model.parallel_sizes
            options = EngineOptions(
                settings["device"], settings["dtype"], max_model_len, tp=tp, pp=pp, ep=ep
            )
            engine_bytes.append(_engine_bytes(plan_engine(model.checkpoint, options)))
            seconds += 2 * (START_S[device.type] + model.weight_bytes / READ_BYTES_PER_S)
            if settings["quality"]:
                window_flops = 2 * model.num_parameters * settings["windows"]
                seconds += window_flops * settings["window_tokens"] / flops_per_s
            if settings["speed"]:
                seconds += settings["repeats"] * _round_seconds(
                    model, settings, flops_per_s, BANDWIDTH[device.type]
                )
        # On a CPU all models are in memory at the same time, on a GPU one after the other.
        memory_bytes = sum(engine_bytes) if device.type == "cpu" else max(engine_bytes)
        has_unplanned_load = settings["speed"] and any(settings.get(key) for key in UNPLANNED_LOADS)
        is_known = not settings["tasks"] and not has_unplanned_load
        return StageEstimate(
            stage.name,
            stage.run,
            memory_bytes=memory_bytes,
            disk_bytes=REPORT_BYTES,
            seconds=seconds if is_known else None,
        )

    def _has_no_checkpoint(self, reference: str) -> bool:
        """Whether a bench stage's target or baseline is a report or a server."""
        stage = self.run_directory.recipe.stages.get(reference)
        if stage:
            return stage.run == "bench"
        return reference.endswith(".json") or "://" in reference


def _engine_bytes(plan: EnginePlan) -> int:
    """The memory of one engine, or of one of its ranks."""
    return (
        LIBRARY_BYTES
        + plan.memory.weight_bytes
        + plan.memory.workspace_bytes
        + plan.memory.kv_cache_bytes
    )


def _round_seconds(
    model: StageModel, settings: Mapping[str, Any], flops_per_s: float, bandwidth: float
) -> float:
    """The time of one round of every scenario.

    All tokens are computed at `flops_per_s`, and each step reads the weights at `bandwidth`.
    """
    seconds = 0.0
    for name in settings["scenario"]:
        if name not in SCENARIOS:
            continue
        scenario = SCENARIOS[name]
        lengths = scenario.draw_lengths(Random(0))[: settings["limit"]]  # noqa: S311
        prompt_tokens = sum(prompt for prompt, _ in lengths)
        output_tokens = sum(output for _, output in lengths)
        steps = output_tokens / max(1, min(scenario.max_concurrency, len(lengths)))
        seconds += (
            2 * model.num_parameters * (prompt_tokens + output_tokens) / flops_per_s
            + steps * model.weight_bytes / bandwidth
        )
    return seconds


def _planned_checkpoint(plan: QuantizePlan) -> Checkpoint:
    """The future output of a quantize stage, with headers only: its tensors cannot be read."""
    tensors = {
        tensor.name: TensorInfo(tensor.name, tensor.dtype, tensor.shape, file, 0, tensor.nbytes)
        for file, file_tensors in plan.files.items()
        for tensor in file_tensors
    }
    config = output_config(plan.source, plan.quantization, plan.dtype)
    return Checkpoint(
        str(plan.out),
        plan.out,
        "safetensors",
        config,
        plan.source.generation_config,
        plan.source.side_files,
        tensors,
        plan.quantization,
        None,
        (),
        SafetensorsRows(plan.out),
    )
