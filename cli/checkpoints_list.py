"""`llmkit list`: the checkpoints on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmkit.cli.output import Output
from llmkit.common.errors import InputError
from llmkit.common.formatting import bytes_text
from llmkit.common.options import Argument, Option
from llmkit.common.terminal_text import clean_line

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.checkpoint.local_checkpoints import LocalCheckpoint


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """What `llmkit list` takes."""

    folders: Annotated[
        tuple[str, ...],
        Argument(
            "Folders to search, up to three levels deep.",
            metavar="DIR",
            unset="the current one",
        ),
    ] = ()
    hub: Annotated[
        bool,
        Option("Show the models in the Hugging Face cache, too.", flags=("--hub/--no-hub",)),
    ] = True


def list_checkpoints(output: Output, arguments: ListArguments) -> None:
    """List local checkpoints: architecture, quantization, size, and whether they are complete.

    It reads configs and headers only. `llmkit inspect` shows more of one checkpoint.
    """
    from llmkit.checkpoint.local_checkpoints import (
        describe_checkpoint,
        find_checkpoints,
        find_hub_checkpoints,
        hub_cache,
    )

    found: list[LocalCheckpoint] = []
    paths: set[Path] = set()
    for folder in arguments.folders or (".",):
        start = Path(folder).expanduser()
        if not start.is_dir():
            raise InputError(f"{folder} is not a folder", "A folder to search was expected")
        for path in find_checkpoints(start):
            if path.resolve() not in paths:
                paths.add(path.resolve())
                found.append(describe_checkpoint(str(path), path))
    if arguments.hub:
        for hub_id, path in find_hub_checkpoints(hub_cache()):
            if path.resolve() not in paths:
                found.append(describe_checkpoint(hub_id, path))
    document = {"checkpoints": [checkpoint.as_dict() for checkpoint in found]}
    output.result(document, lambda console: _show(console, found))
    if not found:
        output.message("No checkpoint was found. Name the folders to search: llmkit list DIR")


def _show(console: Console, checkpoints: list[LocalCheckpoint]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not checkpoints:
        return
    table = Table("model", "architecture", "quantization", "size", "state", box=None)
    table.columns[0].overflow = "fold"
    table.columns[3].justify = "right"
    table.columns[3].no_wrap = True
    for checkpoint in checkpoints:
        table.add_row(
            Text(clean_line(checkpoint.name)),
            Text(clean_line(checkpoint.architecture or "-")),
            Text(clean_line(checkpoint.quantization or "-")),
            bytes_text(checkpoint.weight_bytes),
            Text(
                clean_line(checkpoint.problem or "complete"),
                style="red" if checkpoint.problem else "",
            ),
        )
    console.print(table)
