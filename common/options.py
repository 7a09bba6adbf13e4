"""Options: the type, default, limits and help sentence of a setting, in one place.

A command's options are the fields of a dataclass. A field is an option when its annotation has an
`Option` or an `Argument`:

    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", metavar="N")] = 8000

The command line, the LLMKIT_* variables, the keys of --config files and recipes, and
docs/options.md are all made from these fields. A field that is another dataclass adds that class's
options. A field without metadata is set by code only.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmkit.common.errors import UsageError

COMMON_PANEL = "Common options"
PERFORMANCE_PANEL = "Performance"

T = TypeVar("T")


@dataclass(frozen=True)
class ValueFormat:
    """How a value is written on the command line and in YAML, if not as the field's type."""

    parse: Callable[[str, Any], Any]  # (option, written value) -> value; raises UsageError
    format: Callable[[Any], Any] = str  # value -> written value; shows the default in --help
    written_type: Any = str  # what the command-line parser reads: str, bool or list[str]
    yaml_type: Any = None  # the type in YAML, when it differs from `written_type`: int | str
    none: Any = None  # how None is written: "auto"; None: by leaving the option out


@dataclass(frozen=True)
class Option:
    """The metadata of an option, beside the field's name, type and default."""

    help: str  # one sentence
    flags: tuple[str, ...] = ()  # spellings; by default "--" and the field's name
    metavar: str | None = None  # what --help shows for the value
    unset: str | None = None  # shown in --help as the default: what happens without the option
    choices: tuple[str, ...] = ()  # the allowed values of a str
    min: float | None = None  # limits, which --help and the recipe schema show
    max: float | None = None
    check: Callable[[str, Any], None] | None = None  # (option, value); raises for a bad value
    format: ValueFormat | None = None
    panel: str | None = None  # heading in --help
    follows: str | None = None  # the option before it in --help; None: the order of the fields
    in_recipes: bool = True  # False: a recipe's stage cannot set it
    is_secret: bool = False  # not read from files; its variable is read where it is needed
    is_model: bool = False  # names a model: a remote one is downloaded before the command runs
    completes_models: bool = False  # the shell completes models, as it does where `is_model` is set


@dataclass(frozen=True)
class Argument(Option):
    """A positional argument."""


@dataclass(frozen=True)
class ExcludeFields:
    """Excludes fields of a nested dataclass from a command's options.

    It stands in the annotation of the field that is the nested dataclass.
    """

    fields: tuple[str, ...]


@dataclass(frozen=True)
class OptionField:
    """An option or argument of a command, with its metadata, type and default."""

    path: tuple[str, ...]  # field names, from the command's class to the field
    option: Option
    type: Any  # of the field, without metadata
    default: Any  # of the field; MISSING when the option is required

    @property
    def name(self) -> str:
        """Key in a --config file or recipe: "group_size" for --group-size."""
        return option_name(self.spellings[0]) if self.spellings else self.path[-1]

    @property
    def parameter(self) -> str:
        """A unique identifier, even when two nested classes have a field of the same name."""
        return "_".join(self.path)

    @property
    def flags(self) -> tuple[str, ...]:
        """The spellings as the command-line parser takes them; () for an argument."""
        if isinstance(self.option, Argument):
            return ()
        return self.option.flags or ("--" + self.path[-1].replace("_", "-"),)

    @property
    def spellings(self) -> list[str]:
        """The long flags that set the option: "--eval" of "--eval/--no-eval"."""
        return [flag.split("/")[0] for flag in self.flags if flag.split("/")[0].startswith("--")]

    @property
    def negated_spellings(self) -> list[str]:
        """The long flags that set a bool to False: "--no-eval" of "--eval/--no-eval"."""
        return [flag.split("/")[1] for flag in self.flags if "/" in flag]

    @property
    def label(self) -> str:
        """The name in error messages."""
        if self.spellings:
            return self.spellings[0]
        return self.option.metavar or self.path[-1]

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING

    @property
    def is_flag(self) -> bool:
        """Whether the option takes no value."""
        return self.value_type is bool

    @property
    def is_list(self) -> bool:
        """Whether the option may be repeated."""
        return typing.get_origin(self.value_type) is list

    @property
    def value_type(self) -> Any:
        """The type that the command-line parser reads, without None."""
        if self.option.format is not None:
            return self.option.format.written_type
        if self.option.choices:
            return Literal[self.option.choices]
        return _plain_type(self.type)

    @property
    def value_default(self) -> Any:
        """The default for the command-line parser; None: the option is not given.

        It has no meaning for a required option.
        """
        if self.required or self.option.unset is not None:
            return None
        value_format = self.option.format
        if value_format is not None and self.default is None:
            return value_format.none
        if isinstance(self.default, tuple) and not self.default:
            return None
        if value_format is not None:
            return value_format.format(self.default)
        return list(self.default) if isinstance(self.default, tuple) else self.default

    def read(self, value: Any) -> Any:
        """Convert a value from the command line or a recipe to the field's value.

        Raises what `parse` and `check` raise.
        """
        if self.option.format is not None:
            text = str(value) if self.option.format.written_type is str else value
            value = self.option.format.parse(self.label, text)
        elif isinstance(value, list):
            value = tuple(value)
        elif _without_none(self.type) is Path:
            value = Path(value)
        if self.option.check is not None and value is not None:
            for item in value if self.is_list else (value,):
                self.option.check(self.label, item)
        return value


def option_name(spelling: str) -> str:
    """The key for a flag: "group_size" for "--group-size"."""
    return spelling.lstrip("-").replace("-", "_")


def option_fields(options: type) -> tuple[OptionField, ...]:
    """All options of a dataclass, those of nested dataclasses included, in the order of --help."""
    return _ordered_fields(options)


@functools.cache
def _ordered_fields(options: Any) -> tuple[OptionField, ...]:
    fields = list(_all_fields(options, ()))
    ordered = [field for field in fields if field.option.follows is None]
    for field in fields:
        if field.option.follows is not None:
            names = [other.name for other in ordered]
            ordered.insert(names.index(field.option.follows) + 1, field)
    return tuple(ordered)


def changed_options(options: Any, names: Collection[str] | None = None) -> list[str]:
    """The labels of the options of an object that differ from their defaults: ["--rate"].

    names: of the fields that count; None: all. An option that a command would ignore is refused.
    """
    return [
        field.label
        for field in option_fields(type(options))
        if (names is None or field.path[-1] in names)
        and functools.reduce(getattr, field.path, options) != field.default
    ]


def build_options(options: type[T], values: Mapping[str, Any]) -> T:
    """An object of the dataclass `options`.

    values: by `OptionField.parameter`, as the command-line parser reads them. A value that is None
    or absent means the field's default.
    Raises UsageError for a bad value, and what an option's `check` raises.
    """
    return _build(options, values, ())


def _build(options: type[T], values: Mapping[str, Any], path: tuple[str, ...]) -> T:
    arguments: dict[str, Any] = {}
    for name, member in _members(options, path).items():
        if isinstance(member, type):
            arguments[name] = _build(member, values, (*path, name))
            continue
        value = values.get(member.parameter)
        if value is not None:
            arguments[name] = member.read(value)
        elif member.required:
            raise UsageError(f"{member.label} is missing")
    return options(**arguments)


def _all_fields(options: type, path: tuple[str, ...]) -> Iterator[OptionField]:
    annotations = typing.get_type_hints(options, include_extras=True)
    for name, member in _members(options, path).items():
        if isinstance(member, type):
            without = _metadata(annotations[name], ExcludeFields)
            for field in _all_fields(member, (*path, name)):
                if without is None or field.path[-1] not in without.fields:
                    yield field
        else:
            yield member


def _members(options: type, path: tuple[str, ...]) -> dict[str, OptionField | type]:
    """The fields of a dataclass that are options, and those that are dataclasses with options."""
    members: dict[str, OptionField | type] = {}
    annotations = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        annotation = annotations[field.name]
        option = _metadata(annotation, Option)
        field_type = annotation
        if typing.get_origin(annotation) is typing.Annotated:
            field_type = typing.get_args(annotation)[0]
        if isinstance(field_type, type) and dataclasses.is_dataclass(field_type):
            members[field.name] = field_type
        elif option is not None:
            default = field.default
            if field.default_factory is not MISSING:
                default = field.default_factory()
            members[field.name] = OptionField((*path, field.name), option, field_type, default)
    return members


def _metadata(annotation: Any, kind: type[T]) -> T | None:
    """The metadata of class `kind` in an `Annotated` type; None when there is none."""
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, kind):
            return item
    return None


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    (kind,) = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    return kind


def _plain_type(annotation: Any) -> Any:
    """A type that command-line parsers know: list[str] for tuple[str, ...], str for Path."""
    kind = _without_none(annotation)
    if typing.get_origin(kind) is tuple:
        return list[typing.get_args(kind)[0]]  # type: ignore[misc]
    return str if kind is Path else kind


DEVICE = Option(
    "Where to compute; auto takes CUDA when there is one.",
    choices=("auto", "cuda", "cpu"),
    panel=COMMON_PANEL,
)
SEED = Option("Seed of everything drawn at random.", metavar="N", min=0, panel=COMMON_PANEL)
CpuActivations = Literal["auto", "float32", "bfloat16", "int8"]
CPU_ACTIVATIONS = Option(
    "auto, float32, bfloat16 or int8: what a CPU rounds the inputs of linear layers to, where the "
    "weight's type allows it; auto: bfloat16 for bfloat16 and quantized weights of a bfloat16 "
    "model on a CPU that multiplies bfloat16, else float32.",
    choices=("auto", "float32", "bfloat16", "int8"),
    metavar="DTYPE",
    panel=PERFORMANCE_PANEL,
)
REQUIRE_NATIVE = Option(
    "Refuse a model that is no family of llmkit's own and would run, slower, by transformers' "
    "modeling code.",
    panel=COMMON_PANEL,
)
