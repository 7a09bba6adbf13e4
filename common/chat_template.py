"""Renders chat templates as transformers does, in a Jinja2 sandbox: a template is untrusted code.

This module is in `common` because the server, the tokenizer and `quantize` (calibration text,
sample answers) all render chats, and they share no other layer. It knows no model: a template and
its variables go in, text comes out. Importing it imports Jinja2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmkit.common.errors import ChatTemplateError


class _GenerationTag(Extension):
    """Accepts {% generation %} ... {% endgeneration %}: a mark for training, ignored here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's contents as a separate scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render_chat_template(
    template: str, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> str:
    """Return the prompt text for `messages`; `variables` are further variables of the template.

    Raises ChatTemplateError when the template fails, with the template's own message if it has one.
    """
    try:
        return _compile(template).render(messages=messages, **variables)
    except TemplateError as error:
        raise ChatTemplateError(error.message or type(error).__name__) from error
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ChatTemplateError(
            f"the chat template cannot render these messages ({error})"
        ) from error


def check_chat_template(template: str) -> None:
    """Raise ChatTemplateError, with the line, when a template does not compile.

    Nothing of the template is computed.
    """
    try:
        # The optimizer would compute constant expressions.
        _environment(optimized=False).compile(template, raw=True)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise ChatTemplateError("it is nested too deeply") from error


class TemplateFacts(NamedTuple):
    """What the text of a template says about it."""

    variables: frozenset[str]  # that it reads and does not set before
    texts: frozenset[str]  # its string constants


@lru_cache(maxsize=16)
def template_facts(template: str) -> TemplateFacts:
    """Return the facts of a template that compiles. Nothing of it is computed."""
    tree = _environment(optimized=False).parse(template)
    constants = (node.value for node in tree.find_all(nodes.Const))
    return TemplateFacts(
        frozenset(meta.find_undeclared_variables(tree)),
        frozenset(value for value in constants if isinstance(value, str)),
    )


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    return _environment().from_string(template)


def _environment(optimized: bool = True) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, loopcontrols],
        optimized=optimized,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
