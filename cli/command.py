"""How a function becomes a command: the options every command has, and what surrounds its run."""

from __future__ import annotations

import functools
import inspect
import signal
import typing
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from llmkit.checkpoint.hub import looks_remote
from llmkit.cli.errors import INTERRUPTED, TERMINATED, Stopped
from llmkit.cli.output import Output

COMMON = "Common options"

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=COMMON)]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only results and errors.", rich_help_panel=COMMON)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=COMMON)]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A YAML file of `option: value` lines; the command line and LLMKIT_* variables win.",
        show_default="none",
        rich_help_panel=COMMON,
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cuda", "cpu"],
    typer.Option("--device", help="Where to compute; auto takes CUDA when there is one.", rich_help_panel=COMMON),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Seed of everything drawn at random.", rich_help_panel=COMMON)
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A checkpoint: a directory, a hub id, a URL (docs/registries.md) or a .gguf file."
    ),
]

Command = Callable[..., int | None]


def add(app: typer.Typer, name: str, function: Command, epilog: str = "") -> None:
    """Registers `function(output, **options)` as the command `name`, its docstring as the help.

    Every command also takes --json, --quiet, --debug and --config. What the function returns is the exit code.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    for option, annotation, default in (
        ("config", ConfigOption, None), ("json", JsonOption, False),
        ("quiet", QuietOption, False), ("debug", DebugOption, False),
    ):  # fmt: skip
        parameters.append(
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    @functools.wraps(function)
    def run(**options: Any) -> int:
        output = Output(options.pop("json"), options.pop("quiet"), options.pop("debug"))
        options.pop("config")  # read before the options were parsed
        try:
            if name != "serve":  # which asks for its models' copies itself
                _fetch(output, options)
            return function(output, **options) or 0
        except KeyboardInterrupt:
            raise Stopped(INTERRUPTED) from None
        finally:
            output.close()

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, epilog=epilog or None)(run)


def _fetch(output: Output, options: dict[str, Any]) -> None:
    """Makes the local copies of models that are at a URL, with a bar: whoever opens them later finds them."""
    for parameter in ("model", "models", "baseline", "draft_model"):
        given = options.get(parameter)
        for reference in given if isinstance(given, list) else [given]:
            if isinstance(reference, str) and looks_remote(reference):
                from llmkit.checkpoint.remote import cached

                cached(reference, output.progress())


def stop_on_sigterm() -> None:
    """Makes SIGTERM unwind the command as Ctrl-C does, so that files are left ready to resume."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Stopped(TERMINATED)

    signal.signal(signal.SIGTERM, stop)
