"""Completion of the shell: commands of two words, and the models on this machine."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

# A folder with very many checkpoints would make the shell slow.
MAX_MODELS = 200
FIRST_WORD = "llmkit.first_word"  # in the context of the command line


class CommandGroup(TyperGroup):
    """The commands of `llmkit`, some of which have names of two words: "shard verify"."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words name; the longest name wins."""
        # For `shell_complete`: the word is no command, but may begin the name of one.
        ctx.meta[FIRST_WORD] = args[0]
        joined = " ".join(args[:2])
        if len(args) > 1 and joined in self.commands:
            args = [joined, *args[2:]]
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The next words, of a name of two words only the missing one."""
        first = ctx.meta.get(FIRST_WORD, "")
        items = []
        seen = set()
        for item in super().shell_complete(ctx, f"{first} {incomplete}" if first else incomplete):
            item.value = item.value.removeprefix(f"{first} ").split()[0]
            if item.value not in seen:
                seen.add(item.value)
                items.append(item)
        return items


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models that a word may be: checkpoints, hub ids in the cache, and the second word of a
    command's name.

    None means that the shell completes the names of files.
    """
    # Only completion needs these.
    from llmkit.checkpoint.local_checkpoints import (
        find_checkpoints,
        find_hub_checkpoints,
        hub_cache,
    )

    names = _second_words(ctx)
    # The search begins in the folder that is typed already.
    typed, slash, _ = incomplete.rpartition("/")
    start = Path(typed + slash).expanduser() if slash else Path()
    for path in islice(find_checkpoints(start), MAX_MODELS):
        relative = str(path.relative_to(start))
        # The folder itself is a checkpoint, for example in `llmkit inspect models/tiny/`.
        names.append(typed + slash + relative if relative != "." else typed + slash or ".")
    names += [hub_id for hub_id, _ in islice(find_hub_checkpoints(hub_cache()), MAX_MODELS)]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _second_words(ctx: typer.Context) -> list[str]:
    """The words that could follow a command's name to make another's: `verify` after `shard`."""
    group = ctx.parent.command if ctx.parent is not None else None
    if not isinstance(group, CommandGroup):
        return []
    prefix = f"{ctx.info_name} "
    return [name.removeprefix(prefix) for name in group.commands if name.startswith(prefix)]
