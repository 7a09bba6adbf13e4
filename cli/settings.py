"""The values of options from the environment and the `--config` file.

The command line wins over the environment, and the environment over the file. The names of
variables and of a file's keys follow from the options classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.cli.command import Command
from llmkit.common.errors import UsageError
from llmkit.common.formatting import nearest
from llmkit.common.options import OptionField, option_name

PREFIX = "LLMKIT_"
# The commands read these themselves: a secret is no option.
SECRET_VARIABLES = {"LLMKIT_API_KEY", "LLMKIT_KEY_PASSWORD"}
# kernels/cpu/cpu_kernels.py reads it in every process that computes.
CPU_LEVEL_VARIABLE = "LLMKIT_CPU_LEVEL"
TRUE = {"1", "true", "yes", "on"}
FALSE = {"0", "false", "no", "off"}


@dataclass
class Defaults:
    """Values from the environment and the configuration file, by `OptionField.parameter`."""

    values: dict[str, Any] = field(default_factory=dict)  # as Typer's `default_map` takes them
    origins: dict[str, str] = field(default_factory=dict)  # "LLMKIT_BITS" or "run.yaml:3"

    def set(self, spelling: Spelling, value: Any, origin: str) -> None:
        """Sets an option from text, a number, a bool or a list of them. Raises: UsageError."""
        self.values[spelling.parameter] = spelling.parse(value, origin)
        self.origins[spelling.parameter] = origin


@dataclass(frozen=True)
class Spelling:
    """One way to write an option: `--no-eval` is the negated spelling of `--eval`."""

    option: OptionField
    negated: bool

    @property
    def parameter(self) -> str:
        """The option's parameter of the Typer command."""
        return self.option.parameter

    def parse(self, value: Any, origin: str) -> Any:
        """The value as the command-line parser takes it. Raises: UsageError."""
        if self.option.is_flag:
            text = str(value).strip().lower()
            if text not in TRUE | FALSE:
                raise UsageError(
                    f"{origin}: {value!r} is neither true nor false", "Write true or false"
                )
            return (text in TRUE) != self.negated
        if self.option.is_list:
            items = value if isinstance(value, list) else str(value).split(",")
            return [str(item) for item in items]
        if isinstance(value, (list, dict)):
            raise UsageError(f"{origin}: one value was expected, not {value!r}")
        return str(value)


def spellings(command: Command) -> dict[str, Spelling]:
    """A command's options by key, "group_size" for `--group-size`, negated spellings included."""
    found = {}
    for option in command.fields:
        for flag in option.spellings:
            found[option_name(flag)] = Spelling(option, False)
        for flag in option.negated_spellings:
            found[option_name(flag)] = Spelling(option, True)
    return found


def config_argument(arguments: Iterable[str], environ: Mapping[str, str]) -> str | None:
    """The file of `--config` or LLMKIT_CONFIG, which is read before the options are parsed."""
    words = list(arguments)
    path = environ.get(f"{PREFIX}CONFIG") or None
    for index, word in enumerate(words):
        if word == "--":
            break
        if word == "--config" and index + 1 < len(words):
            path = words[index + 1]
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
    return path


def read_file(path: str, options: Mapping[str, Spelling], defaults: Defaults) -> None:
    """Adds a YAML file's settings. Raises UsageError, with file and line, for a mistake in it."""
    # The YAML library is imported only when there is a file.
    from llmkit.common.yaml_file import YamlFile

    file = YamlFile(path)
    lines: dict[str, int] = {}
    for key, value in file.content.items():
        origin = file.where([key])
        name = option_name(str(key))
        option = options.get(name)
        if option is None or name == "config":
            known = [spelling.replace("_", "-") for spelling in options if spelling != "config"]
            raise UsageError(
                f"{origin}: unknown key {key!r}",
                nearest(name.replace("_", "-"), known, "Keys are"),
            )
        if option.parameter in lines:
            raise UsageError(f"{origin}: {key!r} was already set in line {lines[option.parameter]}")
        lines[option.parameter] = file.line([key])
        if value is not None:
            if option.option.option.is_secret:
                raise UsageError(
                    f"{origin}: {key!r} is a secret and cannot be in this file",
                    todo=f"Set {PREFIX}{name.upper()}",
                )
            defaults.set(option, value, origin)


def read_environment(
    environ: Mapping[str, str], command: str, options: Mapping[str, Spelling], defaults: Defaults
) -> None:
    """Adds LLMKIT_<OPTION>, and LLMKIT_<COMMAND>_<OPTION>, which wins. Raises: UsageError."""
    for prefix in _prefixes(command):
        for name, option in options.items():
            variable = prefix + name.upper()
            if environ.get(variable) and not option.option.option.is_secret:
                defaults.set(option, environ[variable], variable)


def unknown_variables(environ: Mapping[str, str], commands: Mapping[str, Command]) -> list[str]:
    """A warning for each LLMKIT_* variable that no command reads."""
    candidates = [name for name in sorted(environ) if name.startswith(PREFIX)]
    if not candidates:
        return []
    known = {*SECRET_VARIABLES, CPU_LEVEL_VARIABLE}
    for command in commands.values():
        for name, spelling in spellings(command).items():
            if spelling.option.option.is_secret:
                continue
            known |= {prefix + name.upper() for prefix in _prefixes(command.name)}
    warnings = []
    for name in candidates:
        if name not in known:
            hint = nearest(name, sorted(known)).rstrip(" .")
            text = f"warning: {name} is not a variable of llmkit and is ignored."
            warnings.append(f"{text} {hint}." if hint else text)
    return warnings


def _prefixes(command: str) -> list[str]:
    """LLMKIT_, LLMKIT_SHARD_ and LLMKIT_SHARD_PLAN_ for "shard plan"."""
    words = command.upper().split()
    return [
        PREFIX + "".join(f"{word}_" for word in words[:count]) for count in range(len(words) + 1)
    ]
