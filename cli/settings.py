"""Where an option's value comes from: command line, then environment, then `--config` file, then default.

The options themselves are read off the commands, so that a setting is declared once, in its command's
signature; a file's keys and the variables' names follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.text import nearest

PREFIX = "LLMKIT_"
NOT_OPTIONS = {"LLMKIT_API_KEY", "LLMKIT_KEY_PASSWORD"}  # read by the commands themselves: a secret is no option
TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass
class Defaults:
    """What the environment and the configuration file say, by parameter name."""

    values: dict[str, Any] = field(default_factory=dict)  # as typer's `default_map` takes them
    origins: dict[str, str] = field(default_factory=dict)  # "LLMKIT_BITS" or "run.yaml:3"

    def put(self, option: Option, value: Any, origin: str) -> None:
        """Sets an option from text, a number, a truth value or a list of them. Raises: UsageError."""
        self.values[option.parameter] = option.parse(value, origin)
        self.origins[option.parameter] = origin


@dataclass(frozen=True)
class Option:
    """One spelling of a command's option: `--no-eval` is the negated spelling of `--eval`."""

    parameter: str
    flag: bool
    multiple: bool
    negated: bool

    def parse(self, value: Any, origin: str) -> Any:
        """The value as the command-line parser takes it. Raises: UsageError."""
        if self.flag:
            text = str(value).strip().lower()
            if text not in TRUE | FALSE:
                raise UsageError(f"{origin}: {value!r} is neither true nor false", "Write true or false")
            return (text in TRUE) != self.negated
        if self.multiple:
            return [str(item) for item in value] if isinstance(value, list) else str(value).split(",")
        if isinstance(value, (list, dict)):
            raise UsageError(f"{origin}: one value was expected, not {value!r}")
        return str(value)


def options_of(command: Any) -> dict[str, Option]:
    """A command's options by name, "group_size" for `--group-size`, negated spellings included."""
    found = {}
    for parameter in command.params:
        if getattr(parameter, "param_type_name", "") != "option" or parameter.name == "help":
            continue
        flag, multiple = bool(getattr(parameter, "is_flag", False)), bool(getattr(parameter, "multiple", False))
        for negated, spellings in ((False, parameter.opts), (True, parameter.secondary_opts)):
            for spelling in spellings:
                if spelling.startswith("--"):
                    found[_key(spelling)] = Option(parameter.name, flag, multiple, negated)
    return found


def config_argument(arguments: Iterable[str], environ: Mapping[str, str]) -> str | None:
    """The file that `--config` or LLMKIT_CONFIG names; it must be known before options are parsed."""
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


def read_file(path: str, options: Mapping[str, Option], defaults: Defaults) -> None:
    """Adds a YAML file's settings. Raises: UsageError for what cannot be read, with file and line."""
    from llmkit.checkpoint.yaml_file import YamlFile

    file = YamlFile(path)
    seen: dict[str, int] = {}
    for key, value in file.content.items():
        where, name = file.where([key]), _key(str(key))
        option = options.get(name)
        if option is None or name == "config":
            known = [spelling.replace("_", "-") for spelling in options if spelling != "config"]
            raise UsageError(f"{where}: unknown key {key!r}", nearest(name.replace("_", "-"), known, "Keys are"))
        if option.parameter in seen:
            raise UsageError(f"{where}: {key!r} was already set in line {seen[option.parameter]}")
        seen[option.parameter] = file.line([key])
        if value is not None:
            defaults.put(option, value, where)


def read_environment(
    environ: Mapping[str, str], command: str, options: Mapping[str, Option], defaults: Defaults
) -> None:
    """Adds LLMKIT_<OPTION> and, stronger, LLMKIT_<COMMAND>_<OPTION>. Raises: UsageError."""
    words = command.upper().split()
    prefixes = [PREFIX + "".join(f"{word}_" for word in words[:count]) for count in range(len(words) + 1)]
    for prefix in prefixes:
        for name, option in options.items():
            variable = prefix + name.upper()
            if environ.get(variable):
                defaults.put(option, environ[variable], variable)


def unknown_variables(environ: Mapping[str, str], commands: Mapping[str, Any]) -> list[str]:
    """A warning for each LLMKIT_* variable that no command reads."""
    known = set(NOT_OPTIONS)
    for command, parsed in commands.items():
        words = command.upper().split()
        for name in options_of(parsed):
            for count in range(len(words) + 1):
                known.add(PREFIX + "".join(f"{word}_" for word in words[:count]) + name.upper())
    return [
        f"warning: {name} is no variable of llmkit and is ignored. {nearest(name, sorted(known))}".rstrip(" .") + "."
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known
    ]


def _key(spelling: str) -> str:
    return spelling.lstrip("-").replace("-", "_")
