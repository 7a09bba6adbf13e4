"""Options classes: nested classes, order, formats of values, and the keys of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest

from llmkit.cli.main import COMMANDS
from llmkit.cli.serve import ServeArguments, serve_options
from llmkit.cli.typer_options import parse_words
from llmkit.common.errors import InputError, UsageError
from llmkit.common.option_values import (
    INTEGERS,
    LAYER_COUNTS,
    NEGATED,
    NUMBERS,
    RATE,
    SHARE,
    SIZE,
    TOKEN_RANGE,
    count_or_auto,
    format_size,
    within,
)
from llmkit.common.options import (
    Argument,
    ExcludeFields,
    Option,
    OptionField,
    ValueFormat,
    build_options,
    option_fields,
)


@dataclass(frozen=True)
class Cache:
    size: Annotated[int, Option("Size.", format=SIZE)] = 10 << 30
    enabled: Annotated[
        bool, Option("Off.", flags=("--no-cache",), format=NEGATED, follows="name")
    ] = True
    internal: int = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    model: Annotated[str, Argument("Model.", metavar="MODEL")]
    cache: Cache = field(default_factory=Cache)
    name: Annotated[str | None, Option("Name.", unset="none")] = None
    count: Annotated[int, Option("Count.", check=within(1, 9))] = 1
    folder: Annotated[Path | None, Option("Folder.", unset="none")] = None


def test_option_fields_are_flattened_in_the_order_of_help() -> None:
    fields = option_fields(Outer)
    assert [field.name for field in fields] == [
        "model",
        "size",
        "name",
        "no_cache",
        "count",
        "folder",
    ]
    assert [field.parameter for field in fields][1] == "cache_size"
    assert [field.value_default for field in fields[1:]] == ["10GiB", None, False, 1, None]


def test_option_fields_without_some() -> None:
    @dataclass(frozen=True)
    class Smaller:
        cache: Annotated[Cache, ExcludeFields(("enabled",))] = field(default_factory=Cache)

    assert [
        field.name for field in option_fields_of(Smaller, Cache=Cache, ExcludeFields=ExcludeFields)
    ] == ["size"]


def option_fields_of(options: type, **names: object) -> tuple[object, ...]:
    """`option_fields` for a class in a function, whose annotations name local classes."""
    options.__annotations__ = {
        name: eval(annotation, globals() | names)
        for name, annotation in options.__annotations__.items()
    }
    return option_fields(options)


def test_options_are_built_from_parsed_values() -> None:
    values = {"model": "m", "cache_size": "2MiB", "cache_enabled": True, "folder": "x"}
    built = build_options(Outer, values)
    assert built == Outer(model="m", cache=Cache(2 << 20, enabled=False), folder=Path("x"))
    assert build_options(Outer, {"model": "m"}) == Outer(model="m")
    with pytest.raises(UsageError, match="MODEL is missing"):
        build_options(Outer, {})
    with pytest.raises(UsageError, match=r"--count: 10 is out of range\. A number from 1 to 9"):
        build_options(Outer, {"model": "m", "count": 10})
    with pytest.raises(UsageError, match="--size: 'x' is not a size"):
        build_options(Outer, {"model": "m", "cache_size": "x"})


@pytest.mark.parametrize("name", COMMANDS)
def test_default_values_are_parsed_as_they_are_written(name: str) -> None:
    for option in COMMANDS[name].fields:
        if not option.required and option.value_default is not None:
            assert option.read(option.value_default) == option.default, option.name


@pytest.mark.parametrize(
    ("value_format", "value", "written"),
    [
        (SHARE, 0.005, "0.5%"),
        (SHARE, 0.07, "7%"),
        (SHARE, 0.00001, "0.001%"),
        (RATE, 2_000_000.0, "2000000/s"),
        (RATE, 0.25, "0.25/s"),
        (INTEGERS, (1, 1_234_567), "1,1234567"),
        (NUMBERS, (0.5, 40.0), "0.5,40"),
        (LAYER_COUNTS, (8, 10), "8,10"),
        (TOKEN_RANGE, (64, 512), "64-512"),
        (TOKEN_RANGE, (64, 64), "64"),
        (count_or_auto(0), 7, "7"),
        (count_or_auto(0), None, "auto"),
        (INTEGERS, None, None),
        (INTEGERS, (), None),
        (SIZE, None, None),
        (SHARE, None, None),
    ],
)
def test_default_is_written_so_that_it_is_read_as_the_same_value(
    value_format: ValueFormat, value: object, written: str | None
) -> None:
    option = OptionField(("x",), Option("X.", format=value_format), object, value)
    assert option.value_default == written
    if written is not None:
        assert option.read(written) == value


def test_format_size_is_the_inverse_of_parse_size() -> None:
    for size in (0, 1, 1000, 1024, 3 << 20, 10 << 30, 5 << 40):
        assert SIZE.parse("--x", format_size(size)) == size


def test_parse_words_gives_the_options_of_serve(tmp_path: Path) -> None:
    words = ["m", "--tp", "2", "--no-prefix-cache", "--kv-cache-memory", "1GiB", "--port", "0"]
    options = parse_words(ServeArguments, "serve", words).options
    assert (options.model, options.port, options.engine.tp) == ("m", 0, 2)
    assert not options.engine.prefix_cache
    assert options.engine.kv_cache_memory == 1 << 30
    named = serve_options("m", "n", ["--draft-model", "d"], "keys")
    assert (named.served_model_name, named.api_key_file) == ("n", Path("keys"))
    assert named.engine.speculate == 4
    with pytest.raises(InputError, match="--lora a=nothing: nothing is not a directory"):
        serve_options("m", "n", ["--lora", "a=nothing"], None)
    with pytest.raises(UsageError, match="the name 'n' is given twice"):
        serve_options("m", "n", ["--lora", f"n={tmp_path}"], None)
