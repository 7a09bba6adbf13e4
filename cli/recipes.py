"""`llmkit recipes`: the recipes that come with llmkit, and a check of one's own."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from llmkit.checkpoint.errors import InputError, OutputError, UsageError
from llmkit.checkpoint.output import writing
from llmkit.checkpoint.text import nearest
from llmkit.cli.output import Output

SCHEMA = "schema.json"
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="One that `llmkit recipes list` shows.")]


def shipped() -> dict[str, Path]:
    """The recipes that come with llmkit, by name."""
    with resources.as_file(resources.files("llmkit.recipes")) as folder:
        return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find(recipe: str) -> Path:
    """The file that a path or a shipped recipe's name means. Raises InputError when there is none."""
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if recipe in shipped():
        return shipped()[recipe]
    raise InputError(
        f"recipe {recipe} {'is no file' if path.exists() else 'does not exist'}",
        "A YAML file or the name of a shipped recipe was expected",
        nearest(path.name.removesuffix(".yaml"), shipped(), "Those are"),
    )


def recipes(output: Output) -> None:
    """Recipes: whole ways from a model to figures, run by `llmkit run`."""
    list_(output)


def list_(output: Output) -> None:
    """List the recipes that come with llmkit."""
    from rich.table import Table

    from llmkit.bench.recipe import read_recipe
    from llmkit.cli.stages import kinds

    read = [read_recipe(path, kinds()) for path in shipped().values()]
    rows = [
        {"name": one.name, "description": one.description, "model": one.model, "stages": list(one.stages)}
        for one in read
    ]
    table = Table("recipe", "what comes of it", "model")
    for one in read:
        table.add_row(one.name, one.description, one.model)
    output.result({"recipes": rows}, lambda console: console.print(table))


def show(output: Output, name: NameArgument) -> None:
    """Print a recipe."""
    text = _shipped(name).read_text(encoding="utf-8")
    output.result({"name": name, "text": text}, lambda console: print_plain(text))


def copy(
    output: Output,
    name: NameArgument,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to.")] = ".",
) -> None:
    """Copy a recipe, with the JSON schema that editors check it by, to change it."""
    source, to = _shipped(name), Path(folder).expanduser()
    if (to / source.name).exists():
        raise OutputError(f"{to / source.name} exists", todo="Remove it or choose another folder")
    with writing(to):
        to.mkdir(parents=True, exist_ok=True)
        files = [str(shutil.copyfile(file, to / file.name)) for file in (source, source.with_name(SCHEMA))]
    output.result({"files": files}, lambda console: print_plain("\n".join(files) + "\n"))


def validate(
    output: Output, file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe, or the name of one.")]
) -> None:
    """Check a recipe: keys, values, gates and what stages read. Models are not opened."""
    from llmkit.bench.recipe import read_recipe
    from llmkit.cli.stages import kinds

    recipe = read_recipe(find(file), kinds(), (), file)
    stages = {stage.name: stage.run for stage in recipe.stages.values()}
    told = ", ".join(f"{name} ({run})" for name, run in stages.items())
    output.result({"file": file, "stages": stages}, lambda console: print_plain(f"{file} is valid: {told}\n"))


def schema(output: Output) -> None:
    """Print the JSON schema of recipes, which editors check and complete them by."""
    print_plain(schema_text())


def schema_text() -> str:
    """The contents of recipes/schema.json."""
    from llmkit.bench.recipe import recipe_model
    from llmkit.cli.stages import kinds

    return json.dumps(recipe_model(kinds()).model_json_schema(), indent=1) + "\n"


def print_plain(text: str) -> None:
    """Text as it is: no colours, no wrapping."""
    sys.stdout.write(text)


def _shipped(name: str) -> Path:
    if name not in shipped():
        raise UsageError(f"no recipe is called {name}", nearest(name, shipped(), "Those are"))
    return shipped()[name]
