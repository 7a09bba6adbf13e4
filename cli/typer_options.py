"""Typer commands made from options classes, and parsing words to an object of such a class."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any, TypeVar

import typer

from llmkit.cli.completion import complete_model
from llmkit.common.options import Argument, OptionField, build_options, option_fields

T = TypeVar("T")
_TAG = re.compile(r"\[(?=[a-z#/@][^\[]*\])")  # what rich takes for markup


def plain_help(text: str) -> str:
    """A help text in which `llmkit[ray]` is no markup.

    rich.markup.escape does the same, but an import of rich would delay every server.
    """
    return _TAG.sub(r"\[", text)


def typer_signature(*classes: type) -> inspect.Signature:
    """The signature that Typer makes a command of: a keyword for each option of the classes."""
    parameters = []
    for options in classes:
        parameters += [_parameter(field) for field in option_fields(options)]
    return inspect.Signature(parameters)


def parse_words(options: type[T], command: str, words: list[str]) -> T:
    """The options of `llmkit COMMAND WORDS`, without reading variables and --config files.

    Raises UsageError for a bad value, and the command-line parser's own exceptions.
    """
    return build_options(options, _parse(options, command, words).params)


def given_words(options: type, command: str, words: list[str]) -> dict[OptionField, Any]:
    """The options and arguments that WORDS of `llmkit COMMAND WORDS` have, as they are written.

    Raises as `parse_words` does.
    """
    context = _parse(options, command, words)
    return {
        field: context.params[field.parameter]
        for field in option_fields(options)
        if _is_given(context.get_parameter_source(field.parameter))
    }


def _is_given(source: Any) -> bool:
    return source is not None and source.name == "COMMANDLINE"


def _parse(options: type, command: str, words: list[str]) -> Any:
    """The command-line parser's context of `llmkit COMMAND WORDS`."""

    def ignore(**values: Any) -> None:
        """The parser is used without running a command."""

    set_signature(ignore, typer_signature(options))
    app = typer.Typer(add_completion=False)
    app.command(command)(ignore)
    return typer.main.get_command(app).make_context(command, list(words))


def set_signature(function: Any, signature: inspect.Signature) -> None:
    """Makes Typer see a signature in the place of the function's own."""
    function.__signature__ = signature
    function.__annotations__ = {
        parameter.name: parameter.annotation for parameter in signature.parameters.values()
    }


def _parameter(field: OptionField) -> inspect.Parameter:
    kind = field.value_type
    default: Any = inspect.Parameter.empty
    if not field.required:
        default = field.value_default
        if default is None:
            kind = kind | None
    return inspect.Parameter(
        field.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, _typer_info(field)],
    )


def _typer_info(field: OptionField) -> Any:
    option = field.option
    shown: dict[str, Any] = {}
    if option.unset is not None:
        shown["show_default"] = option.unset
    if option.is_model or option.completes_models:
        shown["autocompletion"] = complete_model
    if isinstance(option, Argument):
        return typer.Argument(
            metavar=option.metavar,
            help=plain_help(option.help),
            **shown,
        )
    return typer.Option(
        *field.flags,
        metavar=option.metavar,
        help=plain_help(option.help),
        min=option.min,
        max=option.max,
        rich_help_panel=option.panel,
        **shown,
    )
