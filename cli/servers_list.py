"""`llmkit ps`: the running servers of this user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.cli.output import Output, seconds_text
from llmkit.cli.recipes import NoArguments

if TYPE_CHECKING:
    from rich.console import Console

    from llmkit.runtime.running_servers import RunningServer


def ps(output: Output, arguments: NoArguments) -> None:
    """List your running servers on this machine: address, models, uptime and requests.

    Requests are not shown for a server that wants another API key than LLMKIT_API_KEY.
    """
    from llmkit.runtime.running_servers import running_servers

    servers = running_servers()
    document = {"servers": [server.as_dict() for server in servers]}
    output.result(document, lambda console: _show(console, servers))
    if not servers:
        output.message("No server runs. `llmkit serve MODEL` starts one.")


def _show(console: Console, servers: list[RunningServer]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not servers:
        return
    table = Table("pid", "address", "model", "up", "running", "waiting", box=None)
    for column in (0, 3, 4, 5):
        table.columns[column].justify = "right"
        table.columns[column].no_wrap = True
    table.columns[1].overflow = "fold"
    for server in servers:
        table.add_row(
            str(server.entry.pid),
            Text(server.entry.url),
            Text(", ".join(server.entry.models)),
            uptime_text(server.uptime_s),
            _count(server.running),
            _count(server.waiting),
        )
    console.print(table)


def _count(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def uptime_text(seconds: float) -> str:
    """A long duration for people: 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 3600:
        return seconds_text(seconds)
    hours, minutes = divmod(int(seconds // 60), 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
