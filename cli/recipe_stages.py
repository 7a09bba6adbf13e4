"""The commands as stages of a recipe.

Their options classes give the recipe's keys, types and defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, create_model

from llmkit.cli.bench import BenchArguments, bench
from llmkit.cli.error_report import Stopped
from llmkit.cli.output import Output
from llmkit.cli.quantize import QuantizeArguments, quantize
from llmkit.cli.serve import ServeArguments, serve
from llmkit.cli.shard import ShardArguments, shard
from llmkit.common.options import Argument, OptionField, build_options, option_fields
from llmkit.pipeline.recipe import Stage, StageType, StrictModel

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.quant.quantize_options import QuantizeOptions
    from llmkit.runtime.engine.engine_options import EngineOptions

T = TypeVar("T")

# The commands that a stage can run, with their options classes.
COMMANDS: dict[str, tuple[Callable[[Output, Any], int | None], type]] = {
    "quantize": (quantize, QuantizeArguments),
    "shard": (shard, ShardArguments),
    "bench": (bench, BenchArguments),
    "serve": (serve, ServeArguments),
}


@cache
def stage_types() -> dict[str, StageType]:
    """The keys that a stage of each command may have, the models it reads and its output."""
    bench_files = ("text", "data", "trace", "tasks")
    bench_models = ("models", "baseline", "tokenizer")
    return {
        "quantize": StageType(_settings("quantize"), "checkpoint", ("model",), ("calibration",)),
        "shard": StageType(_settings("shard"), "checkpoint", ("model",)),
        "bench": StageType(_settings("bench"), "report", bench_models, bench_files),
        "serve": StageType(_settings("serve"), "", ("model", "draft_model")),
    }


def run_command(
    output: Output, stage: Stage, settings: Mapping[str, Any], path: Path | None
) -> dict[str, Any]:
    """Runs a stage's command; returns its result, which is also shown.

    settings: the stage's settings, with paths in place of stages' names. path: where the command
    writes; None for a command that writes nothing.
    """
    command, options = COMMANDS[stage.run]
    values = dict(settings)
    if path is not None:
        if stage.run == "bench":
            values["html"] = str(path.with_suffix(".html"))
        else:
            values["output"] = str(path)
    stage_output = _StageOutput(output)
    try:
        code = command(stage_output, _build(options, values))
        if code:
            raise Stopped(code)  # a server that was stopped
    finally:
        stage_output.close()
    return stage_output.document


def planned_options(stage: Stage) -> QuantizeOptions | EngineOptions:
    """The options of a quantize or serve stage, for planning."""
    if stage.run == "quantize":
        return _build(QuantizeArguments, {"output": "", **stage.settings}).options
    return _build(ServeArguments, stage.settings).options.engine


class _StageOutput(Output):
    """A command's output inside a run.

    The result is kept. It is also shown, unless the run prints one JSON document.
    """

    def __init__(self, output: Output) -> None:
        super().__init__(output.as_json, output.quiet, output.debug)
        self.document: dict[str, Any] = {}

    def result(self, document: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """See `Output.result`."""
        self.document = dict(document)
        if not self.as_json:
            show(self.console)


def _build(options: type[T], values: Mapping[str, Any]) -> T:
    """The command's options from values by name."""
    parameters = {field.name: field.parameter for field in option_fields(options)}
    return build_options(
        options, {parameters[name]: value for name, value in values.items() if name in parameters}
    )


def _settings(run: str) -> type[StrictModel]:
    """The pydantic model of a stage that runs a command."""
    _, options = COMMANDS[run]
    fields: dict[str, Any] = {"run": (Literal[run], ...)}
    for field in option_fields(options):
        if field.option.in_recipes:
            fields[field.name] = _setting(field)
    return create_model(f"{run.capitalize()}Settings", __base__=StrictModel, **fields)


def _setting(field: OptionField) -> tuple[Any, Any]:
    """The type of a recipe's key, and pydantic's description of it."""
    option = field.option
    kind = field.value_type
    default = ... if field.required else field.value_default
    if option.format is not None and option.format.yaml_type is not None:
        kind = option.format.yaml_type
    if isinstance(option, Argument):
        default = None  # the recipe's model
    if default is None:
        kind = kind | None
    limits: dict[str, Any] = {}
    if option.min is not None:
        limits["ge"] = option.min
    if option.max is not None:
        limits["le"] = option.max
    return kind, Field(default, description=option.help, **limits)
