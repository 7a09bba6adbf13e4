"""`llmkit run`: a recipe's stages, one command after the other, each only when something has changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.checkpoint.text import bytes_text
from llmkit.cli.output import Output, seconds_text
from llmkit.cli.recipes import find

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.bench.plan_recipe import Estimate
    from llmkit.bench.run_recipe import Outcome

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that `llmkit recipes list` shows.")
]


def run(
    output: Output,
    recipe: RecipeArgument,
    out: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where stages write.", show_default="a folder of the recipe's name"
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the recipe: model=MODEL or int4.samples=16; may be repeated.",
            show_default="none",
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Go on to the recipe's serve stage.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show memory, disk and time of each stage and write nothing.")
    ] = False,
) -> None:
    """Quantize, shard, bench and judge as a recipe says. What was done already and has not changed is skipped."""
    from llmkit.bench.recipe import read_recipe
    from llmkit.bench.run_recipe import Work, require_gates, run_recipe
    from llmkit.cli.stages import kinds, option_object, run_command

    path = find(recipe)
    read = read_recipe(path, kinds(), change or (), recipe)
    folder = Path(out or read.name)
    document = {"recipe": recipe, "output": str(folder.expanduser().absolute())}
    if dry_run:
        from llmkit.bench.plan_recipe import Planner

        estimates = Planner(Work(read, folder, kinds()), option_object).plan()
        rows = [estimate.to_json() for estimate in estimates]
        output.result(document | {"plan": rows}, lambda console: _show_plan(console, recipe, estimates))
        return
    outcomes = run_recipe(
        read,
        folder,
        kinds(),
        lambda stage, settings, to: run_command(output, stage, settings, to),
        output.message,
        serve,
    )
    stages = [outcome.to_json() for outcome in outcomes]
    output.result(document | {"stages": stages}, lambda console: _show(console, recipe, outcomes))
    require_gates(outcomes)


def _show(console: Console, recipe: str, outcomes: list[Outcome]) -> None:
    from rich.table import Table

    from llmkit.bench.report import BenchReport
    from llmkit.bench.tables import gate_table

    if gates := [result for outcome in outcomes for result in outcome.gates]:
        console.print(gate_table(BenchReport([], gates=gates)))
    table = Table("stage", "command", "result", "time", "output", title=recipe, title_justify="left")
    table.columns[3].justify = "right"
    table.columns[4].overflow = "fold"
    for outcome in outcomes:
        spent = seconds_text(outcome.seconds) if outcome.outcome == "done" else ""
        table.add_row(outcome.stage, outcome.run, outcome.outcome, spent, _shortest(outcome.output))
    console.print(table)


def _show_plan(console: Console, recipe: str, estimates: list[Estimate]) -> None:
    from rich.table import Table

    table = Table("stage", "command", "memory", "disk", "time", title=f"{recipe} (nothing written)")
    table.title_justify = "left"
    for column in table.columns[2:]:
        column.justify = "right"
    for estimate in estimates:
        sizes = [("" if size is None else bytes_text(size)) for size in (estimate.memory_bytes, estimate.disk_bytes)]
        spent = "" if estimate.seconds is None else f"about {seconds_text(estimate.seconds)}"
        table.add_row(estimate.stage, estimate.run, *sizes, "there already" if estimate.there else spent)
    memory = max((estimate.memory_bytes or 0 for estimate in estimates), default=0)
    disk = sum(estimate.disk_bytes or 0 for estimate in estimates)
    seconds = sum(estimate.seconds or 0.0 for estimate in estimates)
    table.add_section()
    table.add_row("all", "", bytes_text(memory), bytes_text(disk), f"about {seconds_text(seconds)}")
    console.print(table)


def _shortest(path: str | None) -> str:
    """Relative to where we are, if it lies below."""
    if path is None:
        return ""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
