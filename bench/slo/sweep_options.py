"""`--sweep-options`: the combinations of server options, each benched on its own server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmkit.common.errors import UsageError
from llmkit.common.formatting import nearest
from llmkit.common.options import OptionField, option_fields, option_name
from llmkit.runtime.server.serve_options import ServeOptions

MAX_POINTS = 64  # combinations, each of which is a start of a server and a run of all loads
# Options that bench sets itself, or that would let it measure another server than it started.
_FIXED = {
    "allowed_hosts",
    "allowed_origins",
    "api_key_file",
    "device",
    "grpc_port",
    "host",
    "model",
    "open_metrics",
    "port",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
}
SWEPT_MODES = ("scenarios", "serve", "latency", "sweep", "slo")

ServePoint = dict[str, str]  # values by name of the option: {"max_num_seqs": "8"}


def parse_sweep(texts: Sequence[str]) -> list[ServePoint]:
    """Every combination of the values in NAME=VALUE,VALUE words, the first option's slowest.

    Words are separated by blanks; what has no equals sign is another value of the option before it.
    The values are checked as `llmkit serve` checks them. Raises UsageError.
    """
    options = _swept_options()
    values: dict[str, list[str]] = {}
    name = ""
    for word in re.split(r"[\s,]+", " ".join(texts).strip()):
        key, separator, value = word.partition("=")
        if separator:
            name = option_name(key)
            if name in values:
                raise UsageError(f"--sweep-options: {key} is given twice", "Once, with all values")
            values[name] = []
        elif name:
            value = word
        if not name or not value:
            raise UsageError(
                f"--sweep-options {word!r} is not NAME=VALUE,VALUE",
                "Something like max_num_seqs=8,16 was expected",
            )
        if name not in options:
            raise _unknown(key, name, options)
        if value not in values[name]:
            values[name].append(value)
    for name, found in values.items():
        for value in found:
            _check(options[name], value)
    points = [
        dict(zip(values, combination, strict=True)) for combination in product(*values.values())
    ]
    if len(points) > MAX_POINTS:
        raise UsageError(
            f"--sweep-options makes {len(points)} combinations",
            f"At most {MAX_POINTS} were expected, each of which starts a server",
        )
    return points


def is_sweep_word(word: str) -> bool:
    """Whether a word is NAME=VALUES of an option of `llmkit serve`."""
    name, separator, _ = word.partition("=")
    return bool(separator) and option_name(name) in _swept_options()


def point_name(point: Mapping[str, str]) -> str:
    """A point of a sweep in short: "max_num_seqs=8, kv_cache_dtype=int8"."""
    return ", ".join(f"{name}={value}" for name, value in point.items())


def serve_options(point: Mapping[str, str]) -> dict[str, str]:
    """The values by flag, as `llmkit serve` takes them; "" for a flag without a value."""
    fields = _swept_options()
    flags = {}
    for name, value in point.items():
        field = fields[name]
        if not field.is_flag:
            flags[field.spellings[0]] = value
        elif TypeAdapter(bool).validate_strings(value):
            flags[field.spellings[0]] = ""
    return flags


def serve_words(options: Mapping[str, str]) -> list[str]:
    """Options by flag as words of a command line."""
    return [word for flag, value in options.items() for word in (flag, value) if word]


def _swept_options() -> dict[str, OptionField]:
    """The options of `llmkit serve` that a sweep may set, by all of their names."""
    return {
        option_name(flag): field
        for field in option_fields(ServeOptions)
        if field.name not in _FIXED and field.path[-1] not in _FIXED
        for flag in field.spellings
    }


def _unknown(key: str, name: str, options: Mapping[str, OptionField]) -> UsageError:
    if name in _FIXED:
        return UsageError(
            f"--sweep-options: {key} is set by bench itself", todo="Sweep other options"
        )
    return UsageError(
        f"--sweep-options: llmkit serve has no option {key}",
        nearest(name, sorted(options), "Options are"),
    )


def _check(field: OptionField, text: str) -> None:
    """Raises UsageError unless `llmkit serve` accepts the value."""
    option = field.option
    if field.is_list:
        raise UsageError(
            f"--sweep-options: {field.label} takes several values at once",
            "Options of one value were expected",
        )
    try:
        value: Any = TypeAdapter(field.value_type).validate_strings(text)
    except ValidationError as error:
        raise UsageError(
            f"--sweep-options: {field.label} {text!r} is not allowed", error.errors()[0]["msg"]
        ) from error
    for limit, is_beyond in (
        (option.min, option.min is not None and value < option.min),
        (option.max, option.max is not None and value > option.max),
    ):
        if is_beyond:
            raise UsageError(
                f"--sweep-options: {field.label} {text} is out of range",
                f"{'At least' if limit == option.min else 'At most'} {limit:g} was expected",
            )
    try:
        field.read(value)
    except UsageError as error:
        raise UsageError(f"--sweep-options: {error.what}", error.expected, error.todo) from error
