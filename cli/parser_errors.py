"""Errors of the command-line parser as llmkit words them, with the nearest option."""

from __future__ import annotations

from typing import Any

from llmkit.cli.settings import Defaults
from llmkit.common.errors import UsageError
from llmkit.common.formatting import nearest


def usage_error(error: Any, arguments: list[str], defaults: Defaults) -> UsageError:
    """The UsageError for an exception of the command-line parser.

    The exceptions are recognized by their attributes: Typer decides which library raises them.
    """
    context = getattr(error, "ctx", None)
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        parameters = context.command.params if context else []
        known = [spelling for parameter in parameters for spelling in _spellings(parameter)]
        return UsageError(
            f"no such option: {error.option_name}", nearest(error.option_name, known, "Options are")
        )
    message = str(error.format_message()).rstrip(".").replace("Value error, ", "")
    message = message[:1].lower() + message[1:]
    parameter = getattr(error, "param", None)
    name = getattr(parameter, "name", "") or ""
    value = _value(parameter, arguments)
    origin = defaults.origins.get(name)
    if value is None and origin:
        message = f"{origin}: {message}"
        value = str(defaults.values[name])
    if value and "invalid value" in message and value not in message:
        message += f" ({value})"
    return UsageError(
        message, todo=f"`{context.command_path} --help` lists what it takes" if context else ""
    )


def _value(parameter: Any, arguments: list[str]) -> str | None:
    """The option's value on the command line, "" for a missing one; None when the option is not
    there.
    """
    for spelling in _spellings(parameter):
        for word, next_word in zip(arguments, [*arguments[1:], ""], strict=True):
            option, equals, value = word.partition("=")
            if option == spelling:
                return value if equals else next_word
    return None


def _spellings(parameter: Any) -> list[str]:
    if parameter is None or parameter.param_type_name != "option":
        return []
    return [*parameter.opts, *parameter.secondary_opts]
