"""`llmkit`: runs a command line and returns its exit code.

A command imports what it needs when it runs.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from llmkit.cli import (
    batch,
    bench,
    chat,
    checkpoints_list,
    convert,
    deploy,
    deploy_aws,
    deploy_functions,
    deploy_trtllm,
    doctor,
    inspect,
    plan,
    quantize,
    recipes,
    serve,
    servers_list,
    shard,
)
from llmkit.cli import registries as registry
from llmkit.cli import run as run_recipe
from llmkit.cli.command import Command, stop_on_sigterm, typer_app
from llmkit.cli.error_report import report
from llmkit.cli.output import Output
from llmkit.cli.parser_errors import usage_error
from llmkit.cli.settings import (
    Defaults,
    config_argument,
    read_environment,
    read_file,
    spellings,
    unknown_variables,
)
from llmkit.common.errors import UsageError
from llmkit.common.formatting import nearest


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmkit.common.version import version

        sys.stdout.write(f"llmkit {version()}\n")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Take a Hugging Face checkpoint to a served, quantized, sharded model, and prove what each
    step cost.

    MODEL is a directory, a hub id, a URL (s3://, gs://, models:/) or a .gguf file, everywhere.
    """


SHARD_EPILOG = "Also: llmkit shard plan | verify | merge, each with its own --help."
BENCH_EPILOG = (
    "Also: llmkit bench compare | show | alerts | trace | route | semantic-cache, each with its "
    "own --help."
)
RECIPES_EPILOG = "Also: llmkit recipes list | show | copy | validate | schema."

# In the order of `llmkit --help`.
COMMANDS = {
    command.name: command
    for command in (
        Command("quantize", quantize.quantize, quantize.QuantizeArguments),
        Command("convert", convert.convert, convert.ConvertArguments),
        Command("shard", shard.shard, shard.ShardArguments, SHARD_EPILOG),
        Command("shard plan", shard.plan, shard.ShardPlanArguments),
        Command("shard verify", shard.verify, shard.VerifyArguments),
        Command("shard merge", shard.merge, shard.MergeArguments),
        Command("bench", bench.bench, bench.BenchArguments, BENCH_EPILOG),
        Command("bench compare", bench.compare, bench.CompareArguments),
        Command("bench show", bench.show, bench.ShowArguments),
        Command("bench alerts", bench.alerts, bench.AlertsArguments),
        Command("bench trace", bench.trace, bench.TraceArguments),
        Command("bench route", bench.route, bench.RouteArguments),
        Command("bench semantic-cache", bench.semantic_cache, bench.SemanticCacheArguments),
        Command("serve", serve.serve, serve.ServeArguments),
        Command("chat", chat.chat, chat.ChatArguments),
        Command("ps", servers_list.ps, recipes.NoArguments),
        Command("plan", plan.plan, plan.PlanArguments),
        Command("deploy ray", deploy.ray, deploy.RayArguments),
        Command("deploy gateway", deploy.gateway, deploy.GatewayArguments),
        Command("deploy triton", deploy.triton, deploy.TritonArguments),
        Command("deploy vllm", deploy.vllm, deploy.VllmArguments),
        Command("deploy trtllm", deploy_trtllm.trtllm, deploy_trtllm.TrtllmArguments),
        Command("deploy sagemaker", deploy_aws.sagemaker, deploy_aws.SagemakerArguments),
        Command("deploy ecs", deploy_aws.ecs, deploy_aws.EcsArguments),
        Command("deploy lambda", deploy_functions.aws_lambda, deploy_functions.LambdaArguments),
        Command("deploy modal", deploy_functions.modal, deploy_functions.ModalArguments),
        Command("deploy runpod", deploy_functions.runpod, deploy_functions.RunpodArguments),
        Command(
            "deploy replicate", deploy_functions.replicate, deploy_functions.ReplicateArguments
        ),
        Command("batch", batch.batch, batch.BatchArguments),
        Command("run", run_recipe.run, run_recipe.RunArguments),
        Command("recipes", recipes.recipes, recipes.NoArguments, RECIPES_EPILOG),
        Command("recipes list", recipes.list_recipes, recipes.NoArguments),
        Command("recipes show", recipes.show, recipes.ShowRecipeArguments),
        Command("recipes copy", recipes.copy, recipes.CopyRecipeArguments),
        Command("recipes validate", recipes.validate, recipes.ValidateRecipeArguments),
        Command("recipes schema", recipes.schema, recipes.NoArguments),
        Command("pull", registry.pull, registry.PullArguments),
        Command("push", registry.push, registry.PushArguments),
        Command("sign", registry.sign, registry.SignArguments),
        Command("verify", registry.verify, registry.VerifyArguments),
        Command("list", checkpoints_list.list_checkpoints, checkpoints_list.ListArguments),
        Command("inspect", inspect.inspect, inspect.InspectArguments),
        Command("doctor", doctor.doctor, doctor.DoctorArguments),
    )
}


def app(on_output: Callable[[Output], None] = lambda output: None) -> typer.Typer:
    """The command line of all commands. on_output: gets the Output of the command that runs."""
    return typer_app(COMMANDS.values(), _root, on_output)


def main() -> None:
    """The `llmkit` program: runs it on sys.argv and exits."""
    stop_on_sigterm()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line, without the program's name, and returns the exit code."""
    words = list(arguments)
    name = ""
    defaults = Defaults()
    debug = "--debug" in words
    outputs: list[Output] = []  # of the command, once its options are read

    def fail(error: BaseException, resume: str = "") -> int:
        as_json = _json_wanted(words, defaults)
        # Stdout gets one document: a failed gate is reported by its result.
        if outputs:
            as_json = outputs[0].as_json and not outputs[0].has_result
        return report(error, name, debug, resume, as_json)

    try:
        words = _join_subcommand(words, COMMANDS)
        if words[0] in COMMANDS:
            name = words[0]
            options = spellings(COMMANDS[name])
            path = config_argument(words[1:], os.environ)
            if path:
                read_file(path, options, defaults)
            read_environment(os.environ, name, options, defaults)
            debug = debug or bool(defaults.values.get("debug"))
            for warning in unknown_variables(os.environ, COMMANDS):
                sys.stderr.write(f"llmkit {name}: {warning}\n")
        code = app(outputs.append)(
            args=words,
            prog_name="llmkit",
            standalone_mode=False,
            default_map={name: defaults.values} if name else {},
        )
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        if hasattr(error, "format_message"):
            return fail(usage_error(error, words, defaults))
        return fail(error, _resume_command(name, arguments))


def _json_wanted(words: list[str], defaults: Defaults) -> bool:
    """Whether a command line that could not be read has --json."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options or bool(defaults.values.get("json"))


def _join_subcommand(words: list[str], commands: Mapping[str, Command]) -> list[str]:
    """Join the words of a command: `shard verify DIR` is "shard verify", `shard DIR` is "shard".

    Raises UsageError for an unknown command, with the nearest one.
    """
    if not words:
        return ["--help"]
    first = words[0]
    second = words[1] if len(words) > 1 else ""
    if first.startswith("-"):
        return words
    if f"{first} {second}" in commands:
        return [f"{first} {second}", *words[2:]]
    subcommands = [command.split()[1] for command in commands if command.startswith(f"{first} ")]
    if first not in commands and subcommands:
        raise UsageError(
            f"no such command: {f'{first} {second}'.strip()}",
            f"llmkit {first} {' | '.join(subcommands)} was expected",
        )
    if first not in commands:
        known = list(dict.fromkeys(command.split()[0] for command in commands))
        raise UsageError(f"no such command: {first}", nearest(first, known, "Commands are"))
    close = difflib.get_close_matches(second, subcommands, n=1, cutoff=0.75)
    if close and not Path(second).exists():
        raise UsageError(f"no such command: {first} {second}", f"The nearest is {first} {close[0]}")
    return words


def _resume_command(command: str, arguments: list[str]) -> str:
    """The command line that resumes interrupted work; empty for a command that cannot."""
    if command == "quantize":
        resume = [] if "--resume" in arguments else ["--resume"]
        return shlex.join(["llmkit", *arguments, *resume])
    if command == "batch" and "-" in arguments:
        return ""  # stdin cannot be read again, and stdout not be continued
    if command in ("convert", "shard", "shard merge", "batch", "run", "pull", "push"):
        return shlex.join(["llmkit", *arguments])
    return ""


if __name__ == "__main__":
    main()
