"""Every rank but the first: `python -m llmkit.runtime.parallel.worker --fd N`, started by the first only.

It loads its part and then does what it is told, until the first one is gone. SIGINT and SIGTERM are left to that one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmkit.checkpoint.source import open_checkpoint
from llmkit.model.device import resolve_device
from llmkit.runtime.channel import Channel, Failed, parent_socket
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.load import StartUp
from llmkit.runtime.parallel.lead import agreed, load_rank
from llmkit.runtime.parallel.messages import Go, Join, Step, ToRank, to_rank_decoder
from llmkit.shard.rank import rank_parts


def follow(channel: Channel[ToRank]) -> None:
    """Load, meet the others, step. Raises EOFError or OSError when the first rank is gone."""
    (join,) = channel.receive(wait=True)
    assert isinstance(join, Join)
    options, start = join.engine, StartUp()
    parts = rank_parts(open_checkpoint(join.model), options.tp, options.pp, options.ep)
    told, group, loaded = load_rank(parts, join.index, options, start, join.threads)
    channel.send(told)
    (go, *early) = channel.receive(wait=True)
    assert isinstance(go, Go)
    group.join(Path(go.store), resolve_device(options.device))
    engine = agreed(loaded, go).engine(start, Engine)
    _obey(engine, early)
    while True:
        _obey(engine, channel.receive(wait=True))


def _obey(engine: Engine, messages: list[ToRank]) -> None:
    for message in messages:
        assert isinstance(message, Step)
        for event in message.events:
            engine.cancel(event) if isinstance(event, str) else engine.add(event)
        engine.step()


def main() -> int:
    """Run the process. The first rank learns of a failure from the Failed message."""
    channel: Channel[ToRank] = Channel(parent_socket(), to_rank_decoder)
    try:
        follow(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        failed = Failed.of(error)
        channel.send(failed)
        return failed.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
