"""Renders reports as HTML pages from Jinja2 templates.

A page is one file that loads nothing and runs nothing; its content security policy forbids scripts
and connections. Templates extend `page.html.jinja`. Every value is escaped, except drawings of
`llmkit.common.svg_charts`, which are escaped where they are drawn.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmkit.common.markup import printable

COMMON_TEMPLATES = Path(__file__).parent / "templates"


def render_page(templates: Path, template: str, **context: object) -> bytes:
    """A self-contained HTML5 page in UTF-8.

    templates: the folder of `template` and the files it includes. COMMON_TEMPLATES is searched,
    too.
    """
    environment = Environment(
        loader=FileSystemLoader([templates, COMMON_TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**context).encode()


def _finalize(value: object) -> object:
    """Make a template's value printable; Jinja2 escapes it afterwards."""
    return value if isinstance(value, Markup) else printable(value)
