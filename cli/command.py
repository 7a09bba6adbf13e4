"""A command: its function and options class, and the code around its run."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any

import typer

from llmkit.checkpoint.hub import is_url
from llmkit.cli.completion import CommandGroup
from llmkit.cli.error_report import INTERRUPTED, TERMINATED, Stopped
from llmkit.cli.output import Output
from llmkit.cli.typer_options import plain_help, set_signature, typer_signature
from llmkit.common.options import (
    COMMON_PANEL,
    Argument,
    Option,
    OptionField,
    build_options,
    option_fields,
)

MODEL = Argument(
    "A checkpoint: a directory, a hub id, a URL (docs/registries.md) or a .gguf file.",
    metavar="MODEL",
    is_model=True,
)
OUTPUT_DIRECTORY = Option(
    "The folder to write; it must be absent or empty.",
    flags=("--output", "-o"),
    metavar="DIR",
    in_recipes=False,
)


@dataclass(frozen=True)
class CommonOptions:
    """Options that every command has."""

    config: Annotated[
        str | None,
        Option(
            "A YAML file of `option: value` lines; the command line and LLMKIT_* variables win.",
            metavar="FILE",
            unset="none",
            panel=COMMON_PANEL,
        ),
    ] = None
    json: Annotated[bool, Option("Print one JSON document on stdout.", panel=COMMON_PANEL)] = False
    quiet: Annotated[
        bool,
        Option("Print only results and errors.", flags=("--quiet", "-q"), panel=COMMON_PANEL),
    ] = False
    debug: Annotated[bool, Option("Show tracebacks of errors.", panel=COMMON_PANEL)] = False


@dataclass(frozen=True)
class Command:
    """A command of the command line."""

    name: str  # "shard verify"
    run: Callable[[Output, Any], int | None]  # takes an object of `options`; returns the exit code
    options: type
    epilog: str | None = None

    @property
    def fields(self) -> tuple[OptionField, ...]:
        """Its arguments and options, with those that every command has."""
        return option_fields(self.options) + option_fields(CommonOptions)


def typer_app(
    commands: Iterable[Command],
    callback: Callable[..., None],
    on_output: Callable[[Output], None],
) -> typer.Typer:
    """The command line of the commands.

    callback: has the options of `llmkit` itself, and its help as the docstring. on_output: gets the
    command's Output before the command runs.
    """
    app = typer.Typer(
        name="llmkit",
        cls=CommandGroup,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(callback)
    for command in commands:
        app.command(command.name, epilog=command.epilog)(_typer_function(command, on_output))
    return app


def _typer_function(command: Command, on_output: Callable[[Output], None]) -> Callable[..., int]:
    def run(**values: Any) -> int:
        common = build_options(CommonOptions, values)
        output = Output(common.json, common.quiet, common.debug)
        on_output(output)
        try:
            _download_models(output, option_fields(command.options), values)
            return command.run(output, build_options(command.options, values)) or 0
        except KeyboardInterrupt:
            raise Stopped(INTERRUPTED) from None
        finally:
            output.close()

    run.__doc__ = _help_text(command.run)
    set_signature(run, typer_signature(command.options, CommonOptions))
    return run


def _help_text(function: Callable[..., Any]) -> str:
    """The docstring with each paragraph on one line; --help breaks lines to fit the terminal."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return plain_help(text)


def _download_models(output: Output, fields: Iterable[OptionField], values: dict[str, Any]) -> None:
    """Copies the models at URLs to this machine, with a progress bar.

    Opening such a model then finds its copy.
    """
    for field in fields:
        if not field.option.is_model:
            continue
        value = values[field.parameter]
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and is_url(reference):
                # The registries' clients are heavy: imported only for a URL.
                from llmkit.checkpoint.registry.local_copies import local_copy

                local_copy(reference, output.progress())


def stop_on_sigterm() -> None:
    """Makes SIGTERM unwind the command as Ctrl-C does, so that files are left ready to resume."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Stopped(TERMINATED)

    signal.signal(signal.SIGTERM, stop)
