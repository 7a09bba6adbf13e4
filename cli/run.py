"""`llmkit run`: runs the stages of a recipe whose outputs are out of date, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmkit.cli.output import Output, seconds_text
from llmkit.cli.recipes import find_recipe
from llmkit.common.formatting import bytes_text
from llmkit.common.options import Argument, Option

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.pipeline.plan_recipe import StageEstimate
    from llmkit.pipeline.run_recipe import StageResult


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What `llmkit run` takes."""

    recipe: Annotated[
        str,
        Argument(
            "A YAML file, or the name of a recipe that `llmkit recipes list` shows.",
            metavar="RECIPE",
        ),
    ]
    output: Annotated[
        str | None,
        Option(
            "Where stages write.",
            flags=("--output", "-o"),
            metavar="DIR",
            unset="a folder of the recipe's name",
        ),
    ] = None
    changes: Annotated[
        tuple[str, ...],
        Option(
            "Change the recipe: model=MODEL or int4.samples=16; may be repeated.",
            flags=("--set",),
            metavar="KEY=VALUE",
            unset="none",
        ),
    ] = ()
    serve: Annotated[bool, Option("Run the recipe's serve stage too.")] = False
    dry_run: Annotated[
        bool, Option("Show memory, disk and time of each stage and write nothing.")
    ] = False


def run(output: Output, arguments: RunArguments) -> None:
    """Quantize, shard, bench and check gates as a recipe says. What was done already and has not
    changed is skipped.
    """
    # The recipe engine imports torch.
    from llmkit.cli.recipe_stages import planned_options, run_command, stage_types
    from llmkit.pipeline.recipe import read_recipe
    from llmkit.pipeline.run_recipe import RunDirectory, require_gates, run_recipe

    name = arguments.recipe
    recipe = read_recipe(find_recipe(name), stage_types(), arguments.changes, name)
    directory = Path(arguments.output or recipe.name)
    document = {"recipe": name, "output": str(directory.expanduser().absolute())}
    if arguments.dry_run:
        from llmkit.pipeline.plan_recipe import RecipePlanner

        estimates = RecipePlanner(
            RunDirectory(recipe, directory, stage_types()), planned_options
        ).plan()
        rows = [estimate.to_json() for estimate in estimates]
        output.result(
            document | {"plan": rows}, lambda console: _show_plan(console, name, estimates)
        )
        return
    results = run_recipe(
        recipe,
        directory,
        stage_types(),
        lambda stage, settings, path: run_command(output, stage, settings, path),
        output.message,
        arguments.serve,
    )
    stages = [result.to_json() for result in results]
    output.result(document | {"stages": stages}, lambda console: _show(console, name, results))
    require_gates(results)


def _show(console: Console, recipe: str, outcomes: list[StageResult]) -> None:
    from rich.table import Table

    from llmkit.bench.bench_report import BenchReport
    from llmkit.bench.report_tables import gate_table

    gates = [gate for outcome in outcomes for gate in outcome.gates]
    if gates:
        console.print(gate_table(BenchReport([], gates=gates)))
    table = Table(
        "stage", "command", "result", "time", "output", title=recipe, title_justify="left"
    )
    table.columns[3].justify = "right"
    table.columns[4].overflow = "fold"
    for outcome in outcomes:
        spent = seconds_text(outcome.seconds) if outcome.outcome == "done" else ""
        table.add_row(outcome.stage, outcome.run, outcome.outcome, spent, _shortest(outcome.output))
    console.print(table)


def _show_plan(console: Console, recipe: str, estimates: list[StageEstimate]) -> None:
    from rich.table import Table

    table = Table("stage", "command", "memory", "disk", "time", title=f"{recipe} (nothing written)")
    table.title_justify = "left"
    for column in table.columns[2:]:
        column.justify = "right"
    for estimate in estimates:
        sizes = [
            ("" if size is None else bytes_text(size))
            for size in (estimate.memory_bytes, estimate.disk_bytes)
        ]
        spent = "" if estimate.seconds is None else f"about {seconds_text(estimate.seconds)}"
        table.add_row(
            estimate.stage, estimate.run, *sizes, "there already" if estimate.there else spent
        )
    memory = max((estimate.memory_bytes or 0 for estimate in estimates), default=0)
    disk = sum(estimate.disk_bytes or 0 for estimate in estimates)
    seconds = sum(estimate.seconds or 0.0 for estimate in estimates)
    table.add_section()
    table.add_row("all", "", bytes_text(memory), bytes_text(disk), f"about {seconds_text(seconds)}")
    console.print(table)


def _shortest(path: str | None) -> str:
    """The path, relative to the current directory if it is inside."""
    if path is None:
        return ""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
