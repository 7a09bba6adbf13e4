"""`llmkit recipes`: the recipes that come with llmkit, and a check of other recipes."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from llmkit.checkpoint.output_directory import write_errors
from llmkit.cli.output import Output
from llmkit.common.errors import InputError, OutputError, UsageError
from llmkit.common.formatting import nearest
from llmkit.common.options import Argument

SCHEMA = "schema.json"
NAME = Argument("One that `llmkit recipes list` shows.", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class NoArguments:
    """What a command without arguments takes."""


@dataclass(frozen=True, kw_only=True)
class ShowRecipeArguments:
    """What `llmkit recipes show` takes."""

    name: Annotated[str, NAME]


@dataclass(frozen=True, kw_only=True)
class CopyRecipeArguments:
    """What `llmkit recipes copy` takes."""

    name: Annotated[str, NAME]
    directory: Annotated[str, Argument("Where to.", metavar="DIR")] = "."


@dataclass(frozen=True, kw_only=True)
class ValidateRecipeArguments:
    """What `llmkit recipes validate` takes."""

    file: Annotated[str, Argument("A recipe, or the name of one.", metavar="FILE")]


def shipped() -> dict[str, Path]:
    """The recipes that come with llmkit, by name."""
    with resources.as_file(resources.files("llmkit.recipes")) as folder:
        return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """The file of a recipe that is given by its path or its shipped name.

    Raises InputError when it is neither.
    """
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if recipe in shipped():
        return shipped()[recipe]
    raise InputError(
        f"recipe {recipe} {'is not a file' if path.exists() else 'does not exist'}",
        "A YAML file or the name of a shipped recipe was expected",
        nearest(path.name.removesuffix(".yaml"), shipped(), "Those are"),
    )


def recipes(output: Output, arguments: NoArguments) -> None:
    """Recipes: stages from a model to figures, which `llmkit run` runs."""
    list_recipes(output, arguments)


def list_recipes(output: Output, _arguments: NoArguments) -> None:
    """List the recipes that come with llmkit."""
    from rich.table import Table

    from llmkit.cli.recipe_stages import stage_types
    from llmkit.pipeline.recipe import read_recipe

    table = Table("recipe", "what comes of it", "model")
    rows = []
    for path in shipped().values():
        recipe = read_recipe(path, stage_types())
        table.add_row(recipe.name, recipe.description, recipe.model)
        rows.append(
            {
                "name": recipe.name,
                "description": recipe.description,
                "model": recipe.model,
                "stages": list(recipe.stages),
            }
        )
    output.result({"recipes": rows}, lambda console: console.print(table))


def show(output: Output, arguments: ShowRecipeArguments) -> None:
    """Print a recipe."""
    text = _shipped(arguments.name).read_text(encoding="utf-8")
    output.result({"name": arguments.name, "text": text}, lambda console: print_plain(text))


def copy(output: Output, arguments: CopyRecipeArguments) -> None:
    """Copy a recipe, with the JSON schema that editors check it by, to change it."""
    source = _shipped(arguments.name)
    directory = Path(arguments.directory).expanduser()
    target = directory / source.name
    if target.exists():
        raise OutputError(f"{target} exists", todo="Remove it or choose another folder")
    files = []
    with write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        files = [
            str(shutil.copyfile(file, directory / file.name))
            for file in (source, source.with_name(SCHEMA))
        ]
    output.result({"files": files}, lambda console: print_plain("\n".join(files) + "\n"))


def validate(output: Output, arguments: ValidateRecipeArguments) -> None:
    """Check a recipe: keys, values, gates and what stages read. Models are not opened."""
    from llmkit.cli.recipe_stages import stage_types
    from llmkit.pipeline.recipe import read_recipe

    file = arguments.file
    recipe = read_recipe(find_recipe(file), stage_types(), (), file)
    stages = {stage.name: stage.run for stage in recipe.stages.values()}
    summary = ", ".join(f"{name} ({run})" for name, run in stages.items())
    output.result(
        {"file": file, "stages": stages},
        lambda console: print_plain(f"{file} is valid: {summary}\n"),
    )


def schema(_output: Output, _arguments: NoArguments) -> None:
    """Print the JSON schema of recipes, which editors check and complete them by."""
    print_plain(schema_text())


def schema_text() -> str:
    """The contents of recipes/schema.json."""
    from llmkit.cli.recipe_stages import stage_types
    from llmkit.pipeline.recipe import recipe_model

    return json.dumps(recipe_model(stage_types()).model_json_schema(), indent=1) + "\n"


def print_plain(text: str) -> None:
    """Prints text without colours and without wrapping."""
    sys.stdout.write(text)


def _shipped(name: str) -> Path:
    if name not in shipped():
        raise UsageError(f"no recipe is called {name}", nearest(name, shipped(), "Those are"))
    return shipped()[name]
