"""`llmkit`: finds the command, its settings and its exit code. The commands import what they need when they run."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.text import nearest
from llmkit.cli import batch, bench, deploy, doctor, inspect, plan, quantize, recipes, registry, serve, shard
from llmkit.cli import run as run_recipe
from llmkit.cli.command import add, stop_on_sigterm
from llmkit.cli.errors import report, usage_error
from llmkit.cli.settings import Defaults, config_argument, options_of, read_environment, read_file
from llmkit.cli.settings import unknown_variables as unknown_environment

app = typer.Typer(
    name="llmkit",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmkit.checkpoint.version import version

        sys.stdout.write(f"llmkit {version()}\n")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Take a Hugging Face checkpoint to a served, quantized, sharded model, and prove what each step cost.

    MODEL is a directory, a hub id, a URL (s3://, gs://, models:/) or a .gguf file, everywhere.
    """


add(app, "quantize", quantize.quantize)
add(app, "shard", shard.shard, epilog="Also: llmkit shard plan | verify | merge, each with its own --help.")
add(app, "shard plan", shard.plan)
add(app, "shard verify", shard.verify)
add(app, "shard merge", shard.merge)
add(app, "bench", bench.bench, epilog="Also: llmkit bench compare | show, each with its own --help.")
add(app, "bench compare", bench.compare)
add(app, "bench show", bench.show)
add(app, "serve", serve.serve)
add(app, "plan", plan.plan)
add(app, "deploy ray", deploy.ray)
add(app, "deploy triton", deploy.triton)
add(app, "deploy vllm", deploy.vllm)
add(app, "batch", batch.batch)
add(app, "run", run_recipe.run)
add(app, "recipes", recipes.recipes, epilog="Also: llmkit recipes list | show | copy | validate | schema.")
add(app, "recipes list", recipes.list_)
add(app, "recipes show", recipes.show)
add(app, "recipes copy", recipes.copy)
add(app, "recipes validate", recipes.validate)
add(app, "recipes schema", recipes.schema)
add(app, "pull", registry.pull)
add(app, "push", registry.push)
add(app, "sign", registry.sign)
add(app, "verify", registry.verify)
add(app, "inspect", inspect.inspect)
add(app, "doctor", doctor.doctor)


def main() -> None:
    """The `llmkit` program: runs it on sys.argv and exits."""
    stop_on_sigterm()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line, without the program's name, and returns the exit code."""
    words, name = list(arguments), ""
    defaults = Defaults()
    debug = "--debug" in words
    try:
        commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        words = _join_subcommand(words, commands)
        name = words[0] if words[0] in commands else ""
        if name:
            options = options_of(commands[name])
            if path := config_argument(words[1:], os.environ):
                read_file(path, options, defaults)
            read_environment(os.environ, name, options, defaults)
            debug = debug or bool(defaults.values.get("debug"))
            for warning in unknown_environment(os.environ, commands):
                sys.stderr.write(f"llmkit {name}: {warning}\n")
        code = app(
            args=words, prog_name="llmkit", standalone_mode=False, default_map={name: defaults.values} if name else {}
        )
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        if hasattr(error, "format_message"):
            return report(usage_error(error, words, defaults), name, debug)
        return report(error, name, debug, _resuming(name, arguments))


def _join_subcommand(words: list[str], commands: dict[str, Any]) -> list[str]:
    """`shard verify DIR` names the command "shard verify", and `shard DIR` the command "shard".

    Raises: UsageError for a command there is none of, with the nearest.
    """
    if not words:
        return ["--help"]
    first, second = words[0], words[1] if len(words) > 1 else ""
    if first.startswith("-"):
        return words
    if f"{first} {second}" in commands:
        return [f"{first} {second}", *words[2:]]
    subcommands = [command.split()[1] for command in commands if command.startswith(f"{first} ")]
    if first not in commands and subcommands:
        kinds = " | ".join(subcommands)
        raise UsageError(f"no such command: {f'{first} {second}'.strip()}", f"llmkit {first} {kinds} was expected")
    if first not in commands:
        known = list(dict.fromkeys(command.split()[0] for command in commands))
        raise UsageError(f"no such command: {first}", nearest(first, known, "Commands are"))
    close = difflib.get_close_matches(second, subcommands, n=1, cutoff=0.75)
    if close and not Path(second).exists():
        raise UsageError(f"no such command: {first} {second}", f"The nearest is {first} {close[0]}")
    return words


def _resuming(command: str, arguments: list[str]) -> str:
    """The command line that takes up interrupted work, for the commands that can."""
    if command == "quantize":
        return shlex.join(["llmkit", *arguments, *(["--resume"] if "--resume" not in arguments else [])])
    if command == "batch" and "-" in arguments:  # what went to stdout, or came from stdin, does not come again
        return ""
    resumed = ("shard", "shard merge", "batch", "run", "pull", "push")
    return shlex.join(["llmkit", *arguments]) if command in resumed else ""


if __name__ == "__main__":
    main()
