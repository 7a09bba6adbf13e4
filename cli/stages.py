"""The commands as stages of a recipe: their options become the recipe's keys, with types, defaults and sentences."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model

from llmkit.bench.recipe import Kind, Settings, Stage
from llmkit.cli import bench, quantize, serve, shard
from llmkit.cli.errors import Stopped
from llmkit.cli.output import Output
from llmkit.cli.sizes import parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.quant.plan import QuantizeOptions
    from llmkit.runtime.engine.types import EngineOptions

# What the runner decides for a stage, or what gate stages are for.
NOT_SETTINGS = {
    "output", "out", "dry_run", "resume", "plan", "gate", "max_kl", "max_ppl_ratio", "file", "html", "csv", "charts",
    "png", "junit", "summary", "more", "ray", "max_loaded", "idle_timeout",
}  # fmt: skip
TEXTS = {"N|auto": int | Literal["auto"], "SIZE": int | str}  # options that are text on a command line only
FUNCTIONS: dict[str, Callable[..., int | None]] = {
    "quantize": quantize.quantize,
    "shard": shard.shard,
    "bench": bench.bench,
    "serve": serve.serve,
}


@cache
def kinds() -> dict[str, Kind]:
    """What each command's stages may say, read and write."""
    files = ("text", "data", "trace", "tasks")
    return {
        "quantize": Kind(_settings("quantize"), "checkpoint", ("model",), ("calibration",)),
        "shard": Kind(_settings("shard"), "checkpoint", ("model",)),
        "bench": Kind(_settings("bench"), "report", ("models", "baseline", "tokenizer"), files),
        "serve": Kind(_settings("serve"), "", ("model", "draft_model")),
    }


def run_command(output: Output, stage: Stage, settings: Mapping[str, Any], out: Path | None) -> dict[str, Any]:
    """Run a stage's command on settings whose models are paths; its result, which is also shown.

    `out`: where it writes, for commands that write.
    """
    parameters = {
        parameter: str(settings[key]) if text and settings[key] is not None else settings[key]
        for key, (parameter, text) in _keys(stage.run).items()
    }
    if out is not None:
        parameters |= {"html": str(out.with_suffix(".html"))} if stage.run == "bench" else {"out": str(out)}
    stage_output = _StageOutput(output)
    try:
        if code := FUNCTIONS[stage.run](stage_output, **parameters):
            raise Stopped(code)  # a server that did not stop by itself
    finally:
        stage_output.close()
    return stage_output.document


class _StageOutput(Output):
    """A command's output inside a run: the result is kept, and shown unless there will be one JSON document."""

    def __init__(self, output: Output) -> None:
        super().__init__(output.as_json, output.quiet, output.debug)
        self.document: dict[str, Any] = {}

    def result(self, document: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """See `Output.result`."""
        self.document = dict(document)
        if not self.as_json:
            show(self.console)


def _options(run: str) -> list[tuple[str, inspect.Parameter, Any, Any]]:
    """Each option that a stage may set: its key, the parameter, its type and what Typer is told of it."""
    function = FUNCTIONS[run]
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in NOT_SETTINGS:
            kind, about = typing.get_args(hints[parameter.name])[:2]
            # Typer takes the first spelling for a default until it builds the command.
            spellings = [word for word in (about.default, *(about.param_decls or ())) if isinstance(word, str)]
            long = [word for spelling in spellings for word in spelling.split("/") if word.startswith("--")]
            key = long[0].lstrip("-").replace("-", "_") if long else parameter.name
            found.append((key, parameter, kind, about))
    return found


def _keys(run: str) -> dict[str, tuple[str, bool]]:
    """A stage's keys: the parameter of each and whether that is text."""
    return {key: (parameter.name, about.metavar in TEXTS) for key, parameter, _, about in _options(run)}


def _settings(run: str) -> type[Settings]:
    fields: dict[str, Any] = {"run": (Literal[run], ...)}
    for key, parameter, declared, about in _options(run):
        kind, default = declared, parameter.default
        if about.metavar in TEXTS:
            kind = TEXTS[about.metavar] if default is not None else TEXTS[about.metavar] | None
        if parameter.name in ("model", "models"):
            kind, default = (str if parameter.name == "model" else list[str]) | None, None
        limits = {name: limit for name, limit in (("ge", about.min), ("le", about.max)) if limit is not None}
        fields[key] = (
            kind,
            Field(... if default is parameter.empty else default, description=about.help, **limits),
        )
    return create_model(f"{run.capitalize()}Settings", __base__=Settings, **fields)


def option_object(stage: Stage) -> QuantizeOptions | EngineOptions:
    """What a quantize or serve stage's command makes of its settings, for planning."""
    from llmkit.quant.plan import QuantizeOptions
    from llmkit.runtime.engine.types import EngineOptions

    made = QuantizeOptions if stage.run == "quantize" else EngineOptions
    known = {field.name for field in dataclasses.fields(made)}
    values: dict[str, Any] = {}
    for key, parameter, _, about in _options(stage.run):
        name, value = key if key in known else parameter.name, stage.settings[key]
        if about.metavar == "N|auto":
            value = None if value == "auto" else value
        elif about.metavar == "SIZE":
            value = parse_size(key, None if value is None else str(value))
        if name in known and value is not None:
            values[name] = value
    return made(**values)
