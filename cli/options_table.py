"""Writes docs/options.md, the tables of all options: `python -m llmkit.cli.options_table`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from llmkit.cli.command import Command, CommonOptions
from llmkit.cli.main import COMMANDS
from llmkit.common.options import Argument, OptionField, option_fields

HEAD = """# Options

Each command takes the options of its table, and those of all commands at the end of the page.
`make docs` writes this page from the options classes.

- A value comes from the command line, else from a variable, else from the file of `--config`.
  Otherwise the default holds.
- The variable of `--max-num-seqs` is `LLMKIT_MAX_NUM_SEQS`. For `llmkit serve` alone it is
  `LLMKIT_SERVE_MAX_NUM_SEQS`, which wins.
- `LLMKIT_CPU_LEVEL` is the variable of no option: it forces a lower level of CPU instructions
  (`llmkit doctor` lists those of the processor).
- The key in a file of `--config` is `max-num-seqs` or `max_num_seqs`.
- The key in a recipe's stage is `max_num_seqs`.
"""


def options_page() -> str:
    """The contents of docs/options.md."""
    sections = [_section(command) for command in COMMANDS.values()]
    common = "## All commands\n\n" + _table(option_fields(CommonOptions))
    return "\n".join([HEAD, *sections, common])


def _section(command: Command) -> str:
    text = " ".join((inspect.getdoc(command.run) or "").split("\n\n")[0].split())
    fields = option_fields(command.options)
    arguments = [field for field in fields if isinstance(field.option, Argument)]
    options = [field for field in fields if not isinstance(field.option, Argument)]
    parts = [f"## llmkit {command.name}\n", f"{text}\n"]
    if arguments:
        lines = [f"- `{field.option.metavar}`: {field.option.help}\n" for field in arguments]
        parts.append("".join(lines))
    if options:
        parts.append(_table(options))
    return "\n".join(parts)


def _table(fields: Sequence[OptionField]) -> str:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in fields:
        flags = ", ".join(f"`{flag}`" for flag in field.flags)
        value = f" `{_escaped(field.option.metavar)}`" if field.option.metavar else ""
        rows.append(f"| {flags}{value} | {_default(field)} | {_escaped(field.option.help)} |")
    return "\n".join(rows) + "\n"


def _default(field: OptionField) -> str:
    if field.required:
        return "required"
    if field.option.unset is not None:
        return _escaped(field.option.unset)
    default = field.value_default
    if isinstance(default, bool):
        # A flag without a negated spelling is off by default.
        return (field.spellings if default else field.negated_spellings or ["off"])[0]
    if isinstance(default, list):
        return ", ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(options_page())
