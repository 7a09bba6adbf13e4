"""`llmkit shard`: from any layout to any other, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.command import ModelArgument
from llmkit.cli.output import Output, bytes_text

if TYPE_CHECKING:
    from rich.console import Console

TpOption = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks: each layer is split over them.")]
PpOption = Annotated[int, typer.Option("--pp", min=1, help="Pipeline stages: the layers are divided among them.")]
OutputOption = Annotated[
    str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it must be absent or empty.")
]
LayoutArgument = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `llmkit shard` wrote.")]


def shard(output: Output, model: ModelArgument, tp: TpOption, out: OutputOption) -> None:
    """x"""


def plan(output: Output, model: ModelArgument, tp: TpOption) -> None:
    """x"""


def verify(output: Output, layout: LayoutArgument) -> None:
    """x"""


def merge(output: Output, layout: LayoutArgument, out: OutputOption) -> None:
    """x"""
